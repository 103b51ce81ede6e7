"""Misuse is a typed exception: closed objects, other threads, aborts, memory, wrong values."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_crab import _core, errors

ONE: Any = {"n_ctx": 64, "n_batch": 16, "n_threads": 1, "n_threads_batch": 1}

# What stays readable on a closed object: its identity.
ALWAYS = {
    "Model": {"close", "closed", "path", "vocab_only", "no_alloc", "load_mtp"},
    "Context": {"close", "closed", "model"},
    "Batch": {"close", "closed", "capacity", "n_seq_max", "n_embd"},
    "Sampler": {"close", "closed"},
    "FusedSampler": {"close", "closed", "stages"},
    "LoraAdapter": {"close", "closed", "model", "path"},
    "Memory": set(),
    "Stepper": {"close", "context", "pause"},
    "Embedder": {"close", "context"},
    "DraftModel": {"close", "closed", "target", "model", "kind"},
}


def arguments(batch: _core.Batch, context: _core.Context) -> dict[str, tuple[Any, ...]]:
    """Return arguments for every method that needs some."""
    row = np.zeros(64, np.float32)
    texts = _core.TokenizedTexts.from_ids([[1]])
    greedy = _core.FusedSampler(context.model, [("greedy", {})])
    assign = {
        **{"sampler": greedy, "n_keep": 0, "leader": -1, "max_tokens": 1, "min_tokens": 0},
        **{"stop_tokens": (), "n_logprobs": -1, "prompt_logprobs": False, "ignore_eos": False},
        **{"special": False, "emit": False},
    }
    return {
        "Model.save": ("never.gguf",),
        "Batch.add": (1, 0, [0], True),
        "Batch.extend": ([1], 0, 0, "last"),
        "Batch.extend_embeddings": (row, 0, 0, "last"),
        "Context.decode": (batch,),
        "Context.encode": (batch,),
        "Context.set_n_threads": (1, 1),
        "Context.copy_logits": (np.zeros(759, np.float32),),
        "Context.copy_embeddings": (row,),
        "Context.embeddings_seq": (0,),
        "Context.state_set": (b"",),
        "Context.state_save": ("never", [1]),
        "Context.state_load": ("never",),
        "Context.set_adapters": ({},),
        "Context.set_control_vector": (None,),
        "Memory.seq_rm": (0,),
        "Memory.seq_cp": (0, 0),
        "Memory.seq_keep": (0,),
        "Memory.seq_add": (0, 0, 1, 1),
        "Memory.seq_div": (0, 0, 1, 1),
        "Memory.seq_pos_min": (0,),
        "Memory.seq_pos_max": (0,),
        "Sampler.add": (_core.Sampler.greedy(),),
        "Sampler.remove": (0,),
        "Sampler.accept": (1,),
        "Sampler.apply": (row,),
        "Sampler.select": (row,),
        "Sampler.sample": (context,),
        "FusedSampler.accept": (1,),
        "FusedSampler.apply": (row,),
        "FusedSampler.select": (row,),
        "FusedSampler.sample": (context,),
        "Embedder.add": (texts, 0, row.reshape(1, 64), 0),
        "Embedder.run": ("l2",),
        "DraftModel.decoded": (batch,),
        "DraftModel.draft": ({0: [1]}, 1),
        "DraftModel.rewind": (0, 0),
        "Stepper.assign": (0, [1], assign),
        "Stepper.step": (8,),
        "Stepper.reusable_prefix": (0, [1]),
        "Stepper.hold": (0, True),
        "Stepper.resume": (0, _suspended(context), -1, 0),
        "Stepper.restore": (0, [1], b"x"),
        "Stepper.set_adapters": (1, {}),
        "Stepper.set_draft_model": (_draft_model(context),),
        "Stepper.text": (0, 0),
        "Stepper.news": (0, 0, 0),
        **{
            f"Stepper.{name}": (0,)
            for name in (
                *("release", "clear", "is_active", "progress", "finish", "error", "generated"),
                "drafts",
                *(
                    "tokens",
                    "logprobs",
                    "prompt_logprobs",
                    "times",
                    "suspend",
                    "save",
                    "n_in_batch",
                ),
            )
        },
    }


def _draft_model(context: _core.Context) -> _core.DraftModel:
    return _core.DraftModel(context, context.model, "draft", 4)


def _suspended(context: _core.Context) -> _core.SuspendedSlot:
    stepper = _core.Stepper(context)
    options: Any = {
        **{"sampler": _core.FusedSampler(context.model, [("greedy", {})]), "n_keep": 0},
        **{"leader": -1, "max_tokens": 1, "min_tokens": 0, "stop_tokens": (), "n_logprobs": -1},
        **{"prompt_logprobs": False, "ignore_eos": False, "special": False, "emit": False},
    }
    stepper.assign(0, [1], **options)
    return stepper.suspend(0)


def test_use_after_close_of_every_attribute_of_every_class(
    tiny_path: Path, tiny_lora_path: Path
) -> None:
    """Found by introspection, so that a new method is covered or fails here."""
    model = _core.Model(tiny_path)
    context, batch = _core.Context(model, embeddings=True, **ONE), _core.Batch(4)
    other_batch, other_model = _core.Batch(4), _core.Model(tiny_path)
    other_context = _core.Context(other_model, **ONE)
    closed: list[Any] = [
        _core.LoraAdapter(model, tiny_lora_path),
        _core.Sampler.greedy(),
        _core.FusedSampler(model, [("greedy", {})]),
        batch,
        context.memory,
        _core.Stepper(context),
        _core.Embedder(context),
        _core.DraftModel(context, model, "draft", 4),
        context,
        model,
    ]
    given = arguments(other_batch, other_context)
    for item in closed:
        if hasattr(item, "close"):
            item.close()
            item.close()
    checked = 0
    for item in closed:
        kind = type(item)
        for name, value in vars(kind).items():
            if name.startswith("_") and name not in ("__enter__", "__len__"):
                continue
            if name in ALWAYS[kind.__name__] or isinstance(value, staticmethod):
                continue
            call = list(given.get(f"{kind.__name__}.{name}", ()))
            keywords = call.pop() if call and isinstance(call[-1], dict) and call[-1] else {}
            try:
                found = getattr(item, name)
                if callable(found):
                    found(*call, **keywords)
            except errors.ClosedError:
                pass
            else:
                pytest.fail(f"{kind.__name__}.{name} works after close")
            checked += 1
        for name in ALWAYS[kind.__name__] - {"close"}:
            getattr(item, name)
        repr(item)
    assert checked > 90
    for other in (other_batch, other_context, other_model):
        other.close()


def test_setters_refuse_a_closed_context(tiny: _core.Model) -> None:
    context = _core.Context(tiny, **ONE)
    context.close()
    with pytest.raises(errors.ClosedError):
        context.embeddings_enabled = True
    with pytest.raises(errors.ClosedError):
        context.causal_attn = True
    with pytest.raises(errors.ClosedError):
        _core.Context(tiny, **ONE).decode(closed_batch())


def closed_batch() -> _core.Batch:
    batch = _core.Batch(1)
    batch.close()
    return batch


def test_nothing_is_made_from_a_closed_model(tiny_path: Path, tiny_lora_path: Path) -> None:
    model = _core.Model(tiny_path)
    model.close()
    calls: list[Callable[[], object]] = [
        lambda: _core.Context(model),
        lambda: _core.LoraAdapter(model, tiny_lora_path),
        lambda: model.vocab,
    ]
    for call in calls:
        with pytest.raises(errors.ClosedError):
            call()


def test_a_context_lives_on_when_its_model_object_is_closed(tiny_path: Path) -> None:
    model = _core.Model(tiny_path)
    context, vocab = _core.Context(model, **ONE), model.vocab
    model.close()
    assert vocab.tokenize("a", False, False)
    with _core.Batch(4) as batch:
        batch.extend([1, 2], 0, 0, "last")
        with pytest.raises(errors.ClosedError):
            context.decode(batch)
    context.close()


def test_a_sampler_closed_under_a_running_slot_is_an_error(tiny: _core.Model) -> None:
    with _core.Context(tiny, **ONE) as context:
        stepper, sampler = _core.Stepper(context), _core.Sampler.chain()
        sampler.add(_core.Sampler.dist(1))
        options: Any = arguments(closed_batch(), context)["Stepper.assign"][2]
        stepper.assign(0, [1, 2], **{**options, "sampler": sampler, "max_tokens": 4})
        stepper.step(8)
        sampler.close()
        with pytest.raises(errors.ClosedError):
            stepper.step(8)
        stepper.release(0)
        stepper.assign(0, [1, 2], **options)
        stepper.step(8)
        assert stepper.finish(0)[0] == "length"


def test_a_context_larger_than_the_machine_is_out_of_memory(smol: _core.Model) -> None:
    with pytest.raises(errors.OutOfMemoryError, match="GiB") as caught:
        _core.Context(smol, n_ctx=1 << 31)
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, errors.ContextCreateError)


@pytest.fixture(scope="module")
def long_context(smol: _core.Model, n_threads: int) -> Any:
    with _core.Context(
        smol,
        n_ctx=2048,
        n_batch=2048,
        n_outputs_max=1,
        n_threads=n_threads,
        n_threads_batch=n_threads,
    ) as context:
        yield context


class Prefill(threading.Thread):
    """Decodes 2000 tokens: seconds of work that other threads can get in the way of."""

    def __init__(self, context: _core.Context) -> None:
        super().__init__()
        self.context = context
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.begin = threading.Event()

    def run(self) -> None:
        with _core.Batch(2000) as batch:
            batch.extend([1 + i % 1000 for i in range(2000)], 0, 0, "last")
            self.begin.set()
            start = time.monotonic()
            try:
                self.context.decode(batch)
            except BaseException as error:
                self.error = error
            self.seconds = time.monotonic() - start


def start_prefill(context: _core.Context) -> Prefill:
    context.memory.clear()
    worker = Prefill(context)
    worker.start()
    worker.begin.wait()
    time.sleep(0.3)
    return worker


def test_abort_ends_a_prefill_and_the_context_stays_usable(long_context: _core.Context) -> None:
    tokens = [5, 6, 7, 8]
    with _core.Batch(8) as batch:
        batch.extend(tokens, 0, 0, "last")
        long_context.decode(batch)
        expected = np.array(long_context.logits())
        worker = start_prefill(long_context)
        start = time.monotonic()
        long_context.abort()
        worker.join()
        assert time.monotonic() - start < 2
        assert isinstance(worker.error, errors.DecodeAborted)
        assert worker.error.code == 2
        long_context.memory.clear()
        long_context.decode(batch)
        np.testing.assert_array_equal(np.array(long_context.logits()), expected)


def test_an_abort_before_the_decode_acts_on_it_and_can_be_withdrawn(tiny: _core.Model) -> None:
    with _core.Context(tiny, **ONE) as context, _core.Batch(4) as batch:
        batch.extend([1, 2], 0, 0, "last")
        context.abort()
        with pytest.raises(errors.DecodeAborted):
            context.decode(batch)
        context.decode(batch)
        context.memory.clear()
        context.abort()
        context.clear_abort()
        context.decode(batch)


def test_a_second_thread_is_refused_while_the_first_decodes(long_context: _core.Context) -> None:
    worker = start_prefill(long_context)
    calls: list[Callable[[], object]] = [
        long_context.state_get,
        long_context.logits,
        long_context.close,
        long_context.memory.clear,
        lambda: long_context.memory.seq_pos_max(0),
        lambda: long_context.set_n_threads(1, 1),
        lambda: long_context.decode(closed_batch()),
        lambda: _core.Sampler.greedy().sample(long_context),
    ]
    refused = 0
    for call in calls:
        with pytest.raises(errors.ContextBusyError, match="another thread"):
            call()
        refused += 1
    assert long_context.n_ctx == 2048  # facts can be read at any time
    assert worker.is_alive()
    long_context.abort()
    worker.join()
    assert refused == len(calls)
    assert isinstance(worker.error, errors.DecodeAborted)
    long_context.memory.clear()


def test_other_python_threads_run_while_one_decodes(long_context: _core.Context) -> None:
    worker = start_prefill(long_context)
    ticks = 0
    while worker.is_alive() and ticks < 20:
        time.sleep(0.01)
        ticks += 1
    assert ticks == 20
    long_context.abort()
    worker.join()


def test_every_error_is_a_builtin_too_carries_a_log_and_pickles() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.LlamaCrabError)
    ]
    assert len(kinds) >= 20
    for kind in kinds:
        error = kind("what happened", log=("line 1", "line 2"))
        assert str(error) == "what happened\n  line 1\n  line 2"
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.log) == (kind, str(error), error.log)
        if kind is not errors.LlamaCrabError:
            builtin = (OSError, RuntimeError, ValueError, MemoryError)
            assert issubclass(kind, builtin)


def test_log_lines_of_other_threads_are_not_attached(tmp_path: Path) -> None:
    """Each failure shows its own file only, with two threads failing at once."""
    found: dict[int, list[str]] = {0: [], 1: []}

    def fail(i: int) -> None:
        for turn in range(50):
            path = tmp_path / f"of-{i}-{turn}.gguf"
            path.write_bytes(b"GGUF")
            with pytest.raises(errors.ModelLoadError) as caught:
                _core.Model(path)
            found[i].append(str(caught.value))

    threads = [threading.Thread(target=fail, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 50
        assert not any(f"of-{1 - i}-" in text for text in found[i])
