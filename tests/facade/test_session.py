"""Conversations that keep their place: nothing is computed twice, and every answer is the same."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llama_crab import Completion, Llama, ParameterError, SamplerChain
from llama_crab.errors import ClosedError, ContextBusyError, StateError

GREEDY = SamplerChain().greedy()
DRAWN = SamplerChain().penalties(32, 1.3).top_k(10).temp(1.0)
# In F32 the sums of other batches differ by less than two logits of a random model do.
EXACT: dict[str, Any] = {"flash_attn_type": False, "type_k": "f32", "type_v": "f32"}
FIELDS: dict[str, Any] = {"n_ctx": 1024, "n_ubatch": 32, "n_batch": 64, "n_threads": 1, **EXACT}
PATHS = ["tiny_path", "tiny_swa_path", "tiny_recurrent_path", "tiny_hybrid_path"]

Open = Callable[..., Llama]


@pytest.fixture
def load(tiny_path: Path) -> Iterator[Open]:
    """Return a maker of Llamas of the tiny model with two sequences; they are closed at the end."""
    opened = []

    def make(path: Path = tiny_path, **fields: Any) -> Llama:
        opened.append(Llama(path, **{"n_seq_max": 2, **FIELDS, **fields}))
        return opened[-1]

    yield make
    for llama in opened:
        llama.close()


def words(n: int, seed: int = 0) -> list[int]:
    """Return `n` ordinary tokens that all of the vocabularies have."""
    return [int(token) for token in np.random.default_rng(seed).integers(260, 550, n)]


def complete(llama: Llama, prompt: Any, max_tokens: int | None = 6, **options: Any) -> Completion:
    options = {"sampler": GREEDY, "ignore_eos": True, **options}
    result = llama.create_completion(prompt, max_tokens, **options)
    assert isinstance(result, Completion)
    return result


def go_on(llama: Llama, session: Any, new: list[int], n: int = 6, **options: Any) -> Completion:
    """Take a turn, and compare it with the whole conversation at once on a fresh context."""
    before = session.tokens
    result = complete(llama, new, n, session=session, **options)
    params = llama.params
    with Llama(llama.model.path, **FIELDS, swa_full=params.swa_full) as fresh:
        expected = complete(fresh, [*before, *new], n, **options)
    assert expected.usage.cached_tokens == 0
    assert result.tokens == expected.tokens
    assert result.text == expected.text
    assert result.usage.prompt_tokens == len(before) + len(new)
    assert session.tokens == (*before, *new, *result.tokens)
    assert session.n_tokens == len(session.tokens)
    return result


def n_decoded(llama: Llama) -> int:
    return int(llama.stats()["n_decoded"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kv_unified", [False, True])
def test_a_conversation_is_the_whole_prompt_and_computes_only_what_is_new(
    load: Open, request: pytest.FixtureRequest, path: str, kv_unified: bool
) -> None:
    model: Path = request.getfixturevalue(path)
    for swa_full in (True, False) if path == "tiny_swa_path" else (True,):
        llama = load(model, kv_unified=kv_unified, swa_full=swa_full)
        with llama.session() as session:
            assert (session.tokens, session.n_tokens) == ((), 0)
            for turn in range(4):
                before, n_before = n_decoded(llama), session.n_tokens
                new = words(45 if turn == 0 else 7, turn)
                result = go_on(llama, session, new, sampler=DRAWN, seed=turn)
                # The last token of an answer was not decoded when it was given.
                assert result.usage.cached_tokens == max(0, n_before - 1)
                n_new = result.usage.prompt_tokens - result.usage.cached_tokens
                assert n_decoded(llama) - before == n_new + 5


def test_text_goes_on_without_a_second_beginning(smol_llama: Llama) -> None:
    first, second = "<|im_start|>user\nName a colour.<|im_end|>\n", "<|im_start|>assistant\n"
    with smol_llama.session() as session:
        answer = complete(smol_llama, first, 4, session=session)
        reply = complete(smol_llama, second, 4, session=session)
        ids = [
            *smol_llama.tokenize(first), *answer.tokens,
            *smol_llama.tokenize(second, add_special=False), *reply.tokens,
        ]  # fmt: skip
        assert list(session.tokens) == ids
        assert reply.usage.cached_tokens == len(smol_llama.tokenize(first)) + 3


@pytest.mark.parametrize("kv_unified", [False, True])
def test_forks_go_on_independently_and_share_their_past(load: Open, kv_unified: bool) -> None:
    llama = load(kv_unified=kv_unified, n_seq_max=4, n_ctx=2048)
    root = llama.session()
    go_on(llama, root, words(60))
    past = root.tokens
    before = n_decoded(llama)
    forks = [root.fork() for _ in range(3)]
    assert n_decoded(llama) == before
    for seed, fork in enumerate(forks):
        result = go_on(llama, fork, words(5, 10 + seed))
        # The first one decodes the answer's last token, also for the others.
        assert result.usage.cached_tokens == len(past) - (seed == 0)
    assert root.tokens == past
    go_on(llama, root, words(5, 20))
    for seed, fork in enumerate((*forks, root)):
        result = go_on(llama, fork, words(4, 30 + seed))
        assert result.usage.cached_tokens >= len(past) - 1
        fork.close()


@pytest.mark.parametrize("kv_unified", [False, True])
def test_forks_do_not_take_each_other_s_place_while_slots_are_free(
    load: Open, kv_unified: bool
) -> None:
    llama = load(kv_unified=kv_unified, n_seq_max=4, n_ctx=2048, cache_ram_mib=0)
    root = llama.session()
    go_on(llama, root, words(100))
    forks = [root.fork(), root.fork()]
    for turn in range(2):
        for seed, fork in enumerate((root, *forks)):
            n_before = fork.n_tokens
            result = go_on(llama, fork, words(45, 10 * turn + seed))
            if turn:
                assert result.usage.cached_tokens == n_before - 1


@pytest.mark.parametrize("path", PATHS)
def test_a_saved_session_goes_on_in_another_llama(
    load: Open, request: pytest.FixtureRequest, path: str, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(path)
    file = tmp_path / "chat.session"
    for options in ({}, {"swa_full": False}) if path == "tiny_swa_path" else ({},):
        llama = load(model, **options)
        session = llama.session()
        for turn in range(3):
            go_on(llama, session, words(40, turn))
        session.save(file)
        expected = complete(llama, words(5, 9), session=session)
        for _ in range(2):
            other = load(model, **options, n_batch=32, n_ubatch=16)
            with other.load_session(file) as loaded:
                assert loaded.n_tokens == 3 * 46
                assert n_decoded(other) == 0
                result = complete(other, words(5, 9), session=loaded)
                assert result.usage.cached_tokens == 3 * 46
                assert n_decoded(other) == 5 + 5
                assert result.tokens == expected.tokens
                assert loaded.tokens == session.tokens


def test_what_is_no_longer_in_memory_is_computed_to_be_saved(load: Open, tmp_path: Path) -> None:
    llama = load(n_seq_max=1, cache_ram_mib=0)
    session = llama.session()
    go_on(llama, session, words(50))
    complete(llama, words(80, 1))  # takes the only slot, and there is no host memory
    session.save(tmp_path / "chat")
    other = load(n_seq_max=1)
    result = complete(other, words(5, 2), session=other.load_session(tmp_path / "chat"))
    assert result.usage.cached_tokens == 56
    assert result.tokens == go_on(llama, session, words(5, 2)).tokens


def test_sessions_are_saved_while_others_run(load: Open, tmp_path: Path) -> None:
    llama = load(n_ctx=4096)
    session = llama.session()
    go_on(llama, session, words(50))
    handle = llama.submit(words(20), 2000, sampler=GREEDY, ignore_eos=True)
    session.save(tmp_path / "chat")
    assert not handle.done
    handle.cancel()
    other = load()
    with other.load_session(tmp_path / "chat") as loaded:
        assert go_on(other, loaded, words(5, 9)).usage.cached_tokens == 56


def test_a_session_is_saved_however_busy_the_engine_is(load: Open, tmp_path: Path) -> None:
    llama = load(n_seq_max=1, cache_ram_mib=0)
    session = llama.session()
    go_on(llama, session, words(50))
    enough = threading.Event()

    def ask_on() -> None:
        handles = []
        for n in range(10_000):
            handles.append(llama.submit(words(40, n), 3, sampler=GREEDY, ignore_eos=True))
            if n >= 10:  # ten wait at any time
                handles.pop(0).result()
            if enough.is_set():
                return

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        for _ in range(5):
            session.save(tmp_path / "chat")
    finally:
        enough.set()
        thread.join()
    assert load(n_seq_max=1).load_session(tmp_path / "chat").tokens == session.tokens


def test_a_file_from_a_context_of_another_shape_is_loaded_or_refused_by_name(
    load: Open, tmp_path: Path
) -> None:
    llama = load()
    session = llama.session()
    go_on(llama, session, words(50))
    session.save(tmp_path / "chat")
    for shape in ({"n_seq_max": 1}, {"n_seq_max": 3}, {"kv_unified": True}):
        other = load(**shape)
        try:
            loaded = other.load_session(tmp_path / "chat")
        except StateError as error:
            refusal = error
        else:
            go_on(other, loaded, words(5, 1))
            continue
        # Not what llama.cpp found deep in the data.
        assert not refusal.log
        assert "n_stream" in str(refusal)


def test_files_of_the_disk_tier_are_left_to_the_shape_of_context_that_made_them(
    load: Open, tmp_path: Path
) -> None:
    """Two programs share a folder; one of them has another number of sequences."""
    disk: dict[str, Any] = {"cache_dir": tmp_path, "cache_disk_mib": 64, "cache_ram_mib": 0}

    def talk(n_seq_max: int) -> list[int]:
        llama = load(n_seq_max=n_seq_max, **disk)
        sessions = [llama.session() for _ in range(5)]
        cached = []
        for n, session in enumerate(sessions):
            cached.append(complete(llama, words(60, n), session=session).usage.cached_tokens)
        llama.close()
        return cached

    assert talk(1) == [0] * 5
    files = set(tmp_path.iterdir())
    assert len(files) == 4  # the fifth is in the slot
    talk(2)
    assert files <= set(tmp_path.iterdir())
    assert talk(1)[:4] == [59] * 4


def test_sessions_can_be_saved_after_a_drain(load: Open, tmp_path: Path) -> None:
    """The requests are refused by then; to put conversations away is what a drain is for."""
    llama = load()
    session = llama.session()
    go_on(llama, session, words(50))
    assert llama.drain(10)
    session.save(tmp_path / "chat")
    assert load().load_session(tmp_path / "chat").tokens == session.tokens


def test_a_file_of_another_model_or_cache_is_refused_by_name(
    load: Open, tiny_gguf: ModuleType, tiny_lora_path: Path, vocab_folder: Path, tmp_path: Path
) -> None:
    llama = load()
    session = llama.session()
    go_on(llama, session, words(40))
    file = tmp_path / "chat"
    session.save(file)
    tokens = tiny_gguf.spm_tokens(vocab_folder / "ggml-vocab-llama-spm.gguf")
    stranger: Path = tiny_gguf.write_model(tmp_path / "other.gguf", tokens, seed=5)[0]
    with pytest.raises(StateError, match="model is"):
        load(stranger).load_session(file)
    with pytest.raises(StateError, match="type_k"):
        load(type_k="f16").load_session(file)
    with pytest.raises(StateError, match="rope_freq_base"):
        load(rope_freq_base=5000.0).load_session(file)
    tuned = load()
    adapter = tuned.load_lora(tiny_lora_path)
    with pytest.raises(StateError, match="adapters"):
        tuned.load_session(file, lora=adapter)
    with pytest.raises(FileNotFoundError):
        llama.load_session(tmp_path / "none")
    # A copy of the model is the same model.
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(Path(str(llama.model.path)).read_bytes())
    assert load(copy).load_session(file).tokens == session.tokens


def test_a_damaged_file_is_refused_wherever_the_damage_is(load: Open, tmp_path: Path) -> None:
    llama = load()
    session = llama.session()
    go_on(llama, session, words(40))
    file = tmp_path / "chat"
    session.save(file)
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, 8, 12, 20, 60, *rng.integers(0, len(good), 40)]:
        bad = bytearray(good)
        bad[at] ^= 0x40
        file.write_bytes(bad)
        with pytest.raises(StateError):
            llama.load_session(file)
    for size in [0, 1, 47, 48, 100, *rng.integers(0, len(good), 10)]:
        file.write_bytes(good[:size])
        with pytest.raises(StateError):
            llama.load_session(file)
    file.write_bytes(good)
    with llama.load_session(file) as loaded:
        go_on(llama, loaded, words(4, 1))
    go_on(llama, session, words(4, 2))


def test_a_session_belongs_to_the_adapters_it_was_computed_with(
    load: Open, tiny_lora_path: Path, tmp_path: Path
) -> None:
    def turns(llama: Llama, scale: float) -> tuple[Any, Completion]:
        lora = {llama.load_lora(tiny_lora_path): scale}
        session = llama.session()
        complete(llama, words(50), session=session, lora=lora)
        return session, complete(llama, words(5, 1), session=session, lora=lora)

    llama, other = load(), load()
    session, second = turns(llama, 2.0)
    assert second.usage.cached_tokens == 55
    assert second.tokens != turns(other, 0.0)[1].tokens
    session.save(tmp_path / "chat")
    third = load()
    with pytest.raises(StateError, match="adapters"):
        third.load_session(tmp_path / "chat")
    lora = {third.load_lora(tiny_lora_path): 2.0}
    loaded = third.load_session(tmp_path / "chat", lora=lora)
    result = complete(third, words(5, 2), session=loaded, lora=lora)
    assert result.usage.cached_tokens == session.n_tokens
    mine = complete(
        llama, words(5, 2), session=session, lora={llama.load_lora(tiny_lora_path): 2.0}
    )
    assert result.tokens == mine.tokens


def test_a_busy_session_is_refused_to_a_second_request(load: Open, tmp_path: Path) -> None:
    llama = load()
    session = llama.session()
    handle = llama.submit(words(20), 200, session=session, sampler=GREEDY, ignore_eos=True)
    for use in (
        lambda: complete(llama, words(5), session=session),
        lambda: llama.submit(words(5), session=session),
        lambda: llama.create_completion(words(5), session=session, stream=True),
        session.fork,
        lambda: session.save(tmp_path / "chat"),
    ):
        with pytest.raises(ContextBusyError):
            use()
    assert not handle.done
    tokens = handle.result().tokens
    assert session.tokens == (*words(20), *tokens)
    go_on(llama, session, words(5, 1))
    with pytest.raises(ParameterError, match="n must be 1"):
        complete(llama, words(5), session=session, n=2)
    go_on(llama, session, words(5, 2))


def test_a_turn_that_ends_while_another_is_being_prepared_is_not_lost(load: Open) -> None:
    """The second caller looks at the session before the first one's turn ends, and after it."""
    llama = load()
    session = llama.session()
    first: list[Completion] = []

    def stops() -> Iterator[str]:
        first.append(complete(llama, words(9, 1), session=session))
        yield "never said"

    try:
        second = complete(llama, words(9, 2), session=session, stop=stops())
    except ContextBusyError:
        assert session.tokens == (*words(9, 1), *first[0].tokens)
    else:
        past = (*words(9, 1), *first[0].tokens)
        assert session.tokens == (*past, *words(9, 2), *second.tokens)


def test_an_early_end_leaves_what_was_said(load: Open) -> None:
    llama = load()
    session = llama.session()
    chunks: list[int] = []

    def enough(chunk: Any) -> bool:
        chunks.extend(chunk.tokens)
        return len(chunks) < 4

    cancelled = complete(llama, words(30), 50, session=session, callback=enough)
    assert cancelled.finish_reason == "cancelled"
    assert session.tokens == (*words(30), *cancelled.tokens)
    assert len(cancelled.tokens) >= 4
    go_on(llama, session, words(5, 1))

    def fail(tokens: Any, logits: Any) -> None:
        if len(tokens) >= n_before + 5 + 3:
            raise RuntimeError("enough")

    n_before = session.n_tokens
    with pytest.raises(RuntimeError, match="enough"):
        complete(llama, words(5, 2), session=session, logits_processors=[fail])
    assert session.n_tokens == n_before + 5 + 3
    go_on(llama, session, words(5, 3))
    stopped = complete(llama, words(5, 4), 40, session=session, ignore_eos=False, stop=["e", "a"])
    assert session.tokens[-len(stopped.tokens) - 5 :] == (*words(5, 4), *stopped.tokens)
    go_on(llama, session, words(5, 5))


def test_a_refused_request_leaves_the_session_as_it_was(load: Open) -> None:
    llama = load()
    session = llama.session()
    go_on(llama, session, words(30))
    before = session.tokens
    for wrong in ({"prompt": words(2000)}, {"prompt": [10**6]}, {"seed": -1}, {"priority": 0.5}):
        with pytest.raises(ValueError, match=r"prompt|seed|priority"):
            complete(llama, **{"prompt": words(5), **wrong, "session": session})
        assert session.tokens == before
    assert go_on(llama, session, words(5, 1)).usage.cached_tokens == 35
    llama.drain()
    with pytest.raises(ClosedError):
        complete(llama, words(5), session=session)
    assert session.fork().tokens == session.tokens


@pytest.mark.parametrize("kv_unified", [False, True])
def test_more_sessions_than_slots_all_keep_their_past(load: Open, kv_unified: bool) -> None:
    llama = load(kv_unified=kv_unified, cache_ram_mib=64)
    sessions = [llama.session() for _ in range(7)]
    for turn in range(3):
        for n, session in enumerate(sessions):
            before, n_before = n_decoded(llama), session.n_tokens
            result = go_on(llama, session, words(40 + n, 10 * turn + n))
            assert result.usage.cached_tokens == max(0, n_before - 1)
            assert n_decoded(llama) - before == 40 + n + 5 + min(n_before, 1)


def test_more_sessions_than_memory_are_computed_again(load: Open) -> None:
    llama = load(cache_ram_mib=0)
    sessions = [llama.session() for _ in range(4)]
    for turn in range(2):
        for n, session in enumerate(sessions):
            assert go_on(llama, session, words(40 + n, 10 * turn + n)).usage.cached_tokens == 0


def survives(llama: Llama, session: Any, seed: int) -> bool:
    """Whether a session's past is still in memory after other chats wanted its slot."""
    for n in range(3):
        complete(llama, words(60, 100 * seed + n))
    n_cached = go_on(llama, session, words(4, seed)).usage.cached_tokens
    assert n_cached in (0, session.n_tokens - 4 - 6 - 1)
    return n_cached > 0


@pytest.mark.parametrize("end", ["close", "drop"])
@pytest.mark.parametrize("kv_unified", [False, True])
def test_what_a_session_claims_goes_last_until_it_is_closed_or_dropped(
    load: Open, kv_unified: bool, end: str
) -> None:
    llama = load(kv_unified=kv_unified, cache_ram_mib=0)
    session = llama.session()
    go_on(llama, session, words(50))
    assert survives(llama, session, 1)
    assert survives(llama, session, 2)
    past = list(session.tokens)
    if end == "close":
        session.close()
        session.close()
        with pytest.raises(ParameterError, match="closed"):
            complete(llama, words(4), session=session)
        with pytest.raises(ParameterError, match="closed"):
            session.fork()
    del session
    gc.collect()
    for n in range(3):
        complete(llama, words(60, 900 + n))
    assert complete(llama, [*past, 300]).usage.cached_tokens == 0
    assert not len(llama._engine.scheduler.cache._claims[0])


def test_a_fork_keeps_its_claim_when_the_other_is_closed(load: Open) -> None:
    llama = load(cache_ram_mib=0)
    root = llama.session()
    go_on(llama, root, words(50))
    fork = root.fork()
    root.close()
    assert survives(llama, fork, 1)


def test_pinned_snapshots_are_given_up_with_their_session(load: Open) -> None:
    llama = load(n_seq_max=1, cache_ram_mib=64)
    store = llama._engine.scheduler.cache._store
    assert store is not None
    sessions = [llama.session() for _ in range(3)]
    for n, session in enumerate(sessions):
        go_on(llama, session, words(50, n))
    complete(llama, words(60, 9))
    assert sorted(snapshot.pins for snapshot in store._ram.held) == [1, 1, 1]
    go_on(llama, sessions[0], words(5, 10))  # what it was pinned for has another claim now
    sessions[1].close()
    complete(llama, words(60, 11))
    pinned = [s.tokens for s in store._ram.held if s.pins]
    assert len(pinned) == 2
    assert {len(tokens) // 4 for tokens in pinned} == {50 + 5, 56 + 5 + 5}
    sessions.clear()
    session = llama.session()
    del session
    gc.collect()
    complete(llama, words(60, 12))
    assert not any(snapshot.pins for snapshot in store._ram.held)


def test_a_session_that_fills_its_context_says_that_it_cannot_be_saved(
    load: Open, tmp_path: Path
) -> None:
    llama = load(n_ctx=512)
    session = llama.session()
    complete(llama, words(30), None, session=session)
    assert session.n_tokens == llama.n_ctx + 1
    with pytest.raises(StateError, match="fills its context of 256 tokens"):
        session.save(tmp_path / "chat")
    assert not list(tmp_path.iterdir())


def test_a_handle_that_is_kept_does_not_keep_its_session(load: Open) -> None:
    llama = load()
    session = llama.session()
    handle = llama.submit(words(30), 4, session=session, sampler=GREEDY, ignore_eos=True)
    assert len(handle.result().tokens) == 4
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None


def test_closing_a_session_while_it_runs_lets_the_request_end(load: Open) -> None:
    llama = load()
    session = llama.session()
    handle = llama.submit(words(30), 100, session=session, sampler=GREEDY, ignore_eos=True)
    session.close()
    assert len(handle.result().tokens) == 100
    llama.stats()
    assert not any(map(len, llama._engine.scheduler.cache._claims.values()))


def test_a_session_outlives_its_llama_as_a_list_of_tokens(load: Open, tmp_path: Path) -> None:
    llama = load()
    session = llama.session()
    go_on(llama, session, words(30))
    tokens = session.tokens
    llama.close()
    assert session.tokens == tokens
    with pytest.raises(ClosedError):
        session.save(tmp_path / "chat")
    session.close()


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_a_session_that_the_collector_finds_takes_no_lock(tiny_path: Path, closed: bool) -> None:
    """It may come at any allocation, also of a thread that has the engine's lock at the time."""
    llama = Llama(tiny_path, n_seq_max=1, **FIELDS)
    cycle: list[Any] = [llama.session()]
    go_on(llama, cycle[0], words(30))
    cycle.append(cycle)
    if closed:
        llama.close()
    collected = threading.Event()

    def collect() -> None:
        with llama._engine._lock:
            gc.collect()
        collected.set()

    del cycle
    threading.Thread(target=collect, daemon=True).start()
    assert collected.wait(20)
    llama.close()
