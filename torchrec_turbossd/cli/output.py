"""Where output goes: tried before anything takes time, written whole or not at all, and never half in silence."""

from __future__ import annotations

import contextlib
import os
import sys
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console

from torchrec_turbossd.errors import ConfigError

_LONGEST_NAME = 255


class Output(Console):
    """Standard output, or another one, that says so when nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        """Rich would exit, with a status that means something else here."""
        raise BrokenPipeError


def check_file(option: str, given: str) -> None:
    """Try whether the file of an option can be written, without changing it.

    Raises:
        ConfigError: it cannot; names the option and the file.
    """
    if not given.strip():
        raise ConfigError(f"{option}: got {given!r}, wanted the name of a file")
    # Slow to import, as PyTorch is behind it.
    from torchrec_turbossd.sizing.json_file import is_special, part_beside

    path = Path(given)
    try:
        if path.is_dir() or not path.name:
            raise ConfigError(f"{option}: {given} is a folder, wanted the name of a file")
        if is_special(path):
            return
        if len(os.fsencode(path.name)) > _LONGEST_NAME:
            raise ValueError("the name is too long")
        part = part_beside(path)
        part.touch(exist_ok=False)
        part.unlink()
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise _unwritable(option, given, error) from error


def write_file(option: str, given: str, content: bytes) -> None:
    """Write the file of an option.

    Raises:
        ConfigError: it cannot be written; names the option and the file.
    """
    from torchrec_turbossd.sizing.json_file import write_whole

    try:
        write_whole(given, content)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(option, given, error) from error


def check_standard_output() -> None:
    """Raise `ConfigError` where standard output is closed."""
    if sys.stdout is None or sys.stdout.closed:
        raise ConfigError("standard output is closed, so that nobody would see the plan; name a file with --json")


def print_any_letter() -> None:
    """Let letters that standard output's encoding lacks be printed as their codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def forget_standard_output() -> None:
    """Let what could not be written go, so that Python does not try again when it exits."""
    # A test's or a notebook's standard output has no number.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _unwritable(option: str, given: str, error: Exception) -> ConfigError:
    return ConfigError(f"{option}: {given!r} cannot be written: {getattr(error, 'strerror', None) or error}")


__all__ = ["Output", "check_file", "check_standard_output", "forget_standard_output", "print_any_letter", "write_file"]
