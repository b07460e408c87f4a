"""The report for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .gpus import GpuProbe
from .records import PACKAGES, DoctorReport


def bytes_text(num_bytes: int) -> str:
    """In GiB or MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def render(report: DoctorReport, console: Console | None = None) -> None:
    """Print the report for people; ``console`` defaults to standard output."""
    console = console or Console()
    facts = Table(title=f"sidp_runtime {report.version}", show_header=False, title_justify="left")
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(report):
        facts.add_row(name, Text(value))
    console.print(facts)
    if report.cuda.report and report.cuda.report["devices"]:
        console.print(_device_table(report.cuda.report["devices"], report.gpus))
    if report.gpus and report.gpus.copies:
        console.print(_copy_table(report.gpus))
        if not all(rate["direct"] for rate in report.gpus.copies):
            console.print("* not mapped: through host memory")
    backends = Table("backend", "usable", "why not", title="Backends", title_justify="left")
    for backend in report.backends:
        usable = Text("yes", style="green") if backend.available else Text("no", style="yellow")
        backends.add_row(backend.name, usable, Text(backend.reason))
    console.print(backends)
    for finding in report.findings:
        style = "red" if finding.level == "error" else "yellow"
        console.print(Text.assemble((f"{finding.level}: ", style), finding.what, "\n  do: ", finding.do))


def _facts(report: DoctorReport) -> list[tuple[str, str]]:
    machine, nvshmem, cuda = report.machine, report.nvshmem, report.cuda.report
    quota = "" if machine.cpu_quota is None else f", time of {machine.cpu_quota:g} by the container's limit"
    shm = "missing"
    if machine.shm_bytes is not None and machine.shm_free_bytes is not None:
        shm = f"{bytes_text(machine.shm_free_bytes)} free of {bytes_text(machine.shm_bytes)}"
    rows = [("Python", report.python)]
    rows += [(name, version or f"not installed ({PACKAGES[name]})") for name, version in report.packages.items()]
    rows += [
        ("extension", report.extension.file or f"does not import: {report.extension.error}"),
        ("system", machine.system),
        ("cores", f"{machine.cores}{quota}"),
        (
            "memory",
            f"{bytes_text(machine.memory_available_bytes)} available of {bytes_text(machine.memory_bytes)}",
        ),
        ("/dev/shm", shm),
        ("locked memory", "not needed"),
        ("memcpy, one thread", f"{machine.memcpy_gbps:.1f} GB/s"),
    ]
    if cuda is not None:
        part = f"built with CUDA {cuda['compiled_version']} headers" if cuda["compiled"] else "not built"
        driver = f"supports CUDA {cuda['driver']}" if cuda["driver"] else "not loaded"
        kernel = f" (kernel module {report.cuda.kernel_driver})" if report.cuda.kernel_driver else ""
        rows += [("CUDA part", part), ("NVIDIA driver", driver + kernel)]
        rows.append(("GPUs", cuda["reason"] or str(len(cuda["devices"]))))
    if report.gpus is not None:
        rows += [("NVLink lanes", why)] if (why := report.gpus.nvlinks_reason) else []
        rows += [("copies between GPUs", why)] if (why := report.gpus.copies_reason) else []
    version = f" ({nvshmem.library_version})" if nvshmem.library_version else ""
    rows.append(("NVSHMEM", f"{nvshmem.library}{version}" if nvshmem.library else "no library found"))
    rows.append(("nvshmem4py", nvshmem.nvshmem4py_version or "not installed"))
    rows.append(("NVSHMEM_DISABLE_NVLS", nvshmem.disable_nvls or "not set"))
    return rows


def _nvlink_text(gpus: GpuProbe | None, ordinal: int) -> str:
    lanes = [gpu for gpu in gpus.nvlinks if gpu["ordinal"] == ordinal] if gpus else []
    if not lanes:
        return "not known"
    count, gbps = lanes[0]["lanes"], lanes[0]["gbps"]
    if count == 0:
        return "none"
    return f"{count}, speed not known" if gbps is None else f"{count} of {gbps / count:.1f} GB/s each way"


def _device_table(devices: list[dict[str, Any]], gpus: GpuProbe | None) -> Table:
    table = Table(
        "GPU",
        "name",
        "memory",
        "sm",
        "SMs",
        "copy engines",
        "64-bit stream waits",
        "NVLink lanes",
        "maps",
        title="GPUs",
        title_justify="left",
    )
    for device in devices:
        major, minor = device["compute_capability"]
        peers = [str(i) for i, reach in enumerate(device["can_access_peer"]) if reach and i != device["ordinal"]]
        table.add_row(
            str(device["ordinal"]),
            Text(device["name"]),
            bytes_text(device["memory_bytes"]),
            f"{major}.{minor}",
            str(device["num_sms"]),
            str(device["num_async_engines"]),
            "yes" if device["stream_mem_ops_64bit"] else "no",
            _nvlink_text(gpus, device["ordinal"]),
            ", ".join(peers) or "no peer",
        )
    return table


def _copy_table(gpus: GpuProbe) -> Table:
    ordinals = sorted({rate["src"] for rate in gpus.copies})
    rates = {(rate["src"], rate["dst"]): rate for rate in gpus.copies}
    table = Table("from", *(f"into {dst}" for dst in ordinals), title="Copies, GB/s", title_justify="left")
    for src in ordinals:
        cells = [rates.get((src, dst)) for dst in ordinals]
        table.add_row(str(src), *(f"{c['gbps']:.0f}{'' if c['direct'] else ' *'}" if c else "" for c in cells))
    return table
