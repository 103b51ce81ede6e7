"""``llama-crab bench`` as a user runs it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_crab.cli import main
from llama_crab.cli.bench import _flash_attn, _ints, _pair
from llama_crab.cli.tables import plain_table

COMMAND = [sys.executable, "-m", "llama_crab", "bench"]
SHORT = ("-p", "8", "-n", "4", "-r", "3", "-t", "1")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and terminals")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args], capture_output=True, text=True, timeout=300, check=False
    )


def test_without_a_model_the_demo_model_is_measured(smol_path: Path) -> None:
    done = run(*SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    header, rule, prefill, generate = done.stdout.splitlines()
    assert header.split() == ["threads", "test", "rate"]
    assert set(rule) == {"-", " "}
    assert re.fullmatch(r"1 +pp8 +[\d.]+ ± [\d.]+ tok/s", prefill)
    assert re.fullmatch(r"1 +tg4 +[\d.]+ ± [\d.]+ tok/s", generate)


def test_the_matrix_as_json(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(
        [
            *("bench", str(tiny_path), *SHORT, "-d", "0,16", "-pg", "6,3", "-np", "2", "-t", "2"),
            *("-b", "32", "-ub", "16", "-fa", "on", "-ctk", "bf16", "-ctv", "f16", "-ngl", "0"),
            *("-o", "json"),
        ]
    )
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    report = json.loads(captured.out)
    rows = report["rows"]
    tests = ["pp8", "tg4", "pp6+tg3", "tg4 x 2"]
    expected = [*tests, *(f"{test} @ d16" for test in tests)]
    assert [(row["n_threads"], row["test"]) for row in rows] == [
        (n, test) for n in (1, 2) for test in expected
    ]
    for row in rows:
        assert (row["n_batch"], row["n_ubatch"], row["n_gpu_layers"]) == (32, 16, 0)
        assert (row["type_k"], row["type_v"], row["flash_attn_type"]) == ("bf16", "f16", "enabled")
        assert len(row["samples_ts"]) == 3
    assert report["machine"]["llama_cpp"]


def test_end_to_end_tests_and_csv(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = ("--presets", "benchmark,chat", "--reuse", "--tokenize", "-o", "csv")
    assert main(["bench", "-m", str(tiny_path), *SHORT, *ends]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["test"] for line in lines] == [
        *("pp8", "tg4", "answer 8+4 benchmark", "answer 8+4 chat", "reuse pp8", "tokenize 100000"),
    ]
    assert json.loads(lines[2]["parts"]).keys() == {
        *("prefill", "decode", "sample", "text", "first_token")
    }


def test_drafts_are_measured_on_two_texts(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["bench", str(tiny_path), "-p", "0", "-n", "0", "-r", "1", "-t", "1", "-o", "json"]
    assert main([*args, "--speculative", "none,auto", "--speculative", "lookup:3:4"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    drafts = (None, "auto", "lookup:3:4")
    assert [(row["test"], row["speculative"]) for row in rows] == [
        (test, value) for value in drafts for test in ("copy 128", "free 128")
    ]
    assert all({"drafted", "accepted", "acceptance"} <= row["parts"].keys() for row in rows[2:])
    assert main([*args, "--texts", "free"]) == 0
    assert [row["test"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["free 128"]


def test_one_failure_leaves_the_others(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", str(tiny_path), *SHORT, "-fa", "0", "-ctv", "f16,q8_0"]
    assert main([*args, "-o", "md"]) == 3
    text = capsys.readouterr().out
    assert "| pp8 | failed |" in text
    assert "needs flash attention" in text
    assert re.search(r"\| f16 \| pp8 \| [\d.]+ ±", text)
    assert main([*args[:-1], "q8_0"]) == 1
    assert "pp8 and 1 more: ParameterError" in capsys.readouterr().out


def test_runs_are_saved_and_compared(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, image = (str(tmp_path / name) for name in ("one.json", "two.json", "speed.png"))
    args = ["bench", str(tiny_path), *SHORT]
    assert main([*args, "--save", one, "--plot", image]) == 0
    assert Path(image).read_bytes().startswith(b"\x89PNG")
    assert main([*args, "-n", "5", "--save", two]) == 0
    capsys.readouterr()
    assert main(["bench", "compare", one, two]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["test", "before", "after"]
    assert [line.split()[0] for line in lines[2:4]] == ["pp8", "tg4"]
    assert lines[-1] == "only after: tg5"
    assert main(["bench", "compare", one, image]) == 1
    assert main(["bench", "compare", one, str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("-b", "0"), "-b/--batch-size: 0"),
        (("-p", "abc"), "-p/--n-prompt: 'abc'"),
        (("-p", "1,,2"), "-p/--n-prompt"),
        (("-n", "-1"), "-n/--n-gen: -1"),
        (("-n", "8-4"), "-n/--n-gen: '8-4'"),
        (("-n", "2-9*1"), "-n/--n-gen: '2-9*1'"),
        (("-n", "1-9+0"), "-n/--n-gen: '1-9+0'"),
        (("-n", "1-999999999"), "-n/--n-gen"),
        (("-n", "99999999999999999999"), "-n/--n-gen"),
        (("-pg", "8"), "-pg/--n-pg: '8'"),
        (("-pg", "0,0"), "-pg/--n-pg"),
        (("-t", "0"), "-t/--threads: 0"),
        (("-t", "513"), "-t/--threads: 513"),
        (("-np", "257"), "-np/--n-seq: 257"),
        (("-fa", "maybe"), "-fa/--flash-attn: 'maybe'"),
        (("-ctk", "foo"), "-ctk/--cache-type-k: 'foo'"),
        (("-ctv", "f16,"), "-ctv/--cache-type-v: ''"),
        (("-ngl", "x"), "-ngl/--n-gpu-layers: 'x'"),
        (("-r", "0"), "-r/--repetitions: '0'"),
        (("-o", "xml"), "-o/--output"),
        (("--presets", "poetic"), "--presets: 'poetic'"),
        (("--presets", "all", "-p", "0"), "--presets: need -p"),
        (("--texts", "poem"), "--texts: 'poem'"),
        (("--speculative", "auto,maybe"), "--speculative: 'maybe' is not auto, none"),
        (("--reuse", "-p", "0"), "--reuse: needs -p"),
        (("-p", "0", "-n", "0"), "-p and -n are 0"),
        (("--plot", "speed.txt"), "--plot: speed.txt"),
        (("--plot", "no/folder/speed.png"), "--plot: there is no folder"),
        (("--save", "no/folder/run.json"), "--save: there is no folder"),
        (("compare", "one.json"), "compare: give two files"),
    ],
)
def test_wrong_usage_names_the_option(
    args: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *args]) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "none.gguf")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("llama-crab: no model file")
    assert captured.err.count("\n") == 1


def test_a_missing_matplotlib_is_told_before_the_run(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", str(tiny_path), "--plot", "speed.png"]) == 1
    captured = capsys.readouterr()
    assert "llama-crab[plot]" in captured.err
    assert captured.out == ""


def test_ranges_are_those_of_llama_bench() -> None:
    read = _ints(0)
    assert read("7") == [7]
    assert read("1,2,4") == [1, 2, 4]
    assert read("1-4") == [1, 2, 3, 4]
    assert read("1-8+3") == [1, 4, 7]
    assert read("128-2048*2") == [128, 256, 512, 1024, 2048]
    assert read("0,16-32+16,5") == [0, 16, 32, 5]
    assert _ints(-1)("-1,10") == [-1, 10]
    assert _pair("512,128") == [(512, 128)]
    assert _flash_attn("on,0,auto") == ["enabled", "disabled", "auto"]


def test_a_plain_table_lines_up() -> None:
    text = plain_table(["a", "long name"], [["1", "x"], ["1000", ""]])
    assert text.splitlines() == ["a     long name", "----  ---------", "1     x", "1000"]


@POSIX
def test_ctrl_c_prints_what_was_measured(smol_path: Path, tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    primary, secondary = os.openpty()
    process = subprocess.Popen(
        [*COMMAND, "-p", "8", "-n", "4", "-r", "9999", "-t", "1", "--save", str(saved)],
        stdout=subprocess.PIPE,
        stderr=secondary,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(secondary)
    shown = b""
    # The bar on the terminal says when rounds are over.
    while not re.search(rb"\] [89]/20000 +[\d:]+ left +(pp8|tg4)", shown):
        shown += os.read(primary, 4096)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    os.close(primary)
    assert process.returncode == 130
    lines = out.decode().splitlines()
    assert re.search(r"pp8 +[\d.]+ ±", lines[2])
    assert lines[-1].startswith("interrupted")
    report = json.loads(saved.read_text())
    assert report["interrupted"] is True
    assert all(len(row["samples_ns"]) >= 3 for row in report["rows"])
