"""Greedy text against llama.cpp's own llama-completion, and a batch of 4 against 4 single runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_crab import Completion, CompletionStream, Llama, SamplerChain

FindProgram = Callable[[str], Path]
GREEDY = SamplerChain().greedy()
N_CTX, N_BATCH, N_UBATCH, N_TOKENS = 1024, 128, 64, 64
PROMPTS = {
    "short": "The capital of France is",
    "code": 'def fibonacci(n):\n    """Return the n-th number."""\n    if n < 2:\n\treturn n\n',
    "unicode": "Größe und Übermut: 東京タワー, Привет мир, नमस्ते, 👩‍👩‍👧 🇩🇪 — «ça va?»",
    "long": "".join(
        f"{i}. The {colour} ship left the harbour with {i * 17} sacks of {cargo} on board.\n"
        for i, (colour, cargo) in enumerate(
            [("red", "wheat"), ("green", "salt"), ("old", "wool"), ("black", "tea")] * 3, start=1
        )
    ),
}


@pytest.fixture(scope="session")
def llama_completion(find_program: FindProgram) -> Path:
    return find_program("llama-completion")


@pytest.fixture(scope="module", params=["smol", "gemma"])
def model_path(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_path")
    return path


def load(path: Path, n_threads: int, n_seq_max: int = 1) -> Llama:
    return Llama(
        path,
        n_ctx=N_CTX * n_seq_max,
        n_batch=N_BATCH,
        n_ubatch=N_UBATCH,
        n_seq_max=n_seq_max,
        n_threads=n_threads,
        flash_attn_type="enabled",
    )


def complete(llama: Llama, prompt: str | list[int], max_tokens: int = N_TOKENS) -> Completion:
    result = llama.create_completion(prompt, max_tokens, sampler=GREEDY, cache_prompt=False)
    assert isinstance(result, Completion)
    return result


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_greedy_text_is_that_of_llama_completion(
    llama_completion: Path, model_path: Path, n_threads: int, tmp_path: Path, prompt: str
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(prompt.encode())
    done = subprocess.run(
        [
            *(str(llama_completion), "-m", str(model_path), "-bf", str(file), "--no-escape"),
            *("-n", str(N_TOKENS), "--temp", "0", "-no-cnv", "--no-display-prompt", "--simple-io"),
            *("-c", str(N_CTX), "-b", str(N_BATCH), "-ub", str(N_UBATCH), "-fa", "on"),
            *("-t", str(n_threads), "-tb", str(n_threads), "--swa-full", "-fit", "off"),
            *("--no-warmup", "-ngl", "0"),
        ],
        capture_output=True,
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    with load(model_path, n_threads) as llama:
        result = complete(llama, prompt)
    ending = " [end of text]\n\n\n" if result.finish_reason == "stop" else "\n\n"
    # On Windows the program writes text, with its line ends.
    printed = done.stdout.decode("utf-8", "replace").replace("\r\n", "\n")
    assert printed == result.text + ending
    if prompt == PROMPTS["long"]:
        assert result.usage.prompt_tokens > N_BATCH


def together(llama: Llama, prompts: list[str]) -> list[Completion]:
    """Run the prompts at the same time, one sequence each."""
    jobs = [
        llama.create_completion(p, N_TOKENS, sampler=GREEDY, cache_prompt=False, stream=True)
        for p in prompts
    ]
    assert llama.context.n_seq_max == len(jobs)
    while True:
        chunks = [next(job, None) for job in jobs]
        if not any(chunks):
            break
    results = []
    for job in jobs:
        assert isinstance(job, CompletionStream)
        results.append(job.result())
    return results


@pytest.fixture(scope="module")
def singles_and_batch(
    model_path: Path, n_threads: int
) -> tuple[list[list[int]], list[Completion], list[Completion]]:
    """Return the prompts' ids, what each gives alone, and what they give in one context."""
    prompts = list(PROMPTS.values())
    with load(model_path, n_threads) as llama:
        ids = [llama.tokenize(prompt) for prompt in prompts]
        singles = [complete(llama, prompt) for prompt in prompts]
    with load(model_path, n_threads, n_seq_max=4) as llama:
        batch = together(llama, prompts)
        n_steps = llama._engine.scheduler.stepper.n_steps
    assert n_steps < N_TOKENS + 12  # all four in the same steps
    return ids, singles, batch


def test_a_batch_of_four_equals_four_single_runs(
    singles_and_batch: tuple[list[list[int]], list[Completion], list[Completion]],
    model_path: Path,
    n_threads: int,
) -> None:
    ids, singles, batch = singles_and_batch
    if "SmolLM2" in model_path.name:
        # With flash attention this model's greedy text does not depend on the batch, as long as a
        # prompt is one piece: "long" is cut into other micro-batches when it has company.
        n = len(singles) - 1
        assert [result.text for result in batch[:n]] == [result.text for result in singles[:n]]
    with load(model_path, n_threads) as llama:
        for prompt, single, found in zip(ids, singles, batch, strict=True):
            for at, (token, other) in enumerate(zip(single.tokens, found.tokens, strict=False)):
                if token == other:
                    continue
                # llama.cpp rounds by micro-batch: only a close call may fall otherwise.
                complete(llama, [*prompt, *single.tokens[:at]], 0)
                with llama.context.logits() as view:
                    row = np.array(view)
                assert abs(row[token] - row[other]) < 0.5
                break
            else:
                assert found.text == single.text
