"""What a user does at the keyboard: messages over one or several lines, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Any

_PROMPT, _MORE = "> ", "... "
_QUOTES = '"""'
_HISTORY_LINES = 1000
# Seconds: soon, and still there when the machine was busy.
_ROUSING_DELAYS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class MessageReader:
    r"""Reads messages from stdin, with line editing and a history where stdin is a terminal.

    A message is a line. One that ends with a backslash goes on in the next line, and between
    ``\"\"\"`` there may be any lines; the end of the input ends any of them.

    At a terminal, Ctrl-C raises KeyboardInterrupt. Thread-safety: none.
    """

    def __init__(self, history: Path | None = None) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._history = history
        self._has_begun = False
        self._readline: Any = None
        if self.is_terminal and sys.stdout.isatty():
            self._readline = _start_readline(history)
        self._rouser = Rouser() if self.is_terminal else None

    def close(self) -> None:
        """Give the signals back. Idempotent."""
        if self._rouser is not None:
            self._rouser.close()

    def read(self) -> tuple[str, bool]:
        """Return the next message, and whether it is a command. Raises EOFError at the end."""
        self._has_begun = False
        line = self._line(_PROMPT)
        if line.startswith(_QUOTES):
            return self._block(line.removeprefix(_QUOTES)), False
        parts = []
        while line.endswith("\\"):
            parts.append(line.removesuffix("\\"))
            line = self._line_or_end(_MORE) or ""
        text = "\n".join([*parts, line])
        return text.strip(), text.startswith("/")

    def was_empty(self) -> bool:
        """Return whether nothing had been typed when Ctrl-C ended `read`."""
        typed = self._readline is not None and self._readline.get_line_buffer()
        return not (typed or self._has_begun)

    def _block(self, line: str | None) -> str:
        lines = []
        while line is not None:
            if line.rstrip().endswith(_QUOTES):
                lines.append(line.rstrip().removesuffix(_QUOTES))
                break
            lines.append(line)
            line = self._line_or_end(_MORE)
        return "\n".join(lines).strip("\n")

    def _line_or_end(self, prompt: str) -> str | None:
        self._has_begun = True
        try:
            return self._line(prompt)
        except EOFError:
            return None

    def _line(self, prompt: str) -> str:
        if self._readline is not None:
            line = input(prompt)
            # At once: a window that is closed gives no other occasion.
            _save_history(self._readline, self._history)
            return line
        if self.is_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


def _start_readline(history: Path | None) -> Any:
    try:
        import readline
    except ImportError:  # Windows has none; its console edits lines itself
        return None
    readline.set_history_length(_HISTORY_LINES)
    if history is not None:
        with contextlib.suppress(OSError):
            readline.read_history_file(history)
    return readline


def _save_history(readline: Any, path: Path | None) -> None:
    """Put a history file in place that nobody else can read. A chat goes on without."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # readline writes with the mode of the process: only inside a private folder.
        folder = tempfile.mkdtemp(prefix=".history-", dir=path.parent)
        try:
            copy = os.path.join(folder, "history")
            readline.write_history_file(copy)
            os.chmod(copy, 0o600)
            os.replace(copy, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Rouser:
    """Sees to it that Ctrl-C ends the wait for a key, also when it comes just before it.

    Python keeps a signal until the wait returns, and only a signal during the wait ends it. So
    another one, which does nothing else, follows several times. Thread-safety: none.
    """

    def __init__(self) -> None:
        self._writer = -1
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or not hasattr(signal, "pthread_kill"):  # Windows
            return
        # The one signal that is ignored where nobody handles it, so that a late one does no harm.
        self._before: Any = signal.signal(signal.SIGURG, _do_nothing)
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=_rouse, args=(reader,), daemon=True).start()

    def close(self) -> None:
        """Give the signals back. Idempotent."""
        if self._writer >= 0:
            signal.set_wakeup_fd(-1)
            os.close(self._writer)  # which ends the thread
            self._writer = -1
            signal.signal(signal.SIGURG, self._before)


def _rouse(reader: int) -> None:
    sleeper = threading.main_thread().ident
    assert sleeper is not None
    delays: list[float] = []
    while True:
        ready, _, _ = select.select([reader], [], [], delays[0] if delays else None)
        if not ready:
            del delays[0]
            signal.pthread_kill(sleeper, signal.SIGURG)
            continue
        numbers = os.read(reader, 512)
        if not numbers:
            break
        if signal.SIGINT in numbers:
            delays = [*_ROUSING_DELAYS]
    os.close(reader)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass


class Interrupts:
    """Ctrl-C while an answer comes, raised as KeyboardInterrupt only where `allowed` is entered.

    Elsewhere it is kept until then, so that it does not break off what draws on the screen. Keys
    pressed meanwhile are not shown. Thread-safety: none.
    """

    def __init__(self) -> None:
        self._kept = False
        self._allowed = False
        self._before: Any = None
        self._terminal: Any = None

    def __enter__(self) -> Interrupts:
        is_main = threading.current_thread() is threading.main_thread()
        # A program started with SIGINT ignored, as by nohup, is to be left alone.
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        self._terminal = _hide_keys()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _show_keys(self._terminal)
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let Ctrl-C end what is done here, once."""
        self._allowed = True
        try:
            if self._kept:
                self._kept = False
                raise KeyboardInterrupt
            yield
        finally:
            self._allowed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._allowed:
            self._allowed = False
            raise KeyboardInterrupt
        self._kept = True


def _hide_keys() -> Any:
    """Turn the echo of the terminal off; return what `_show_keys` needs."""
    try:
        import termios
    except ImportError:  # Windows
        return None
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        quiet = [*before]
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    except (OSError, ValueError, termios.error):
        return None
    return descriptor, before


def _show_keys(hidden: Any) -> None:
    if hidden is not None:
        import termios

        with contextlib.suppress(termios.error):
            termios.tcsetattr(hidden[0], termios.TCSANOW, hidden[1])
