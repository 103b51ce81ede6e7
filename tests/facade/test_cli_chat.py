"""The command ``llama-crab chat``: as a process on SmolLM2, through pipes and a terminal."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_crab import Llama, SamplerChain
from llama_crab.cli import main

COMMAND = [sys.executable, "-m", "llama_crab", "chat"]
GREEDY = ("--temp", "0", "-t", "1")
# Greedily it is answered by hundreds of tokens, so that a signal finds it at work.
ENDLESS = "Write a long story about a dragon and a castle."
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals, pipes and terminals")


def command(model: Path, *options: str) -> list[str]:
    return [*COMMAND, str(model), *GREEDY, *options]


def chat(model: Path, stdin: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(model, *options),
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def answers(smol_path: Path) -> list[str]:
    """Return what the facade answers to two messages, one after the other."""
    found: list[str] = []
    messages = [{"role": "system", "content": "Be brief."}]
    with Llama(smol_path, n_threads=1) as llama:
        for text in ("What is the capital of France?", "And\nof Italy?"):
            messages.append({"role": "user", "content": text})
            done = llama.create_chat_completion(messages, 24, sampler=SamplerChain().temp(0))
            found.append(done.message.content or "")
            messages.append({"role": "assistant", "content": found[-1]})
    return found


# Through pipes


def test_each_line_is_answered_with_all_before_it(smol_path: Path, answers: list[str]) -> None:
    stdin = "What is the capital of France?\n\nAnd\\\nof Italy?\n"
    done = chat(smol_path, stdin, "-n", "24", "--system", "Be brief.")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize(
    "quoted", ['"""And\nof Italy?"""\n', '"""\nAnd\nof Italy?\n"""', '"""And\nof Italy?']
)
def test_quotes_hold_several_lines(smol_path: Path, answers: list[str], quoted: str) -> None:
    stdin = f"/system Be brief.\nWhat is the capital of France?\n{quoted}"
    done = chat(smol_path, stdin, "-n", "24")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    assert done.stderr == "system text: Be brief.\n"


def test_a_saved_chat_goes_on_where_it_ended(
    smol_path: Path, answers: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "my chat.json"
    first = chat(
        smol_path,
        f"What is the capital of France?\n/save {path}\n",
        *("-n", "24", "--system", "Be brief."),
    )
    assert first.returncode == 0, first.stderr
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][2]["content"] == answers[0]
    second = chat(smol_path, f"/load {path}\nAnd\\\nof Italy?\n/stats\n", "-n", "24")
    assert second.stdout == answers[1] + "\n"
    for label in ("exchanges 2", "prefill", "cached", "generated", "context", "memory"):
        assert f"\n{label}" in second.stderr


def test_undo_and_retry_ask_with_the_same_history(smol_path: Path, answers: list[str]) -> None:
    stdin = "What is the capital of France?\nWho are you?\n/undo\n/retry\nAnd\\\nof Italy?\n"
    done = chat(smol_path, stdin, "-n", "24", "--system", "Be brief.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{answers[0]}\n")
    assert done.stdout.endswith(f"{answers[0]}\n{answers[1]}\n")


def test_the_first_error_ends_it(smol_path: Path) -> None:
    done = chat(smol_path, "/nonsense\nHello\n", "-n", "4")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "llama-crab: there is no command /nonsense; /help lists them\n"


def test_exit_ends_it_and_help_is_no_answer(smol_path: Path) -> None:
    done = chat(smol_path, "/help\n/exit\nHello\n", "-n", "4")
    assert (done.returncode, done.stdout) == (0, "")
    assert "/retry" in done.stderr


def test_a_full_context_leaves_out_the_oldest(smol_path: Path) -> None:
    done = chat(smol_path, "Tell me a story.\n" * 6 + "/stats\n", "-n", "40", "-c", "256")
    assert done.returncode == 0, done.stderr
    assert "The context of 256 tokens is full: the model no longer sees the oldest" in done.stderr
    assert re.search(r"exchanges 6, the oldest \d left out", done.stderr)


def test_a_message_that_fits_no_context_is_one_line(smol_path: Path) -> None:
    done = chat(smol_path, "word " * 400, "-c", "256")
    assert done.returncode == 1
    assert re.fullmatch(r"llama-crab: the message needs \d+ tokens .* 256; .*\n", done.stderr)


# Wrong usage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-n", "0"), "--max-tokens: 0 is less than 1"),
        (("-n", "x"), "invalid int value: 'x'"),
        (("-m", "other.gguf"), "MODEL and --model exclude each other"),
        (("--enable-thinking", "--no-thinking"), "not allowed with argument"),
        (("--preset", "chat"), "--preset and --temp exclude each other"),
        (("--seed", "-1"), "seed"),
    ],
)
def test_wrong_usage_is_status_2(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "model.gguf", *GREEDY, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_template_is_told(
    tiny_embedder_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(tiny_embedder_path), *GREEDY]) == 1
    assert "has no chat template" in capsys.readouterr().err


def test_a_template_that_is_none_is_told_before_any_message(smol_path: Path) -> None:
    done = chat(smol_path, "", "--chat-template", "{% if")
    assert done.returncode == 1
    assert done.stderr.startswith("llama-crab: ")
    assert done.stderr.count("\n") == 1


# Signals and terminals


def start(model: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a process whose SIGINT is Python's, even below a shell that ignores it."""
    return subprocess.Popen(
        command(model, *options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@POSIX
@pytest.mark.parametrize("ending", ["reader leaves", "ctrl-c"])
def test_a_piped_chat_that_is_broken_off_ends_quietly(smol_path: Path, ending: str) -> None:
    with start(smol_path) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdin.write(ENDLESS.encode() + b"\n")
        running.stdin.flush()
        assert len(running.stdout.read(5)) == 5
        if ending == "ctrl-c":
            running.send_signal(signal.SIGINT)
        else:
            running.stdout.close()
        assert running.wait(timeout=60) == (130 if ending == "ctrl-c" else 141)
        assert running.stderr.read() == b""


class Terminal:
    """A program at a pseudo-terminal."""

    def __init__(self, command: list[str], cache: Path) -> None:
        import pty

        env = {**os.environ, "TERM": "xterm-256color", "LLAMA_CRAB_CACHE": str(cache)}
        env.pop("NO_COLOR", None)
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(sys.executable, command, env)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def wait_for(self, pattern: str, timeout: float = 60.0) -> str:
        """Return what comes until the pattern is shown, that included."""
        limit = time.monotonic() + timeout
        while (match := re.search(pattern, self.shown, re.DOTALL)) is None:
            ready, _, _ = select.select([self._descriptor], [], [], limit - time.monotonic())
            assert ready, f"{pattern} is not in {self.shown!r}"
            try:
                data = os.read(self._descriptor, 65536)
            except OSError:  # Linux: the other end is closed
                data = b""
            assert data, f"{pattern} is not in {self.shown!r}"
            self.shown += data.decode("utf-8", "replace")
        found, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return found

    def end(self) -> int:
        """Return the exit status."""
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self._descriptor], [], [], 0.02)[0]:
                try:
                    self.shown += os.read(self._descriptor, 65536).decode("utf-8", "replace")
                except OSError:
                    time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it did not end: {self.shown!r}")

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture(params=["markdown", "plain"])
def terminal(request: pytest.FixtureRequest, smol_path: Path, tmp_path: Path) -> Iterator[Terminal]:
    options = ["--no-markdown"] if request.param == "plain" else []
    opened = Terminal(command(smol_path, *options), tmp_path / "cache")
    yield opened
    opened.close()


@POSIX
def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("/help for help.*> $")
    terminal.type(f"{ENDLESS}\n")
    terminal.wait_for("[a-z]+ [a-z]+ [a-z]+ [a-z]+.*[a-z]+ [a-z]+ [a-z]+ [a-z]+")
    time.sleep(1)
    terminal.type("\x03")
    shown = terminal.wait_for(r"prompt tokens cached.*> $")
    assert "stopped, " in shown
    terminal.type(f"/save {tmp_path / 'chat.json'}\n")
    terminal.wait_for("saved 1 exchange.*> $")
    saved = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))["messages"][-1]
    assert saved["finish_reason"] == "cancelled"
    assert len(saved["content"]) > 5
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D or /exit ends the chat.*> $")
    terminal.type("/nonsense\n")
    terminal.wait_for("there is no command /nonsense.*> $")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.shown


@POSIX
def test_what_was_typed_is_there_again_and_private(smol_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    for keys, wanted in (("/system one\n", "one"), ("\x1b[A\n", "one")):
        terminal = Terminal(command(smol_path), tmp_path)
        terminal.wait_for("/help for help.*> $")
        terminal.type(keys)
        terminal.wait_for(f"system text: {wanted}.*> $")
        terminal.type("\x04")
        assert terminal.end() == 0
        terminal.close()
    history = tmp_path / "chat-history"
    assert "/system one" in history.read_text(encoding="utf-8")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["chat-history"]


# A signal that another thread takes is, to the wait for a key, one that came before it began.
EARLY = """
import signal, threading
from llama_crab.cli.chat_input import MessageReader

threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
reader = MessageReader()
for _ in range(3):
    try:
        print("typed", reader.read())
    except KeyboardInterrupt:
        print("interrupted")
reader.close()
print("SIGURG", signal.getsignal(signal.SIGURG) == signal.SIG_DFL)
"""


@POSIX
def test_ctrl_c_before_the_wait_for_a_key_ends_it(tmp_path: Path) -> None:
    terminal = Terminal([sys.executable, "-c", EARLY], tmp_path)
    for _ in range(2):
        terminal.wait_for("> $")
        terminal.type("\x03")
        terminal.wait_for("interrupted")
    terminal.wait_for("> $")
    terminal.type("word\n")
    terminal.wait_for("typed .'word', False.*SIGURG True")
    assert terminal.end() == 0
    terminal.close()


@POSIX
def test_ctrl_c_drops_a_line_that_is_being_typed(smol_path: Path, tmp_path: Path) -> None:
    terminal = Terminal(command(smol_path), tmp_path)
    terminal.wait_for("/help for help.*> $")
    terminal.type("/exit and more")
    terminal.wait_for("and more")
    terminal.type("\x03")
    assert "ends the chat" not in terminal.wait_for("> $")
    terminal.type('"""a\n')
    terminal.wait_for(r"\.\.\. $")
    terminal.type("\x03")
    assert "ends the chat" not in terminal.wait_for("> $")
    terminal.type("/exit\n")
    assert terminal.end() == 0
    terminal.close()
