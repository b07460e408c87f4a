"""The ``sidp`` command. Commands import what they need, so that ``--help`` is quick."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from . import bench_cli
from .console import Debug, plain_errors
from .errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from .job import JobConfig

app = typer.Typer(
    name="sidp",
    help="One copy of the weights for a group of data-parallel LLM replicas.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench_cli.app, name="bench")


class ModeChoice(str, Enum):
    """How streamed layers are used."""

    auto = "auto"
    was = "was"
    cas = "cas"


class DtypeChoice(str, Enum):
    """Of weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    auto = "auto"


Backend = Annotated[str, typer.Option(help="Transport between replicas.")]
Prompts = Annotated[Path, typer.Option(help='JSON lines: {"id", "prompt" or "messages", "raw"}.')]
Out = Annotated[Path, typer.Option(help="Results, JSON lines. An unfinished job is taken up where it was.")]
Replicas = Annotated[int, typer.Option(min=1, help="Processes that share the weights.")]
UsedMode = Annotated[ModeChoice, typer.Option(help="was: stream layers. cas: send activations.")]
NewTokens = Annotated[int, typer.Option(min=1)]
Dtype = Annotated[DtypeChoice, typer.Option(help="auto: as stored, if bfloat16; else float32.")]
Threads = Annotated[int, typer.Option(min=1, help="Of the arithmetic. Another count, other bits.")]
Deadline = Annotated[
    Optional[int], typer.Option(min=10, help="Longest wait for a peer. Default: SIDP_DEADLINE_MS.")  # noqa: UP045
]
Silence = Annotated[int, typer.Option(min=100, help="A replica without progress for so long is taken for dead.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew.")]
Seed = Annotated[int, typer.Option(min=0, help="Of torch's generator; greedy decoding draws nothing.")]
Report = Annotated[Optional[Path], typer.Option(help="Write the figures as JSON.")]  # noqa: UP045
Show = Annotated[int, typer.Option(min=0, help="Print so many of the answers.")]


@app.command()
def generate(
    model: Annotated[Path, typer.Option(help="Model directory (safetensors) or .gguf file.")],
    prompts: Prompts,
    out: Out,
    replicas: Replicas,
    backend: Backend = "host",
    mode: UsedMode = ModeChoice.auto,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that go through the model together.")] = 4,
    max_new_tokens: NewTokens = 64,
    dtype: Dtype = DtypeChoice.auto,
    threads_per_replica: Threads = 1,
    deadline_ms: Deadline = None,
    silence_ms: Silence = 600_000,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    report: Report = None,
    show: Show = 0,
    debug: Debug = False,
) -> None:
    """Answer a file of prompts, greedily, with N replicas on one copy of the weights."""
    with plain_errors(debug):
        from .job import JobConfig

        _run_job(
            JobConfig(
                model=model,
                prompts=prompts,
                out=out,
                replicas=replicas,
                backend=backend,
                mode=mode.value,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                dtype=dtype.value,
                threads_per_replica=threads_per_replica,
                deadline_ms=deadline_ms,
                silence_ms=silence_ms,
                overwrite=overwrite,
                seed=seed,
                report=report,
            ),
            show,
        )


@app.command()
def vllm_generate(
    model: Annotated[Path, typer.Option(help="Model directory (safetensors).")],
    prompts: Prompts,
    out: Out,
    replicas: Replicas,
    backend: Backend = "host",
    mode: UsedMode = ModeChoice.auto,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that an engine runs together.")] = 256,
    max_new_tokens: NewTokens = 64,
    dtype: Dtype = DtypeChoice.auto,
    threads_per_replica: Threads = 1,
    engine_arguments: Annotated[str, typer.Option(help="More arguments of vllm.LLM, a JSON object.")] = "{}",
    deadline_ms: Deadline = None,
    silence_ms: Silence = 600_000,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    report: Report = None,
    show: Show = 0,
    debug: Debug = False,
) -> None:
    """The same with N independent vLLM engines (docs/vllm.md)."""
    with plain_errors(debug):
        from .job import JobConfig

        _run_job(
            JobConfig(
                model=model,
                prompts=prompts,
                out=out,
                replicas=replicas,
                backend=backend,
                mode=mode.value,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                dtype=dtype.value,
                threads_per_replica=threads_per_replica,
                deadline_ms=deadline_ms,
                silence_ms=silence_ms,
                overwrite=overwrite,
                seed=seed,
                report=report,
                engine="vllm",
                engine_arguments=_json_object("--engine-arguments", engine_arguments),
            ),
            show,
        )


def _json_object(option: str, text: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option} is a JSON {type(value).__name__}, not an object")
    return value


def _run_job(config: JobConfig, show: int) -> None:
    from rich.console import Console

    from .job import run
    from .job.display import Display

    console = Console()
    with Display(console) as display:
        result = run(config, display)
    result.render(console)
    _print_answers(Path(config.out), show, console)


def _print_answers(out: Path, count: int, console: Console) -> None:
    import json
    from itertools import islice

    if not count:
        return
    with out.open(encoding="utf-8") as lines:
        for line in islice(lines, count):
            answer = json.loads(line)
            console.print(f"[bold]{answer['id']}[/]:", highlight=False)
            console.print(answer["text"].strip(), markup=False, highlight=False)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    debug: Debug = False,
) -> None:
    """What this machine can do, and why not. Exit code 1 if no job can run here."""
    with plain_errors(debug):
        import json

        from . import doctor as module

        found = module.report()
        if as_json:
            print(json.dumps(found.as_dict(), indent=1))
        else:
            module.render(found)
        if found.exit_code:
            raise typer.Exit(found.exit_code)


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="Model directory, its config.json, or a bundled name (a wrong one lists them).")
    ],
    replicas: Annotated[int, typer.Option(help="GPUs, with a replica each.")],
    workload: Annotated[
        list[str],
        typer.Option(
            help="Tokens of a request, in=2048,out=512: an endless queue; in=2048,out=512,prompts=400: a job that "
            "ends. Several: a job of all."
        ),
    ],
    gpu: Annotated[str, typer.Option(help="H200, H100, H20, B200, or a JSON file with a profile.")] = "H200",
    dtype: Annotated[Optional[str], typer.Option(help="bfloat16 or float16. Default: the config's.")] = None,  # noqa: UP045
    utilization: Annotated[float, typer.Option(help="Share of the device's memory to use.")] = 0.90,
    workspace_gib: Annotated[float, typer.Option(help="Reserve for activations and library workspaces.")] = 1.75,
    ring_slots: Annotated[int, typer.Option(help="Layers that a ring holds.")] = 2,
    cas_rows: Annotated[int, typer.Option(help="Rows of the largest CaS step; 0: WaS only.")] = 512,
    step_tokens: Annotated[int, typer.Option(help="Most tokens of a step, prompts and answers together.")] = 8192,
    max_sequences: Annotated[
        Optional[int], typer.Option(help="Most sequences a replica runs together.")  # noqa: UP045
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Draw to this file (needs matplotlib).")] = None,  # noqa: UP045
    debug: Debug = False,
) -> None:
    """Memory, KV tokens, thresholds and predicted throughput of plain DP, TP and SiDP. Needs no GPU."""
    with plain_errors(debug):
        from .planner import command

        command.run(
            model=model,
            gpu=gpu,
            replicas=replicas,
            workloads=workload,
            dtype=dtype,
            utilization=utilization,
            workspace_gib=workspace_gib,
            ring_slots=ring_slots,
            cas_rows=cas_rows,
            step_tokens=step_tokens,
            max_sequences=max_sequences,
            as_json=as_json,
            plot=plot,
        )


@app.command()
def calibrate(
    backend: Backend = "host",
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Shapes, as for plan. Default: Qwen3-32B's on GPUs, small ones on the host."),
    ] = None,
    layers: Annotated[Optional[int], typer.Option(help="Layers to measure with. Default: 8.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Write the profile here too: plan --gpu takes it.")] = None,  # noqa: UP045
    check: Annotated[bool, typer.Option("--check", help="Steps in both modes, predicted and measured.")] = False,
    tokens: Annotated[str, typer.Option(help="Sizes of these steps.")] = "1,4,16,64,256,512,1024,2048,4096",
    profile: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Predict with this profile, and store nothing."),
    ] = None,
    json_path: Annotated[Optional[Path], typer.Option("--json", help="Write all figures here.")] = None,  # noqa: UP045
    debug: Debug = False,
) -> None:
    """Measure this machine with two ranks: links, memory, products, round trips. The mode policy uses the result."""
    with plain_errors(debug):
        from . import calibration

        calibration.run(
            backend=backend,
            model=model,
            num_layers=layers,
            out=out,
            check=check,
            tokens=tokens,
            profile=profile,
            json_path=json_path,
        )


@app.command()
def trace(
    model: Annotated[
        str,
        typer.Option(help="Model directory, .gguf file, or synthetic[:layers=8,hidden=512,inner=2048,dtype=float32]."),
    ],
    out: Annotated[Path, typer.Option(help="Where the trace goes, for ui.perfetto.dev.")],
    replicas: Annotated[int, typer.Option(min=1, help="Processes that share the weights.")] = 2,
    mode: Annotated[ModeChoice, typer.Option(help="was: stream layers. cas: send activations.")] = ModeChoice.auto,
    steps: Annotated[int, typer.Option(min=1, help="Traced steps, after one that warms up.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of a step, of each replica.")] = 16,
    backend: Backend = "host",
    num_events: Annotated[int, typer.Option(min=1, help="Room of each replica; what does not fit is counted.")] = 32768,
    nvtx: Annotated[bool, typer.Option("--nvtx", help="Also NVTX ranges, for nsys.")] = False,
    debug: Debug = False,
) -> None:
    """A timeline of lanes, waits, requests and compute of a few steps of all replicas."""
    with plain_errors(debug):
        from .tracing import command

        config = command.TraceConfig(model, out, replicas, mode.value, steps, tokens, backend, num_events, nvtx)
        print("\n".join(command.run(config).lines()))


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
