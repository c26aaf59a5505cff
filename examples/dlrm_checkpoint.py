"""A checkpoint: a snapshot of the tables, and the dense part that goes with just that snapshot."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from dlrm_ranks import together
from dlrm_training import Trainer

from torchrec_turbossd.errors import ConfigError, SnapshotError
from torchrec_turbossd.sharding import load_snapshot, save_snapshot

_TABLES, _DENSE = "tables", "dense.pt"


def save_checkpoint(trainer: Trainer, directory: Path, samples: int) -> None:
    """Write all that training goes on from to `directory`, in place of what was there. Collective.

    Args:
        trainer: between steps, with tables on SSD.
        directory: on a file system that all ranks share.
        samples: how many have been learnt from.
    """
    new = directory.with_name(f".{directory.name}-new")
    together(lambda: shutil.rmtree(new, ignore_errors=True))
    manifest = save_snapshot(trainer.model, new / _TABLES, version=samples, extra={"samples": samples})
    dense = {
        "snapshot": manifest.id,
        "samples": samples,
        "run": _identity(trainer),
        "parameters": {name: weight.detach().cpu() for name, weight in trainer.dense.items()},
        "optimizer": trainer.optimizer.state_dict(),
    }
    together(lambda: _put(new, dense, directory))


def load_checkpoint(trainer: Trainer, directory: Path) -> int:
    """Go on from what `save_checkpoint` wrote; returns how many samples have been learnt from. Collective.

    Ranks, batch size, budget, and so the plan, may be others.

    Raises:
        ConfigError: it is of another model, or of other samples.
        SnapshotError: not a checkpoint, or the tables of one with the dense part of another.
        Others: see `load_snapshot`.
    """
    dense = together(lambda: _read(directory))
    ours = _identity(trainer)
    different = [what for what in ours if dense["run"].get(what) != ours[what]]
    if different:
        told = "; ".join(f"its {what}: {dense['run'].get(what)}, here: {ours[what]}" for what in different)
        raise ConfigError(f"{directory} is of another run: {told}; resume with the arguments that it had")
    manifest = load_snapshot(trainer.model, directory / _TABLES)
    if manifest.id != dense["snapshot"]:
        raise SnapshotError(
            f"{directory} has tables of snapshot {manifest.id}, and a dense part that goes with {dense['snapshot']}"
        )
    with torch.no_grad():
        for name, weight in trainer.dense.items():
            weight.copy_(dense["parameters"][name])
    trainer.optimizer.load_state_dict(dense["optimizer"])
    return int(dense["samples"])


def _identity(trainer: Trainer) -> dict[str, Any]:
    """What the runs before and after must have in common."""
    day, settings = trainer.day, trainer.settings
    return {"samples": day.name, "rows": list(day.rows), "dim": settings.dim, "seed": settings.seed}


def _put(new: Path, dense: dict[str, Any], directory: Path) -> None:
    torch.save(dense, new / _DENSE)
    old = directory.with_name(f".{directory.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _read(directory: Path) -> dict[str, Any]:
    try:
        dense: dict[str, Any] = torch.load(directory / _DENSE, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SnapshotError(f"{directory} is not a checkpoint of this program: {error}") from error
    return dense


__all__ = ["load_checkpoint", "save_checkpoint"]
