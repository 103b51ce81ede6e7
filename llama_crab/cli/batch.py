"""Answer a file of requests in OpenAI's batch format; started again, go on where it ended."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..params import ParameterError
from . import loading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, BinaryIO

    from ..async_llama import AsyncLlama
    from ..completion import Completion
    from ..mapping import ProgressBar
    from ..params import LlamaParams
    from ..request_builder import CompletionOptions, Prompt

NAME = "batch"
EXIT_SOME_FAILED = 3
# Looked at as often, so what is lost when the machine stops is of the last second.
_SYNC_SEC = 0.5
# How every line of ours begins, so that no other file is cut.
_HEAD = b'{"id": "batch_req_'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Answer a file of requests in OpenAI's batch format. Each answer is appended to OUT as it "
        "is ready. Started again, it skips what OUT has an answer to, and tries again what failed "
        "with a status of 500 or more. The exit status is 0 when OUT answers all, 3 when some "
        "answers are errors."
    )
    parser.add_argument("input", metavar="IN.jsonl", type=Path, help="one request per line")
    parser.add_argument("output", metavar="OUT.jsonl", type=Path, help="one result per line")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--no-resume", action="store_true", help="refuse an OUT with results")
    existing.add_argument("--overwrite", action="store_true", help="drop the results in OUT")
    group = loading.add_arguments(parser)
    help_ = "sequences at a time, which share --n-ctx (default: 8)"
    group.add_argument("-np", "--n-seq-max", type=int, default=8, help=help_)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    params = loading.params_of(args, n_seq_max=args.n_seq_max)
    if not args.input.is_file():  # it is read twice
        raise FileNotFoundError(f"{args.input} is not a file")
    if args.output.exists() and args.output.samefile(args.input):
        raise argparse.ArgumentError(None, "IN and OUT are the same file")
    if args.no_resume and args.output.exists() and args.output.stat().st_size:
        raise FileExistsError(f"{args.output} is not empty (see --overwrite)")
    ids = _custom_ids(args.input)
    with _Results(args.output, keep=not args.overwrite) as results:
        if ids.keys() <= results.status.keys():
            results.begin()
        else:
            _run(args, params, ids, results)
        n_errors = sum(results.status[custom_id] != 200 for custom_id in ids)
    print(f"{len(ids)} requests, {n_errors} with errors", file=sys.stderr)
    return EXIT_SOME_FAILED if n_errors else 0


def _run(
    args: argparse.Namespace, params: LlamaParams, ids: Mapping[str, int], results: _Results
) -> None:
    import asyncio

    from ..async_llama import AsyncLlama
    from ..mapping import ProgressBar, n_in_flight

    llama = AsyncLlama.load(params)
    results.begin()
    bar = ProgressBar(len(ids), len(ids.keys() & results.status.keys()))
    answers = _Answers(results, bar)
    try:
        asyncio.run(_answer(llama, _lines(args.input), answers, n_in_flight(args.n_seq_max)))
    finally:
        bar.close()


@dataclass(slots=True)
class _Line:
    """A line of the input; `error` is why it is no request."""

    number: int
    custom_id: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: ParameterError | None = None


@dataclass(slots=True)
class _Job:
    """A request of the input, with what its prompts have given so far."""

    custom_id: str
    model: str | None
    prompts: tuple[Prompt, ...]
    max_tokens: int
    options: CompletionOptions
    outcomes: dict[int, Completion | BaseException] = field(default_factory=dict)


def _lines(path: Path) -> Iterator[_Line]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield _line(number, raw)


def _line(number: int, raw: bytes) -> _Line:
    line = _Line(number, f"line {number}")
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        line.error = ParameterError(f"not JSON: {error}")
        return line
    if not isinstance(fields, dict):
        line.error = ParameterError(f"expected an object, not {fields!r:.80}")
    elif not isinstance(fields.get("custom_id"), str) or not fields["custom_id"]:
        line.error = ParameterError("custom_id: expected text")
    else:
        line.custom_id, line.fields = fields["custom_id"], fields
    return line


def _custom_ids(path: Path) -> dict[str, int]:
    """Return the ids of all lines with their numbers. Raises ValueError for one used twice."""
    seen: dict[str, int] = {}
    for line in _lines(path):
        first = seen.setdefault(line.custom_id, line.number)
        if first != line.number:
            raise ValueError(
                f"{path}: lines {first} and {line.number} have the same custom_id "
                f"{line.custom_id!r:.80}"
            )
    return seen


def _completion_job(custom_id: str, body: Any) -> _Job:
    from ..openai_fields import completion_options

    prompts, max_tokens, options = completion_options(body)
    for name in ("stream", "stream_options"):
        if body.get(name):
            raise ParameterError(f"{name}: not supported in a batch")
    return _Job(custom_id, body.get("model"), prompts, max_tokens, options)


# A further endpoint is a function here, and what `_answer` runs for its jobs.
_ENDPOINTS: dict[str, Callable[[str, Any], _Job]] = {"/v1/completions": _completion_job}


def _job(line: _Line) -> _Job:
    """Return the request of a line. Raises `ParameterError`, naming the field."""
    if line.error is not None:
        raise line.error
    method, url = line.fields.get("method"), line.fields.get("url")
    if method != "POST":
        raise ParameterError(f"method: {method!r:.80} is not supported")
    endpoint = _ENDPOINTS.get(url) if isinstance(url, str) else None
    if endpoint is None:
        raise ParameterError(f"url: {url!r:.80} is not supported")
    return endpoint(line.custom_id, line.fields.get("body"))


async def _answer(
    llama: AsyncLlama, lines: Iterable[_Line], answers: _Answers, n_running_max: int
) -> None:
    """Run what has no answer yet, a bounded number at a time. Cancelled, it writes nothing more."""
    import asyncio

    running: dict[asyncio.Future[Completion], tuple[_Job, int]] = {}

    async def collect() -> None:
        """Wait until something has ended, but not for long."""
        done, _ = await asyncio.wait(
            running, timeout=_SYNC_SEC, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            job, index = running.pop(task)
            answers.take(job, index, task.exception() or task.result())
        answers.results.sync(_SYNC_SEC)

    try:
        async with llama:
            for line in lines:
                job = answers.job(line)
                if job is None:
                    await asyncio.sleep(0)  # where a long row of them can be interrupted
                    continue
                for index, prompt in enumerate(job.prompts):
                    while len(running) >= n_running_max:
                        await collect()
                    try:
                        handle = llama.create_completion(prompt, job.max_tokens, **job.options)
                    except Exception as error:
                        answers.take(job, index, error)
                    else:
                        running[asyncio.ensure_future(handle)] = job, index
            while running:
                await collect()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class _Answers:
    """Makes results of what the prompts give, and counts them. Thread-safety: none."""

    def __init__(self, results: _Results, bar: ProgressBar) -> None:
        self.results = results
        self._bar = bar
        self._answered = frozenset(results.status)

    def job(self, line: _Line) -> _Job | None:
        """Return what to run for a line; None if it has an answer, as one that is no request."""
        if line.custom_id in self._answered:
            return None
        try:
            return _job(line)
        except ParameterError as error:
            self._write(line.custom_id, error)
            return None

    def take(self, job: _Job, index: int, outcome: Completion | BaseException) -> None:
        """Take what a job's prompt has given; write the job's answer if it was the last."""
        from ..openai_fields import completion_body

        job.outcomes[index] = outcome
        if len(job.outcomes) < len(job.prompts):
            return
        completions: list[Completion] = []
        for index in range(len(job.prompts)):
            outcome = job.outcomes[index]
            if isinstance(outcome, BaseException):
                self._write(job.custom_id, outcome)
                return
            completions.append(outcome)
        self._write(job.custom_id, completion_body(completions, job.model))

    def _write(self, custom_id: str, outcome: dict[str, Any] | BaseException) -> None:
        from ..openai_fields import error_status

        if isinstance(outcome, BaseException):
            status, code = error_status(outcome)
            error = {"code": code, "message": str(outcome) or type(outcome).__name__}
            self.results.append(custom_id, status, {"error": error}, error)
        else:
            self.results.append(custom_id, 200, outcome, None)
        self._bar.advance()


class _Results:
    """The output file, to which whole lines are appended.

    `status` holds the status of each custom_id that has an answer. Until `begin`, the file is as it
    was. `keep` is whether what it holds counts; then ValueError is raised for a file that is no
    batch's, and what an interrupted write left at its end is ignored.

    Thread-safety: none. One process at a time, where the system has locks; BlockingIOError else.
    """

    def __init__(self, path: Path, *, keep: bool) -> None:
        self._path = Path(os.path.realpath(path))
        self._keep = keep
        self._files = [_open_locked(self._path)]
        self._n_whole = 0
        self._n_stale = 0
        self._dirty = False
        self._synced = time.monotonic()
        self.status: dict[str, int] = {}
        if keep:
            try:
                self._read()
            except BaseException:
                self.close()
                raise

    def begin(self) -> None:
        """Cut off what does not count; from here on there may be `append`."""
        if self._n_stale:
            self._rewrite()
        else:
            os.ftruncate(self._file.fileno(), self._n_whole)

    def append(self, custom_id: str, status: int, body: object, error: object) -> None:
        """Write a result."""
        key = os.urandom(12).hex()
        record = {
            "id": f"batch_req_{key}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": f"req_{key}", "body": body},
            "error": error,
        }
        # ASCII: no separator of lines but ours, and no half of a surrogate pair.
        data = json.dumps(record).encode() + b"\n"
        while data:  # once, but on a full disk
            data = data[os.write(self._file.fileno(), data) :]
        self._dirty = True
        self.status[custom_id] = status
        self.sync(_SYNC_SEC)

    def sync(self, age_sec: float = 0.0) -> None:
        """Bring to the disk what was written, if the last time is `age_sec` seconds ago."""
        if self._dirty and time.monotonic() - self._synced >= age_sec:
            os.fsync(self._file.fileno())
            self._dirty = False
            self._synced = time.monotonic()

    def close(self) -> None:
        """Bring everything to the disk and close. Idempotent."""
        try:
            self.sync()
        finally:
            self._dirty = False
            for file in self._files:
                file.close()

    def __enter__(self) -> _Results:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _file(self) -> BinaryIO:
        return self._files[-1]

    def _read(self) -> None:
        for number, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                # NULs are what a file system may leave behind when the machine stops.
                if not _HEAD.startswith(raw.rstrip(b"\0")[: len(_HEAD)]):
                    raise self._foreign(number)
                return
            custom_id, status = self._entry(number, raw)
            self._n_whole += len(raw)
            if status >= 500:
                self._n_stale += 1
            else:
                self.status[custom_id] = status

    def _entry(self, number: int, raw: bytes) -> tuple[str, int]:
        try:
            record = json.loads(raw)
            response = record["response"]
            return str(record["custom_id"]), int(response["status_code"]) if response else 500
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._foreign(number) from None

    def _foreign(self, number: int) -> ValueError:
        return ValueError(f"{self._path}, line {number}: no result of a batch (see --overwrite)")

    def _rewrite(self) -> None:
        """Put a file without the answers that are tried again in the place of this one."""
        path = self._path.with_name(self._path.name + ".tmp")
        self._file.seek(0)
        with path.open("wb") as copy:
            for number, raw in enumerate(self._file, 1):
                if raw.endswith(b"\n") and self._entry(number, raw)[1] < 500:
                    copy.write(raw)
            copy.flush()
            os.fsync(copy.fileno())
        path.chmod(self._path.stat().st_mode)
        if sys.platform == "win32":
            self._file.close()  # an open file cannot be replaced there
        # Elsewhere it stays locked, for a process that has opened it before.
        path.replace(self._path)
        self._files.append(_open_locked(self._path))


def _open_locked(path: Path) -> BinaryIO:
    file = path.open("a+b")
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BlockingIOError(f"{path}: another process writes to it") from None
    file.seek(0)
    return file
