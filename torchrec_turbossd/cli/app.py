"""The command line: what to run, where output goes, and exit statuses."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from torchrec_turbossd import __version__
from torchrec_turbossd.cli.options import PlanOptions, takes_options
from torchrec_turbossd.cli.output import (
    check_file,
    check_standard_output,
    forget_standard_output,
    print_any_letter,
    write_file,
)
from torchrec_turbossd.errors import BudgetError, ConfigError, TurboSSDError

if TYPE_CHECKING:
    from torchrec_turbossd.cli.plan import Planned
    from torchrec_turbossd.cli.spec import Hardware, PlanSpec
    from torchrec_turbossd.planner import Machine

DOES_NOT_FIT, WRONG_INPUT = 1, 2
_INTERRUPTED, _NOBODY_READS = 130, 141
_MACHINE_FILE = "machine.json"
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
    print_any_letter()
    with _plain_errors(), _quiet_torchrec():
        _run(options)


def _run(options: PlanOptions) -> None:
    from torchrec_turbossd.cli.overrides import with_options
    from torchrec_turbossd.cli.spec import PlanSpec, read_spec

    has_tables = options.file is not None or options.model is not None
    _check_outputs(options, has_tables=has_tables)
    if not has_tables and not options.measure:
        raise ConfigError("nothing to plan: name a FILE, or a --model, or --measure this host")
    of_model = options.model is not None
    spec = read_spec(options.file, of_model=of_model) if options.file is not None else PlanSpec()
    spec = with_options(spec, options)
    machine = _machine(options, spec, keep=not has_tables)
    if has_tables:
        _plan(options, spec, machine)


def _check_outputs(options: PlanOptions, *, has_tables: bool) -> None:
    """Measuring and planning take long: what cannot be written is found out before."""
    if options.json in (None, "-"):
        check_standard_output()
    else:
        check_file("--json", options.json)
    if options.plot is not None:
        check_file("--plot", options.plot)
    if options.measure and (options.machine is not None or not has_tables):
        check_file("--machine", _MACHINE_FILE if options.machine is None else options.machine)
    if not options.machine and options.machine is not None:
        raise ConfigError("--machine: got '', wanted the name of a file")
    if options.json is not None and options.json == options.plot:
        raise ConfigError(f"--json and --plot are both {options.plot}; give each a file of its own")


def _plan(options: PlanOptions, spec: PlanSpec, machine: Machine | None) -> None:
    from torchrec_turbossd.cli.model import load_model
    from torchrec_turbossd.cli.plan import make_plan
    from torchrec_turbossd.cli.tables import print_plan

    model = load_model(options.model) if options.model is not None else None
    planned = make_plan(spec, model, machine=machine, where=str(options.file or "the options"))
    if options.json == "-":
        typer.echo(planned.report.to_json(), nl=False)
        for warning in planned.report.warnings:
            typer.echo(f"Warning: {warning}", err=True)
    else:
        print_plan(planned.report, top=None if options.all else options.top)
    _write(options, planned)


def _write(options: PlanOptions, planned: Planned) -> None:
    """Write what is wanted besides what was printed, and say so."""
    aloud = options.json != "-"
    if options.json is not None and aloud:
        write_file("--json", options.json, planned.report.to_json().encode())
        typer.echo(f"Wrote {options.json}.")
    if options.plot is None:
        return
    from torchrec_turbossd.cli.plot import draw_plan

    drawn, picture = draw_plan(planned)
    if not drawn:
        typer.echo(f"Warning: no table is on SSD, so that there is no curve to draw in {options.plot}.", err=True)
        return
    write_file("--plot", options.plot, picture)
    if aloud:
        typer.echo(f"Drew {len(drawn)} hit-rate curves in {options.plot}.")


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
    ranks = _ranks_here(hardware)
    among = "" if ranks is None else f" for {ranks} of its ranks"
    typer.echo(f"Measuring this host{among}, with {options.ssd_directory} as SSD ...", err=True)
    machine = measure_machine(options.ssd_directory, compute_device=hardware.device, local_world_size=ranks)
    if options.json != "-":
        print_measured(machine)
    return machine


def _ranks_here(hardware: Hardware) -> int | None:
    """Ranks of this host, where something is said of them: as many as there are in all, but at most one for each GPU;
    None: as `measure_machine` finds."""
    if hardware.ranks_per_host is not None or hardware.ranks is None:
        return hardware.ranks_per_host
    import torch

    gpus = torch.cuda.device_count() if hardware.device != "cpu" and torch.cuda.is_available() else hardware.ranks
    return min(hardware.ranks, gpus)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """One line on standard error, and an exit status, for everything that the user can mend."""
    try:
        yield
    except typer.Exit:
        raise
    except BudgetError as error:
        _leave(error, DOES_NOT_FIT)
    except BrokenPipeError as error:
        # As of a program that the system ends because nobody reads on.
        forget_standard_output()
        raise typer.Exit(_NOBODY_READS) from error
    except KeyboardInterrupt:
        _leave("interrupted", _INTERRUPTED)
    except TurboSSDError as error:
        _leave(error, WRONG_INPUT)
    except OSError as error:
        _leave(error if error.filename is None else f"{error.filename}: {error.strerror}", WRONG_INPUT)
    except Exception as error:
        # Python's own way would end with the status that means "does not fit".
        _leave(f"this was not foreseen: {type(error).__name__}: {error}", WRONG_INPUT)


def _leave(error: object, status: int) -> None:
    try:
        typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        forget_standard_output()
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
