"""Access profiles of the tables of a plan, from wherever they are: an exponent, a profile, counts, or a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_turbossd.cli.spec import AccessSpec
from torchrec_turbossd.errors import ConfigError, TurboSSDError
from torchrec_turbossd.sizing import DEFAULT_ZIPF_ALPHA, AccessProfile

DEFAULT_SOURCE = f"default: Zipf {DEFAULT_ZIPF_ALPHA:g}"
"""What stands for the access of a table of which nothing is said."""


def load_profiles(access: Mapping[str, AccessSpec], rows: Mapping[str, int]) -> dict[str, AccessProfile]:
    """Profiles by table.

    Args:
        access: of tables of which something is said.
        rows: of every table.

    Raises:
        ConfigError: a file that cannot be used, or is about a table of another size; names the place.
    """
    return {table: _load(spec, rows[table]) for table, spec in access.items()}


def source_of(spec: AccessSpec | None) -> str:
    """A few words that say where a profile came from."""
    if spec is None:
        return DEFAULT_SOURCE
    return f"Zipf {spec.alpha:g}" if spec.kind == "zipf" else f"{spec.kind} {spec.path}"


def _load(spec: AccessSpec, rows: int) -> AccessProfile:
    if spec.kind == "zipf":
        return AccessProfile.zipf(rows, spec.alpha)
    try:
        profile = _read(spec, rows)
    except (TurboSSDError, ValueError) as error:
        raise ConfigError(f"{spec.where}: {spec.path} is of no use: {error}") from error
    except OSError as error:
        raise ConfigError(f"{spec.where}: {spec.path} cannot be read: {error.strerror or error}") from error
    if profile.rows != rows:
        raise ConfigError(f"{spec.where}: {spec.path} is about {profile.rows:,} rows, the table has {rows:,}")
    return profile


def _read(spec: AccessSpec, rows: int) -> AccessProfile:
    if spec.kind == "profile":
        return AccessProfile.load(spec.path)
    numbers = _numbers(spec)
    if spec.kind == "counts":
        return AccessProfile.from_counts(numbers)
    return AccessProfile.from_trace(numbers, rows)


def _numbers(spec: AccessSpec) -> npt.NDArray[Any]:
    """The array of a file, which is not read before it is used."""
    kinds, wanted = ("iuf", "real numbers") if spec.kind == "counts" else ("iu", "integers")
    try:
        numbers = np.load(spec.path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:
        # NumPy raises what its parsers raise.
        raise ConfigError(f"it is no .npy file of {wanted}: {error}") from error
    if not isinstance(numbers, np.ndarray):
        numbers.close()
        raise ConfigError(f"it has several arrays, wanted one of {wanted}, as numpy.save writes it")
    if numbers.dtype.kind not in kinds:
        raise ConfigError(f"got an array of {numbers.dtype}, wanted {wanted}")
    return numbers


__all__ = ["DEFAULT_SOURCE", "load_profiles", "source_of"]
