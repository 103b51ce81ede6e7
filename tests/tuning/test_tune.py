"""`tune` and its command on a tiny model: what it measures, tells, saves and refuses.

How fast things are is not tested here; benchmarks/tune_against_grid.py measures that.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from llama_crab import Llama, LlamaParams, ParameterError
from llama_crab.cli import main
from llama_crab.errors import ModelNotFoundError
from llama_crab.tuning import Profile, goals, probe, tune, tune_report, tuner
from llama_crab.tuning.bed import Bed
from llama_crab.tuning.search import Step
from llama_crab.tuning.tuner import explain


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CRAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "profiles"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two threads that wait for each other would take seconds where other work is running."""
    monkeypatch.setattr(probe, "default_n_threads", lambda: 1)
    monkeypatch.setattr(goals, "_logical_cpus", lambda: 1)


@pytest.mark.parametrize("goal", ["latency", "throughput", "ttft"])
def test_each_goal_ends_with_a_table_and_a_profile_that_loads(goal, tiny_path, own_cache):
    said = []
    report = tune(tiny_path, goal=goal, budget_sec=6.0, progress=said.append)
    assert report.ended in ("converged", "budget")
    assert report.n_measured > 3
    assert len(said) == 2 + len(report.steps)
    (path,) = own_cache.iterdir()
    assert str(path) == report.profile_path
    assert Profile.load(path) == report.profile
    levers = {
        "latency": {"flash_attn_type"},
        "ttft": {"flash_attn_type", "n_ubatch"},
        "throughput": {"n_seq_max", "flash_attn_type", "n_ubatch"},
    }[goal]
    rows = tune_report.table(report)
    assert levers <= {row[0] for row in rows}
    changed = {row.lever for row in report.rows if row.after != row.before}
    if report.reverted or not changed:
        assert report.profile.params == {}
        assert "defaults are best" in tune_report.conclusion(report) or report.ended == "budget"
    else:
        assert set(report.profile.params) == changed
        assert rows[-1][0] == "total, measured again"
    with Llama(tiny_path, profile=goal) as llama:
        for name, value in report.profile.params.items():
            assert getattr(llama.params, name) == value


def test_kv_types_are_tried_only_when_asked_for(tiny_path):
    plain = tune(tiny_path, budget_sec=3.0, depth=0, save=False)
    asked = tune(tiny_path, budget_sec=6.0, depth=0, save=False, allow_quantised_kv=True)
    assert not any("type_k" in row.lever for row in plain.rows)
    assert any(row.lever == "type_k, type_v" for row in asked.rows)
    assert any("changes what the model answers" in note for note in asked.notes)


def test_where_the_search_begins_can_be_given(tiny_path):
    params = LlamaParams(n_threads=1, flash_attn_type="disabled")
    report = tune(tiny_path, budget_sec=3.0, depth=0, params=params, save=False)
    start = {row.lever: row.before for row in report.rows}
    assert start["flash_attn_type"] == "disabled"
    assert start.get("n_threads", 1) == 1


def test_a_budget_too_small_for_a_search_leaves_the_defaults(tiny_path):
    report = tune(tiny_path, budget_sec=0.001, save=False)
    assert report.profile.params == {}
    assert report.ended == "budget"
    assert "Nothing better" in tune_report.conclusion(report)


@pytest.mark.parametrize("goal", ["latency", "throughput", "ttft"])
@pytest.mark.parametrize("token_sec", [0.001, 0.03, 0.5, 5.0])
def test_a_slow_model_stays_within_its_budget(goal, token_sec, tiny_path, monkeypatch):
    """Time passes by tokens only; one measurement beyond the budget is what tune.md allows."""
    now, costs = [0.0], []

    def take(n_tokens):
        costs.append(n_tokens * token_sec)
        now[0] += costs[-1]
        return costs[-1]

    def filled(bed, depth):
        if depth and getattr(bed, "depth", 0) != depth:
            now[0] += depth * token_sec
            bed.depth = depth

    def prefill(bed, n, depth=0):
        filled(bed, depth)
        return take(n)

    def parallel(bed, n_seq, n, depth=0):
        filled(bed, n_seq * depth)
        return take(n_seq * n)

    monkeypatch.setattr(Bed, "prefill", prefill)
    monkeypatch.setattr(Bed, "parallel", parallel)
    clock = SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime)
    monkeypatch.setattr(tuner, "time", clock)
    report = tune(tiny_path, goal=goal, budget_sec=20.0, save=False)
    assert report.elapsed_sec == now[0]
    # The look cannot be spared: a decode that pages the weights in, a prefill, a token.
    assert now[0] <= max(20.0 + costs[-1], 5 * token_sec)
    assert report.n_measured == 0 or token_sec < 5.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"goal": "speed"}, "goal: 'speed' is not one of latency"),
        ({"budget_sec": 0}, "budget_sec: 0 is not above 0"),
        ({"budget_sec": -1.0}, "budget_sec: -1"),
        ({"budget_sec": float("nan")}, "budget_sec: nan"),
        ({"budget_sec": "60s"}, "budget_sec: expected seconds"),
        ({"depth": -1}, "depth: -1 is less than 0"),
        ({"depth": 10**6}, "depth: 1000000 does not fit"),
    ],
)
def test_wrong_arguments_are_named(fields, message, tiny_path):
    with pytest.raises(ParameterError, match=re.escape(message)):
        tune(tiny_path, **fields)


def test_a_missing_model(tmp_path):
    with pytest.raises(ModelNotFoundError):
        tune(tmp_path / "no.gguf")


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Step("n_threads", 4, 8, "kept", 0.03), "n_threads 4 -> 8: +3.0 %, kept"),
        (Step("n_ubatch", 512, 64, "slower", -0.2), "n_ubatch 512 -> 64: -20.0 %, slower"),
        (
            Step("n_batch", 1, 2, "same", 0.004, 0.02),
            "n_batch 1 -> 2: +0.4 %, within the spread, left as it was",
        ),
        (
            Step("n_batch", 1, 2, "same", 0.008, 0.002),
            "n_batch 1 -> 2: +0.8 %, less than 1 %, left as it was",
        ),
        (
            Step("n_seq_max", 8, 16, "infeasible", note="no memory"),
            "n_seq_max 8 -> 16: not possible (no memory)",
        ),
        (
            Step("n_ubatch", 512, 1024, "kept", 0.1, note="with n_batch 1024"),
            "n_ubatch 512 -> 1024 (with n_batch 1024): +10.0 %, kept",
        ),
    ],
)
def test_steps_in_words(step, text):
    assert explain(step) == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "abc"], "--budget: 'abc' is no time"),
        (["--budget", "0"], "--budget: '0' is no time"),
        (["--budget", "-5"], "--budget: '-5' is no time"),
        (["--goal", "foo"], "--goal: invalid choice: 'foo'"),
        (["--depth", "x"], "--depth: 'x' is not a number"),
        (["--depth", "1000000"], "--depth: 1000000 does not fit"),
        (["--report", "x.pdf"], "--report: x.pdf does not end in .html or .png"),
        (["--report", "/no/such/x.png"], "--report: there is no folder"),
        (["--output", "/no/such/x.json"], "--output: there is no folder"),
        (["--output", "/"], "--output: / is a folder"),
    ],
)
def test_wrong_options_are_usage_errors(args, message, tiny_path, capsys):
    assert main(["tune", str(tiny_path), *args]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_what_is_asked_for(tiny_path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page, profile = tmp_path / "r.html", tmp_path / "p.json"
    args = ["--budget", "3s", "--depth", "0", "--report", str(page), "--output", str(profile)]
    assert main(["tune", str(tiny_path), *args]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("lever")
    assert "Saved for Llama" in out
    assert err == ""  # progress is for terminals
    assert Profile.load(profile).goal == "latency"
    text = page.read_text()
    assert "<svg" in text
    # Self-contained: nothing is fetched when it is opened.
    assert not re.search(r"<(link|img|script src)|@import|url\(http", text)
    data = json.loads(re.search(r'id="report">(.*?)</script>', text, re.DOTALL)[1])
    assert data["goal"] == "latency"
    assert len(data["steps"]) == text.count("<li>")


def test_json_and_png(tiny_path, tmp_path, capsys, own_cache):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "r.png"
    args = ["--budget", "2s", "--depth", "0", "--json", "--no-save", "--report", str(picture)]
    assert main(["tune", str(tiny_path), *args]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["profile_path"] is None
    assert not own_cache.exists()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_is_printed_before_a_file_fails(tiny_path, tmp_path, capsys, monkeypatch):
    def fail(self, path=None):
        raise OSError("the disk is full")

    monkeypatch.setattr(Profile, "save", fail)
    args = ["--budget", "2s", "--depth", "0", "--no-save", "--output", str(tmp_path / "p.json")]
    assert main(["tune", str(tiny_path), *args]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("lever")
    assert "the disk is full" in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals are told by sockets only")
def test_ctrl_c_ends_a_decode_at_once(tiny_path):
    """Python's own handler does nothing here: only a decode that is aborted ends the search."""
    over = threading.Event()

    def press():
        while not over.wait(0.003):
            os.kill(os.getpid(), signal.SIGINT)

    said = []
    before = signal.signal(signal.SIGINT, lambda *_: None)
    thread = threading.Thread(target=press)

    def tell(line):
        said.append(line)
        if len(said) == 2:
            thread.start()

    try:
        report = tune(tiny_path, budget_sec=600.0, depth=400, save=False, progress=tell)
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
        signal.signal(signal.SIGINT, before)
    assert report.ended == "interrupted"
    assert report.elapsed_sec < 600.0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_says_that_it_is_unfinished(tiny_path):
    """The progress shows when the search runs: a terminal is faked by a flag of the test."""
    code = (
        "import sys; sys.stderr.isatty = lambda: True\n"
        "from llama_crab.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "tune", str(tiny_path), "--budget", "600", "--depth", "400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stderr:
        if line.startswith("loaded in"):
            break
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the search was over before the signal")
    assert process.returncode == 130
    assert "unfinished" in out
