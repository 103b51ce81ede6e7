"""The terminal chat's conversation, its file, and its commands, with a model that is made up."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_crab.cli.chat import Chat
from llama_crab.cli.chat_history import Conversation, Exchange
from llama_crab.cli.chat_input import Interrupts
from llama_crab.completion import Usage
from llama_crab.errors import ContextLengthError, DecodeError
from llama_crab.timings import CompletionTimings


class Stream:
    """An answer that is known."""

    def __init__(self, deltas: list[Any], n_prompt: int) -> None:
        self._deltas = deltas
        self._n_prompt = n_prompt
        self._taken: list[Any] = []
        self._reason = "stop"

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._deltas:
            raise StopIteration
        delta = self._deltas.pop(0)
        if isinstance(delta, BaseException):
            raise delta
        self._taken.append(delta)
        return SimpleNamespace(delta=delta)

    def close(self) -> None:
        if self._deltas:
            self._reason = "cancelled"
        self._deltas.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def result(self) -> Any:
        content = "".join(delta.content or "" for delta in self._taken)
        reasoning = "".join(delta.reasoning_content or "" for delta in self._taken)
        n = len(self._taken)
        return SimpleNamespace(
            message=SimpleNamespace(content=content, reasoning_content=reasoning or None),
            finish_reason=self._reason,
            usage=Usage(self._n_prompt, n, self._n_prompt + n),
            timings=CompletionTimings(predicted_n=n),
        )


class MadeUpLlama:
    """A model whose tokens are words; `answers` are what it will say."""

    n_ctx = 64
    model = SimpleNamespace(desc="made up")

    def __init__(self) -> None:
        self.answers: list[list[Any]] = []
        self.asked: list[list[dict[str, Any]]] = []
        self.options: list[dict[str, Any]] = []

    def format_chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return " ".join(f"{message['role']} {message['content']}" for message in messages)

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        return [0] * len(text.split())

    def create_chat_completion(
        self, messages: list[dict[str, Any]], max_tokens: int | None, **options: Any
    ) -> Stream:
        self.asked.append(messages)
        self.options.append(options)
        answer = self.answers.pop(0) if self.answers else [content("fine")]
        return Stream(answer, len(self.tokenize(self.format_chat(messages), add_special=False)))


class Notes:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.shown: list[tuple[str, str]] = []
        self.n_open = 0

    def begin(self) -> None:
        self.n_open += 1

    def content(self, text: str) -> None:
        self.shown.append(("content", text))

    def reasoning(self, text: str) -> None:
        self.shown.append(("reasoning", text))

    def end(self) -> None:
        self.n_open -= 1

    def note(self, text: str) -> None:
        self.notes.append(text)


class Desk:
    """A chat with all that belongs to it."""

    def __init__(self, **options: Any) -> None:
        self.llama, self.screen = MadeUpLlama(), Notes()
        llama: Any = self.llama
        self.chat = Chat(llama, Conversation(), self.screen, **options)

    def type(self, *lines: str) -> None:
        for line in lines:
            with Interrupts() as interrupts:
                assert self.chat.take(line, line.startswith("/"), interrupts)

    @property
    def exchanges(self) -> list[Exchange]:
        return self.chat.conversation.exchanges


def content(text: str) -> Any:
    return SimpleNamespace(content=text, reasoning_content=None)


def reasoning(text: str) -> Any:
    return SimpleNamespace(content=None, reasoning_content=text)


@pytest.fixture
def desk() -> Desk:
    return Desk()


# Answers


def test_reasoning_is_shown_apart_and_sent_again(desk: Desk) -> None:
    desk.llama.answers = [[reasoning("hm"), content("a "), content("b")]]
    desk.type("one", "two")
    assert desk.screen.shown[:3] == [("reasoning", "hm"), ("content", "a "), ("content", "b")]
    assert desk.llama.asked[1] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "a b", "reasoning_content": "hm"},
        {"role": "user", "content": "two"},
    ]


def test_a_stopped_answer_stays_and_is_marked(desk: Desk) -> None:
    desk.llama.answers = [[content("half"), KeyboardInterrupt(), content("never")]]
    desk.type("one")
    assert desk.exchanges == [Exchange("one", "half", None, "cancelled")]
    assert desk.screen.notes[0].startswith("stopped, 1 tokens")
    assert desk.screen.n_open == 0


def test_stopped_before_it_began_nothing_is_kept(desk: Desk) -> None:
    desk.llama.answers = [[KeyboardInterrupt(), content("never")]]
    desk.type("one")
    assert desk.exchanges == []
    assert "not kept" in desk.screen.notes[0]


def test_an_error_leaves_the_conversation_as_it_was(desk: Desk) -> None:
    desk.type("one")
    desk.llama.answers = [[content("half"), DecodeError("broken")]]
    with pytest.raises(DecodeError):
        desk.type("two")
    assert [exchange.user for exchange in desk.exchanges] == ["one"]
    assert desk.screen.n_open == 0


def test_the_oldest_are_left_out_but_not_forgotten(desk: Desk) -> None:
    for i in range(12):
        desk.type(f"message {i} of five words")
    assert len(desk.exchanges) == 12
    sent = [
        [m["content"] for m in messages if m["role"] == "user"] for messages in desk.llama.asked
    ]
    assert sent[-1][-1] == "message 11 of five words"
    assert sent[-1][0] != "message 0 of five words"
    # Not with each message: the cached beginning of the prompt would be lost each time.
    begins = [users[0] for users in sent]
    assert len(set(begins)) <= 4
    assert sum("no longer sees" in note for note in desk.screen.notes) == len(set(begins)) - 1
    desk.type("/clear", "again")
    assert desk.chat.conversation.n_left_out == 0


def test_a_message_longer_than_the_context_is_refused(desk: Desk) -> None:
    with pytest.raises(ContextLengthError, match=r"needs 71 tokens .* has 64; shorten it"):
        desk.type("word " * 70)
    assert desk.llama.asked == []


# Commands


def test_retry_asks_again_with_another_seed() -> None:
    desk = Desk(seed=7)
    desk.llama.answers = [
        [content("one")],
        [content("two")],
        [KeyboardInterrupt(), 0],
        [content("3")],
    ]
    desk.type("hi", "/retry")
    assert [exchange.answer for exchange in desk.exchanges] == ["two"]
    desk.type("/retry")  # stopped before it began: the old answer is still there
    assert [exchange.answer for exchange in desk.exchanges] == ["two"]
    desk.type("/retry", "next")
    assert [options["seed"] for options in desk.llama.options] == [7, 8, 9, 10, 7]
    assert [len(messages) for messages in desk.llama.asked] == [1, 1, 1, 1, 3]


@pytest.mark.parametrize("line", ["/undo", "/retry", "/save", "/load ", "/", "/Help", "/foo bar"])
def test_what_cannot_be_done_is_told_and_not_sent(desk: Desk, line: str) -> None:
    with pytest.raises(ValueError, match=r"nothing|no message|needs the name|no command"):
        desk.type(line)
    assert desk.llama.asked == []


@pytest.mark.parametrize("command", ["/save", "/load"])
def test_the_folder_of_nobody_is_told(desk: Desk, command: str) -> None:
    with pytest.raises(ValueError, match=r"^~nosuchuser/x: "):
        desk.type(f"{command} ~nosuchuser/x")


def test_system_is_set_shown_and_removed(desk: Desk) -> None:
    desk.type("/system", "/system Be brief. ", "hi", "/system", "/system -", "ho")
    assert desk.llama.asked[0][0] == {"role": "system", "content": "Be brief."}
    assert desk.llama.asked[1][0]["role"] == "user"
    notes = [note for note in desk.screen.notes if "system" in note]
    assert notes == ["no system text", *["system text: Be brief."] * 2, "no system text"]


# Files


@pytest.fixture
def talk() -> Conversation:
    conversation = Conversation("Be\nbrief. ü")
    conversation.exchanges = [
        Exchange("a", "b", "because", "length"),
        Exchange("c\n", "", None, "cancelled"),
    ]
    return conversation


def test_a_saved_conversation_is_the_same_when_loaded(talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    talk.save(path, "model")
    loaded = Conversation.load(path)
    assert (loaded.system, loaded.exchanges) == (talk.system, talk.exchanges)
    loaded.pop()
    loaded.save(path, "model")
    assert len(Conversation.load(path).exchanges) == 1
    Conversation().save(path, "model")
    empty = Conversation.load(path)
    assert (empty.system, empty.exchanges) == (None, [])


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes and links")
def test_files_are_private_and_keep_mode_and_link(talk: Conversation, tmp_path: Path) -> None:
    path, link = tmp_path / "chat.json", tmp_path / "link"
    link.symlink_to(path)
    talk.save(link, "model")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    talk.save(link, "model")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert link.is_symlink()
    assert {item.name for item in tmp_path.iterdir()} == {"chat.json", "link"}


def test_a_write_that_fails_leaves_the_old_file(
    talk: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat.json"
    talk.save(path, "model")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*chat.json: No space left on device"):
        Conversation().save(path, "model")
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["chat.json"]


def ours(*messages: Any) -> str:
    return json.dumps({"object": "llama_crab.chat", "messages": messages})


USER = {"role": "user", "content": "a"}
FOREIGN = {
    "some text": "not JSON",
    "[" * 100_000: "not JSON",
    "[]": "JSON of another kind",
    '{"messages": []}': "JSON of another kind",
    '{"object": "llama_crab.chat", "messages": 5}': "JSON of another kind",
    "": "not JSON",
}


@pytest.mark.parametrize(("text", "reason"), FOREIGN.items(), ids=range(len(FOREIGN)))
def test_foreign_files_are_neither_read_nor_overwritten(
    talk: Conversation, tmp_path: Path, text: str, reason: str
) -> None:
    path = tmp_path / "foreign"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"foreign is no saved chat: {reason}"):
        Conversation.load(path)
    with pytest.raises(FileExistsError, match="not overwritten"):
        talk.save(path, "model")
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ours(5), "message 1: expected an object"),
        (ours(USER, {"role": "assistant", "content": None}), "message 2: content is no text"),
        (ours({"role": ["user"], "content": "a"}), "message 1: role is no text"),
        (ours({"role": "user", "content": "\ud800"}), "message 1: content is no Unicode text"),
        (ours(USER), "no exchanges"),
        (ours(USER, USER), "no exchanges"),
        (ours(USER, {"role": "tool", "content": "a"}), "no exchanges"),
    ],
)
def test_messages_that_are_none_are_told(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "chat.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        Conversation.load(path)


def test_a_file_that_is_not_there_or_none_is_told(talk: Conversation, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Conversation.load(tmp_path / "missing")
    with pytest.raises(OSError, match="is not a file"):
        Conversation.load(tmp_path)
    with pytest.raises(OSError, match=r"cannot write .*: No such file"):
        talk.save(tmp_path / "missing" / "chat.json", "model")
    with pytest.raises(FileExistsError):
        talk.save(tmp_path, "model")
