"""What wakes a lazy grammar: patterns of chat formats, in texts that grow by a token."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from grammars import allowed, both, zeros

from llama_crab import _core
from llama_crab.sampling import SamplerChain

# By format, as llama-common and the fallback for tools have them, and the snippets of its texts.
PATTERNS = {
    "fallback": (r'(<tool_call>\n?(?:\{"?)?)(?![\s\S])',),
    "gpt-oss": (
        r"^\s+to$",
        r"^<\|channel\|>(?:commentary|analysis)\s+to=functions$",
        r"<\|start\|>assistant(\s+to)",
        r"<\|start\|>assistant(<\|channel\|>(?:commentary|analysis)\s+to)",
    ),
    "muse": (
        r"(?:^|<\|start\|>assistant)( to=(?!self<\|message\|>)(?!user<\|message\|>)"
        r"[^<]*?<\|message\|>)",
    ),
    "functionary": (r">>>(?!all)",),
    "llama.cpp's own": (r"[\s\S]*?(<tool_call>\s*\{)[\s\S]*$", r"^(?:never|(>>>)all)"),
    "others": (r"^\s+(to)", r"(<\|sta|>>)r*t", r"a?(ssistant=)", r"[\s\S]*( to=)s"),
}
SNIPPETS = [
    *("<|start|>assistant to=", "functions<|message|>", "<tool_call>\n", " to"),
    *("<|start|>", "assistant", " to", "=", "self", "user", "functions", "<|message|>", ">>>"),
    *("all", "\n", " ", "<|channel|>", "analysis", "commentary", "<tool_call>", "{", '"', "x", "<"),
]

STARVED = """
import sys, threading
from llama_crab import _core
from llama_crab.sampling import SamplerChain
model = _core.Model(sys.argv[1], vocab_only=True)
chain = SamplerChain().grammar_lazy('root ::= "<|"', trigger_patterns=sys.argv[3:])
sampler = chain.compile(model, 0)
def work():
    for token in model.vocab.tokenize(sys.argv[2], False, False):
        sampler.accept(token)
    print("done")
threading.stack_size(512 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.fixture(scope="module")
def swa(tiny_swa_path: Path) -> Iterator[_core.Model]:
    """Return a model whose vocabulary adds no blank to a text."""
    with _core.Model(tiny_swa_path) as model:
        yield model


@pytest.mark.parametrize("name", PATTERNS)
def test_a_grammar_wakes_when_llama_cpp_s_does(swa: _core.Model, name: str) -> None:
    """A grammar without digits tells that it is awake by refusing them."""
    rng = random.Random(7)
    row = zeros(swa)
    chain = SamplerChain().grammar_lazy("root ::= [^0-9]*", trigger_patterns=PATTERNS[name])
    ours, theirs = both(chain, swa)
    n_awake = 0
    for _ in range(60):
        ours.reset()
        theirs.reset()
        text = "".join(rng.choice(SNIPPETS) for _ in range(rng.randrange(1, 9)))
        # Cut anywhere, and not only as the vocabulary would cut the whole.
        while text:
            n = rng.randrange(1, 12)
            for token in swa.vocab.tokenize(text[:n], False, False):
                ours.accept(token)
                theirs.accept(token)
            text = text[n:]
            sets = [allowed(sampler, row) for sampler in (ours, theirs)]
            assert sets[0] == sets[1]
        n_awake += len(sets[0]) < swa.vocab.n_tokens
    assert 0 < n_awake < 60


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("muse", " to=x" + " word" * 4000),
        ("muse", "<|start|>assistant to=x" + " word" * 4000),
        ("gpt-oss", "\n" * 8000),
        ("gpt-oss", "<|start|>assistant" + "\n" * 8000),
        ("llama.cpp's own", " word" * 8000),
        ("llama.cpp's own", "<tool_call>" + "\n" * 8000),
    ],
    ids=lambda value: value[:20].strip(),
)
def test_a_long_text_fits_a_small_stack(tiny_swa_path: Path, name: str, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARVED, str(tiny_swa_path), text, *PATTERNS[name]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "done\n"


def test_a_message_of_another_recipient_is_passed_over(swa: _core.Model) -> None:
    chain = SamplerChain().grammar_lazy("root ::= [^0-9]*", trigger_patterns=PATTERNS["muse"])
    for text, wakes in (
        (" to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>4", False),
        (" to=self<|message|>Hm.<|eom|><|start|>assistant to=get<|message|>", True),
        (" to=selfish<|message|>", True),
        (" to=<|message|>", True),
        (" to=get<|end|> to=get<|message|>", False),
        (" to=self<|message|>" + "Hm. " * 600 + "<|start|>assistant to=get<|message|>", True),
    ):
        sampler = chain.compile(swa, 0)
        for token in swa.vocab.tokenize(text, False, False):
            sampler.accept(token)
        assert (len(allowed(sampler, zeros(swa))) < swa.vocab.n_tokens) is wakes, text
