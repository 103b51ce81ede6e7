"""`bench` on tiny models: what is run in which order, what is kept when something fails."""

from __future__ import annotations

import csv
import io
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from llama_crab import LlamaParams, ParameterError, PromptLookupDecoding, _core, tuning
from llama_crab.errors import DecodeError, ModelNotFoundError
from llama_crab.tuning import BenchReport, BenchRow, bench, bench_run, compare_reports
from llama_crab.tuning.bed import Bed
from llama_crab.tuning.bench_compare import difference_table
from llama_crab.tuning.bench_plot import plot
from llama_crab.tuning.bench_report import BenchFileError
from llama_crab.tuning.bench_run import Progress
from llama_crab.tuning.interrupt import abort_on_interrupt
from llama_crab.tuning.texts import TEXTS, n_prompt_max, prompt_of
from llama_crab.tuning.workloads import (
    PRESETS,
    Answer,
    Complete,
    Generate,
    Parallel,
    Prefill,
    Reuse,
    Tokenize,
)

ONE_THREAD = LlamaParams(n_threads=1, n_batch=64, n_ubatch=64)


def report_of(*rows: BenchRow, interrupted: bool = False) -> BenchReport:
    return BenchReport(tuple(rows), 5, {"version": "1"}, interrupted)


def row_of(test: str = "tg8", seconds: Sequence[float] = (1.0,) * 5, **config: Any) -> BenchRow:
    rounds = tuple(range(len(seconds)))
    return BenchRow("m.gguf", test, "tok/s", 8, config, {"n_gen": 8}, tuple(seconds), rounds)


def test_every_combination_is_measured_in_every_round(tiny_path: Path) -> None:
    report = bench(
        tiny_path,
        [Prefill(20), Generate(3)],
        params=ONE_THREAD,
        axes={"n_threads": [1, 2], "type_k": ["f16", "bf16"]},
        rounds=3,
    )
    assert [(r.config["n_threads"], r.config["type_k"], r.test) for r in report.rows] == [
        (n, kind, test) for n in (1, 2) for kind in ("f16", "bf16") for test in ("pp20", "tg3")
    ]
    for row in report.rows:
        assert row.error is None
        assert sorted(row.rounds) == [0, 1, 2]
        assert row.samples is not None
        assert row.samples.values == tuple(row.n_tokens / seconds for seconds in row.seconds)
    assert not report.interrupted
    assert report.differing() == ["n_threads", "type_k"]


def test_rounds_take_turns_forwards_and_backwards(tiny_path: Path) -> None:
    seen: list[Progress] = []
    work = [Prefill(5), Generate(2), Parallel(2, 2)]
    bench(tiny_path, work, params=ONE_THREAD, rounds=2, progress=seen.append)
    names = [workload.name for workload in work]
    assert [step.name for step in seen] == names[::-1] + names + names[::-1]
    assert [step.done for step in seen] == list(range(9))
    assert {step.total for step in seen} == {9}
    # A warm-up says nothing: it loads, and generates one token only.
    assert all(step.seconds_left is None for step in seen[:6])
    assert all(step.seconds_left is not None for step in seen[6:])


def test_without_a_warm_up_the_first_run_counts(tiny_path: Path) -> None:
    seen: list[Progress] = []
    bench(
        *(tiny_path, [Generate(2)]), params=ONE_THREAD, rounds=2, warmup=False, progress=seen.append
    )
    assert len(seen) == 2


def test_contexts_stay_and_share_weights_until_the_end(tiny_path: Path) -> None:
    before = _core.live_handles()
    live: list[dict[str, int]] = []
    bench(
        tiny_path,
        [Prefill(5), Generate(300)],
        params=ONE_THREAD,
        axes={"n_threads": [1, 2]},
        rounds=1,
        progress=lambda step: live.append(_core.live_handles()),
    )
    assert live[-1]["models"] == before["models"] + 1
    assert live[-1]["contexts"] == before["contexts"] + 4
    assert _core.live_handles() == before


def test_contexts_give_way_where_memory_is_short(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "available_memory", lambda: 1 << 20)
    before = _core.live_handles()["contexts"]
    live: list[int] = []
    report = bench(
        tiny_path,
        [Prefill(5), Generate(300)],
        params=ONE_THREAD,
        axes={"type_k": ["f16", "bf16"]},
        rounds=2,
        progress=lambda step: live.append(_core.live_handles()["contexts"]),
    )
    assert max(live) == before + 1
    assert all(len(row.seconds) == 2 for row in report.rows)


def test_all_parts_of_a_split_model_count(
    tiny_path: Path, tiny_splits: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models that do not fit together are not loaded together."""
    both = tiny_path.stat().st_size + sum(part.stat().st_size for part in tiny_splits)
    models = []
    # Between what the first part would leave and what all of them take.
    for room in (both * 7 // 5, 2 * both):
        monkeypatch.setattr(bench_run, "available_memory", lambda room=room: room)
        live: list[int] = []
        bench(
            *([tiny_path, tiny_splits[0]], [Prefill(2)]),
            params=ONE_THREAD,
            rounds=1,
            progress=lambda step, live=live: live.append(_core.live_handles()["models"]),
        )
        models.append(max(live) - live[0])
    assert models == [1, 2]


def test_two_models_are_compared_in_one_run(tiny_path: Path, tiny_fim_path: Path) -> None:
    report = bench([tiny_path, tiny_fim_path], [Generate(3)], params=ONE_THREAD, rounds=3)
    assert [row.model for row in report.rows] == [tiny_path.name, tiny_fim_path.name]
    header, rows = report.table()
    assert header[0] == "model"
    assert rows[1][-1] == str(report.comparisons()[1])


def test_what_cannot_be_is_a_row_that_says_why(smol_path: Path) -> None:
    report = bench(
        smol_path,
        [Generate(2)],
        params=ONE_THREAD,
        axes={"flash_attn_type": [True, False], "type_v": ["f16", "q8_0"]},
        rounds=1,
    )
    errors = [row.error for row in report.rows]
    assert errors[:3] == [None, None, None]
    assert errors[3] is not None
    assert errors[3].startswith("ParameterError: type_v")
    assert [row.config["type_v"] for row in report.rows] == ["f16", "q8_0"] * 2
    assert report.failed == (report.rows[3],)
    assert "type_v" in report.notes()[0]


def test_the_reason_of_llama_cpp_is_told(tiny_path: Path) -> None:
    """Heads of 16 values cannot be stored in blocks of 32."""
    report = bench(tiny_path, [Generate(2)], params=ONE_THREAD, axes={"type_k": ["q8_0"]}, rounds=1)
    error = report.rows[0].error or ""
    assert error.startswith("ContextCreateError: ")
    assert "block size 32" in error
    assert "\n" not in error


def test_a_cache_too_large_fails_alone(tiny_path: Path) -> None:
    work = [Generate(2), Generate(2, depth=2_000_000_000), Generate(3)]
    report = bench(tiny_path, work, params=ONE_THREAD, rounds=2)
    assert [len(row.seconds) for row in report.rows] == [2, 0, 2]
    assert (report.rows[1].error or "").startswith("OutOfMemoryError: n_ctx=2000000002")


def test_depths_beyond_the_trained_length_are_measured(tiny: _core.Model, tiny_path: Path) -> None:
    depth = tiny.n_ctx_train + 10
    report = bench(tiny_path, [Generate(2, depth)], params=ONE_THREAD, rounds=1)
    assert report.rows[0].error is None


@dataclass(frozen=True)
class _FailsLater(Generate):
    def run(self, bed: Bed) -> float:
        if bed.context.n_threads == 1 and runs.append(1) is None and len(runs) > 2:
            raise DecodeError("the device is gone")
        return super().run(bed)


runs: list[int] = []


def test_what_fails_later_keeps_what_was_measured(tiny_path: Path) -> None:
    runs.clear()
    work = [_FailsLater(2), Prefill(4)]
    report = bench(tiny_path, work, params=ONE_THREAD, rounds=5)
    failed, other = report.rows
    assert (len(failed.seconds), failed.error) == (2, "DecodeError: the device is gone")
    assert len(other.seconds) == 5
    assert "after 2 rounds" in report.notes()[0]


def test_an_interrupt_keeps_what_was_measured(tiny_path: Path) -> None:
    def stop_at(step: Progress) -> None:
        if step.done == 5:
            raise KeyboardInterrupt

    before = _core.live_handles()
    report = bench(
        *(tiny_path, [Prefill(4), Generate(2)]), params=ONE_THREAD, rounds=9, progress=stop_at
    )
    assert report.interrupted
    assert [len(row.seconds) for row in report.rows] == [1, 2]
    assert "interrupted" in report.notes()[-1]
    assert _core.live_handles() == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals are told by sockets only")
def test_a_signal_aborts_before_python_sees_it() -> None:
    aborted = threading.Event()
    before = signal.set_wakeup_fd(-1)

    def interrupted() -> None:
        with abort_on_interrupt(aborted.set):
            signal.raise_signal(signal.SIGINT)
            aborted.wait(10)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert aborted.is_set()
    assert signal.set_wakeup_fd(before) == -1


def test_wrong_input_ends_before_anything_runs(tiny_path: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    with pytest.raises(ModelNotFoundError):
        bench([tiny_path, tmp_path / "none.gguf"], progress=seen.append)
    for wrong in (
        {"rounds": 0},
        {"axes": {"n_thread": [1]}},
        {"workloads": []},
    ):
        with pytest.raises(ParameterError):
            bench(tiny_path, progress=seen.append, **wrong)  # type: ignore[arg-type]
    assert not seen


def test_the_name_is_the_function_however_it_was_imported() -> None:
    assert tuning.bench is bench_run.bench
    assert "bench" in dir(tuning)
    with pytest.raises(AttributeError):
        _ = tuning.nothing


@pytest.mark.parametrize("preset", PRESETS)
def test_answers_say_what_their_time_went_into(smol_path: Path, preset: str) -> None:
    work = Complete(20, 8, preset)
    with Bed(work.fit(LlamaParams(smol_path))) as bed:
        stepper = bed.llama._engine.scheduler.stepper
        before = stepper.n_decoded
        measured = work.measure(bed)
        # The last token of an answer is not decoded.
        assert stepper.n_decoded - before == 20 + 8 - 1
    parts = dict(measured.parts)
    first = parts.pop("first_token")
    assert sum(parts.values()) == pytest.approx(measured.seconds, rel=0.02)
    assert all(value >= 0.0 for value in parts.values())
    assert parts["prefill"] <= first <= measured.seconds


def test_answers_have_the_same_prompt_each_time(smol_path: Path) -> None:
    from llama_crab.tuning import workloads

    with Bed(LlamaParams(smol_path, n_ctx=256)) as bed:
        for n in (1, 50, 300):
            assert len(workloads._prompt(bed, n)) == n
            assert workloads._prompt(bed, n) == workloads._prompt(bed, n)
        text = bed.model.vocab.detokenize(workloads._prompt(bed, 60), False, False).decode()
    assert "lighthouse keeper" in text


def test_reuse_computes_one_token(tiny_path: Path) -> None:
    work = Reuse(50)
    with Bed(work.fit(LlamaParams(tiny_path, n_threads=1))) as bed:
        for _ in range(2):
            assert work.measure(bed).parts == {"cached_n": 49.0}


def test_tokenising_counts_characters(tiny_path: Path) -> None:
    report = bench(tiny_path, [Tokenize(1000)], params=ONE_THREAD, rounds=1)
    assert (report.rows[0].unit, report.rows[0].n_tokens) == ("char/s", 1000)
    assert report.rows[0].samples is not None


def test_unknown_presets_and_texts_are_refused() -> None:
    with pytest.raises(ParameterError, match="preset"):
        Complete(1, 1, "poetic")
    with pytest.raises(ParameterError, match="text: 'poem' is not one of copy, free"):
        Answer("poem")


def test_drafts_are_an_axis_of_answers_only(tiny_path: Path) -> None:
    """Raw decodes have none, and are measured once; names are what JSON can hold."""

    def nothing(tokens: Any, n_max: int) -> list[int]:
        return []

    lookup = PromptLookupDecoding(1, 4, adaptive=False)
    report = bench(
        tiny_path,
        [Generate(2), Answer("copy", 24)],
        params=ONE_THREAD,
        axes={"speculative": [None, "auto", lookup, nothing, "maybe"], "n_threads": [1]},
        rounds=3,
    )
    names = [None, "auto", "lookup:1:4 (adaptive=False)", "nothing", "maybe"]
    assert [(row.test, row.config.get("speculative")) for row in report.rows] == [
        ("tg2", None),
        *(("copy 24", name) for name in names),
    ]
    raw, plain, _, drafted, idle, wrong = report.rows
    assert "speculative: expected" in (wrong.error or "")
    assert not [row.error for row in report.rows[:-1] if row.error]
    assert "drafted" not in raw.parts
    assert "drafted" not in plain.parts
    parts = drafted.parts
    assert parts["drafted"] >= parts["accepted"] >= 0.0
    assert parts["drafted"] > 0.0
    assert parts["acceptance"] == parts["accepted"] / parts["drafted"]
    assert (idle.parts["drafted"], idle.parts["acceptance"]) == (0.0, 0.0)
    header, rows = report.table()
    assert header[0] == "speculative"
    assert header[-4:-1] == ["drafted", "accepted", "acceptance"]
    assert [row[0] for row in rows] == ["none", *(name or "none" for name in names)]
    assert rows[1][-4:-1] == ["", "", ""]
    assert rows[3][-4] == f"{parts['drafted']:.0f}"
    assert rows[3][-2].endswith("%")
    assert rows[4][-4:-1] == ["0", "", ""]
    assert sorted(report.comparisons()) == [2, 3, 4]
    again = BenchReport.from_dict(json.loads(report.to_json()))
    assert again.table() == report.table()


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_the_same_each_time_and_fit(smol_path: Path, text: str) -> None:
    work = Answer(text, 16)
    params = LlamaParams(smol_path, n_threads=1, speculative="auto")
    with Bed(work.fit(params)) as bed:
        prompt = prompt_of(text, bed.model.vocab)
        assert prompt == prompt_of(text, bed.model.vocab)
        assert 16 < len(prompt) <= n_prompt_max(text)
        measured = work.measure(bed)
        assert bed.llama.perf.predicted_n == 16
        # Also a chain that samples has its own seed.
        assert work.measure(bed).parts.keys() == measured.parts.keys()
    assert measured.parts["drafted"] >= measured.parts["accepted"]


def test_json_gives_the_report_back(tiny_path: Path, tmp_path: Path) -> None:
    report = bench(
        *(tiny_path, [Prefill(5), Generate(2, 3), Complete(5, 4, "chat"), Prefill(2**31 - 1)]),
        params=ONE_THREAD,
        rounds=3,
    )
    path = tmp_path / "run.json"
    path.write_text(report.to_json())
    again = BenchReport.load(path)
    assert again.table() == report.table()
    assert again.notes() == report.notes()
    assert again.to_dict().keys() == report.to_dict().keys()
    record = json.loads(report.to_json())["rows"][1]
    # llama-bench's names.
    assert (record["test"], record["n_gen"], record["n_depth"]) == ("tg2 @ d3", 2, 3)
    assert len(record["samples_ts"]) == len(record["samples_ns"]) == 3
    assert record["model_n_params"] > 0
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [line["test"] for line in lines] == [row.test for row in report.rows]
    assert json.loads(lines[0]["samples_ts"]) == report.to_dict()["rows"][0]["samples_ts"]
    table = report.to_markdown().splitlines()
    assert table[1].startswith("| ---")
    assert len({line.count("|") for line in table[:6]}) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "llama_crab bench", "version": 1}', "[" * 100_000]
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(BenchFileError, match=r"other\.json"):
        BenchReport.load(path)


def test_damaged_rows_are_refused() -> None:
    values = report_of(row_of()).to_dict()
    for wrong in (
        *({"samples_ns": samples} for samples in (3, [0, 1], [-1], [math.nan], [10**400])),
        *({"n_tokens": n} for n in (None, 0)),
        *({"parts": 5}, {"parts": {"prefill": "x"}}, {"rounds": [0]}, {"rounds": "abc"}),
    ):
        damaged = {**values, "rows": [{**values["rows"][0], **wrong}]}
        with pytest.raises(BenchFileError):
            BenchReport.from_dict(damaged)
    with pytest.raises(BenchFileError, match="version"):
        BenchReport.from_dict({**values, "version": 2})


def test_rows_are_compared_with_the_first_of_their_test() -> None:
    slow = (1.0, 2.0, 1.0, 2.0, 1.0)
    fast = tuple(value / 1.5 for value in slow)
    report = report_of(
        row_of(seconds=slow, n_threads=1),
        row_of("pp8", seconds=slow, n_threads=1),
        row_of(seconds=fast, n_threads=2),
        row_of("pp8", seconds=slow, n_threads=2),
    )
    found = report.comparisons()
    assert sorted(found) == [2, 3]
    assert (found[2].verdict, found[3].verdict) == ("faster", "same")
    assert found[2].ratio == pytest.approx(1.5)


def test_only_common_rounds_are_compared() -> None:
    one = row_of(seconds=(1.0, 1.0, 1.0, 9.0), n_threads=1)
    two = replace(row_of(seconds=(1.0, 1.0, 1.0), n_threads=2), rounds=(0, 1, 2))
    assert report_of(one, two).comparisons()[1].verdict == "same"


def test_files_are_compared_by_test_and_settings() -> None:
    steady = (1.0, 1.01, 0.99, 1.0, 1.0)
    half = tuple(value / 2 for value in steady)
    before = report_of(
        row_of(seconds=steady, n_threads=1),
        row_of(seconds=steady, n_threads=2),
        row_of("pp8", seconds=steady, n_threads=1),
        row_of("gone", seconds=steady),
        row_of("broken", seconds=()),
    )
    after = report_of(
        row_of("new", seconds=steady),
        row_of("pp8", seconds=half, n_threads=4),
        row_of(seconds=half, n_threads=2),
        row_of(seconds=steady, n_threads=1),
        row_of("broken", seconds=steady),
    )
    found = compare_reports(before, after)
    told = [(p.before.test, p.comparison and p.comparison.verdict, p.changed) for p in found.pairs]
    assert told == [
        ("tg8", "same", {}),
        ("tg8", "faster", {}),
        ("pp8", "faster", {"n_threads": (1, 4)}),
        ("broken", None, {}),
    ]
    assert [row.test for row in found.only_before] == ["gone"]
    assert [row.test for row in found.only_after] == ["new"]
    header, rows = difference_table(found)
    assert header[-1] == "changed"
    assert rows[2][-1] == "n_threads 1 to 4"
    # Neither failed: Ctrl-C came first.
    assert rows[3][1] == rows[3][-2] == "not measured"


def test_a_plot_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "speed.png"
    plot(report_of(row_of(n_threads=1), row_of(n_threads=2), row_of("pp8")), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing was measured"):
        plot(report_of(row_of(seconds=())), path)


def test_a_plot_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"llama-crab\[plot\]"):
        plot(report_of(row_of()), tmp_path / "speed.png")


def test_the_page_runs(tiny_path: Path, run_page: Callable[..., list[str]]) -> None:
    page = run_page("bench.md", 1, '"model.gguf"', repr(str(tiny_path)))
    tests = ["pp512", "tg32 @ d256", "answer 128+32 chat"]
    assert [line.rsplit(" ", 3)[0] for line in page[:6]] == tests * 2
    assert all(line.endswith(" None") for line in page[:6])
    assert len(page) == 6 + 3
