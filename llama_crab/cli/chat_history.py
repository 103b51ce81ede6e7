"""A conversation in the terminal: its exchanges, which of them are sent, and its file."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# How a file says what it is, so that no other one is read or overwritten.
_OBJECT = "llama_crab.chat"
_ENDS = ("stop", "length", "cancelled")
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Exchange:
    """A message of the user with its answer. One that was stopped has "cancelled" as its reason."""

    user: str
    answer: str
    reasoning: str | None = None
    finish_reason: str = "stop"

    def messages(self) -> list[dict[str, Any]]:
        """Return both in OpenAI's form."""
        answer: dict[str, Any] = {"role": "assistant", "content": self.answer}
        if self.reasoning:
            answer["reasoning_content"] = self.reasoning
        return [{"role": "user", "content": self.user}, answer]


class Conversation:
    """Whole exchanges below a system text, of which the first `n_left_out` are not sent.

    Thread-safety: none.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.exchanges: list[Exchange] = []
        self.n_left_out = 0

    def messages(self, user: str) -> list[dict[str, Any]]:
        """Return what is sent to ask `user`."""
        sent = self._system_message()
        for exchange in self.exchanges[self.n_left_out :]:
            sent += exchange.messages()
        return [*sent, {"role": "user", "content": user}]

    def leave_out_oldest(self) -> bool:
        """Send one exchange less from now on; return False where none is left."""
        if self.n_left_out == len(self.exchanges):
            return False
        self.n_left_out += 1
        return True

    def pop(self) -> Exchange | None:
        """Take back the last exchange."""
        if not self.exchanges:
            return None
        last = self.exchanges.pop()
        self.n_left_out = min(self.n_left_out, len(self.exchanges))
        return last

    def clear(self) -> None:
        """Forget the exchanges; the system text stays."""
        self.exchanges.clear()
        self.n_left_out = 0

    def save(self, path: Path, model: str) -> None:
        """Write all to a file that others cannot read; it is there whole or not at all.

        Raises OSError, also for a file that is there and is no saved chat.
        """
        target = Path(os.path.realpath(path))
        mode = 0o600
        if target.exists():
            if not _is_ours(target):
                raise FileExistsError(f"{path} is no saved chat: it is not overwritten")
            mode = target.stat().st_mode & 0o777
        messages = self._system_message()
        for exchange in self.exchanges:
            user, answer = exchange.messages()
            messages += [user, {**answer, "finish_reason": exchange.finish_reason}]
        document = {"object": _OBJECT, "model": model, "messages": messages}
        data = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
        try:
            _write_whole(target, data.encode("utf-8", "replace"), mode)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read a saved chat. Raises OSError and, for anything else, ValueError."""
        document = _document(path)
        messages = document["messages"]
        system = None
        for index, message in enumerate(messages):
            _check_message(path, index, message)
        if messages and messages[0]["role"] == "system":
            system = messages[0]["content"]
            messages = messages[1:]
        loaded = cls(system)
        users, answers = messages[::2], messages[1::2]
        if (
            len(users) != len(answers)
            or any(message["role"] != "user" for message in users)
            or any(message["role"] != "assistant" for message in answers)
        ):
            raise ValueError(f"{path}: its messages are no exchanges of a user with an assistant")
        for user, answer in zip(users, answers, strict=True):
            reason = answer.get("finish_reason")
            loaded.exchanges.append(
                Exchange(
                    user["content"],
                    answer["content"],
                    answer.get("reasoning_content"),
                    reason if reason in _ENDS else "stop",
                )
            )
        return loaded

    def _system_message(self) -> list[dict[str, Any]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def _is_ours(path: Path) -> bool:
    try:
        _document(path)
    except (OSError, ValueError):
        return False
    return True


def _document(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():  # a device or a pipe might never end
        raise OSError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path} is no saved chat: larger than {_MAX_BYTES >> 20} MiB")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no saved chat: not JSON") from None
    if (
        not isinstance(document, dict)
        or document.get("object") != _OBJECT
        or not isinstance(document.get("messages"), list)
    ):
        raise ValueError(f"{path} is no saved chat: JSON of another kind")
    return document


def _check_message(path: Path, index: int, message: object) -> None:
    where = f"{path}, message {index + 1}"
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected an object")
    for name in ("role", "content", "reasoning_content"):
        value = message.get(name)
        if value is None and name == "reasoning_content":
            continue
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} is no text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: {name} is no Unicode text") from None


def _write_whole(target: Path, data: bytes, mode: int) -> None:
    # In the same folder, so that the last step is one atomic rename. Private from the beginning.
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:64]}-", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
