"""What the core computes from a row of logits, against numpy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_crab import _core
from llama_crab.engine import Request, Scheduler
from llama_crab.errors import SamplerError
from llama_crab.sampling import SamplerChain

TEXT = "The quick brown fox\njumps over 13 lazy dogs. Ça va? 東京は"

Row = npt.NDArray[np.float64]


def open_engine(model: _core.Model) -> Scheduler:
    context = _core.Context(
        model, n_ctx=256, n_batch=64, n_ubatch=64, n_outputs_max=1, n_threads=1, n_threads_batch=1
    )
    return Scheduler(context)


def rows_and_logprobs(
    model: _core.Model, n_top: int, n_tokens: int, sampler: SamplerChain | None = None
) -> tuple[list[Row], Request]:
    """Generate greedily; return each step's row as the context holds it, and the request."""
    engine = open_engine(model)
    request = Request(
        prompt=model.vocab.tokenize(TEXT, True, True)[:24],
        sampler=sampler or SamplerChain().greedy(),
        seed=1,
        max_tokens=n_tokens,
        logprobs=n_top,
        ignore_eos=True,
    )
    engine.submit(request)
    rows: list[Row] = []
    while not request.done:
        engine.step()
        with engine.context.logits() as view:
            rows.append(np.array(view, dtype=np.float64))
    engine.context.close()
    if request.error is not None:
        raise request.error
    return rows, request


def log_softmax(row: Row) -> Row:
    top = row.max()
    result: Row = row - (top + np.log(np.exp(row - top).sum()))
    return result


def best_first(row: Row) -> npt.NDArray[np.int64]:
    """Order ids by logit, descending; of equal ones the smaller id first."""
    return np.lexsort((np.arange(row.size), -row))


@pytest.mark.parametrize("model_name", ["smol", "gemma"])
def test_logprobs_of_real_rows(model_name: str, request: pytest.FixtureRequest) -> None:
    model: _core.Model = request.getfixturevalue(model_name)
    rows, done = rows_and_logprobs(model, 20, 6)
    (sequence,) = done.sequences
    assert len(rows) == len(sequence.tokens) == len(sequence.logprobs) == 6
    eog = list(model.vocab.eog_tokens)
    for row, token, (logprob, top) in zip(rows, sequence.tokens, sequence.logprobs, strict=True):
        exact = log_softmax(row)
        assert abs(logprob - exact[token]) < 1e-4
        assert [entry[0] for entry in top] == best_first(row)[:20].tolist()
        np.testing.assert_allclose(
            [value for _, value in top], exact[best_first(row)[:20]], atol=1e-4
        )
        allowed = row.copy()
        allowed[eog] = -np.inf
        assert token == allowed.argmax()


@pytest.mark.parametrize("n_top", [0, 1, 31, 32, 33, 758, 759, 10_000])
def test_any_number_of_alternatives(tiny: _core.Model, n_top: int) -> None:
    rows, done = rows_and_logprobs(tiny, n_top, 3)
    for row, (_, top) in zip(rows, done.sequences[0].logprobs, strict=True):
        assert [entry[0] for entry in top] == best_first(row)[:n_top].tolist()
        np.testing.assert_allclose(
            [value for _, value in top], log_softmax(row)[best_first(row)[:n_top]], atol=1e-4
        )


def test_logprobs_are_those_of_the_model_whatever_the_sampler_did(tiny: _core.Model) -> None:
    rows, done = rows_and_logprobs(tiny, 5, 8, SamplerChain().penalties(64, 1.5).top_k(9).temp(2.0))
    (sequence,) = done.sequences
    for row, token, (logprob, top) in zip(rows, sequence.tokens, sequence.logprobs, strict=True):
        assert abs(logprob - log_softmax(row)[token]) < 1e-4
        assert [entry[0] for entry in top] == best_first(row)[:5].tolist()


@pytest.fixture(scope="module")
def rewritten(tiny_gguf: Any, tiny_folder: Path, vocab_folder: Path) -> dict[str, Path]:
    """Write the tiny model with other output rows: each id twice ("ties"), or one NaN ("nan")."""
    tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    make_tensors = tiny_gguf._tensors
    n_vocab = len(tokens.texts)

    def ties(output: npt.NDArray[np.float32]) -> None:
        output[1:n_vocab:2] = output[0 : n_vocab - 1 : 2]

    def nan(output: npt.NDArray[np.float32]) -> None:
        output[700] = np.nan

    files = {}
    for name, change in (("ties", ties), ("nan", nan)):

        def changed(*args: object, change: object = change) -> dict[str, npt.NDArray[np.float32]]:
            tensors: dict[str, npt.NDArray[np.float32]] = make_tensors(*args)
            assert callable(change)
            change(tensors["output.weight"])
            return tensors

        tiny_gguf._tensors = changed
        try:
            files[name] = tiny_gguf.write_model(tiny_folder / f"{name}.gguf", tokens)[0]
        finally:
            tiny_gguf._tensors = make_tensors
    return files


def test_of_equal_logits_the_smallest_id_wins(rewritten: dict[str, Path]) -> None:
    with _core.Model(rewritten["ties"]) as model:
        rows, done = rows_and_logprobs(model, 40, 12)
    (sequence,) = done.sequences
    for row, token, (_, top) in zip(rows, sequence.tokens, sequence.logprobs, strict=True):
        assert (row[0:758:2] == row[1:759:2]).all()
        row_allowed = row.copy()
        row_allowed[2] = -np.inf  # the end of the text
        assert token == row_allowed.argmax()
        assert [entry[0] for entry in top] == best_first(row)[:40].tolist()


@pytest.mark.parametrize("sampler", [SamplerChain().greedy(), SamplerChain().temp(0.8)], ids=repr)
def test_a_row_with_nan_is_an_error_of_the_request(
    rewritten: dict[str, Path], sampler: SamplerChain
) -> None:
    with _core.Model(rewritten["nan"]) as model, pytest.raises(SamplerError, match="NaN"):
        rows_and_logprobs(model, 1, 4, sampler)
