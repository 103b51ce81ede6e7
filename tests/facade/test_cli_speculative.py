"""`--speculative` of the commands that load a model."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_crab import (
    CompletionTimings,
    DraftModelDecoding,
    LlamaParams,
    ParameterError,
    PromptLookupDecoding,
)
from llama_crab.cli import _parser, chat_stats, loading, main
from llama_crab.cli.chat_history import Conversation
from llama_crab.speculative import as_text, from_text

# What an answer has to copy.
CODE = """def area(shapes):
    total = 0
    for shape in shapes:
        if shape.kind == "circle":
            total += 3.14159 * shape.radius ** 2
        elif shape.kind == "square":
            total += shape.side ** 2
    return total
"""
COPY = f"{CODE}\n\nThe same with sum for total:\n\ndef area(shapes):\n    sum = 0\n"
COMMANDS = (["run", "hi"], ["chat"], ["batch", "in.jsonl", "out.jsonl"], ["doctor"], ["fit"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("auto", "auto"),
        ("none", None),
        ("lookup", PromptLookupDecoding()),
        ("lookup:3", PromptLookupDecoding(3)),
        ("lookup:3:16", PromptLookupDecoding(3, 16)),
    ],
)
def test_the_option_becomes_the_field(command: list[str], text: str, value: Any) -> None:
    args = _parser().parse_args([*command, "--speculative", text])
    args.verbose = False
    assert loading.params_of(args) == LlamaParams(args.model, speculative=value)


def test_a_gguf_is_a_draft_model(tiny_path: Path) -> None:
    args = _parser().parse_args(["run", "hi", "--speculative", str(tiny_path)])
    assert loading.params_of(args).speculative == DraftModelDecoding(model=str(tiny_path))


def test_without_it_nothing_is_drafted() -> None:
    assert loading.params_of(_parser().parse_args(["run", "hi"])).speculative is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("always", "'always' is not auto, none, lookup[:MAX_NGRAM[:N]] or FILE.gguf"),
        ("", "'' is not auto"),
        ("lookup:", "'lookup:' is not auto"),
        ("lookup:a", "'lookup:a' is not auto"),
        ("lookup:1:2:3", "'lookup:1:2:3' is not auto"),
        ("lookup:" + "9" * 5000, "is not auto"),
        ("lookup:17", "max_ngram: 17 is more than 16"),
        ("lookup:2:0", "num_pred_tokens: 0 is less than 1"),
        ("lookup:2:129", "num_pred_tokens: 129 is more than 128"),
        ("none.gguf", "there is no file none.gguf"),
    ],
)
def test_anything_else_is_wrong_usage(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--speculative", text, "hi"]) == 2
    error = capsys.readouterr().err
    assert "argument --speculative: " in error
    assert message in error
    with pytest.raises(ParameterError, match=r"^speculative"):
        from_text(text)


@pytest.mark.parametrize("text", ["auto", "none", "lookup:2:8", "lookup:16:128"])
def test_names_can_be_read_again(text: str) -> None:
    assert as_text(from_text(text)) == text


def test_names_say_what_is_not_the_default() -> None:
    fixed = PromptLookupDecoding(3, 4, min_ngram=2, adaptive=False)
    assert as_text(fixed) == "lookup:3:4 (min_ngram=2, adaptive=False)"
    assert as_text(DraftModelDecoding("folder/small.gguf")) == "small.gguf"
    assert as_text(DraftModelDecoding(kind="mtp")) == "heads (kind=mtp)"
    assert as_text(from_text) == "from_text"


def test_run_answers_the_same_and_tells_of_drafts(
    smol_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["run", "-m", str(smol_path), "-c", "512", "-t", "1", "-n", "60", "--temp", "0"]
    shown = []
    for more in ([], ["--speculative", "auto"]):
        assert main([*args, "-fa", "enabled", *more, COPY]) == 0
        shown.append(capsys.readouterr())
    plain, drafted = shown
    assert drafted.out == plain.out
    assert "drafts" not in plain.err
    found = re.search(r"total [\d.]+ s, drafts (\d+)/(\d+) accepted$", drafted.err.rstrip())
    assert found is not None
    assert 0 < int(found[1]) <= int(found[2])


def test_the_stats_of_a_chat_tell_of_drafts() -> None:
    def text(**counts: int) -> str:
        llama: Any = SimpleNamespace(
            n_ctx=512,
            model=SimpleNamespace(size=1),
            stats=lambda: {"ram_bytes": 0},
            perf=SimpleNamespace(speculative_gain=1.25),
        )
        usage = SimpleNamespace(cached_tokens=0, prompt_tokens=9)
        last: Any = SimpleNamespace(timings=CompletionTimings(**counts), usage=usage)
        return chat_stats.stats_text(llama, Conversation(None), 1, last)

    assert "drafts" not in text()
    expected = (
        "drafts    30 of 40 tokens accepted (75 %); all answers 1.25 times as fast as without"
    )
    assert expected in text(draft_n=40, draft_accepted_n=30).splitlines()
