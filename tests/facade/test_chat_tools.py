"""Tools: with the template's own form and without one, an asked-for call is well-formed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_crab import Llama, ParameterError, SamplerChain, _core
from llama_crab.chat_reader import ChatPlan, ChatReader
from llama_crab.errors import ChatTemplateError

TEMPLATES = Path(__file__).resolve().parents[2] / "third_party/llama.cpp/models/templates"
GREEDY = SamplerChain().greedy()
HERMES = TEMPLATES / "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use.jinja"
QWEN3 = TEMPLATES / "Qwen-Qwen3-0.6B.jinja"
ASK = [{"role": "user", "content": "What is the weather in Bern?"}]


def get_weather(place: str) -> str:
    """Tell the weather of a place."""
    return f"sunny in {place}"


def now() -> str:
    """Tell the time."""
    return "noon"


TOOLS: Any = [get_weather, now]
NAMED = {"type": "function", "function": {"name": "now"}}


def ask(llama: Llama, messages: Any = ASK, max_tokens: int = 120, **options: Any) -> Any:
    return llama.create_chat_completion(
        messages, max_tokens, **{"sampler": GREEDY, "tools": TOOLS, **options}
    )


@pytest.mark.parametrize("template", [None, HERMES, QWEN3], ids=["fallback", "hermes", "qwen3"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_an_asked_for_call_is_made(smol_llama: Llama, template: Any, choice: Any) -> None:
    options = {"chat_template": template, "tool_choice": choice, "enable_thinking": False}
    answer = ask(smol_llama, **options)
    (call,) = answer.tool_calls
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    if choice == NAMED:
        assert (call.name, call.parsed_arguments) == ("now", {})
    else:
        assert call.name in ("get_weather", "now")
        assert isinstance(call.parsed_arguments, dict)
    assert call.id
    stream = ask(smol_llama, stream=True, **options)
    deltas = [delta for chunk in stream for delta in chunk.delta.tool_calls]
    assert [delta.name for delta in deltas] == [call.name] + [None] * (len(deltas) - 1)
    assert "".join([delta.arguments for delta in deltas]) == call.arguments
    assert [bool(delta.id) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert stream.result().tool_calls[0].id == deltas[0].id
    told = answer.to_dict()["choices"][0]["message"]["tool_calls"][0]
    assert told["function"] == {"name": call.name, "arguments": call.arguments}


@pytest.mark.parametrize("template", [None, HERMES], ids=["fallback", "hermes"])
def test_a_free_answer_is_text(smol_llama: Llama, template: Any) -> None:
    answer = ask(smol_llama, max_tokens=12, chat_template=template, tool_choice="none")
    assert answer.tool_calls == ()
    assert answer.text
    auto = ask(smol_llama, max_tokens=12, chat_template=template)
    assert auto.text or auto.tool_calls


def test_a_lazy_grammar_begins_with_the_call(smol_llama: Llama) -> None:
    """What the model says before is free; from the mark of a call on, it is held to the form."""
    mark = smol_llama.tokenize("<tool_call>\n", add_special=False, parse_special=False)
    text = smol_llama.tokenize("Well. ", add_special=False)
    forced = iter([*text, *mark])

    def force(tokens: Any, logits: Any) -> None:
        token = next(forced, None)
        if token is not None:
            logits[:] = float("-inf")
            logits[token] = 0.0

    answer = ask(smol_llama, chat_template=HERMES, logits_processors=[force])
    assert answer.text.strip() == "Well."
    (made,) = answer.tool_calls
    assert made.name in ("get_weather", "now")


def test_thinking_does_not_wake_a_lazy_grammar(smol_llama: Llama) -> None:
    """A mark inside of thinking is a thought; behind it, it is a call."""
    words = "I could <tool_call>\n but no"
    written = f"{words}</think><tool_call>\n"
    forced = iter(smol_llama.tokenize(written, add_special=False, parse_special=False))

    def force(tokens: Any, logits: Any) -> None:
        token = next(forced, None)
        if token is not None:
            logits[:] = float("-inf")
            logits[token] = 0.0

    answer = ask(
        smol_llama,
        chat_template=TEMPLATES / "Qwen-QwQ-32B.jinja",
        logits_processors=[force],
    )
    assert answer.message.reasoning_content.strip() == words
    (call,) = answer.tool_calls
    assert call.name in ("get_weather", "now")
    assert isinstance(call.parsed_arguments, dict)


def test_every_template_with_tools_takes_a_required_call(smol: _core.Model) -> None:
    """The grammar goes on from what the template wrote of the answer, for all templates."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    n_made = 0
    for path in sorted(TEMPLATES.glob("*.jinja")):
        templates = _core.ChatTemplates(smol, path.read_text(encoding="utf-8"))
        if not templates.capabilities()["supports_tools"]:
            continue
        prompt = templates.render(
            json.dumps(ASK), tools=json.dumps([tool]), tool_choice="required", now=1
        )
        stages = [("grammar", {"grammar_str": prompt.grammar, "grammar_root": "root"})]
        opening = (prompt.generation_prompt, prompt.thinking_start_tag, prompt.thinking_end_tags)
        sampler = _core.FusedSampler(smol, [*stages, ("greedy", {})], opening)
        sampler.reset()
        sampler.close()
        n_made += 1
    assert n_made > 50


def test_tools_and_a_form_exclude_each_other(smol_llama: Llama) -> None:
    with pytest.raises(ParameterError, match="response_format: an answer that may call"):
        ask(smol_llama, response_format={"type": "json_object"})
    plain = ask(smol_llama, choices=["yes", "no"], tool_choice="none")
    assert plain.parsed in ("yes", "no")
    with pytest.raises(ParameterError, match="tool_choice"):
        ask(smol_llama, tool_choice="other")
    with pytest.raises((ParameterError, ChatTemplateError), match="tools"):
        ask(smol_llama, tools=[{"type": "function"}])


def test_only_one_call_is_kept_unless_several_are_wanted() -> None:
    class Two:
        def push(self, data: str) -> list[dict[str, Any]]:
            return [{"index": i, "id": "", "name": f"f{i}", "arguments": "{}"} for i in range(2)]

        def finish(self) -> list[dict[str, Any]]:
            return []

    for parallel in (False, True):
        plan = ChatPlan(fallback=Two, parallel_tool_calls=parallel)
        reader = ChatReader(plan, "x")
        reader.push("both")
        calls = reader.message().tool_calls
        assert [call.name for call in calls] == ["f0", "f1"][: 1 + parallel]
        assert len({call.id for call in calls}) == len(calls)


def test_functions_are_called_until_the_model_is_done(smol_llama: Llama) -> None:
    run = smol_llama.run_tools(
        ASK, [now], tool_choice="required", max_steps=2, max_tokens=40, sampler=GREEDY
    )
    assert [message["role"] for message in run.messages[:3]] == ["user", "assistant", "tool"]
    assert run.messages[2]["content"] == "noon"
    assert run.messages[2]["tool_call_id"] == run.messages[1]["tool_calls"][0]["id"]
    assert run.n_steps == 2
