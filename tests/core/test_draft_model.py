"""DraftModel: drafts are what the model says, whatever has happened to its sequences; refusals."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llama_crab import _core, errors

SMALL: Any = {
    **{"n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "n_seq_max": 4, "n_outputs_max": 16},
    **{"n_threads": 1, "n_threads_batch": 1},
}


def text(seed: int, n: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [1, *(int(token) for token in rng.integers(300, 700, n - 1))]


class Greedy:
    """A model token by token, in a context of its own."""

    def __init__(self, model: _core.Model) -> None:
        self.context = _core.Context(model, **{**SMALL, "n_seq_max": 1})

    def after(self, tokens: list[int], n: int, given: list[int] | None = None) -> list[int]:
        """Return up to n greedy tokens, to the first end of a generation.

        Those of `given` are taken where they are as good as the best: in other batches and at other
        places in memory, sums are rounded in another way.
        """
        self.context.memory.clear()
        found: list[int] = []
        with _core.Batch(64) as batch:
            pos = 0
            for start in range(0, len(tokens), 64):
                batch.clear()
                batch.extend(tokens[start : start + 64], pos, 0, "last")
                pos += len(batch)
                self.context.decode(batch)
            while len(found) < n and not (found and self.context.model.vocab.is_eog(found[-1])):
                with self.context.logits(-1) as row:
                    logits = np.asarray(row)
                    best = int(np.argmax(logits))
                    if given is not None and len(given) > len(found):
                        token = given[len(found)]
                        best = token if logits[token] > logits[best] - 0.1 else best
                    del logits
                found.append(best)
                batch.clear()
                batch.add(best, pos, [0], True)
                pos += 1
                self.context.decode(batch)
        return found

    def agrees(self, tokens: list[int], draft: list[int], n: int) -> bool:
        return draft == self.after(tokens, n, draft)


@pytest.fixture(scope="module")
def greedy(tiny: _core.Model) -> Greedy:
    return Greedy(tiny)


@pytest.fixture(params=[False, True], ids=["streams", "unified"])
def target(request: pytest.FixtureRequest, tiny: _core.Model) -> Iterator[_core.Context]:
    # The model was trained for 512 positions.
    fields = {**SMALL, "kv_unified": request.param, "n_ctx": 512 if request.param else 2048}
    with _core.Context(tiny, **fields) as context:
        yield context


@pytest.fixture
def drafts(target: _core.Context, tiny: _core.Model) -> Iterator[_core.DraftModel]:
    with _core.DraftModel(target, tiny, "draft", 8) as drafts:
        yield drafts


def test_drafts_are_the_models_greedy_tokens(drafts: _core.DraftModel, greedy: Greedy) -> None:
    texts = {0: text(0, 9), 2: text(1, 5), 3: text(2, 1)}
    found = drafts.draft(texts, 6)
    assert all(greedy.agrees(tokens, found[seq], 6) for seq, tokens in texts.items())
    assert drafts.draft({1: np.array(text(0, 9), np.int32)}, 3) == {1: found[0][:3]}
    # The limit is the smaller of the two.
    assert len(drafts.draft({0: text(0, 9)}, 100)[0]) == 8


def test_a_sequence_goes_on_after_any_number_of_accepted_tokens(
    drafts: _core.DraftModel, greedy: Greedy
) -> None:
    """The tokens that follow are the draft's first k, then another one: the rest must be gone."""
    tokens = text(3, 20)
    for k in (0, 3, 6, 1, 5, 0):
        draft = drafts.draft({1: tokens}, 6)[1]
        assert greedy.agrees(tokens, draft, 6)
        tokens = [*tokens, *draft[:k], 400 + k]


def test_sequences_change_hands(drafts: _core.DraftModel, greedy: Greedy) -> None:
    """Cut, moved, copied, begun anew: nobody tells, and hints that are wrong do no harm."""
    long = text(4, 60)
    history = [
        {0: long},
        {0: long[:40]},  # cut
        {2: [*long, 500], 0: text(5, 12)},  # moved on to 2, while 0 has another text
        {3: [*long[:50], 333, 334], 1: [*long[:40], 444]},  # copies of a beginning
        {0: [*long, 500, 501, 502], 2: text(6, 3)},
        {2: long},  # copied from 0 while 0 goes on elsewhere
    ]
    for step, texts in enumerate(history):
        found = drafts.draft(texts, 5)
        assert all(greedy.agrees(tokens, found[seq], 5) for seq, tokens in texts.items()), step
        drafts.rewind(step % 4, 7)


def test_sequences_take_cells_of_a_common_beginning(
    target: _core.Context, tiny: _core.Model
) -> None:
    """A beginning that another sequence has is copied, so the draft comes with the first call."""
    long = text(7, 200)
    with _core.DraftModel(target, tiny, "draft", 4) as drafts:
        calls = 1
        while not drafts.draft({0: long}, 4)[0]:
            calls += 1
        # 64 tokens a call.
        assert calls == 4
        assert len(drafts.draft({1: [*long, 300], 2: [*long[:150], 301]}, 4)[2]) == 4


def test_long_texts_are_caught_up_in_micro_batches(
    drafts: _core.DraftModel, greedy: Greedy
) -> None:
    long, short = text(8, 250), text(9, 6)
    found = drafts.draft({0: long, 1: short}, 4)
    # What lacks little goes first, and does not wait for the other one.
    assert found[0] == []
    assert greedy.agrees(short, found[1], 4)
    for _ in range(10):
        if found[0]:
            break
        found = drafts.draft({0: long}, 4)
    assert greedy.agrees(long, found[0], 4)


def test_random_histories(drafts: _core.DraftModel, greedy: Greedy) -> None:
    rng = np.random.default_rng(0)
    texts = {seq: text(seq, 10) for seq in range(4)}
    for _ in range(60):
        chosen = [seq for seq in texts if rng.random() < 0.6] or [0]
        for seq in chosen:
            if rng.random() < 0.2:
                other = texts[int(rng.integers(4))]
                texts[seq] = other[: int(rng.integers(1, len(other) + 1))]
            texts[seq] = [*texts[seq][:100], int(rng.integers(300, 700))]
        n = int(rng.integers(1, 8))
        found = drafts.draft({seq: texts[seq] for seq in chosen}, n)
        for seq in chosen:
            assert not found[seq] or greedy.agrees(texts[seq], found[seq], n)
            if found[seq] and rng.random() < 0.7:
                texts[seq] = texts[seq] + found[seq][: int(rng.integers(n + 1))]


def test_room_for_drafts_ends_with_the_context(target: _core.Context, tiny: _core.Model) -> None:
    n = target.n_ctx_seq
    with _core.DraftModel(target, tiny, "draft", 4) as drafts:
        long = text(10, n + 1)

        def after(k: int) -> int:
            for _ in range(n // 64 + 1):
                if found := drafts.draft({0: long[:k]}, 4)[0]:
                    return len(found)
            return 0

        # Of a full context the last row still says one token.
        assert [after(n - 4), after(n - 2), after(n), after(n + 1)] == [4, 3, 1, 0]


def test_cells_of_idle_sequences_make_room_in_a_unified_cache(
    tiny: _core.Model, greedy: Greedy
) -> None:
    with (
        _core.Context(tiny, **{**SMALL, "n_ctx": 256, "kv_unified": True}) as target,
        _core.DraftModel(target, tiny, "draft", 4) as drafts,
    ):
        for seq in (0, 1, 2, 3):
            tokens = text(20 + seq, 110)
            for _ in range(3):
                found = drafts.draft({seq: tokens}, 4)[seq]
            assert greedy.agrees(tokens, found, 4)


def test_unsure_drafts_end_early(target: _core.Context, tiny: _core.Model) -> None:
    tokens = text(11, 12)
    with _core.DraftModel(target, tiny, "draft", 8) as drafts:
        whole = drafts.draft({0: tokens}, 8)[0]
    probabilities = []
    with _core.Context(tiny, **SMALL) as context, _core.Batch(64) as batch:
        batch.extend(tokens, 0, 0, "last")
        for token in whole:
            context.decode(batch)
            with context.logits(-1) as row:
                logits = np.asarray(row, np.float64)
                probabilities.append(float(1 / np.exp(logits - logits.max()).sum()))
            pos = len(tokens) + len(probabilities) - 1
            batch.clear()
            batch.add(token, pos, [0], True)
    for p_min in (0.0, sorted(probabilities)[2] * 1.001, sorted(probabilities)[6] * 1.001, 1.0):
        n = next((i for i, p in enumerate(probabilities) if p < p_min), len(whole))
        with _core.DraftModel(target, tiny, "draft", 8, p_min=p_min) as drafts:
            assert drafts.draft({0: tokens}, 8)[0] == whole[:n]


def test_a_draft_ends_behind_an_end_token(
    tiny_gguf: ModuleType, tiny_path: Path, tmp_path: Path, vocab_folder: Path, greedy: Greedy
) -> None:
    tokens = text(12, 9)
    whole = greedy.after(tokens, 8)
    end = next(i for i, token in enumerate(whole) if i > 0 and token not in whole[:i])
    vocab = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    path = tiny_gguf.write_model(tmp_path / "end.gguf", replace(vocab, eos=whole[end]))[0]
    with (
        _core.Model(path) as model,
        _core.Context(model, **SMALL) as target,
        _core.DraftModel(target, model, "draft", 8) as drafts,
    ):
        assert drafts.draft({0: tokens}, 8)[0] == whole[: end + 1]


def test_a_sliding_window(tiny_swa_path: Path) -> None:
    """Also with a cache that keeps the window only, which cannot go back far."""
    with _core.Model(tiny_swa_path) as model:
        oracle = Greedy(model)
        for swa_full in (True, False):
            fields = {**SMALL, "n_ubatch": 16, "swa_full": swa_full}
            with (
                _core.Context(model, **fields) as target,
                _core.DraftModel(target, model, "draft", 8, swa_full=swa_full) as drafts,
            ):
                tokens = text(13, 100)
                tokens = [token % 500 for token in tokens]
                for cut in (100, 97, 40, 60, 90, 3, 100):
                    for _ in range(8):
                        if found := drafts.draft({0: tokens[:cut]}, 4)[0]:
                            break
                    assert oracle.agrees(tokens[:cut], found, 4), (swa_full, cut)


def test_more_tokens_at_the_end_of_a_vocabulary_do_no_harm(
    tiny_gguf: ModuleType, tiny: _core.Model, tmp_path: Path, vocab_folder: Path, greedy: Greedy
) -> None:
    vocab = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    path = tiny_gguf.write_model(tmp_path / "more.gguf", tiny_gguf.fim_tokens(vocab))[0]
    n = tiny.vocab.n_tokens
    with _core.Model(path) as larger:
        assert larger.vocab.n_tokens > n
        with (
            _core.Context(larger, **SMALL) as target,
            _core.DraftModel(target, tiny, "draft", 4) as drafts,
        ):
            tokens = text(14, 8)
            assert drafts.draft({0: tokens, 1: [*tokens, n]}, 4) == {
                0: greedy.after(tokens, 4),
                1: [],
            }
        with (
            _core.Context(tiny, **SMALL) as target,
            _core.DraftModel(target, larger, "draft", 8) as drafts,
        ):
            for seed in range(40):
                found = drafts.draft({0: text(seed, 5)}, 8)[0]
                assert all(token < n for token in found)


# What cannot draft


def test_models_that_cannot_draft_are_refused(
    tiny: _core.Model,
    tiny_gguf: ModuleType,
    tmp_path: Path,
    vocab_folder: Path,
    tiny_recurrent_path: Path,
    tiny_hybrid_path: Path,
    tiny_embedder_path: Path,
    tiny_swa_path: Path,
) -> None:
    vocab = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    texts = [*vocab.texts]
    texts[400] = b"other"
    other = tiny_gguf.write_model(tmp_path / "other.gguf", replace(vocab, texts=texts))[0]
    bos = tiny_gguf.write_model(tmp_path / "bos.gguf", replace(vocab, bos=3))[0]
    many = tiny_gguf.write_model(
        tmp_path / "many.gguf",
        replace(
            vocab,
            texts=[*vocab.texts, *(b"x%d" % i for i in range(200))],
            scores=[*vocab.scores, *[0.0] * 200],
            types=[*vocab.types, *[1] * 200],
        ),
    )[0]
    cases = [
        (tiny_recurrent_path, "recurrent"),
        (tiny_hybrid_path, "recurrent"),
        (tiny_embedder_path, "embeds only|encoder|vocabulary"),
        (tiny_swa_path, "vocabulary: the type of the tokenizer is 1 in the target and 2"),
        (other, "vocabulary: token 400 is '.*' in the target and 'other' in the draft model"),
        (bos, "vocabulary: a text begins with BOS token 1 in the target and BOS token 3 in"),
        (many, r"vocabulary: the number of tokens is \d+ in the target and \d+ in the draft"),
    ]
    with _core.Context(tiny, **SMALL) as target:
        for path, message in cases:
            with (
                _core.Model(path) as model,
                pytest.raises(errors.DraftModelError, match=message),
            ):
                _core.DraftModel(target, model, "draft", 4)
    with (
        _core.Model(tiny_recurrent_path) as model,
        _core.Context(model, **SMALL) as target,
        pytest.raises(errors.DraftModelError, match="target keeps a recurrent state"),
    ):
        _core.DraftModel(target, tiny, "draft", 4)
    assert _core.live_handles()["drafters"] == 0


def test_contexts_that_do_not_fit_are_refused(target: _core.Context, tiny: _core.Model) -> None:
    n = target.n_ctx_seq // 2
    with pytest.raises(errors.DraftModelError, match=f"has room for {n} tokens"):
        _core.DraftModel(target, tiny, "draft", 4, n_ctx=target.n_ctx // 2)
    with (
        _core.Context(tiny, **{**SMALL, "n_ctx": 4096}) as large,
        pytest.raises(errors.DraftModelError, match="knows 512 positions, a sequence"),
    ):
        _core.DraftModel(large, tiny, "draft", 4)
    for field in ("n_seq_max", "embeddings", "ctx_type"):
        with pytest.raises(TypeError, match="follows from its target"):
            _core.DraftModel(target, tiny, "draft", 4, **{field: 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unknown context parameter"):
        _core.DraftModel(target, tiny, "draft", 4, foo=1)  # type: ignore[call-arg]
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"kind": "lookup"}),
        (ValueError, {"n_max": 0}),
        (ValueError, {"p_min": 1.5}),
        (ValueError, {"p_min": float("nan")}),
        (TypeError, {"n_max": 2.5}),
        (TypeError, {"model": None}),
        (errors.DraftModelError, {"kind": "mtp"}),
        (errors.DraftModelError, {"kind": "eagle3"}),
    ]
    for error, change in wrong:
        arguments: Any = {"model": tiny, "kind": "draft", "n_max": 4, **change}
        with pytest.raises(error):
            _core.DraftModel(target, **arguments)


def test_wrong_calls(drafts: _core.DraftModel) -> None:
    with pytest.raises(errors.InvalidBatchError, match=r"outside 0\.\.3"):
        drafts.draft({4: [1]}, 4)
    with pytest.raises(errors.InvalidBatchError, match="has no tokens"):
        drafts.draft({0: []}, 4)
    with pytest.raises(ValueError, match="n_max=0"):
        drafts.draft({0: [1]}, 0)
    with pytest.raises(ValueError, match="seq=9"):
        drafts.rewind(9, 0)
    assert drafts.draft({0: [1, 10**6], 1: [-1]}, 4) == {0: [], 1: []}
    assert drafts.draft({}, 4) == {}
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(drafts)


# Lifetime


def test_it_keeps_what_it_needs(tiny_path: Path) -> None:
    before = _core.live_handles()
    model = _core.Model(tiny_path)
    target = _core.Context(model, **SMALL)
    small = _core.Model(tiny_path)
    drafts = _core.DraftModel(target, small, "draft", 4)
    small.close()
    model.close()
    found = drafts.draft({0: [1, 300]}, 4)[0]
    assert len(found) == 4
    assert (drafts.kind, drafts.n_max, drafts.target) == ("draft", 4, target)
    target.close()
    with pytest.raises(errors.ClosedError, match="context is closed"):
        drafts.draft({0: [1, 300]}, 4)
    drafts.close()
    drafts.close()
    assert drafts.closed
    assert _core.live_handles() == before


def test_closed(target: _core.Context, tiny: _core.Model) -> None:
    drafts = _core.DraftModel(target, tiny, "draft", 4)
    drafts.close()
    for call in (lambda: drafts.draft({0: [1]}, 1), lambda: drafts.rewind(0, 0)):
        with pytest.raises(errors.ClosedError, match="draft model is closed"):
            call()
    with _core.Batch(8) as batch:
        batch.extend([1, 300], 0, 0, "last")
        target.decode(batch)


def test_threads_are_shared_with_the_target(tiny: _core.Model, greedy: Greedy) -> None:
    """The target's pools may be replaced, and either of the two may go first."""
    tokens = text(15, 30)
    expected = greedy.after(tokens, 4)
    fields: list[Any] = [{}, {"n_threads": 1, "n_threads_batch": 2}, {"n_threads": 4}]
    for draft_fields in fields:
        target = _core.Context(tiny, **{**SMALL, "n_threads": 2, "n_threads_batch": 3})
        drafts = _core.DraftModel(target, tiny, "draft", 4, **draft_fields)
        with _core.Batch(8) as batch:
            batch.extend([1, 300], 0, 0, "last")
            target.decode(batch)
            assert drafts.draft({0: tokens}, 4)[0] == expected
            target.set_n_threads(1, 1)
            assert drafts.draft({0: [*tokens, 300]}, 4)[0] == greedy.after([*tokens, 300], 4)
            target.memory.clear()
            target.decode(batch)
            target.set_n_threads(2, 2)
            assert drafts.draft({1: tokens}, 4)[1] == expected
            target.memory.clear()
            target.decode(batch)
        target.close()
        drafts.close()


def test_an_abort_of_the_target_ends_the_draft(drafts: _core.DraftModel, greedy: Greedy) -> None:
    tokens = text(16, 20)
    drafts.target.abort()
    assert drafts.draft({0: tokens}, 4) == {0: []}
    drafts.target.clear_abort()
    assert drafts.draft({0: tokens}, 4)[0] == greedy.after(tokens, 4)


def test_one_thread_at_a_time(drafts: _core.DraftModel, greedy: Greedy) -> None:
    expected = {seed: greedy.after(text(seed, 40), 8) for seed in range(4)}
    wrong: list[object] = []
    n_done = [0] * 4

    def run(seed: int) -> None:
        for _ in range(200):
            try:
                found = drafts.draft({seed: text(seed, 40)}, 8)[seed]
            except errors.ContextBusyError:
                continue
            n_done[seed] += 1
            if found != expected[seed]:
                wrong.append(found)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(n_done) > 0


# A real model


def test_a_real_model_accepts_its_own_drafts(smol: _core.Model, n_threads: int) -> None:
    """SmolLM2 drafts for itself: of 8 tokens in a batch nearly all are what it says one by one."""
    fields: Any = {
        **{"n_ctx": 1024, "n_seq_max": 2, "n_outputs_max": 16, "n_batch": 256},
        **{"n_threads": n_threads, "n_threads_batch": n_threads},
    }
    n_accepted = n_drafted = 0
    with (
        _core.Context(smol, **fields) as target,
        _core.DraftModel(target, smol, "draft", 8) as drafts,
        _core.Batch(64) as batch,
    ):
        for seq, start in enumerate(
            ("The history of the city of Paris began", "def fibonacci(n):")
        ):
            tokens = smol.vocab.tokenize(start, True, False)
            n_past = 0
            while len(tokens) < 80:
                draft = drafts.draft({seq: tokens}, 8)[seq]
                batch.clear()
                batch.extend(tokens[n_past:-1], n_past, seq, "none")
                batch.extend([tokens[-1], *draft], len(tokens) - 1, seq, "all")
                target.decode(batch)
                first = len(batch) - len(draft) - 1
                said = []
                for i in range(first, len(batch)):
                    with target.logits(i) as row:
                        said.append(int(np.argmax(np.asarray(row))))
                k = next((i for i, token in enumerate(draft) if token != said[i]), len(draft))
                n_drafted += len(draft)
                n_accepted += k
                tokens = [*tokens, *said[: k + 1]]
                n_past = len(tokens) - 1
                target.memory.seq_rm(seq, n_past, -1)
    assert n_drafted > 100
    assert n_accepted > 0.95 * n_drafted
