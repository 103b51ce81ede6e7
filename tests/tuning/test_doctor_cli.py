"""`llama-crab doctor` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_crab import LlamaParams
from llama_crab.cli import main
from llama_crab.tuning import default_n_threads, doctor
from llama_crab.tuning.finding import Diagnosis, Finding


def test_the_demo_model(smol_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", str(smol_path), "--quick", "-v"])
    shown = capsys.readouterr()
    assert status in (0, 4)  # as the machine is
    assert shown.err == ""
    assert "context-length: 4096 of 8192 tokens" in shown.out
    assert shown.out.splitlines()[-1].split()[1] == "checks,"


def test_passed_checks_are_shown_on_request_only(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "-v"])
    assert "\nok " in "\n" + capsys.readouterr().out
    main(["doctor"])
    assert "\nok " not in "\n" + capsys.readouterr().out


def test_problems_have_a_status_of_their_own(
    smol_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["-m", str(smol_path), "-c", "20000", "--temp", "0", "--quick", "--json"]
    assert main(["doctor", *args]) == 4
    shown = json.loads(capsys.readouterr().out)
    found = {item["name"]: item for item in shown["findings"]}
    assert found["context-length"]["severity"] == "problem"
    assert found["sampler"]["severity"] == "advice"
    assert shown["counts"]["problem"] >= 1
    assert set(found["sampler"]) == {"name", "severity", "symptom", "evidence", "fix"}


def test_the_options_reach_the_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[LlamaParams | None] = []

    def look(params: LlamaParams | None = None, **options: object) -> Diagnosis:
        seen.append(params)
        return Diagnosis((Finding("x", "advice", "slow", "seen", "do"),))

    monkeypatch.setattr(doctor, "examine", look)
    n_threads = default_n_threads()
    assert main(["doctor", "a.gguf", "-t", str(n_threads), "-ctk", "q8_0", "-ub", "64"]) == 0
    assert seen == [LlamaParams("a.gguf", n_threads=n_threads, type_k="q8_0", n_ubatch=64)]
    assert capsys.readouterr().out.splitlines() == [
        "advice   x: slow",
        "  seen   seen",
        "  fix    do",
        "",
        "1 check, no problems, 1 piece of advice",
    ]


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["none.gguf"], 1, "no model file none.gguf"),
        (["a.gguf", "-m", "b.gguf"], 2, "MODEL and -m name a model each"),
        (["-ub", "9999"], 2, "n_ubatch: 9999 is larger than n_batch"),
        (["--preset", "chat", "--temp", "0"], 2, "exclude each other"),
    ],
)
def test_wrong_input(
    args: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *args]) == status
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    assert main(["doctor", str(path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
