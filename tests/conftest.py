"""Models for all tests: two real ones, and tiny random ones made once per run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from llama_crab import _core
from llama_crab.tuning import default_n_threads

# Children started in the checkout must find the installed package too, not the source.
os.environ["PYTHONSAFEPATH"] = "1"

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def _module(name: str) -> ModuleType:
    """Load a file beside this one; in importlib mode `tests` is no package."""
    spec = importlib.util.spec_from_file_location(f"llama_crab_tests_{name}", TESTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long forms as well")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--full"):
        config.option.markexpr = ""


@pytest.fixture(scope="session")
def llama_cpp_tree() -> Path:
    """Return the llama.cpp tree that the package was built from."""
    tree = Path(os.environ.get("LLAMA_CPP_DIR") or ROOT / "third_party" / "llama.cpp")
    assert (tree / "models").is_dir(), f"{tree} has no models folder; run third_party/fetch.py"
    return tree


@pytest.fixture(scope="session")
def vocab_folder(llama_cpp_tree: Path) -> Path:
    """Return the folder of vocab-only GGUFs with golden tokenizer files."""
    return llama_cpp_tree / "models"


@pytest.fixture(scope="session")
def n_threads() -> int:
    return default_n_threads()


@pytest.fixture(scope="session")
def smol_path() -> Path:
    """Return SmolLM2-135M-Instruct Q4_1, verified; fetched where it is missing."""
    models = _module("fetch_models")
    path: Path = models.fetch(models.DEMO_MODEL)
    return path


@pytest.fixture
def run_page(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs the Python of a page of docs/, and returns what it prints.

    ``run_page(name, n_blocks, old, new, *flags)``: the page has that many blocks, which are one
    program, in which `new` replaces `old`; the flags are the interpreter's.
    """

    def run(name: str, n_blocks: int, old: str, new: str, *flags: str) -> list[str]:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == n_blocks
        script = tmp_path / "examples.py"
        script.write_text("\n".join(blocks).replace(old, new), encoding="utf-8")
        command = [sys.executable, *flags, str(script)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    return run


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Return Gemma 3 270M Q4_K_M, verified; fetched where it is missing."""
    models = _module("fetch_models")
    path: Path = models.fetch(models.GEMMA)
    return path


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Return all-MiniLM-L6-v2 in F32, made from the original where it is missing."""
    path: Path = _module("minilm").minilm_path(_module("fetch_models").fetch, "F32")
    return path


@pytest.fixture(scope="session")
def minilm_f16_path() -> Path:
    """Return all-MiniLM-L6-v2 in F16, made from the original where it is missing."""
    path: Path = _module("minilm").minilm_path(_module("fetch_models").fetch, "F16")
    return path


@pytest.fixture(scope="session")
def smol(smol_path: Path) -> Iterator[_core.Model]:
    with _core.Model(smol_path) as model:
        yield model


@pytest.fixture(scope="session")
def gemma(gemma_path: Path) -> Iterator[_core.Model]:
    with _core.Model(gemma_path) as model:
        yield model


@pytest.fixture(scope="session")
def tiny_gguf() -> ModuleType:
    """Return the module that writes tiny models, with their shapes as constants."""
    return _module("tiny_gguf")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def tiny_path(tiny_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path) -> Path:
    """Return a random Llama of 2 layers, width 64, with a SentencePiece vocabulary."""
    tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    path: Path = tiny_gguf.write_model(tiny_folder / "tiny.gguf", tokens)[0]
    return path


@pytest.fixture(scope="session")
def tiny_swa_path(tiny_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path) -> Path:
    """Return a random Gemma 3 of 2 layers with a sliding window and a BPE vocabulary."""
    tokens = tiny_gguf.bpe_tokens(vocab_folder / "ggml-vocab-gpt-2.gguf")
    path: Path = tiny_gguf.write_model(tiny_folder / "swa.gguf", tokens, arch="gemma3")[0]
    return path


@pytest.fixture(scope="session")
def tiny_splits(tiny_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path) -> list[Path]:
    """Return the same weights as `tiny_path`, in three files."""
    tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    files: list[Path] = tiny_gguf.write_model(tiny_folder / "tiny.gguf", tokens, n_split=3)
    return files


@pytest.fixture(scope="session")
def tiny_lora_path(tiny_gguf: ModuleType, tiny_folder: Path) -> Path:
    """Return a LoRA adapter of rank 4 for `tiny_path`."""
    path: Path = tiny_gguf.write_lora(tiny_folder / "lora.gguf")
    return path


@pytest.fixture(scope="session")
def tiny_reranker_path(tiny_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path) -> Path:
    """Return a random BERT with a classifier of one output and a WordPiece vocabulary."""
    tokens = tiny_gguf.wpm_tokens(vocab_folder / "ggml-vocab-bert-bge.gguf")
    path: Path = tiny_gguf.write_reranker(tiny_folder / "reranker.gguf", tokens)
    return path


@pytest.fixture(scope="session")
def tiny_embedder_path(tiny_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path) -> Path:
    """Return a random BERT with mean pooling."""
    tokens = tiny_gguf.wpm_tokens(vocab_folder / "ggml-vocab-bert-bge.gguf")
    path: Path = tiny_gguf.write_embedder(tiny_folder / "embedder.gguf", tokens)
    return path


@pytest.fixture(scope="session")
def tiny_fim_path(tiny_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path) -> Path:
    """Return a random Llama with all six tokens for filling in the middle."""
    tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    path: Path = tiny_gguf.write_fim(tiny_folder / "all-fim.gguf", tokens)
    return path


@pytest.fixture(scope="session")
def tiny_recurrent_path(tiny_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path) -> Path:
    """Return a random Mamba."""
    tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    path: Path = tiny_gguf.write_recurrent(tiny_folder / "recurrent.gguf", tokens)
    return path


@pytest.fixture(scope="session")
def tiny_hybrid_path(tiny_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path) -> Path:
    """Return a random Jamba: a recurrent layer, then one that attends."""
    tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    path: Path = tiny_gguf.write_hybrid(tiny_folder / "hybrid.gguf", tokens)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Iterator[_core.Model]:
    with _core.Model(tiny_path) as model:
        yield model


@pytest.fixture
def tiny_context(tiny: _core.Model) -> Iterator[_core.Context]:
    """Return a small context of 4 sequences, one thread."""
    with _core.Context(
        tiny, n_ctx=256, n_batch=64, n_ubatch=64, n_seq_max=4, n_threads=1, n_threads_batch=1
    ) as context:
        yield context
