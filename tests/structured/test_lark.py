"""Lark grammars, which llguidance runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_crab import Llama
from llama_crab.errors import GrammarError
from llama_crab.params import ParameterError

LIST = r"""
start: "[" item ("," item)* "]"
item: NUMBER | WORD
NUMBER: /[0-9]{1,3}/
WORD: /[a-zé]{1,6}/
"""
WHOLE = re.compile(r"\[([0-9]{1,3}|[a-zé]{1,6})(,([0-9]{1,3}|[a-zé]{1,6}))*\]")


def test_answers_are_of_the_grammar(tiny_path: Path) -> None:
    """Of several answers to a request at once, each; with one that shares its beginning."""
    n_whole = 0
    with Llama(tiny_path, n_ctx=2048, n_seq_max=4, n_threads=1) as llama:
        for seed in range(8):
            result = llama.create_completion("x", 60, lark=LIST, n=4, seed=seed)
            for choice in result.choices:
                assert choice.incomplete == (choice.finish_reason == "length")
                if not choice.incomplete:
                    assert WHOLE.fullmatch(choice.text)
                    assert choice.parsed == choice.text
                    n_whole += 1
        handles = [llama.submit("y", 30, lark='start: "yes" | "no"', seed=i) for i in range(6)]
        assert {handle.result().parsed for handle in handles} <= {"yes", "no"}
    assert n_whole >= 8


def test_smollm2_answers(smol_llama: Llama) -> None:
    asked = smol_llama.create_completion("Numbers: [1,2,", 40, lark=LIST, seed=1)
    again = smol_llama.create_completion("Numbers: [1,2,", 40, lark=LIST, seed=1)
    assert asked.text == again.text
    assert asked.incomplete or WHOLE.fullmatch(asked.text)


def test_what_is_no_grammar_is_refused(smol_llama: Llama) -> None:
    for wrong in ("start: missing", "nothing", "start: /(/"):
        with pytest.raises(GrammarError, match="lark"):
            smol_llama.create_completion("x", 2, lark=wrong)
    with pytest.raises(ParameterError, match="choices and lark"):
        smol_llama.create_completion("x", 2, lark=LIST, choices=["a"])
    with pytest.raises(ParameterError, match="ignore_eos"):
        smol_llama.create_completion("x", 2, lark=LIST, ignore_eos=True)


def test_the_extra_is_named(tmp_path: Path, tiny_path: Path) -> None:
    code = f"""
import sys
from llama_crab import Llama
sys.modules["llguidance"] = None
with Llama({str(tiny_path)!r}, n_ctx=64) as llama:
    try:
        llama.create_completion("x", 2, lark='start: "a"')
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert 'pip install "llama-crab[structured]"' in done.stdout
