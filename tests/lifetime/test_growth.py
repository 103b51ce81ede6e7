"""Creating and closing thousands of objects leaves no memory and no C object behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")

PROGRAM = """
import gc, os, sys
from llama_crab import _core
PATH = sys.argv[1]

def rss():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

model = _core.Model(PATH)
ONE = dict(n_ctx=64, n_batch=16, n_threads=1, n_threads_batch=1)

def batches(n):
    for i in range(n):
        batch = _core.Batch(64, 4)
        batch.extend([1, 2, 3], 0, 0, "last")
        if i % 2:
            batch.close()

def samplers(n):
    for i in range(n):
        chain = _core.Sampler.chain()
        chain.add(_core.Sampler.penalties(759, 64, 1.1, 0.0, 0.0))
        chain.add(_core.Sampler.top_k(40))
        chain.add(_core.Sampler.dist(i))
        if i % 10 == 0:
            chain.add(_core.Sampler.grammar(model.vocab, 'root ::= "a"+', "root"))
            chain.remove(3)
        if i % 2:
            chain.clone()

def vocabularies(n):
    for i in range(n):
        vocab = model.vocab
        vocab.detokenize(vocab.tokenize("Hello world", True, True), True, False)
        vocab.piece(i % 759, True)

def contexts(n):
    for i in range(n):
        context = _core.Context(model, **ONE)
        with _core.Batch(4) as batch:
            batch.extend([1, 2], 0, 0, "last")
            context.decode(batch)
        bytes(context.logits())
        _core.Stepper(context)
        if i % 2:
            context.close()

def models(n):
    for i in range(n):
        other = _core.Model(PATH)
        other.vocab
        other.metadata
        if i % 2:
            other.close()

def failures(n):
    for i in range(n):
        try:
            _core.Model(PATH, kv_overrides={"tokenizer.ggml.model": "none such"})
        except OSError:
            pass
        try:
            _core.Sampler.grammar(model.vocab, "root ::= missing", "root")
        except ValueError:
            pass

kind, warm, n = globals()[sys.argv[2]], int(sys.argv[3]), int(sys.argv[4])
kind(warm)
before = rss()
kind(n)
growth = rss() - before
model.close()
del model
gc.collect()
assert not any(_core.live_handles().values()), _core.live_handles()
print(growth)
"""


@pytest.mark.parametrize(
    ("kind", "warm", "n", "limit_mb"),
    [
        ("batches", 500, 10_000, 4),
        ("samplers", 500, 10_000, 4),
        ("vocabularies", 500, 10_000, 4),
        ("contexts", 50, 500, 8),
        ("models", 100, 100, 8),
        ("failures", 20, 100, 4),
    ],
)
def test_cycles_do_not_grow(tiny_path: Path, kind: str, warm: int, n: int, limit_mb: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny_path), kind, str(warm), str(n)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit_mb * 2**20
