"""No order of dropping, no cycle, no fork and no exit crashes: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest

Run = Callable[[str], None]

PRELUDE = """
import gc, os, signal, sys, threading, time, weakref
from llama_crab import _core, errors
PATH, LORA = sys.argv[1:3]
ONE = dict(n_ctx=64, n_batch=16, n_seq_max=2, n_threads=2, n_threads_batch=1)

def decode(context, tokens=(1, 300, 301), pos=0):
    with _core.Batch(16) as batch:
        batch.extend(tokens, pos, 0, "last")
        context.decode(batch)

def nothing_lives():
    gc.collect()
    assert not any(_core.live_handles().values()), _core.live_handles()
"""


@pytest.fixture
def run(tiny_path: Path, tiny_lora_path: Path) -> Run:
    """Return a function that runs code in a new interpreter and expects a silent, clean end."""
    command = [sys.executable, "-X", "faulthandler", "-c"]

    def run_code(code: str) -> None:
        done = subprocess.run(
            [*command, PRELUDE + code, str(tiny_path), str(tiny_lora_path)],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode, done.stderr) == (0, ""), code

    return run_code


EVERYTHING = """
def make(n_threads=1):
    model = _core.Model(PATH)
    context = _core.Context(model, **{**ONE, "n_threads": n_threads})
    adapter = _core.LoraAdapter(model, LORA)
    context.set_adapters({adapter: 1.0})
    chain = _core.Sampler.chain()
    chain.add(_core.Sampler.grammar(model.vocab, 'root ::= [a-z ]+', "root"))
    chain.add(_core.Sampler.dry(model.vocab, 0.8, 1.75, 2, 64, [","]))
    chain.add(_core.Sampler.dist(1))
    batch = _core.Batch(4)
    batch.extend([1, 300], 0, 0, "last")
    context.decode(batch)
    stepper = _core.Stepper(context)
    drafts = _core.DraftModel(context, model, "draft", 4)
    return dict(model=model, context=context, vocab=model.vocab, memory=context.memory,
                adapter=adapter, chain=chain, stage=chain[0], batch=batch,
                buffer=memoryview(context.logits()), view=context.logits(), stepper=stepper,
                drafts=drafts)

def use(name, item):
    if name == "model": item.n_embd
    if name == "context": item.memory.seq_pos_max(0)
    if name == "vocab": item.tokenize("hello", True, True)
    if name == "memory": item.seq_pos_max(0)
    if name == "adapter": item.metadata
    if name == "chain": item.clone().reset()
    if name == "stage": item.name, item.clone()
    if name == "batch": len(item)
    if name == "buffer": item[0], item[758]
    if name == "view": bytes(item)
    if name == "stepper": item.reusable_prefix(0, [1, 300, 5])
    if name == "drafts": item.draft({1: [1, 300, 5]}, 4)
"""


@pytest.mark.parametrize("close", [False, True])
def test_150_orders_of_dropping_leave_the_rest_usable_and_nothing_alive(
    run: Run, close: bool
) -> None:
    """With `close`, objects are closed first; then only what stays valid is used."""
    code = (
        EVERYTHING
        + f"""
import random
for turn in range(150):
    items = make()
    order = list(items)
    random.Random(turn).shuffle(order)
    for name in order:
        item = items.pop(name)
        if {close} and hasattr(item, "close"):
            try:
                item.close()
            except (BufferError, errors.SamplerError):
                pass
        del item
        for other, value in items.items():
            try:
                use(other, value)
            except errors.ClosedError:
                assert {close}
    del value
    nothing_lives()
"""
    )
    run(code)


@pytest.mark.parametrize(
    "order", [" ".join(order) for order in permutations(("model", "context", "buffer", "chain"))]
)
def test_the_main_objects_dropped_in_every_order(run: Run, order: str) -> None:
    code = (
        EVERYTHING
        + f"""
items = {{name: item for name, item in make().items() if name in {order.split()}}}
for name in {order.split()}:
    del items[name]
    gc.collect()
    for other, value in items.items():
        use(other, value)
    value = None
nothing_lives()
"""
    )
    run(code)


def test_a_sampler_with_a_grammar_outlives_its_model(run: Run) -> None:
    run(
        """
from array import array
model = _core.Model(PATH)
grammar = _core.Sampler.grammar(model.vocab, 'root ::= "a"+', "root")
chain = _core.Sampler.chain()
chain.add(_core.Sampler.grammar(model.vocab, 'root ::= "b"+', "root"))
stage = chain.remove(0)
model.close()
del model, chain
gc.collect()
logits = array("f", [0.0] * 759)
for sampler in (grammar, stage, grammar.clone()):
    ids, values, _, _ = sampler.apply(logits)
    assert sum(value > -1 for value in values) > 0
assert _core.live_handles()["models"] == 1
del grammar, stage, sampler
nothing_lives()
"""
    )


def test_a_chain_keeps_the_models_of_all_its_stages(run: Run) -> None:
    run(
        """
from array import array
chain = _core.Sampler.chain()
for text in ('root ::= "a"+', 'root ::= "a"* "b"'):
    chain.add(_core.Sampler.grammar(_core.Model(PATH).vocab, text, "root"))
gc.collect()
copy = chain.clone()
chain.close()
del chain
gc.collect()
copy.apply(array("f", [0.0] * 759))
del copy
nothing_lives()
"""
    )


def test_cycles_are_collected(run: Run) -> None:
    run(
        EVERYTHING
        + """
for turn in range(20):
    class Owner: pass
    owner = Owner()
    owner.items = make()
    owner.self = owner
    # A progress callback that refers to the model it loads, through its owner.
    owner.model = _core.Model(PATH, progress_callback=lambda f, owner=owner: None)
    dead = weakref.ref(owner)
    del owner
    gc.collect()
    assert dead() is None
nothing_lives()
"""
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_is_refused_ends_cleanly_and_the_parent_goes_on(run: Run) -> None:
    run(
        EVERYTHING
        + """
items = make(2)
logits = bytes(items["view"])
for turn in range(3):
    pid = os.fork()
    if pid == 0:
        refused = 0
        for name, item in items.items():
            try:
                use(name, item)
            except errors.ForkedProcessError:
                refused += 1
            except BufferError:
                pass
        # The batch and the buffer stand alone; all else belongs to the parent.
        ok = refused >= len(items) - 3
        try:
            items["context"].decode(items["batch"])
            ok = False
        except (errors.ForkedProcessError, BufferError):
            pass
        for item in items.values():
            if hasattr(item, "close"):
                try:
                    item.close()
                except (errors.SamplerError, errors.ForkedProcessError, BufferError):
                    pass
        items.clear()
        gc.collect()
        # The child makes its own objects and ends like any Python process.
        mine = _core.Model(PATH)
        decode(_core.Context(mine, **ONE))
        sys.exit(0 if ok else 9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
for name, item in items.items():
    use(name, item)
assert bytes(items["view"]) == logits
items.pop("buffer").release()
decode(items["context"], [5], 2)
items.clear()
del item
nothing_lives()
"""
    )


def test_multiprocessing_by_fork_and_spawn_give_typed_errors_or_work(run: Run) -> None:
    run(
        """
import pickle
model = _core.Model(PATH)
for item in (model, model.vocab, _core.Context(model, **ONE), _core.Batch(1),
             _core.Sampler.greedy(), _core.LoraAdapter(model, LORA)):
    try:
        pickle.dumps(item)
    except TypeError:
        pass
    else:
        raise AssertionError(item)
"""
    )


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "import builtins; builtins.kept = items"])
def test_exit_with_everything_alive(run: Run, end: str) -> None:
    run(EVERYTHING + "items = make(2)\nitems['self'] = items\n" + end)


def test_exit_with_an_exception_that_holds_everything(run: Run) -> None:
    run(
        EVERYTHING
        + """
def fail():
    items = make()
    raise RuntimeError("expected")
try:
    fail()
except RuntimeError as error:
    sys.last = error
"""
    )


@pytest.mark.parametrize("daemon", [True, False])
def test_exit_while_threads_decode(run: Run, daemon: bool) -> None:
    """A daemon thread is inside decode when the interpreter ends; others are joined by it."""
    run(
        f"""
model = _core.Model(PATH)
stop = time.monotonic() + 1.0
started = threading.Barrier(4)

def work():
    context = _core.Context(model, **ONE)
    started.wait()
    while {daemon} or time.monotonic() < stop:
        context.memory.clear()
        decode(context)

for _ in range(3):
    threading.Thread(target=work, daemon={daemon}).start()
started.wait()
time.sleep(0.2)
"""
    )


def test_exit_while_a_thread_loads(run: Run) -> None:
    run(
        """
def work():
    try:
        while True:
            _core.Model(PATH, progress_callback=lambda fraction: None)
    except errors.ModelLoadError:
        pass  # a load that the exit overtakes is cancelled

threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
    )


def test_objects_dropped_by_another_thread_than_the_one_that_made_them(run: Run) -> None:
    run(
        EVERYTHING
        + """
for turn in range(10):
    box = [make()]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
nothing_lives()
"""
    )


def test_two_threads_close_and_use_at_once(run: Run) -> None:
    run(
        """
model = _core.Model(PATH)
for turn in range(100):
    context = _core.Context(model, n_ctx=64, n_threads=1, n_threads_batch=1)
    gate = threading.Barrier(3)

    def use():
        gate.wait()
        try:
            for _ in range(50):
                context.memory.clear()
                decode(context)
        except (errors.ClosedError, errors.ContextBusyError):
            pass

    def close():
        gate.wait()
        while not context.closed:
            try:
                context.close()
            except errors.ContextBusyError:
                pass

    threads = [threading.Thread(target=use), threading.Thread(target=use),
               threading.Thread(target=close)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
del context, model
nothing_lives()
"""
    )


def test_close_frees_the_weights_whatever_is_still_held(run: Run) -> None:
    run("""
from llama_crab import Llama, SamplerChain
llama = Llama(PATH, n_ctx=256, n_threads=1)
adapters = [llama.load_lora(LORA), llama.load_lora(LORA)]
done = llama.create_completion([300, 301], 4, lora=adapters[0], ignore_eos=True)
words = SamplerChain().grammar('root ::= [a-z ]+')
handle = llama.submit([300, 302], 4, ignore_eos=True, sampler=words)
running = llama.submit([300, 303], None, ignore_eos=True)
session, model, vocab = llama.session(), llama.model, llama.model.vocab
handle.result()
llama.close()
nothing_lives()
assert handle.result().text is not None
assert running.result().choices[0].finish_reason == "cancelled"
for call in (lambda: llama.tokenize("a"), lambda: vocab.bos, lambda: llama.load_lora(LORA)):
    try:
        call()
    except errors.ClosedError:
        continue
    raise AssertionError
assert vocab.closed
llama.close()
""")
