"""DraftModel with MTP layers and EAGLE3 heads: they read the right hidden states, always.

The heads are made so that their drafts are known: one kind says what the last token's embedding
says, the others say what the target itself has said one token earlier.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from llama_crab import _core, errors

SMALL: Any = {
    **{"n_ctx": 512, "n_batch": 64, "n_ubatch": 16, "n_seq_max": 4, "n_outputs_max": 64},
    **{"n_threads": 1, "n_threads_batch": 1},
}
N_MAX = 5
KINDS = ["mtp-token", "mtp-hidden", "eagle3", "eagle3-mapped"]


@pytest.fixture(scope="module")
def heads_folder(tiny_gguf: ModuleType, tiny_folder: Path, vocab_folder: Path) -> Path:
    tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    for reads in ("token", "hidden"):
        tiny_gguf.write_mtp(tiny_folder / f"mtp-{reads}.gguf", tokens, reads=reads)
    target = tiny_gguf.write_quiet_end(tiny_folder / "quiet.gguf", tokens)
    for name, mapped in (("eagle3", False), ("eagle3-mapped", True)):
        tiny_gguf.write_eagle3(tiny_folder / f"{name}.gguf", tokens, target, mapped=mapped)
    tiny_gguf.write_eagle3(tiny_folder / "wide.gguf", tokens, target, width=128)
    return tiny_folder


class Bed:
    """A target with heads; tells them of each decode, and knows what they must draft."""

    def __init__(self, folder: Path, name: str, **fields: Any) -> None:
        kind = name.partition("-")[0]
        path = folder / ("quiet.gguf" if kind == "eagle3" else f"{name}.gguf")
        self.model = _core.Model(path, load_mtp=True)
        self.target = _core.Context(self.model, **{**SMALL, **fields})
        self.heads = _core.Model(folder / f"{name}.gguf") if kind == "eagle3" else None
        arguments: Any = (self.target, self.heads, kind, N_MAX)
        self.drafts = _core.DraftModel(*arguments)
        self.reads_token = name == "mtp-token"
        weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        rows = np.array(weights["token_embd.weight"], np.float64)
        rows /= np.sqrt((rows**2).mean(1, keepdims=True) + 1e-5)
        self.after = np.argmax(rows @ np.array(weights["output.weight"], np.float64).T, 1)
        self.said: dict[int, int] = {}  # by sequence: the target's choice at its last position

    def close(self) -> None:
        if self.heads is not None:
            self.heads.close()
        self.drafts.close()
        self.target.close()
        self.model.close()

    def decode(self, pieces: dict[int, tuple[int, list[int]]], kept: dict[int, int]) -> None:
        """Decode pieces (position, tokens) by sequence; all but the first `kept` go again."""
        with _core.Batch(64) as batch:
            first = {}
            for seq, (pos, tokens) in pieces.items():
                first[seq] = len(batch)
                batch.extend(tokens, pos, seq, "all")
            self.target.decode(batch)
            for seq, (_, tokens) in pieces.items():
                with self.target.logits(first[seq] + kept.get(seq, len(tokens)) - 1) as row:
                    self.said[seq] = int(np.argmax(np.asarray(row)))
            self.drafts.decoded(batch)
        for seq, n in kept.items():
            self.target.memory.seq_rm(seq, pieces[seq][0] + n, -1)
            self.drafts.rewind(seq, pieces[seq][0] + n)

    def expected(self, seq: int, last: int, n: int) -> list[int]:
        if not self.reads_token:
            return [self.said[seq]] * n
        found = [int(self.after[last])]
        while len(found) < n:
            found.append(int(self.after[found[-1]]))
        return found


@pytest.fixture(params=KINDS)
def bed(request: pytest.FixtureRequest, heads_folder: Path) -> Iterator[Bed]:
    bed = Bed(heads_folder, request.param)
    yield bed
    bed.close()


def tokens_of(rng: np.random.Generator, n: int) -> list[int]:
    return [int(token) for token in rng.integers(300, 700, n)]


def test_drafts_go_on_from_the_last_hidden_state(bed: Bed) -> None:
    rng = np.random.default_rng(0)
    texts = {0: tokens_of(rng, 40), 1: tokens_of(rng, 3), 3: tokens_of(rng, 17)}
    bed.decode({seq: (0, tokens) for seq, tokens in texts.items()}, {})
    wants = {seq: [*tokens, 333] for seq, tokens in texts.items()}
    assert bed.drafts.draft(wants, 3) == {seq: bed.expected(seq, 333, 3) for seq in texts}
    assert bed.drafts.draft({1: wants[1]}, 100)[1] == bed.expected(1, 333, bed.drafts.n_max)
    assert bed.drafts.n_max == N_MAX


def test_any_number_of_drafted_tokens_is_accepted(bed: Bed) -> None:
    """Steps as an engine makes them: each sequence drafts or not, and keeps a part."""
    rng = np.random.default_rng(1)
    texts = {seq: tokens_of(rng, 6 + seq) for seq in range(4)}
    bed.decode({seq: (0, tokens) for seq, tokens in texts.items()}, {})
    n_drafts = 0
    for step in range(40):
        last = {seq: tokens_of(rng, 1)[0] for seq in texts}
        wants = {seq: [*texts[seq], last[seq]] for seq in texts if rng.random() < 0.7}
        n = int(rng.integers(1, N_MAX + 1))
        drafts = bed.drafts.draft(wants, n)
        assert drafts == {seq: bed.expected(seq, last[seq], n) for seq in wants}, step
        n_drafts += len(wants)
        pieces, kept = {}, {}
        for seq in texts:
            if rng.random() < 0.2:
                continue  # not in this batch
            tried = [last[seq], *drafts.get(seq, [])]
            pieces[seq] = (len(texts[seq]), tried)
            kept[seq] = int(rng.integers(1, len(tried) + 1))
            texts[seq] += tried[: kept[seq]]
        if pieces:
            bed.decode(pieces, kept)
        for seq, tokens in texts.items():
            if len(tokens) > 90:
                # Another request in this sequence, with a common beginning.
                texts[seq] = tokens[:4] + tokens_of(rng, 5)
                bed.target.memory.seq_rm(seq, 4, -1)
                bed.drafts.rewind(seq, 4)
                bed.decode({seq: (4, texts[seq][4:])}, {})
    assert n_drafts > 50


def test_what_was_not_told_gives_no_wrong_draft(bed: Bed) -> None:
    rng = np.random.default_rng(2)
    text = tokens_of(rng, 20)
    bed.decode({0: (0, text)}, {})
    assert bed.drafts.draft({0: [*text, 333]}, 2)[0] == bed.expected(0, 333, 2)
    # The target goes on without a word.
    assert bed.drafts.draft({0: [*text, 333, 334]}, 2) == {0: []}
    # It goes back without a word, further than the last batch.
    bed.decode({0: (20, [301, 302])}, {})
    assert bed.drafts.draft({0: text[:10]}, 2) == {0: []}
    # A text of the same length is another one.
    bed.decode({1: (0, text)}, {})
    assert bed.drafts.draft({1: [*text[::-1], 333]}, 2) == {1: []}
    # Sequences that have not been seen, or not from their beginning.
    assert bed.drafts.draft({3: [5, 6]}, 2) == {3: []}
    bed.target.memory.seq_cp(1, 2)
    bed.decode({2: (20, [401, 402])}, {})
    assert bed.drafts.draft({2: [*text, 401, 402, 333]}, 3)[2] == bed.expected(2, 333, 3)
    # After all that, as ever.
    bed.target.memory.clear()
    bed.decode({0: (0, text)}, {})
    assert bed.drafts.draft({0: [*text, 333]}, 4)[0] == bed.expected(0, 333, 4)


def test_no_room_no_draft(bed: Bed) -> None:
    n = bed.target.n_ctx_seq
    text = tokens_of(np.random.default_rng(3), n)
    for start in range(0, n - N_MAX, 64):
        bed.decode({0: (start, text[start : min(start + 64, n - N_MAX)])}, {})
    assert len(bed.drafts.draft({0: text[: n - N_MAX + 1]}, N_MAX)[0]) == N_MAX
    bed.decode({0: (n - N_MAX, text[n - N_MAX : n - 2])}, {})
    assert bed.drafts.draft({0: text[: n - 1]}, N_MAX) == {0: []}


def test_the_target_is_as_before_and_after(heads_folder: Path) -> None:
    """Its rows are the same with heads, and after them; the heads' end leaves nothing alive."""
    gc.collect()
    before = _core.live_handles()
    text = tokens_of(np.random.default_rng(4), 30)

    def rows(target: _core.Context) -> Any:
        target.memory.clear()
        with _core.Batch(64) as batch:
            batch.extend(text, 0, 0, "all")
            target.decode(batch)
            return np.array([np.array(target.logits(i)) for i in range(30)])

    for name in KINDS:
        bed = Bed(heads_folder, name)
        with _core.Context(bed.model, **SMALL) as other:
            expected = rows(other)
        assert np.allclose(rows(bed.target), expected, atol=1e-5)
        bed.drafts.close()
        assert np.allclose(rows(bed.target), expected, atol=1e-5)
        bed.close()
    del bed, other
    gc.collect()
    assert _core.live_handles() == before


def test_either_may_go_first(heads_folder: Path) -> None:
    gc.collect()
    before = _core.live_handles()
    for name in ("mtp-hidden", "eagle3"):
        bed = Bed(heads_folder, name)
        bed.decode({0: (0, [1, 300, 301])}, {})
        bed.target.close()
        with pytest.raises(errors.ClosedError):
            bed.drafts.draft({0: [1, 300, 301, 302]}, 2)
        bed.drafts.close()
        bed.close()
    del bed
    gc.collect()
    assert _core.live_handles() == before


def test_mtp_layers_of_another_file(heads_folder: Path) -> None:
    path = heads_folder / "mtp-hidden.gguf"
    with (
        _core.Model(path) as model,
        _core.Model(path, load_mtp=True) as heads,
        _core.Context(model, **SMALL) as target,
        _core.DraftModel(target, heads, "mtp", 2) as drafts,
        _core.Batch(8) as batch,
    ):
        batch.extend([1, 300, 301], 0, 0, "last")
        target.decode(batch)
        said = int(np.argmax(np.array(target.logits())))
        drafts.decoded(batch)
        assert drafts.draft({0: [1, 300, 301, 302]}, 2) == {0: [said, said]}


def test_heads_that_do_not_fit_are_refused(heads_folder: Path, tiny_swa_path: Path) -> None:
    with (
        _core.Model(heads_folder / "mtp-token.gguf") as model,
        _core.Context(model, **SMALL) as target,
        _core.Model(heads_folder / "eagle3.gguf") as eagle3,
    ):
        for heads, kind, message in (
            (None, "mtp", "loaded without its MTP layers"),
            (eagle3, "mtp", "no MTP layers"),
            (model, "eagle3", "architecture glm4moe, not eagle3"),
            (eagle3, "eagle3", "target of the architecture glm4moe does not show"),
        ):
            with pytest.raises(errors.DraftModelError, match=message):
                _core.DraftModel(target, heads, kind, 4)  # type: ignore[arg-type]
    with (
        _core.Model(heads_folder / "quiet.gguf") as model,
        _core.Context(model, **SMALL) as target,
        _core.Model(heads_folder / "wide.gguf") as wide,
        pytest.raises(errors.DraftModelError, match="target of width 128, this one has 64"),
    ):
        _core.DraftModel(target, wide, "eagle3", 4)


def test_a_map_of_tokens_outside_the_vocabulary_is_refused(
    heads_folder: Path, tmp_path: Path
) -> None:
    path = heads_folder / "eagle3-mapped.gguf"
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "d2t"]
    for wrong in (-1, len(tensor.data), 2**40):
        data = bytearray(path.read_bytes())
        data[tensor.data_offset : tensor.data_offset + 8] = wrong.to_bytes(8, "little", signed=True)
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(data)
        with pytest.raises(errors.ModelLoadError, match="d2t names tokens outside"):
            _core.Model(damaged)


def test_batches_that_the_target_has_not_decoded(heads_folder: Path) -> None:
    bed = Bed(heads_folder, "mtp-token")
    with _core.Batch(256) as batch:
        batch.extend([1, 300], 0, 0, "last")
        with pytest.raises(errors.InvalidBatchError, match="has not decoded this batch"):
            bed.drafts.decoded(batch)
        bed.target.decode(batch)
        bed.drafts.decoded(batch)
        batch.clear()
        batch.extend([1] * 65, 0, 0, "last")
        with pytest.raises(errors.InvalidBatchError, match="has not decoded this batch"):
            bed.drafts.decoded(batch)
        batch.clear()
        batch.extend([1, 10**6], 0, 0, "last")
        with pytest.raises(errors.InvalidTokenError):
            bed.drafts.decoded(batch)
    bed.close()
