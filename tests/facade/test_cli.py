"""The command llama-crab as a user runs it: a process, on SmolLM2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llama_crab import Llama, SamplerChain, __version__
from llama_crab.cli import main
from llama_crab.packaged import DEMO_MODEL, cache_dir

MODEL = str(cache_dir() / "models" / DEMO_MODEL.file_name)
PROMPT = "The capital of France is"
# Greedily it goes on for thousands of tokens, so a signal always finds the run at work.
ENDLESS = "1, 2, 3, 4, 5, 6,"
COMMAND = [sys.executable, "-m", "llama_crab"]
POSIX_SIGNALS = pytest.mark.skipif(
    sys.platform == "win32", reason="POSIX signals and pipes; Windows has neither"
)


def llama_crab(*args, stdin=""):
    return subprocess.run(
        [*COMMAND, *args],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def start(*args):
    """Start a process whose SIGINT is Python's, even below a shell that ignores it."""
    return subprocess.Popen(
        [*COMMAND, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def greedy_text():
    with Llama(MODEL) as llama:
        return llama.create_completion(PROMPT, 12, sampler=SamplerChain.benchmark()).text


def test_run_streams_the_text_and_reports_timings(greedy_text):
    done = llama_crab("run", "-m", MODEL, "-n", "12", "--preset", "benchmark", PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == greedy_text + "\n"
    prompt, generated = done.stderr.strip().splitlines()
    assert prompt.startswith("prompt")
    assert "generated     12 tokens" in generated
    assert "tok/s" in generated


def test_without_a_model_the_demo_model_runs(greedy_text):
    done = llama_crab("run", "-n", "12", "--temp", "0", "--no-timings", PROMPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, greedy_text + "\n", "")


@pytest.mark.parametrize("args", [(), ("-",)])
def test_the_prompt_may_come_from_stdin(args, greedy_text):
    done = llama_crab("run", "-m", MODEL, "-n", "12", "--temp", "0", *args, stdin=PROMPT + "\n")
    assert done.stdout == greedy_text + "\n"


def test_json_is_the_whole_completion(greedy_text):
    done = llama_crab("run", "-m", MODEL, "-n", "12", "--temp", "0", "--json", PROMPT)
    result = json.loads(done.stdout)
    assert result["object"] == "text_completion"
    assert result["choices"][0]["text"] == greedy_text
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["completion_tokens"] == 12
    assert result["timings"]["predicted_n"] == 12


def test_loading_and_sampling_options_arrive():
    done = llama_crab(
        *("run", "-m", MODEL, "--json", "-n", "4", "--seed", "7", "--top-k", "5", "--min-p", "0"),
        *("-c", "512", "-t", "1", "-b", "64", "-ub", "32", "-fa", "enabled", "-ngl", "0"),
        *("-ctk", "q8_0", "-ctv", "q8_0", PROMPT),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seed"] == 7


def test_a_seed_repeats_the_answer():
    args = ("run", "-m", MODEL, "-n", "12", "--temp", "1.5", "--no-timings", PROMPT, "--seed")
    one, again, other = (llama_crab(*args, seed).stdout for seed in ("3", "3", "4"))
    assert one == again
    assert one != other


def test_a_stop_string_ends_the_text(greedy_text):
    stop = greedy_text[len(greedy_text) // 2 :][:4]
    args = ("run", "-m", MODEL, "-n", "12", "--temp", "0", "--no-timings")
    done = llama_crab(*args, "--stop", "@@@", "--stop", stop, PROMPT)
    assert done.stdout == greedy_text[: greedy_text.index(stop)] + "\n"


def test_verbose_shows_what_llama_cpp_says():
    args = ("run", "-m", MODEL, "-n", "1", "--no-timings", PROMPT)
    assert "llama_model_loader" in llama_crab(*args, "-v").stderr
    assert llama_crab(*args).stderr == ""


def test_a_missing_model_is_one_line_and_status_1(tmp_path):
    done = llama_crab("run", "-m", str(tmp_path / "no.gguf"), PROMPT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("llama-crab: no model file ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "info"])
def test_a_file_that_is_no_model_is_one_line_and_status_1(command, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"not a model at all" * 50)
    args = ("run", "-m", str(path), PROMPT) if command == "run" else ("info", str(path))
    done = llama_crab(*args)
    assert done.returncode == 1
    assert done.stderr.startswith(f"llama-crab: cannot load {path}: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("run",), "no PROMPT, and nothing on stdin"),
        (("run", "-n", "x", "hi"), "invalid int value: 'x'"),
        (("run", "-b", "0", "hi"), "n_batch: 0 is less than 1"),
        (("run", "-fa", "maybe", "hi"), "flash_attn_type: 'maybe' is not one of"),
        (("run", "--top-p", "-1", "hi"), "top_p"),
        (("run", "--preset", "chat", "--temp", "1", "hi"), "--preset and --temp exclude"),
        (("run", "--preset", "nice", "hi"), "invalid choice: 'nice'"),
    ],
)
def test_wrong_usage_is_status_2(args, message):
    done = llama_crab(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@POSIX_SIGNALS
def test_ctrl_c_keeps_the_text_prints_timings_and_gives_130():
    with start("run", "-m", MODEL, "-n", "4000", "-c", "4096", "--temp", "0", ENDLESS) as running:
        head = running.stdout.read(20)
        running.send_signal(signal.SIGINT)
        rest, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert len(head) == 20
    assert rest.endswith(b"\n")
    assert b"generated" in errors
    assert b"Traceback" not in errors


@POSIX_SIGNALS
def test_a_reader_that_leaves_ends_the_run_quietly():
    with start("run", "-m", MODEL, "-n", "4000", "-c", "4096", "--temp", "0", ENDLESS) as running:
        running.stdout.read(5)
        running.stdout.close()
        errors = running.stderr.read()
        assert running.wait(timeout=60) == 141
    assert errors == b""


def test_info_names_build_machine_and_threads():
    done = llama_crab("info", "--json")
    facts = json.loads(done.stdout)
    assert facts["version"] == __version__
    assert "0c1e57098".startswith(facts["llama_cpp"]["commit"][:9])
    assert "CPU" in facts["backends"]
    assert facts["devices"][0]["memory_total"] > 0
    assert set(facts["supports"]) == {"gpu_offload", "mmap", "mlock", "rpc"}
    assert 1 <= facts["threads"]["default"] <= (os.cpu_count() or 1)
    assert "cores" in facts["threads"]["why"]
    assert "model" not in facts


def test_info_of_a_model_matches_its_metadata():
    model = json.loads(llama_crab("info", MODEL, "--json").stdout)["model"]
    special = model.pop("special_tokens")
    assert model == {
        "path": MODEL,
        "architecture": "llama",
        "name": "Smollm2 135M 8k Lc100K Mix1 Ep2",
        "license": "apache-2.0",
        "license_link": None,
        "n_params": 134_515_008,
        "size": 96_576_768,
        "quantisation": "Q4_1",
        "n_ctx_train": 8192,
        "n_embd": 576,
        "n_layer": 30,
        "n_head": 9,
        "n_head_kv": 3,
        "n_swa": 0,
        "vocab": {"type": "bpe", "n_tokens": 49152},
        "chat_template": True,
    }
    assert special["bos"] == {"id": 1, "text": "<|im_start|>"}
    assert special["eos"] == {"id": 2, "text": "<|im_end|>"}
    assert "fim_pre" not in special


def test_info_for_people():
    lines = llama_crab("info", MODEL).stdout.splitlines()
    rows = {line[:16].strip(): line[16:] for line in lines}
    assert rows["llama-crab"] == __version__
    assert rows["parameters"] == "134.5 M"
    assert rows["quantisation"] == "Q4_1"
    assert rows["context"] == "8192 tokens trained"
    assert rows["chat template"] == "yes"
    assert rows["licence"] == "apache-2.0"
    assert "by default: " in rows["threads"]


def test_the_installed_script_is_this_command():
    script = Path(sysconfig.get_path("scripts"), "llama-crab")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"llama-crab {__version__}\n"


def test_main_returns_statuses_instead_of_raising(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llama-crab {__version__}\n"
    assert main(["run", "--no-such-option"]) == 2
