"""LangChain's LlamaCpp, ChatLlamaCpp and embeddings, and LlamaIndex's LlamaCPP, on our module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_crab.compat.llama_cpp import Llama

PROGRAM = Path(__file__).with_name("integrations_program.py")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install both, without the llama-cpp-python that one of them asks for."""
    folder = tmp_path_factory.mktemp("integrations")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
    subprocess.run([*command, "langchain-community>=0.4", "llama-index-core>=0.14"], check=True)
    # Beside the others, since pip does not add to a folder that it has made.
    command[-1] = str(folder / "llm")
    subprocess.run([*command, "--no-deps", "llama-index-llms-llama-cpp>=0.7"], check=True)
    added = folder / "llama_index" / "llms"
    added.mkdir(exist_ok=True)
    (folder / "llm" / "llama_index" / "llms" / "llama_cpp").rename(added / "llama_cpp")
    return folder


@pytest.mark.full
def test_langchain_and_llama_index_run_unchanged(
    packages: Path, smol_path: Path, minilm_path: Path, smol_cpp: Llama
) -> None:
    command = [sys.executable, str(PROGRAM), str(packages), str(smol_path), str(minilm_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    prompt = "The capital of France is"
    text = smol_cpp(prompt, max_tokens=8, temperature=0)["choices"][0]["text"]
    assert found["langchain text"] == found["llama-index text"] == text
    assert "".join(found["langchain stream"]) == text
    assert "".join(found["llama-index stream"]) == text
    assert found["llama-index chat"] == text
    assert found["langchain stop"] == text.partition(".")[0]
    assert found["langchain tokens"] == len(smol_cpp.tokenize(prompt.encode()))
    assert found["langchain grammar"] in ("yes", "no")
    assert found["langchain chat"]
    assert found["langchain chat reason"] in ("stop", "length")
    assert "".join(found["langchain chat stream"]) == found["langchain chat"]
    assert set(found["langchain structured"]) == {"city", "population"}
    assert found["langchain calls"] == [["Place", ["city", "population"]]]
    assert found["langchain streamed calls"] == found["langchain calls"]
    assert found["langchain vectors"] == [384, 384]
    assert found["langchain vector"] == 384
    assert found["llama-index context"] == 512
