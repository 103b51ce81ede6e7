"""What OpenAI's fields become, and what is refused, by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llama_crab import Completion, CompletionChoice, CompletionTimings, SamplerChain, Usage
from llama_crab.errors import (
    ContextLengthError,
    DecodeError,
    GrammarError,
    InvalidTokenError,
    RequestTimeoutError,
    SamplerError,
    TokenizeError,
)
from llama_crab.openai_fields import completion_body, completion_options, error_status
from llama_crab.params import ParameterError


def sampler(**fields: Any) -> SamplerChain | None:
    return completion_options({"prompt": "x", **fields})[2].get("sampler")


def test_a_prompt_alone_has_openais_defaults() -> None:
    assert completion_options({"prompt": "x"}) == (("x",), 16, {})


def test_null_counts_as_left_out() -> None:
    names = ("max_tokens", "temperature", "top_p", "n", "best_of", "stop", "seed", "logprobs")
    names += ("echo", "suffix", "logit_bias", "stream", "model", "user", "presence_penalty")
    assert completion_options({"prompt": "x", **dict.fromkeys(names)}) == (("x",), 16, {})


def test_fields_become_options() -> None:
    body = json.loads(
        '{"prompt": "x", "max_tokens": 0, "n": 2, "best_of": 3, "stop": "end", "seed": 7,'
        ' "logprobs": 0, "echo": true, "suffix": "y", "logit_bias": {"5": -100, "07": 1.5},'
        ' "model": "some", "user": "me", "stream": false, "stream_options": {}}'
    )
    prompts, max_tokens, options = completion_options(body)
    assert (prompts, max_tokens) == (("x",), 0)
    assert options == {
        "n": 2,
        "best_of": 3,
        "stop": ("end",),
        "seed": 7,
        "logprobs": 0,
        "echo": True,
        "suffix": "y",
        "logit_bias": {5: -100.0, 7: 1.5},
    }


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("", ("",)),
        ([1, 2], ([1, 2],)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ([1], [2, 3])),
        (["a", [2, 3]], ("a", [2, 3])),
    ],
)
def test_every_form_of_prompt(given: Any, prompts: tuple[Any, ...]) -> None:
    assert completion_options({"prompt": given})[0] == prompts


def test_stop_may_be_a_list() -> None:
    assert completion_options({"prompt": "x", "stop": ["a", "b"]})[2]["stop"] == ("a", "b")
    assert completion_options({"prompt": "x", "stop": []})[2]["stop"] == ()


@pytest.mark.parametrize(
    ("fields", "chain"),
    [
        ({"temperature": 0}, SamplerChain().temp(0)),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 3}, SamplerChain().temp(0)),
        (
            {"temperature": 0, "frequency_penalty": 1},
            SamplerChain().penalties(64, 1.0, 1.0, 0.0).temp(0),
        ),
        ({"temperature": 0.7}, SamplerChain().top_k(40).top_p(0.95).min_p(0.05).temp(0.7)),
        ({"top_p": 0.5}, SamplerChain().top_k(40).top_p(0.5).min_p(0.05).temp(0.8)),
        ({"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0}, SamplerChain()),
        (
            {"repeat_penalty": 1.1, "presence_penalty": 0.25, "frequency_penalty": -2},
            SamplerChain()
            .penalties(64, 1.1, -2.0, 0.25)
            .top_k(40)
            .top_p(0.95)
            .min_p(0.05)
            .temp(0.8),
        ),
        ({"presence_penalty": 0}, SamplerChain.default()),
    ],
)
def test_sampler_fields_make_a_chain_in_llama_cpps_order(
    fields: dict[str, Any], chain: SamplerChain
) -> None:
    assert sampler(**fields) == chain


def test_temperature_zero_is_greedy() -> None:
    chain = sampler(temperature=0, presence_penalty=1)
    assert chain is not None
    assert chain.selector.name == "greedy"


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ParameterError, match=r"^messages: not supported"):
        completion_options({"prompt": "x", "messages": []})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("prompt", value) for value in (5, [], [True], [["a"]], [[]], {"a": 1}, [1, "a"])),
        *(("max_tokens", value) for value in (-1, 1.5, "5", True, 2**40)),
        *(("n", value) for value in (0, 129, True)),
        *(("best_of", value) for value in (0, 10**9)),
        *(("stop", value) for value in (5, "", ["a", ""], [5], {"a": 1})),
        *(("seed", value) for value in (-1, 2**32 - 1, 1.0)),
        *(("logprobs", value) for value in (-1, True, "5")),
        *(("echo", value) for value in (1, "true")),
        *(("suffix", value) for value in (5, ["a"])),
        *(("logit_bias", value) for value in ([], {"a": 1}, {"-1": 1}, {" 1": 1}, {"²": 1})),
        *(("logit_bias", value) for value in ({"1": "x"}, {"1": True}, {"1": float("nan")})),
        *(("logit_bias", value) for value in ({"1": float("-inf")}, {"9" * 20: 1})),
        *(("temperature", value) for value in (-1, "hot", True, float("nan"), [1], 10**400)),
        *(("top_p", value) for value in (-0.1, 1.1)),
        *(("top_k", value) for value in (-1, 1.5)),
        *(("min_p", value) for value in (2, "x")),
        *(("presence_penalty", value) for value in ("x", float("inf"))),
        *(("frequency_penalty", value) for value in ([], {})),
        *(("repeat_penalty", value) for value in (0, -1)),
        *(("model", value) for value in (5, ["a"])),
        *(("user", value) for value in (5,)),
        *(("stream", value) for value in (1, "no")),
        *(("stream_options", value) for value in (True, [])),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"^{name}\b") as caught:
        completion_options({"prompt": "x", name: value})
    assert len(str(caught.value)) < 250


def test_best_of_below_n_is_named() -> None:
    with pytest.raises(ParameterError, match=r"^best_of: 2 is less than n 3"):
        completion_options({"prompt": "x", "n": 3, "best_of": 2})


@pytest.mark.parametrize(("body", "name"), [({}, "prompt"), ([], "body"), (None, "body")])
def test_a_body_without_a_prompt(body: Any, name: str) -> None:
    with pytest.raises(ParameterError, match=f"^{name}: "):
        completion_options(body)


def completion(id_: str, *texts: str) -> Completion:
    choices = tuple(CompletionChoice(i, text, "length") for i, text in enumerate(texts))
    return Completion(id_, 1, "file.gguf", choices, Usage(3, 4, 7, 2), CompletionTimings(), 5)


def test_the_body_of_one_prompt_is_the_completion() -> None:
    one = completion("a", "x", "y")
    assert completion_body([one]) == one.to_dict()
    assert completion_body([one], "asked-for") == {**one.to_dict(), "model": "asked-for"}


def test_the_body_of_several_prompts_counts_choices_and_tokens_through() -> None:
    body = completion_body([completion("a", "x", "y"), completion("b", "z", "w")])
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate("xyzw"))
    assert body["usage"] == Usage(6, 8, 14, 4).to_dict()
    assert body["id"] == "a"
    assert not {"timings", "seed"} & body.keys()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ContextLengthError("x"), (400, "context_length_exceeded")),
        (ParameterError("x"), (400, "invalid_request")),
        (InvalidTokenError("x"), (400, "invalid_request")),
        (SamplerError("x"), (400, "invalid_request")),
        (GrammarError("x"), (400, "invalid_request")),
        (TokenizeError("x"), (400, "invalid_request")),
        (DecodeError("x"), (500, "server_error")),
        (RequestTimeoutError("x"), (500, "server_error")),
        (ZeroDivisionError(), (500, "server_error")),
    ],
)
def test_statuses_of_errors(error: Exception, status: tuple[int, str]) -> None:
    assert error_status(error) == status
