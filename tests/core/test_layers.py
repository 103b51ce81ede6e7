"""The house rules that a machine can check: directions of imports, callers of C, sizes of files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "llama_crab"
MAX_LINES = 450

# Lowest first. A module may import its own layer and the ones below.
LAYERS: dict[str, int] = {
    **dict.fromkeys(("errors", "_version"), 1),
    **dict.fromkeys(("_core",), 2),
    **dict.fromkeys(
        (
            *("sampling", "sampling_stages", "sampling_compile", "params", "timings"),
            *("perf", "param_rules", "speculative"),
            *("completion", "hub", "packaged", "logs", "engine", "stream", "handle", "session"),
            *("request_builder", "lora", "model_identity", "mapping", "openai_fields"),
            *("embedding", "infill", "rerank", "structured", "tools", "tool_loop"),
            *("chat", "chat_handle", "chat_reader", "chat_reasoning", "chat_request"),
            *("chat_formats", "chat_grammar", "chat_stream"),
        ),
        3,
    ),
    **dict.fromkeys(("llama", "async_llama", "chat_methods", "completion_methods"), 4),
    **dict.fromkeys(("draft_sources", "vector_methods", "tuning", "compat", "telemetry"), 4),
    **dict.fromkeys(("cli", "pytest_plugin"), 5),
}
# They gather and start; every layer is below them.
TOP = {"__init__", "__main__"}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield each Python module's first name below the package, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).with_suffix("").parts[0], path


def imported(path: Path) -> Iterator[str]:
    """Yield the first names below the package that a module imports, at any depth of code."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "llama_crab":
                    yield [*alias.name.split("."), "__init__"][1]
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level == 0:
                if parts[0] != "llama_crab":
                    continue
                parts = parts[1:]
            elif node.level - 1 < depth:
                parts = [*path.relative_to(PACKAGE).parts[: depth - node.level + 1], *parts]
            if parts:
                yield parts[0]
            else:
                for alias in node.names:
                    yield alias.name if alias.name in LAYERS else "__init__"


def test_every_module_has_a_layer() -> None:
    found = {name for name, _ in modules()}
    assert found - TOP == set(LAYERS) - {"_core"}


def test_imports_go_down_only() -> None:
    wrong = []
    n_checked = 0
    for name, path in modules():
        if name in TOP:
            continue
        for target in imported(path):
            n_checked += 1
            # The command line may use the public face; for all others it would be a way up.
            if target == "__init__":
                if LAYERS[name] < 5:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports the package itself")
            elif LAYERS[target] > LAYERS[name]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {target}")
    assert n_checked > 20
    assert not wrong


def test_only_the_core_calls_the_c_library() -> None:
    """`lib.` and `nat.` appear in _core.pyx, _core.pxd and handles/ alone."""
    allowed = {PACKAGE / "_core.pyx", PACKAGE / "_core.pxd"}
    callers = set()
    for path in PACKAGE.rglob("*"):
        if path.suffix not in (".pyx", ".pxd", ".pxi", ".py", ".pyi"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        if re.search(r"\b(lib|nat)\.\w+\(|cimport (lib|native)\b", code):
            callers.add(path)
    outside = {path for path in callers if path.parent.name != "handles"} - allowed
    assert {path.name for path in outside} == set()
    assert len(callers) > 10


def test_our_cpp_knows_no_python() -> None:
    sources = [path for path in (PACKAGE / "native").iterdir() if path.suffix in (".h", ".cpp")]
    assert len(sources) > 8
    for path in sources:
        assert "Python.h" not in path.read_text(encoding="utf-8"), path.name


def test_the_core_has_no_policy_logging_or_numpy() -> None:
    for path in (PACKAGE / "_core.pyx", *(PACKAGE / "handles").glob("*.pxi")):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"^\s*c?import (\w+)|^\s*from (\w+)", text, re.MULTILINE)
        names = {first or second for first, second in found}
        assert not names & {"numpy", "logging", "np"}, path.name


def test_importing_the_package_imports_no_numpy() -> None:
    code = (
        "import sys, llama_crab; "
        "print([name for name in ('numpy', 'huggingface_hub', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_small() -> None:
    long = {}
    for path in PACKAGE.rglob("*"):
        # The stub is one file by nature: it mirrors one extension.
        if path.suffix in (".py", ".pyx", ".pxd", ".pxi", ".h", ".cpp"):
            n = len(path.read_text(encoding="utf-8").splitlines())
            if n > MAX_LINES:
                long[str(path.relative_to(PACKAGE))] = n
    assert not long


def test_there_is_no_module_for_everything() -> None:
    names = {path.stem for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts}
    assert not names & {"utils", "util", "helpers", "common", "misc"}
