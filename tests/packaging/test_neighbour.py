"""Two copies of llama.cpp in one process: ours and llama-cpp-python's."""

import subprocess
import sys
from pathlib import Path

import fetch
import pytest

PROGRAM = """
import sys

sys.path.append(sys.argv[1])
order = sys.argv[3]
if order == "ours last":
    import llama_cpp
from llama_crab import Llama
import llama_cpp

prompt = "The capital of France is"
ours = Llama(sys.argv[2], n_ctx=256)
theirs = llama_cpp.Llama(sys.argv[2], n_ctx=256, verbose=False)
for _ in range(2):
    print(repr(ours.create_completion(prompt, 8).text))
    print(repr(theirs(prompt, max_tokens=8)["choices"][0]["text"]))
"""


@pytest.fixture(scope="module")
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install llama-cpp-python, at the version that carries our pin, into a folder of its own."""
    folder = tmp_path_factory.mktemp("neighbour")
    pin = fetch.read_pin()
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
    subprocess.run([*command, f"{pin.package}=={pin.version}"], check=True)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_both_generate_in_one_process(neighbour: Path, order: str) -> None:
    model = fetch.cache_dir() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    command = [sys.executable, "-c", PROGRAM, str(neighbour), str(model), order]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    texts = done.stdout.splitlines()
    assert len(texts) == 4
    assert all(len(text) > 2 for text in texts)
