"""Named chat formats: what they write, and where their answers end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llama_crab import Llama, ParameterError, chat_formats
from llama_crab.chat_formats import FORMATS, ChatFormat

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]
# As llama.cpp's llama_chat_apply_template writes them, without its BOS and with the model's EOS.
PROMPTS = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n"
    "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nU2<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral-v1": " [INST] S\n\nU1 [/INST] A1EOS [INST] U2 [/INST]",
    "mistral-v3": "[INST] S\n\nU1[/INST] A1EOS[INST] U2[/INST]",
    "mistral-v3-tekken": "[INST]S\n\nU1[/INST]A1EOS[INST]U2[/INST]",
    "mistral-v7": "[SYSTEM_PROMPT] S[/SYSTEM_PROMPT][INST] U1[/INST] A1EOS[INST] U2[/INST]",
    "mistral-v7-tekken": "[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]U1[/INST]A1EOS[INST]U2[/INST]",
    "gemma": "<start_of_turn>user\nS\n\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
    "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n"
    "<|user|>\nU2<|end|>\n<|assistant|>\n",
    "phi4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>U1<|im_end|>"
    "<|im_start|>assistant<|im_sep|>A1<|im_end|><|im_start|>user<|im_sep|>U2<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    "falcon3": "<|system|>\nS\n<|user|>\nU1\n<|assistant|>\nA1\n<|user|>\nU2\n<|assistant|>\n",
    "openchat": "S<|end_of_turn|>GPT4 Correct User: U1<|end_of_turn|>"
    "GPT4 Correct Assistant: A1<|end_of_turn|>GPT4 Correct User: U2<|end_of_turn|>"
    "GPT4 Correct Assistant:",
    "vicuna": "S USER: U1 ASSISTANT: A1EOSUSER: U2 ASSISTANT:",
    "vicuna-orca": "SYSTEM: S\nUSER: U1\nASSISTANT: A1EOS\nUSER: U2\nASSISTANT:",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_named_format_writes_its_prompt(smol_llama: Llama, name: str) -> None:
    vocab = smol_llama._vocab
    bos = ""
    if "bos_token" in FORMATS[name].template:
        bos = vocab.piece(vocab.bos, True).decode()
    eos = vocab.piece(vocab.eos, True).decode()
    text = smol_llama.format_chat(TALK, chat_template=name)
    assert text == bos + PROMPTS[name].replace("EOS", eos)


def test_every_format_takes_a_conversation(smol_llama: Llama) -> None:
    for name in FORMATS:
        text = smol_llama.format_chat(TALK, chat_template=name)
        places = [text.index(content) for content in ("S", "U1", "A1", "U2")]
        assert places == sorted(places), name
    with pytest.raises(ParameterError, match=r"none of chatml, .*llama3"):
        smol_llama.format_chat(TALK, chat_template="llama33")


def test_an_answer_ends_at_the_mark_of_its_format(
    smol_llama: Llama, forced: Callable[..., Any]
) -> None:
    """Here as text: the vocabulary does not know Gemma's mark."""
    for options in ({}, {"stop": ["xyz"]}):
        answer = smol_llama.create_chat_completion(
            TALK,
            20,
            chat_template="gemma",
            logits_processors=[forced(smol_llama, "Hi.<end_of_turn>\nMore")],
            **options,
        )
        assert (answer.text, answer.finish_reason) == ("Hi.", "stop")
        assert answer.choices[0].stop_reason is None
    own = smol_llama.create_chat_completion(
        TALK,
        20,
        chat_template="gemma",
        stop=["<end_of_turn>"],
        logits_processors=[forced(smol_llama, "Hi.<end_of_turn>\nMore")],
    )
    assert own.choices[0].stop_reason == "<end_of_turn>"


def test_an_answer_ends_at_the_mark_that_is_a_special_token(
    smol_llama: Llama, forced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is not shown, so no stop string finds it."""
    formats: dict[str, Any] = {"turns": ChatFormat(FORMATS["chatml"].template, ("<|im_start|>",))}
    monkeypatch.setattr(chat_formats, "FORMATS", formats)
    answer = smol_llama.create_chat_completion(
        TALK,
        20,
        chat_template="turns",
        logits_processors=[forced(smol_llama, "Hi.<|im_start|>user\nMore")],
    )
    assert (answer.text, answer.finish_reason) == ("Hi.", "stop")
    assert answer.choices[0].stop_reason is None
