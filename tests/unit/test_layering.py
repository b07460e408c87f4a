"""The rules between parts of the tree, proven by reading it."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_LINES = 400
GENERATED = {"sidp_runtime/_C.pyi"}
TEXT = {
    ".py", ".pyi", ".hpp", ".cpp", ".c", ".cu", ".cuh", ".h", ".md", ".toml", ".txt", ".yaml", ".yml", ".cmake",
    ".sh", ".in", ".cfg", ".json", ".jsonl", "",
}  # fmt: skip
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
STANDARD = re.compile(r"[a-z_]+")  # <vector>: no slash, no extension
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/|^torch$")


@pytest.fixture(scope="module")
def tree(repository: Path) -> dict[str, str]:
    """Text by path of everything that is, or would be, committed."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [path for path in listing.stdout.splitlines() if Path(path).suffix in TEXT]
    files = {path: (repository / path).read_text() for path in sorted(set(paths)) if (repository / path).is_file()}
    assert len(files) > 50
    return files


def under(tree: dict[str, str], *folders: str) -> Iterator[tuple[str, str]]:
    found = [(path, text) for path, text in tree.items() if path.startswith(folders)]
    assert found, f"nothing under {folders}: the rule would hold of nothing"
    return iter(found)


def cpp(tree: dict[str, str]) -> Iterator[tuple[str, str]]:
    return ((p, t) for p, t in under(tree, "csrc/", "include/") if not p.endswith((".md", ".cmake")))


def includes(text: str) -> list[tuple[str, str]]:
    return INCLUDE.findall(text)


def python(tree: dict[str, str]) -> Iterator[tuple[str, ast.Module]]:
    return ((p, ast.parse(t)) for p, t in under(tree, "sidp_runtime/", "bench/") if p.endswith(".py"))


def imported(module: ast.Module) -> set[str]:
    """Top-level names of every import, wherever it stands, but for type checking only."""
    names: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                names |= {alias.name.split(".")[0] for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom) and inner.level == 0 and inner.module:
                names.add(inner.module.split(".")[0])
    return names


def test_python_and_pybind11_only_in_bindings(tree: dict[str, str]) -> None:
    users = {p for p, t in cpp(tree) if any(i.startswith(("Python.h", "pybind11/")) for _, i in includes(t))}
    assert users
    assert all(path.startswith("csrc/bindings/") for path in users), users


def test_no_torch_header_anywhere(tree: dict[str, str]) -> None:
    assert {p: i for p, t in cpp(tree) for _, i in includes(t) if TORCH.search(i)} == {}


def test_nvshmem_only_in_its_backend(tree: dict[str, str]) -> None:
    """Nothing includes NVSHMEM's headers, its host functions are looked up; the table and the bindings include ours."""
    assert {p: i for p, t in cpp(tree) for kind, i in includes(t) if kind == "<" and "nvshmem" in i.lower()} == {}
    users = {p for p, t in cpp(tree) if any("nvshmem/" in i for _, i in includes(t))}
    assert users == {"csrc/backends/registry.cpp", "csrc/bindings/bind_graphs.cpp"}


def test_cuda_headers_only_in_cuda_and_nvshmem(tree: dict[str, str]) -> None:
    users = {p for p, t in cpp(tree) if any(re.match(r"cuda(\.h|_)|nvml", i) for _, i in includes(t))}
    assert all(path.startswith(("csrc/cuda/", "csrc/backends/nvshmem/")) for path in users), users


def test_public_headers_include_only_std_and_their_own(tree: dict[str, str]) -> None:
    for path, text in under(tree, "include/sidp/"):
        for kind, name in includes(text):
            own = kind == '"' and name.startswith("sidp/")
            assert own or (kind == "<" and STANDARD.fullmatch(name)), f"{path} includes {name}"


def test_core_knows_no_backend(tree: dict[str, str]) -> None:
    for path, text in under(tree, "csrc/core/"):
        for kind, name in includes(text):
            assert not name.startswith(("backends/", "bindings/", "cuda/", "../")), f"{path} includes {name}"
            if kind == '"':
                own = f"csrc/core/{name.removeprefix('core/')}" in tree
                assert name.startswith("sidp/") or own, f"{path} includes {name}"
            else:
                assert STANDARD.fullmatch(name), f"{path} includes <{name}>"


def test_bindings_are_one_file_a_component(tree: dict[str, str]) -> None:
    for path, text in under(tree, "csrc/bindings/"):
        if Path(path).name.startswith("bind_"):
            component = Path(path).stem
            assert re.findall(r"^void (bind_\w+)\(", text, re.M) == [component], path
            assert f"{component}(m);" in tree["csrc/bindings/module.cpp"]


def test_torch_is_imported_only_where_it_may_be(tree: dict[str, str]) -> None:
    users = {path for path, module in python(tree) if path.startswith("sidp_runtime/") and "torch" in imported(module)}
    own = {f"sidp_runtime/_torch{part}.py" for part in ("", "_gpu", "_calibration")}
    assert own <= users
    users -= own
    assert all(path.startswith("sidp_runtime/integrations/") for path in users), users


def test_the_environment_is_read_only_in_config(tree: dict[str, str]) -> None:
    words = re.compile(r"\bos\.(environ|getenv|putenv)\b|\bgetenv\(|from os import .*environ")
    users = {p for p, t in under(tree, "sidp_runtime/", "csrc/", "include/") if words.search(t)}
    assert users == {"sidp_runtime/config.py"}


def test_files_are_short(tree: dict[str, str]) -> None:
    long = {p: n for p, t in tree.items() if p not in GENERATED and (n := t.count("\n")) > MAX_LINES}
    assert {p: n for p, n in long.items() if Path(p).suffix in {".py", ".hpp", ".cpp", ".c", ".cu", ".h"}} == {}


def test_no_path_of_a_particular_machine(tree: dict[str, str]) -> None:
    words = re.compile(r"(?<![\w.])/(work|root)/\w|/tmp/" + r"exp\b|\bshared/" + r"(design|research|measured)")
    found = {p: m.group() for p, t in tree.items() if (m := words.search(t))}
    assert found == {}


def test_nothing_is_left_to_do(tree: dict[str, str]) -> None:
    words = re.compile(r"\b(" + "TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    assert {p: m.group() for p, t in tree.items() if (m := words.search(t))} == {}


def test_top_level_folders_are_the_agreed_ones(tree: dict[str, str]) -> None:
    folders = {path.split("/")[0] for path in tree if "/" in path and not path.startswith(".")}
    assert folders <= {"bench", "csrc", "docs", "include", "sidp_runtime", "tests"}
