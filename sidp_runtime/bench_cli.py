"""The ``sidp bench`` commands."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .console import Debug, plain_errors

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(help="Microbenchmarks, with every peer in the same run.", no_args_is_help=True)

Backend = Annotated[str, typer.Option(help="host or nvshmem.")]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer sizes and shorter samples.")]
Shape = Annotated[Optional[str], typer.Option(help="Layers' shape: qwen3-32b, llama-3.1-70b, medium or small.")]  # noqa: UP045
Limit = Annotated[float, typer.Option(min=1, help="Seconds for all cases together.")]
Json = Annotated[Optional[Path], typer.Option("--json", help="Write the figures here.")]  # noqa: UP045


def _bench(module: str) -> Any:
    """A module of the benchmarks: installed they are a subpackage, in a checkout the folder bench/ beside it."""
    package = f"{__package__}.bench" if find_spec(f"{__package__}.bench") else "bench"
    return import_module(f"{package}.{module}")


def _command() -> str:
    """As it was called, without where its results go."""
    words = sys.argv[1:]
    if "--json" in words:
        place = words.index("--json")
        words = words[:place] + words[place + 2 :]
    return " ".join(["sidp", *words])


@app.command("list")
def list_cases() -> None:
    """The cases: what they measure, on which backends, beside which peers, and what is compared first."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("case", "measures", "backends", "peers", "verified"):
        table.add_column(heading, overflow="fold")
    for case in _bench("cases").CASES:
        table.add_row(case.key, case.description, ", ".join(case.backends), ", ".join(case.peers), case.verification)
    Console().print(table)


@app.command()
def run(
    case: Annotated[Optional[list[str]], typer.Option(help="Pattern of case keys; may be given again.")] = None,  # noqa: UP045
    backend: Backend = "host",
    quick: Quick = False,
    shape: Shape = None,
    ranks: Annotated[Optional[int], typer.Option(min=2, help="Processes of each case.")] = None,  # noqa: UP045
    limit: Limit = 480,
    json_path: Json = None,
    debug: Debug = False,
) -> None:
    """Runs cases and prints a table each. Exit code 1 if a figure misses its bar, a case fails or data are wrong."""
    with plain_errors(debug):
        from rich.console import Console

        console = Console()
        report = _bench("runner").run(
            command=_command(),
            patterns=case or (),
            backend=backend,
            quick=quick,
            shape=shape,
            ranks=[ranks] if ranks else (),
            limit_s=limit,
            json_path=json_path,
            console=console,
        )
        _finish(report, console)


@app.command()
def scale(
    backend: Backend = "host",
    ranks: Annotated[Optional[int], typer.Option(min=2, help="Most processes. Default: one a GPU, or 8.")] = None,  # noqa: UP045
    quick: Quick = False,
    shape: Shape = None,
    limit: Limit = 520,
    json_path: Json = None,
    debug: Debug = False,
) -> None:
    """The scaling run: links, steps and start-up with 2, 4, 8 ... ranks, beside the simulator's prediction."""
    with plain_errors(debug):
        from rich.console import Console

        console = Console()
        report = _bench("scale").scale(
            command=_command(),
            backend=backend,
            ranks=ranks,
            num_gpus=_bench("environment").num_gpus(),
            quick=quick,
            shape=shape,
            limit_s=limit,
            json_path=json_path,
            console=console,
        )
        _finish(report, console)


def _finish(report: Any, console: Console) -> None:
    if report.failures:
        console.print(f"{len(report.failures)} of {len(report.figures)} figures failed or missed their bar")
        raise typer.Exit(1)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="Results of the earlier run.")],
    new: Annotated[Path, typer.Argument(help="Results of the later run.")],
    threshold: Annotated[float, typer.Option(min=0, help="Share by which a row may be worse.")] = 0.05,
    debug: Debug = False,
) -> None:
    """Exit code 1 if a row of OLD is worse in NEW by more than the threshold, or is missing there."""
    with plain_errors(debug):
        from rich.console import Console

        module, harness = _bench("compare"), _bench("harness")
        result = module.compare(harness.Report.read(old), harness.Report.read(new), threshold)
        result.render(Console())
        if not result.passed:
            raise typer.Exit(1)


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="A file of `sidp bench run --json`.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures (PNG).")],
    debug: Debug = False,
) -> None:
    """Bandwidth over size, step time over tokens or ranks, and when a WaS step waited and computed."""
    with plain_errors(debug):
        for path in _bench("plot").write(_bench("harness").Report.read(results), out):
            print(path)
