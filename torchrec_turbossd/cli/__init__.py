"""The command `torchrec-turbossd`, which needs the libraries of the extra `cli`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_OF_THE_EXTRA = ("matplotlib", "rich", "typer", "yaml")
_OF_TORCHREC = ("torch", "fbgemm_gpu", "torchrec")


def main() -> None:
    """Run the command with the arguments of this process, and exit."""
    for names, cure in (
        (_OF_THE_EXTRA, 'pip install "torchrec_turbossd[cli]"'),
        (_OF_TORCHREC, 'pip install "torchrec_turbossd[cuda]", or as its README says for a machine without a GPU'),
    ):
        missing = [name for name in names if find_spec(name) is None]
        if missing:
            print(f"torchrec-turbossd needs {', '.join(missing)}: {cure}", file=sys.stderr)
            sys.exit(2)
    from torchrec_turbossd.cli.app import app

    app(prog_name="torchrec-turbossd")


__all__ = ["main"]
