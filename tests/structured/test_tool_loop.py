"""The loop of asking, calling and telling, over answers that are written down here."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from llama_crab import Llama, SamplerChain
from llama_crab.chat import ChatCompletion
from llama_crab.params import ParameterError
from llama_crab.tool_loop import arun_tool_loop, run_tool_loop
from llama_crab.tools import Tool, normalize_tools


@dataclass
class Call:
    id: str
    name: str
    arguments: str


@dataclass
class Message:
    content: str | None
    tool_calls: tuple[Call, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": c.id,
                    "type": "function",
                    "function": {"name": c.name, "arguments": c.arguments},
                }
                for c in self.tool_calls
            ]
        return found


@dataclass
class Answer:
    message: Message
    finish_reason: str = "stop"

    @property
    def tool_calls(self) -> tuple[Call, ...]:
        return self.message.tool_calls


def calling(*calls: tuple[str, str], finish_reason: str = "tool_calls") -> Answer:
    made = tuple([Call(f"c{i}", name, text) for i, (name, text) in enumerate(calls)])
    return Answer(Message(None, made), finish_reason)


@dataclass
class Script:
    """Answers in turn, the last one for ever."""

    answers: list[Answer]
    seen: list[list[dict[str, Any]]] = field(default_factory=list)

    def __call__(self, messages: list[dict[str, Any]]) -> Any:
        self.seen.append(messages)
        return self.answers[min(len(self.seen), len(self.answers)) - 1]

    async def aask(self, messages: list[dict[str, Any]]) -> Any:
        await asyncio.sleep(0)
        return self(messages)


def add(a: int, b: int) -> dict[str, int]:
    return {"sum": a + b}


def fail(why: str) -> None:
    raise RuntimeError(why)


def shout(text: str) -> str:
    return text.upper()


TOOLS = normalize_tools([add, fail, shout])
QUESTION = [{"role": "user", "content": "Add."}]
DONE = Answer(Message("Done."))


def run(script: Script, is_async: bool, tools: Any = TOOLS, max_steps: int = 8) -> Any:
    if is_async:
        return asyncio.run(arun_tool_loop(script.aask, QUESTION, tools, max_steps))
    return run_tool_loop(script, QUESTION, tools, max_steps)


both = pytest.mark.parametrize("is_async", [False, True])


@both
def test_calls_are_answered_until_there_is_none(is_async: bool) -> None:
    first = calling(("add", '{"a": 1, "b": 2}'), ("shout", '{"text": "hé"}'))
    script = Script([first, calling(("add", '{"a": 3, "b": 4}')), DONE])
    found = run(script, is_async)
    assert found.completion is DONE
    assert found.n_steps == 3
    assert [message["role"] for message in found.messages] == [
        *("user", "assistant", "tool", "tool", "assistant", "tool", "assistant")
    ]
    assert found.messages[1] == first.message.to_dict()
    assert found.messages[2] == {
        "role": "tool",
        "tool_call_id": "c0",
        "name": "add",
        "content": '{"sum": 3}',
    }
    assert found.messages[3]["content"] == "HÉ"
    assert found.messages[5]["content"] == '{"sum": 7}'
    assert script.seen == [found.messages[:1], found.messages[:4], found.messages[:6]]
    assert QUESTION == [{"role": "user", "content": "Add."}]


@both
def test_errors_are_told_to_the_model(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(
        [
            calling(
                ("fail", '{"why": "no luck"}'),
                ("add", '{"a": "x"}'),
                ("add", "{"),
                ("other", "{}"),
                ("add", '{"a": 1, "b": 1}'),
                ("fail", json.dumps({"why": "y" * 9999})),
            ),
            DONE,
        ]
    )
    with caplog.at_level(logging.WARNING, "llama_crab.tools"):
        found = run(script, is_async)
    texts = [m["content"] for m in found.messages if m["role"] == "tool"]
    assert json.loads(texts[0]) == {"error": "RuntimeError: no luck"}
    assert json.loads(texts[1])["error"].startswith("tool 'add': a: Input should be a valid int")
    assert "b: missing" in texts[1]
    assert "not JSON" in texts[2]
    assert json.loads(texts[3]) == {
        "error": "tool 'other': there is no such tool, only: add, fail, shout"
    }
    assert texts[4] == '{"sum": 2}'
    assert len(texts[5]) < 2100
    assert len(caplog.records) == 5
    assert "no luck" in caplog.text


@both
def test_the_steps_are_limited(is_async: bool) -> None:
    found = run(Script([calling(("add", '{"a": 1, "b": 1}'))]), is_async, max_steps=3)
    assert found.n_steps == 3
    assert found.completion.finish_reason == "tool_calls"
    # The results are there: the conversation can go on.
    assert found.messages[-1]["content"] == '{"sum": 2}'
    assert len(found.messages) == 7


@both
def test_a_cut_answer_calls_nothing(is_async: bool) -> None:
    found = run(Script([calling(("add", '{"a": 1, "'), finish_reason="length")]), is_async)
    assert found.n_steps == 1
    assert found.messages[1] == {"role": "assistant", "content": ""}


@both
def test_what_cannot_work_is_refused_before_anything_is_asked(is_async: bool) -> None:
    script = Script([DONE])
    for steps in (0, -1, True, 1.5, None):
        with pytest.raises(ParameterError, match="max_steps"):
            run(script, is_async, max_steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=r"tools\[3\]: 'bare' has no function"):
        run(script, is_async, [*TOOLS, Tool("bare")])
    assert not script.seen


def test_asynchronous_calls_run_at_the_same_time() -> None:
    waiting = 0
    most = 0

    async def wait(n: int) -> int:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0.02 * n)
        waiting -= 1
        return n

    def block() -> str:
        time.sleep(0.05)
        return "slept"

    first = calling(("wait", '{"n": 2}'), ("block", "{}"), ("wait", '{"n": 1}'))
    found = run(Script([first, DONE]), True, normalize_tools([wait, block]))
    assert [m["content"] for m in found.messages[2:5]] == ["2", "slept", "1"]
    assert most == 2


def test_an_asynchronous_tool_in_a_synchronous_loop_is_refused() -> None:
    """No model can do anything about it."""

    async def later() -> str:
        """Answer later."""
        return "now"

    script = Script([calling(("later", "{}"))])
    with pytest.raises(ParameterError, match=r"tools\[0\]: 'later' is asynchronous"):
        run_tool_loop(script, [{"role": "user", "content": "?"}], normalize_tools([later]))
    assert not script.seen


def test_cancelling_ends_the_calls() -> None:
    ended = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def main() -> None:
        loop = arun_tool_loop(Script([calling(("wait", "{}"))]).aask, QUESTION, tools)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop, 0.05)

    tools = normalize_tools([wait])
    asyncio.run(main())
    assert ended == [True]


def test_an_interrupt_ends_the_loop() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    script = Script([calling(("stop", "{}")), DONE])
    with pytest.raises(KeyboardInterrupt):
        run(script, False, normalize_tools([stop]))


def weather(place: Annotated[str, Field(max_length=20)]) -> dict[str, Any]:
    """Tell the weather of a place."""
    return {"place": place, "sun": True}


def test_a_real_model_calls_and_answers(smol_llama: Llama) -> None:
    def ask(history: list[dict[str, Any]]) -> ChatCompletion:
        return smol_llama.create_chat_completion(
            history,
            48,
            tools=[weather],
            tool_choice="required" if history[-1]["role"] == "user" else "none",
            sampler=SamplerChain.benchmark(),
        )

    question = [{"role": "user", "content": "How is the weather in Oslo?"}]
    found = run_tool_loop(ask, question, normalize_tools([weather]), max_steps=3)
    assert [each["role"] for each in found.messages] == ["user", "assistant", "tool", "assistant"]
    (call,) = found.messages[1]["tool_calls"]
    place = json.loads(call["function"]["arguments"])["place"]
    assert json.loads(found.messages[2]["content"]) == {"place": place, "sun": True}
    assert found.n_steps == 2
    assert found.completion.message.content
    assert found.completion.usage.cached_tokens > 0


def test_the_examples_of_the_docs_run(smol_path: Path, run_page: Callable[..., list[str]]) -> None:
    lines = run_page("tools.md", 4, "Llama()", f"Llama({str(smol_path)!r}, n_ctx=1024)")
    assert lines == [
        "weather ['place'] 1",
        "tool_calls weather Oslo",
        "21",
        "lookup ['city']",
        "2 ['user', 'assistant', 'tool', 'assistant']",
        "<tool_call>",
        "weather False",
    ]
