"""llama.cpp's own programs for many requests: llama-server and llama-batched-bench.

The client shares the cores with the server, and ggml's threads lose far more than the time that is
taken from them. So a request is one write and reads that block, on a socket file (no port to race
for, no delay of small packets), and asks for the smallest response there is. Without streaming the
first token's time is the end less what the server says the generation took.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from load import Answer, LoadRequest
from side_by_side import GPU_LAYERS, N_THREADS, Native

START_SEC = 300
# What a user may add to find a faster server: --backend-sampling on a GPU, --poll, ...
MORE_FLAGS = shlex.split(os.environ.get("LLAMA_CRAB_BENCH_SERVER_ARGS", ""))

_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def _shared_flags(
    model: Path, n_ctx: int, n_batch: int, n_ubatch: int, flash_attn: bool
) -> list[str]:
    return [
        *("-m", str(model), "-c", str(n_ctx), "-b", str(n_batch), "-ub", str(n_ubatch)),
        *("-t", str(N_THREADS), "-ngl", str(GPU_LAYERS), "-fa", "on" if flash_attn else "off"),
    ]


class NativeServer:
    """A running llama-server; `n_ctx` is of all its slots together.

    `cache_ram` is its cache of prompts beside the slots, in MiB: each request that takes over a
    slot then copies the slot's state out of the context and into it.
    """

    def __init__(
        self,
        native: Native,
        model: Path,
        *,
        n_ctx: int,
        n_parallel: int,
        kv_unified: bool,
        flash_attn: bool = True,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        cache_ram: int = 0,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="native-server-")
        self._socket = str(Path(self._folder.name) / "server.sock")
        self._log = Path(self._folder.name) / "log"
        self._command = [
            str(native.folder / "llama-server"),
            *_shared_flags(model, n_ctx, n_batch, n_ubatch, flash_attn),
            *("--host", self._socket, "-np", str(n_parallel), "--no-webui", "-fit", "off"),
            *("--kv-unified" if kv_unified else "--no-kv-unified", "--cache-ram", str(cache_ram)),
            # Errors only. "The best one" is its cheapest greedy choice: nothing is left to draw.
            *("-lv", "1", "--samplers", "top_k", "--top-k", "1"),
            *MORE_FLAGS,
        ]

    def __enter__(self) -> NativeServer:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SEC
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self._exchange(_HEALTH).startswith(b"HTTP/1.1 200"):
                    return
            except (FileNotFoundError, ConnectionError):
                pass
            time.sleep(0.05)
        raise RuntimeError(f"{shlex.join(self._command)} did not start:\n{self._log.read_text()}")

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def ask(self, request: LoadRequest, *, cache_prompt: bool = True) -> Answer:
        """Wait for a whole answer."""
        message = _message(request, stream=False, cache_prompt=cache_prompt)
        submitted = time.perf_counter()
        response = self._exchange(message)
        end = time.perf_counter()
        body = json.loads(response.partition(b"\r\n\r\n")[2])
        if "tokens_predicted" not in body:
            raise RuntimeError(f"llama-server answered {body}")
        n_tokens = int(body["tokens_predicted"])
        assert n_tokens == request.max_tokens
        first = end - body["timings/predicted_ms"] / 1e3
        return Answer(submitted, (first, end), n_tokens)

    def ask_streaming(self, request: LoadRequest, *, cache_prompt: bool = True) -> Answer:
        """Note when each piece arrives."""
        message = _message(request, stream=True, cache_prompt=cache_prompt)
        marks: list[float] = []
        submitted = time.perf_counter()
        with self._connect() as connection:
            connection.sendall(message)
            tail = b""
            while data := connection.recv(65536):
                # Line ends within a text are escaped, so that each of these begins an event.
                events = (tail + data).count(b"\ndata: ")
                tail = data[-6:]
                marks += [time.perf_counter()] * events
        # The last event carries no token.
        marks.pop()
        return Answer(submitted, tuple(marks), request.max_tokens)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(self._socket)
        except BaseException:
            connection.close()
            raise
        return connection

    def _exchange(self, message: bytes) -> bytes:
        with self._connect() as connection:
            connection.sendall(message)
            parts = []
            while data := connection.recv(65536):
                parts.append(data)
        return b"".join(parts)


def _message(request: LoadRequest, *, stream: bool, cache_prompt: bool) -> bytes:
    body = json.dumps(
        {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "ignore_eos": True,
            "stream": stream,
            "cache_prompt": cache_prompt,
            "response_fields": ["tokens_predicted", "timings/predicted_ms"],
        }
    ).encode()
    head = (
        "POST /completion HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def batched_bench(
    native: Native,
    model: Path,
    n_parallel: int,
    *,
    n_prompt: int,
    n_gen: int,
    n_ctx: int,
    kv_unified: bool,
    flash_attn: bool = True,
    n_batch: int = 2048,
    n_ubatch: int = 512,
) -> float:
    """Return tokens per second of n equal sequences while they generate: no sampling, no text."""
    command = [
        str(native.folder / "llama-batched-bench"),
        *_shared_flags(model, n_ctx, n_batch, n_ubatch, flash_attn),
        *("-npp", str(n_prompt), "-ntg", str(n_gen), "-npl", str(n_parallel)),
        *("--kv-unified" if kv_unified else "--no-kv-unified", "--output-format", "jsonl"),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (row,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return float(row["speed_tg"])
