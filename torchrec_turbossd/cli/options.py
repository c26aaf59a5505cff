"""The options of `torchrec-turbossd plan`, and what they change of a file."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_MACHINES, _OUTPUT, _MEASURING = "The machines", "Output", "Measuring"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Arguments and options, as the command's help explains them."""

    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="YAML or JSON file that says what is to be planned.")
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function without arguments that returns the model, which may be on the meta device. FILE may then "
            "say what is asked for in its tables, and what machines there are.",
        ),
    ] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples of one rank in a step.")] = None
    profile: Annotated[
        list[str] | None,
        typer.Option(metavar="TABLE=PATH", help="Access profile of a table, a JSON file. May be repeated."),
    ] = None
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="What trains.", rich_help_panel=_MACHINES)] = (
        None
    )
    ranks: Annotated[int | None, typer.Option(min=1, help="All of them.", rich_help_panel=_MACHINES)] = None
    ranks_per_host: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="As many as there are, unless given; with --machine, as many as were measured.",
            rich_help_panel=_MACHINES,
        ),
    ] = None
    hbm: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help='Of one rank: "80 GB", "64 GiB", or GiB.', rich_help_panel=_MACHINES),
    ] = None
    dram: Annotated[str | None, typer.Option(metavar="SIZE", help="Of one rank.", rich_help_panel=_MACHINES)] = None
    ssd: Annotated[str | None, typer.Option(metavar="SIZE", help="Of one rank.", rich_help_panel=_MACHINES)] = None
    ssd_reads_per_second: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="Random reads of 4 KiB of one rank.", rich_help_panel=_MACHINES),
    ] = None
    ssd_bandwidth: Annotated[
        str | None,
        typer.Option(metavar="SPEED", help='Of one rank: "6 GB/s", or GB/s.', rich_help_panel=_MACHINES),
    ] = None
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="What --measure wrote on a host like those that will train; with --measure, where to write it. "
            "Sizes and speeds in FILE and in options go before it.",
            rich_help_panel=_MACHINES,
        ),
    ] = None
    json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write everything as JSON; - is standard output.", rich_help_panel=_OUTPUT),
    ] = None
    plot: Annotated[
        str | None,
        typer.Option(metavar="PNG", help="Draw hit rates of the tables on SSD.", rich_help_panel=_OUTPUT),
    ] = None
    top: Annotated[int, typer.Option(min=1, help="Tables and ranks to show.", rich_help_panel=_OUTPUT)] = 20
    all: Annotated[bool, typer.Option("--all", help="Show all of them.", rich_help_panel=_OUTPUT)] = False
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure this host: about ten seconds. It has as many ranks as GPUs, or those given. Alone it writes "
            "--machine (machine.json unless given); with tables they are planned for it.",
            rich_help_panel=_MEASURING,
        ),
    ] = False
    ssd_directory: Annotated[
        Path, typer.Option(metavar="DIR", help="Where tables will be.", rich_help_panel=_MEASURING)
    ] = Path(".")


def takes_options(function: Callable[[PlanOptions], None]) -> Callable[..., None]:
    """A command with an option for each field, which it gets as one value."""
    hints = get_type_hints(PlanOptions, include_extras=True)
    fields = dataclasses.fields(PlanOptions)

    def command(**given: Any) -> None:
        function(PlanOptions(**given))

    command.__doc__ = function.__doc__
    command.__annotations__ = {**hints, "return": None}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in fields
        ]
    )
    return command


__all__ = ["PlanOptions", "takes_options"]
