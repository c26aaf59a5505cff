"""The command line: what to run, where output goes, and exit statuses."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrec_turbossd import __version__
from torchrec_turbossd.cli.options import PlanOptions, takes_options
from torchrec_turbossd.errors import BudgetError, ConfigError, TurboSSDError

if TYPE_CHECKING:
    from torchrec_turbossd.cli.plan import Planned
    from torchrec_turbossd.cli.spec import PlanSpec
    from torchrec_turbossd.planner import Machine

DOES_NOT_FIT, WRONG_INPUT = 1, 2
_MACHINE_FILE = Path("machine.json")
_PLAN_HELP = (
    "Say which tables go to SSD, what hit rates their caches reach and how long a step takes, before anything is "
    "built.\n\nFILE names tables, machines and how training runs; docs/formats/plan.md has every key. The exit status "
    "is 1 where tables do not fit, and 2 where something in FILE or the options is wrong."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchrec_turbossd {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    """Embedding tables larger than memory, for PyTorch and TorchRec."""


@app.command("plan", help=_PLAN_HELP)
@takes_options
def plan(options: PlanOptions) -> None:
    """Plan, print, write."""
    with _plain_errors(), _quiet_torchrec():
        _run(options)


def _run(options: PlanOptions) -> None:
    from torchrec_turbossd.cli.overrides import with_options
    from torchrec_turbossd.cli.spec import PlanSpec, read_spec

    has_tables = options.file is not None or options.model is not None
    if not has_tables and not options.measure:
        raise ConfigError("nothing to plan: name a FILE, or a --model, or --measure this host")
    of_model = options.model is not None
    spec = read_spec(options.file, of_model=of_model) if options.file is not None else PlanSpec()
    spec = with_options(spec, options)
    machine = _machine(options, spec, keep=not has_tables)
    if has_tables:
        _plan(options, spec, machine)


def _plan(options: PlanOptions, spec: PlanSpec, machine: Machine | None) -> None:
    from torchrec_turbossd.cli.model import load_model
    from torchrec_turbossd.cli.plan import make_plan

    model = load_model(options.model) if options.model is not None else None
    planned = make_plan(spec, model, machine=machine, where=str(options.file or "--model"))
    written = _write(options, planned)
    if options.json == "-":
        return
    from torchrec_turbossd.cli.tables import print_plan

    print_plan(planned.report, top=None if options.all else options.top)
    for what in written:
        typer.echo(what)


def _write(options: PlanOptions, planned: Planned) -> list[str]:
    """Write what is wanted besides text, and say what was written."""
    written = []
    if options.json == "-":
        typer.echo(planned.report.to_json(), nl=False)
    elif options.json is not None:
        _write_text(Path(options.json), planned.report.to_json())
        written.append(f"Wrote {options.json}.")
    if options.plot is not None:
        from torchrec_turbossd.cli.plot import draw_plan

        drawn = draw_plan(planned, options.plot)
        written.append(f"Drew {len(drawn)} hit-rate curves in {options.plot}.")
    return written


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _machine(options: PlanOptions, spec: PlanSpec, *, keep: bool) -> Machine | None:
    """This host as measured, or what a file says of another; None where only `spec` speaks of machines."""
    from torchrec_turbossd.planner import Machine

    if not options.measure:
        return Machine.load(spec.machine) if spec.machine is not None else None
    if keep and (options.json or options.plot):
        raise ConfigError("--json and --plot are about a plan: name a FILE or a --model too")
    machine = _measured(options, spec)
    path = options.machine or (_MACHINE_FILE if keep else None)
    if path is not None:
        machine.save(path)
        typer.echo(f"Wrote {path}.", err=True)
    return machine


def _measured(options: PlanOptions, spec: PlanSpec) -> Machine:
    from torchrec_turbossd.cli.tables import print_measured
    from torchrec_turbossd.planner import measure_machine

    hardware = spec.hardware
    ranks = hardware.ranks_per_host or hardware.ranks or 1
    typer.echo(f"Measuring this host for {ranks} of its ranks, with {options.ssd_directory} as SSD ...", err=True)
    machine = measure_machine(options.ssd_directory, compute_device=hardware.device, local_world_size=ranks)
    if options.json != "-":
        print_measured(machine)
    return machine


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """One line on standard error, and an exit status, for everything that the user can mend."""
    try:
        yield
    except BudgetError as error:
        _leave(error, DOES_NOT_FIT)
    except TurboSSDError as error:
        _leave(error, WRONG_INPUT)
    except OSError as error:
        _leave(error if error.filename is None else f"{error.filename}: {error.strerror}", WRONG_INPUT)


def _leave(error: object, status: int) -> None:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(status)


@contextlib.contextmanager
def _quiet_torchrec() -> Iterator[None]:
    """TorchRec's log and warnings are about the making of plans, which is this command's business."""
    before = logging.root.manager.disable
    # Some of it goes through the root logger.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


__all__ = ["DOES_NOT_FIT", "WRONG_INPUT", "app"]
