"""Snapshots: immutable, verified directories of rows, of one model at one moment."""

from __future__ import annotations

from torchrec_turbossd.snapshot.bulk import write_serving_snapshot
from torchrec_turbossd.snapshot.convert import check_data_types, convert_to_serving
from torchrec_turbossd.snapshot.manifest import MANIFEST_FILE, FileDigest, Manifest, OptimizerProgress, Part, ShardRange
from torchrec_turbossd.snapshot.verify import read_manifest, verify, verify_parts
from torchrec_turbossd.snapshot.write import (
    commit_snapshot,
    digest_part,
    new_staging,
    remove_staging,
    snapshot_part,
    staging_directory,
)

__all__ = [
    "MANIFEST_FILE",
    "FileDigest",
    "Manifest",
    "OptimizerProgress",
    "Part",
    "ShardRange",
    "check_data_types",
    "commit_snapshot",
    "convert_to_serving",
    "digest_part",
    "new_staging",
    "read_manifest",
    "remove_staging",
    "snapshot_part",
    "staging_directory",
    "verify",
    "verify_parts",
    "write_serving_snapshot",
]
