"""The command ``llama-crab batch``: what it answers, and what is there after any end."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_crab import AsyncLlama, Completion, Llama, SamplerChain
from llama_crab.cli import main

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and locks")
HEAD = '{"id": "batch_req_'


def request(custom_id: Any, body: Any = None, **fields: Any) -> dict[str, Any]:
    """Return a line of the input; the default body gives 3 tokens of "hi"."""
    body = {"prompt": "hi", "max_tokens": 3} if body is None else body
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return {**line, **fields}


def result(custom_id: str, status: int = 200) -> str:
    """Return a line of the output, as an earlier run would have left it."""
    response = {"status_code": status, "request_id": "req_0", "body": {"earlier": True}}
    record = {"id": "batch_req_0", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(record) + "\n"


class Files:
    """An input, an output, and the command over them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.model = model

    def write(self, *lines: Any) -> None:
        """Write the input; a line is an object, text or bytes."""
        texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        data = [text if isinstance(text, bytes) else text.encode() for text in texts]
        self.input.write_bytes(b"".join(line + b"\n" for line in data))

    def args(self, *options: str, n_seq_max: int = 4) -> list[str]:
        loading = ("-m", str(self.model), "-c", str(256 * n_seq_max), "-np", str(n_seq_max))
        return ["batch", str(self.input), str(self.output), *loading, "-t", "1", *options]

    def run(self, *options: str, **loading: int) -> int:
        return main(self.args(*options, **loading))

    def records(self) -> list[dict[str, Any]]:
        text = self.output.read_bytes()
        assert not text or text.endswith(b"\n")
        return [json.loads(line) for line in text.splitlines()]

    def by_id(self) -> dict[str, dict[str, Any]]:
        """Return the records by id, of which each has one."""
        records = self.records()
        found = {record["custom_id"]: record for record in records}
        assert len(found) == len(records)
        return found

    def error(self, custom_id: str) -> tuple[int, str]:
        """Return status and message."""
        record = self.by_id()[custom_id]
        assert record["response"]["body"] == {"error": record["error"]}
        assert record["error"].keys() == {"code", "message"}
        return record["response"]["status_code"], record["error"]["message"]


@pytest.fixture
def files(tmp_path: Path, tiny_path: Path) -> Files:
    return Files(tmp_path, tiny_path)


def test_an_answer_is_the_completion_in_openais_line(files: Files) -> None:
    body = {"prompt": "one two", "max_tokens": 12, "temperature": 0, "logprobs": 2, "seed": 5}
    files.write(request("a", {**body, "model": "some-model"}), request("b", body))
    assert files.run(n_seq_max=1) == 0
    with Llama(files.model, n_ctx=256, n_threads=1) as llama:
        wanted = llama.create_completion(
            "one two", 12, sampler=SamplerChain().temp(0), logprobs=2, seed=5
        )
        assert isinstance(wanted, Completion)
    found = files.by_id()
    for custom_id, model in (("a", "some-model"), ("b", "tiny.gguf")):
        record = found[custom_id]
        assert record.keys() == {"id", "custom_id", "response", "error"}
        assert record["error"] is None
        assert record["response"].keys() == {"status_code", "request_id", "body"}
        assert record["response"]["status_code"] == 200
        answer = record["response"]["body"]
        assert answer["object"] == "text_completion"
        assert answer["model"] == model
        (choice,) = answer["choices"]
        (other,) = wanted.to_dict()["choices"]
        # A cached prefix rounds differently.
        for found_values, values in (
            (choice["logprobs"].pop(name), other["logprobs"].pop(name))
            for name in ("token_logprobs", "top_logprobs")
        ):
            assert found_values == [pytest.approx(value, abs=1e-4) for value in values]
        assert choice == other
        assert answer["usage"]["total_tokens"] == wanted.usage.total_tokens
    assert len({record["id"] for record in found.values()}) == 2
    assert files.output.read_text().startswith(HEAD)


def test_several_prompts_give_several_choices(files: Files) -> None:
    prompts = [f"prompt {i}" for i in range(20)]  # more than are in flight
    body = {"prompt": prompts, "n": 2, "max_tokens": 2, "echo": True}
    files.write(request("many", body), request("ids", {"prompt": [300, 301], "max_tokens": 2}))
    assert files.run() == 0
    answer = files.by_id()["many"]["response"]["body"]
    assert [choice["index"] for choice in answer["choices"]] == list(range(40))
    for index, choice in enumerate(answer["choices"]):
        assert choice["text"].startswith(prompts[index // 2])
    assert files.by_id()["ids"]["response"]["body"]["usage"]["prompt_tokens"] == 2


def test_one_broken_prompt_of_several_is_the_requests_error(files: Files) -> None:
    files.write(request("a", {"prompt": ["fine", [10**6], "fine"]}))
    assert files.run() == 3
    assert files.error("a")[0] == 400


@pytest.mark.parametrize(
    ("line", "custom_id", "words"),
    [
        ("{not json", "line 2", "not JSON"),
        ('"text"', "line 2", "expected an object"),
        ("[" * 100_000, "line 2", "not JSON"),
        (b'{"custom_id": "\xff"}', "line 2", "not JSON"),
        (json.dumps({"method": "POST"}), "line 2", "custom_id: "),
        (request(7), "line 2", "custom_id: "),
        (request(""), "line 2", "custom_id: "),
        (request("x", method="GET"), "x", "method: 'GET' is not supported"),
        (request("x", url="/v1/chat/completions"), "x", "not supported"),
        (request("x", url="/v1/embeddings"), "x", "not supported"),
        (request("x", url=["/v1/completions"]), "x", "not supported"),
        (request("x", body=[]), "x", "body: "),
        (request("x", {}), "x", "prompt: missing"),
        (request("x", {"prompt": "a", "temprature": 1}), "x", "temprature: not supported"),
        (request("x", {"prompt": "a", "stream": True}), "x", "stream: not supported"),
        (request("x", {"prompt": "a", "top_p": 7}), "x", "top_p: "),
        (request("x", {"prompt": [10**6]}), "x", "prompt: "),
        (request("x", {"prompt": [300] * 300}), "x", "300 tokens"),
        (request("x", {"prompt": "a", "suffix": "b"}), "x", "suffix: "),
        (request("x", {"prompt": "a", "logit_bias": {"99999": 1}}), "x", "logit_bias: "),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_line_is_answered_400_and_the_others_run(
    files: Files, line: Any, custom_id: str, words: str
) -> None:
    files.write(request("before"), line, request("after"))
    assert files.run() == 3
    status, message = files.error(custom_id)
    assert status == 400
    assert words in message
    found = files.by_id()
    assert found.keys() == {"before", custom_id, "after"}
    assert found["before"]["response"]["status_code"] == 200
    assert found["after"]["response"]["status_code"] == 200


def test_a_long_prompt_has_openais_error_code(files: Files) -> None:
    files.write(request("a", {"prompt": [300] * 300}))
    assert files.run() == 3
    assert files.by_id()["a"]["error"]["code"] == "context_length_exceeded"


def test_ids_and_prompts_of_any_characters(files: Files) -> None:
    ids = ["\ud800", "ü\u2028\u0085", "a\nb", '"', "x" * 5000]
    files.write(*[request(i, {"prompt": f"{i[:9]} \udc00", "max_tokens": 1}) for i in ids], "", " ")
    assert files.run() == 0
    assert files.by_id().keys() == set(ids)
    assert files.output.read_bytes().isascii()


def test_an_empty_input_and_a_byte_order_mark(files: Files) -> None:
    files.input.write_bytes(b"")
    assert files.run() == 0
    files.input.write_bytes(b"\xef\xbb\xbf" + json.dumps(request("a")).encode())
    assert files.run() == 0
    assert files.by_id().keys() == {"a"}


def test_the_end_is_told(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write(request("a"), request("b", {"prompt": 5}))
    assert files.run() == 3
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "2 requests, 1 with errors\n")


# Started again


def test_a_second_run_answers_what_is_missing(files: Files) -> None:
    files.write(*[request(f"r{i}") for i in range(6)])
    before = result("r1") + result("r3", 400) + result("not in the input")
    files.output.write_text(before)
    assert files.run() == 3  # the 400 of the earlier run counts
    assert files.output.read_text().startswith(before)
    assert files.by_id().keys() == {*(f"r{i}" for i in range(6)), "not in the input"}
    again = files.output.read_bytes()
    assert files.run() == 3
    assert files.output.read_bytes() == again


def test_errors_of_the_server_are_tried_again(files: Files) -> None:
    files.write(*[request(f"r{i}") for i in range(4)])
    files.output.write_text(result("r0") + result("r1", 500) + result("r2", 503) + HEAD)
    files.output.chmod(0o640)
    mode = files.output.stat().st_mode
    assert files.run() == 0
    assert files.records()[0] == json.loads(result("r0"))
    assert {r["response"]["status_code"] for r in files.by_id().values()} == {200}
    assert files.output.stat().st_mode == mode
    assert {path.name for path in files.output.parent.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_an_unforeseen_error_is_a_500_and_tried_again(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = AsyncLlama.create_completion

    def broken(self: AsyncLlama, prompt: Any, *args: Any, **options: Any) -> Any:
        if prompt == "hi":
            raise ZeroDivisionError
        return create(self, prompt, *args, **options)

    files.write(request("a"), request("b", {"prompt": "other", "max_tokens": 1}))
    with monkeypatch.context() as patch:
        patch.setattr(AsyncLlama, "create_completion", broken)
        assert files.run() == 3
    assert files.error("a") == (500, "ZeroDivisionError")
    assert files.run() == 0
    assert files.by_id().keys() == {"a", "b"}


@pytest.mark.parametrize(
    "torn",
    [b"{", HEAD.encode(), HEAD.encode() + b'0", "custom_id": "r1"', b"\0" * 99, b'{"id"' + b"\0"],
)
def test_a_torn_last_line_is_cut_off(files: Files, torn: bytes) -> None:
    files.write(request("r0"), request("r1"))
    files.output.write_bytes(result("r0").encode() + torn)
    assert files.run() == 0
    assert files.output.read_bytes().startswith(result("r0").encode() + HEAD.encode())
    assert files.by_id().keys() == {"r0", "r1"}


def test_a_torn_line_is_cut_off_when_nothing_is_left_to_do(files: Files, tmp_path: Path) -> None:
    files.write(request("r0"))
    files.output.write_bytes(result("r0").encode() + b'{"id": "ba')
    files.model = tmp_path / "not needed.gguf"
    assert files.run() == 0
    assert files.output.read_text() == result("r0")


@pytest.mark.parametrize(
    "foreign",
    [b"some text\n", b"some text", b"{}\n", b'{"custom_id": "a"}\n', b"[1]\n", b"\0\0\n", b"5\n"],
)
def test_a_file_of_another_kind_is_left_alone(
    files: Files, foreign: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write(request("a"))
    kept = result("a").encode() + foreign
    files.output.write_bytes(kept)
    assert files.run() == 1
    assert files.output.read_bytes() == kept
    assert "line 2: no result of a batch" in capsys.readouterr().err
    assert files.run("--overwrite") == 0
    assert files.by_id().keys() == {"a"}


def test_no_resume_refuses_results(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write(request("a"))
    assert files.run("--no-resume") == 0
    kept = files.output.read_bytes()
    assert files.run("--no-resume") == 1
    assert files.output.read_bytes() == kept
    assert "is not empty" in capsys.readouterr().err


def test_overwrite_keeps_the_results_until_the_model_is_there(
    files: Files, tmp_path: Path, tiny_path: Path
) -> None:
    files.write(request("a"))
    files.output.write_text(result("a") + result("b"))
    files.model = tmp_path / "missing.gguf"
    assert files.run("--overwrite") == 1
    assert len(files.records()) == 2
    files.model = tiny_path
    assert files.run("--overwrite") == 0
    assert files.by_id()["a"]["id"] != "batch_req_0"


# Refused before anything runs


def test_an_id_used_twice_is_refused(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.write(request("a"), "", request("b"), request("a", {"prompt": "other"}))
    assert files.run() == 1
    assert "lines 1 and 4 have the same custom_id 'a'" in capsys.readouterr().err
    assert not files.output.exists()
    files.write(request("line 2"), "no json")
    assert files.run() == 1
    assert "lines 1 and 2 have the same custom_id 'line 2'" in capsys.readouterr().err


def test_the_input_must_be_a_file_and_not_the_output(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run() == 1
    assert "in.jsonl is not a file" in capsys.readouterr().err
    files.write(request("a"))
    kept = files.input.read_bytes()
    files.output.hardlink_to(files.input)
    assert files.run("--overwrite") == 2
    assert "same file" in capsys.readouterr().err
    assert files.input.read_bytes() == kept


@pytest.mark.parametrize(
    "options", [("--no-resume", "--overwrite"), ("-np", "0"), ("-fa", "maybe"), ("-np", "x")]
)
def test_wrong_usage_is_status_2(files: Files, options: tuple[str, ...]) -> None:
    files.write(request("a"))
    assert files.run(*options) == 2
    assert not files.output.exists()


@POSIX
def test_two_processes_do_not_write_to_one_file(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    files.write(request("a"))
    with files.output.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert files.run() == 1
        assert "another process writes to it" in capsys.readouterr().err
    assert files.run() == 0


# What reaches the disk


def test_each_line_is_one_write_and_the_end_is_on_the_disk(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[bytes | None] = []
    write, fsync = os.write, os.fsync

    def writes(fd: int, data: bytes) -> int:
        if data.startswith(HEAD.encode()):
            done.append(data)
        return write(fd, data)

    def syncs(fd: int) -> None:
        done.append(None)
        fsync(fd)

    monkeypatch.setattr(os, "write", writes)
    monkeypatch.setattr(os, "fsync", syncs)
    files.write(*[request(f"r{i}") for i in range(30)])
    assert files.run() == 0
    lines = [data for data in done if data is not None]
    assert len(lines) == 30
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    assert done[-1] is None


def test_it_is_synced_as_time_goes_by(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[float] = []
    fsync, clock = os.fsync, itertools.count(step=0.2)
    monkeypatch.setattr("llama_crab.cli.batch.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(1), fsync(fd)))
    files.write(*[request(f"r{i}") for i in range(40)])
    assert files.run() == 0
    assert len(synced) > 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_status_1(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    write = os.write

    def fails(fd: int, data: bytes) -> int:
        if not data.startswith(HEAD.encode()):
            return write(fd, data)
        write(fd, data[:100])  # as much as there was room for
        return write(full, data)

    files.write(request("a"), request("b"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails)
        assert files.run() == 1
    os.close(full)
    assert "No space left" in capsys.readouterr().err
    assert files.output.stat().st_size == 100
    assert files.run() == 0
    assert files.by_id().keys() == {"a", "b"}


# As a process


def start(files: Files) -> subprocess.Popen[bytes]:
    """Start the command with Python's SIGINT, even below a shell that ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "llama_crab", *files.args()],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def has_lines(files: Files, n: int) -> Callable[[], bool]:
    return lambda: files.output.exists() and files.output.read_bytes().count(b"\n") >= n


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


@POSIX
def test_killed_twice_and_started_again_it_answers_each_request_once(files: Files) -> None:
    body = {"prompt": [f"story {i}" for i in range(2)], "max_tokens": 60, "logprobs": 3}
    files.write(*[request(f"r{i}", body) for i in range(250)])
    kept = b""
    for n_lines in (20, 60):
        with start(files) as running:
            wait_until(has_lines(files, n_lines))
            running.kill()
            running.wait(timeout=60)
        assert running.returncode == -signal.SIGKILL
        found = files.output.read_bytes()
        assert n_lines <= found.count(b"\n") < 250
        # What was whole is kept, byte for byte.
        assert found.startswith(kept)
        kept = found[: found.rindex(b"\n") + 1]
    assert files.run() == 0
    assert files.output.read_bytes().startswith(kept)
    answered = Counter(record["custom_id"] for record in files.records())
    assert answered == Counter(f"r{i}" for i in range(250))


@POSIX
def test_ctrl_c_keeps_what_is_written_and_gives_130(files: Files) -> None:
    files.write(*[request(f"r{i}", {"prompt": "story", "max_tokens": 60}) for i in range(200)])
    with start(files) as running:
        wait_until(has_lines(files, 10))
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 130
        assert running.stderr is not None
        assert running.stderr.read() == b""
    kept = files.output.read_bytes()
    assert 10 <= len(files.records()) < 200
    assert {r["response"]["body"]["choices"][0]["finish_reason"] for r in files.records()} <= {
        "length",
        "stop",
    }
    assert files.run() == 0
    assert files.output.read_bytes().startswith(kept)
    assert files.by_id().keys() == {f"r{i}" for i in range(200)}
