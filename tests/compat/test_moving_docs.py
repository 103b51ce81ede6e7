"""The page on moving: its examples run, and its table knows every argument."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

from llama_crab.compat.llama_cpp import Llama
from llama_crab.compat.llama_cpp.arguments import REMOVED
from llama_crab.compat.llama_cpp.llama_chat_format import FORMATS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "moving-from-llama-cpp-python.md"


def test_the_examples_run(smol_path: Path, run_page: Callable[..., list[str]]) -> None:
    printed = run_page(PAGE.name, 4, '"model.gguf"', repr(str(smol_path)), "-W", "error")
    lines = [line for line in printed if line.strip()]
    assert lines[0] == " Paris"
    assert lines[1].startswith(" Paris.")
    assert lines[-5] in ("yes", "no")
    assert re.fullmatch("assistant (stop|length)", lines[-4])
    assert lines[-3] == "show"
    assert re.fullmatch(r"(stop|length) \d", lines[-2])
    assert lines[-1] == "True"


def test_every_argument_and_format_is_told() -> None:
    page = PAGE.read_text(encoding="utf-8")
    told = set(re.findall(r"`([\w*.-]+)`", page))
    prefixes = tuple(name[:-1] for name in told if name.endswith("_*"))
    for name in (*inspect.signature(Llama.__init__).parameters, *REMOVED):
        if name not in ("self", "removed"):
            assert name in told or name.startswith(prefixes), name
    assert set(FORMATS) <= told
