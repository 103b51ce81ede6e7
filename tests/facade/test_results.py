"""Result types: what they say, their OpenAI shape, and that they are values."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_crab.completion import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    Logprobs,
    TokenLogprob,
    Usage,
)
from llama_crab.timings import CompletionTimings

TIMINGS = CompletionTimings(
    prompt_n=12,
    prompt_sec=0.05,
    predicted_n=128,
    predicted_sec=1.6,
    total_sec=1.7,
    cached_n=4,
    first_token_sec=0.06,
    sample_sec=0.1,
    load_sec=0.4,
    draft_n=20,
    draft_accepted_n=15,
)
PARIS = TokenLogprob.from_piece(
    5,
    b" Paris",
    -0.25,
    [
        TokenLogprob.from_piece(5, b" Paris", -0.25),
        TokenLogprob.from_piece(9, b" Rome", -math.inf),
    ],
)
LOGPROBS = Logprobs.from_tokens([TokenLogprob.from_piece(1, b"is", None), PARIS], start=3)
CHOICE = CompletionChoice(0, " Paris.", "stop", "\n", (5, 6), LOGPROBS)
USAGE = Usage(prompt_tokens=12, completion_tokens=128, total_tokens=140, cached_tokens=4)
COMPLETION = Completion("cmpl-1", 1700000000, "m.gguf", (CHOICE,), USAGE, TIMINGS, 42)
CHUNK = CompletionChunk(
    " Paris", 0, (5,), "stop", None, LOGPROBS, USAGE, TIMINGS, "cmpl-1", 1700000000, "m.gguf"
)
VALUES = [TIMINGS, PARIS, LOGPROBS, CHOICE, USAGE, COMPLETION, CHUNK]
by_type = pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)


@by_type
def test_results_are_values(value: Any) -> None:
    for other in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert other == value
        assert hash(other) == hash(value)
    first = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, first, None)
    with pytest.raises((AttributeError, TypeError)):
        value.new_attribute = 1
    assert not hasattr(value, "__dict__")


@by_type
def test_shapes_are_strict_json(value: Any) -> None:
    if not isinstance(value, TokenLogprob):  # always part of a Logprobs
        shape = value.to_dict()
        assert json.loads(json.dumps(shape, allow_nan=False)) == shape


def test_timings_rates_count_only_work_done() -> None:
    assert TIMINGS.prompt_per_sec == pytest.approx(8 / 0.05)
    assert TIMINGS.predicted_per_sec == pytest.approx(TIMINGS.predicted_n / TIMINGS.predicted_sec)
    assert TIMINGS.to_dict() == {
        **dataclasses.asdict(TIMINGS),
        "prompt_per_sec": TIMINGS.prompt_per_sec,
        "predicted_per_sec": TIMINGS.predicted_per_sec,
    }


def test_timings_without_time_have_no_rate() -> None:
    empty = CompletionTimings()
    assert (empty.prompt_per_sec, empty.predicted_per_sec) == (0.0, 0.0)
    assert CompletionTimings(predicted_n=1, predicted_sec=0.0).predicted_per_sec == 0.0


def test_timings_print_as_two_lines() -> None:
    assert str(TIMINGS).splitlines() == [
        "prompt        12 tokens    0.050 s     160.0 tok/s, 4 cached",
        "generated    128 tokens    1.600 s      80.0 tok/s, first token 0.060 s, total 1.700 s,"
        " drafts 15/20 accepted",
    ]
    plain = str(CompletionTimings(prompt_n=1, predicted_n=1))
    assert len(plain.splitlines()) == 2
    assert "cached" not in plain
    assert "drafts" not in plain


def test_completion_has_the_openai_shape() -> None:
    assert COMPLETION.to_dict() == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1700000000,
        "model": "m.gguf",
        "choices": [
            {
                "index": 0,
                "text": " Paris.",
                "logprobs": {
                    "tokens": ["is", " Paris"],
                    "token_logprobs": [None, -0.25],
                    "top_logprobs": [None, {" Paris": -0.25, " Rome": -9999.0}],
                    "text_offset": [3, 5],
                },
                "finish_reason": "stop",
                "stop_reason": "\n",
            }
        ],
        "usage": {
            "prompt_tokens": 12,
            "completion_tokens": 128,
            "total_tokens": 140,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
        "timings": TIMINGS.to_dict(),
        "seed": 42,
    }


def test_completion_speaks_for_its_first_choice() -> None:
    second = CompletionChoice(1, " Rome.", "length")
    both = dataclasses.replace(COMPLETION, choices=(CHOICE, second))
    assert (both.text, both.finish_reason, both.stop_reason) == (" Paris.", "stop", "\n")
    assert both.tokens == (5, 6)
    assert both.logprobs is LOGPROBS
    assert second.to_dict()["logprobs"] is None


def test_a_chunk_carries_usage_and_timings_only_on_the_last() -> None:
    first = CompletionChunk(" Par", tokens=(4,), id="cmpl-1", created=7, model="m.gguf")
    assert first.to_dict() == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 7,
        "model": "m.gguf",
        "choices": [
            {
                "index": 0,
                "text": " Par",
                "logprobs": None,
                "finish_reason": None,
                "stop_reason": None,
            }
        ],
    }
    last = CHUNK.to_dict()
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["usage"] == USAGE.to_dict()
    assert last["timings"] == TIMINGS.to_dict()


def test_reprs_show_a_short_preview() -> None:
    assert repr(COMPLETION) == (
        "Completion(text=' Paris.', finish_reason='stop', 2 tokens, 80.0 tok/s, seed=42)"
    )
    assert repr(CHUNK) == "CompletionChunk(text=' Paris', index=0, finish_reason='stop')"
    assert repr(CompletionChunk("a")) == "CompletionChunk(text='a', index=0)"
    long = CompletionChoice(1, "x" * 5000, "length", tokens=(1,))
    assert "(5000 characters)" in repr(long)
    assert repr(long).endswith("finish_reason='length', stop_reason=None, 1 token)")
    assert len(repr(long)) < 200
    many = dataclasses.replace(COMPLETION, choices=(long, CHOICE, CHOICE))
    assert "choices=3" in repr(many)
    assert len(repr(many)) < 250


def test_bytes_that_are_no_text_are_spelled_out() -> None:
    half = TokenLogprob.from_piece(3, "é".encode()[:1], -1.0)
    assert half.token == "bytes:\\xc3"
    assert half.bytes == b"\xc3"


def test_of_tokens_with_the_same_text_the_best_is_kept() -> None:
    tops = [TokenLogprob.from_piece(i, b"a", -float(i)) for i in (1, 2)]
    shape = Logprobs.from_tokens([TokenLogprob.from_piece(1, b"a", -1.0, tops)]).to_dict()
    assert shape["top_logprobs"] == [{"a": -1.0}]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.data())
def test_offsets_point_at_the_character_a_token_begins_in(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=6)) | {0, len(raw)})
    pieces = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    logprobs = Logprobs.from_tokens(
        [TokenLogprob.from_piece(i, piece, 0.0) for i, piece in enumerate(pieces)], start=10
    )
    ends = [len(text[: i + 1].encode()) for i in range(len(text))]
    expected = [10 + sum(end <= cut for end in ends) for cut in cuts[:-1]]
    assert list(logprobs.text_offset) == expected
