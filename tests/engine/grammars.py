"""Grammars for the grammar tests, and the comparison of our masks with llama.cpp's."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_requests import answer, ask, prompt_of, run

from llama_crab import _core
from llama_crab.engine import Request, Scheduler
from llama_crab.engine.request import Sequence
from llama_crab.errors import SamplerError
from llama_crab.sampling import SamplerChain

EXECUTORS = ("fused", "reference")

# As a JSON schema with strings, integers, an array and an enum would be written down.
OBJECT = r"""
root   ::= "{\"name\": " string ", \"age\": " int ", \"tags\": [" (tag (", " tag){0,3})? "]}"
string ::= "\"" [A-Za-z ]{1,12} "\""
int    ::= "0" | [1-9] [0-9]{0,2}
tag    ::= "\"red\"" | "\"green\"" | "\"blue\""
"""

OWN = {
    "object": OBJECT,
    "repeats": r'root ::= ("ab" | "c"){0,50} [0-9]{2,5} "x"{3} " "{0,50} "y"{2,}',
    "sentence": r'root ::= [a-z ,]{0,50} [.!?]',
    "scripts": r'root ::= ([β-ωБ-я] | [一-鿿] | "é" | [😀-😏] | "\U0001F680" | [à-ý])+ "!"?',
    "negated": r'root ::= [^a-zA-Z\n]{3,} "\n" [^é-ü]{2} [^\x00-\x7f]{4} [^ ]*',
    "nullable": 'root ::= a\na ::= "x" a "y" | "(" a ")" a | b\nb ::= "" | "z" b | " " b',
    "palindrome": r'root ::= "" | [ab] | "a" root "a" | "b" root "b" | "é" root "é"',
    "empty alternatives": 'root ::= "" | ("a" | ) ( | "b") ("c" | "") "d"? (" e" | )',
    "ambiguous": 'root ::= (a | b | c)+ "."?\na ::= "a"+\nb ::= "aa" | "ab"\nc ::= [ab] [ab]',
    "any": r'root ::= . . "é" .{0,50} "\n"?',
    "right": 'root ::= "[" (root (", "? root)*)? "]" " "*',
    "bytes": 'root ::= ("日本語" | "日本人" | "日光" [0-9] | "ÿ" | "🦀" "🦀"?)+ " end"',
    "tokens": 'root ::= <[300]>+ !<[301]> "ab" [c-f]*',
    "keywords": 'root ::= ("return" | "returns" | "ret" "urn"* | "re" [a-z]{0,50})+ ";"',
    "hex": r'root ::= "0x" [0-9a-fA-F]{1,16} ("," " "? root)?',
    "line": 'root ::= line{1,50}\nline ::= [^\\r\\n]* "\\n"',
}  # fmt: skip
FILES = ("arithmetic", "c", "chess", "english", "japanese", "json", "json_arr", "list")


def grammar_text(name: str, llama_cpp_tree: Path) -> str:
    """Return one of OWN, or one of llama.cpp's examples."""
    return OWN.get(name) or (llama_cpp_tree / "grammars" / f"{name}.gbnf").read_text()


def zeros(model: _core.Model) -> Any:
    return np.zeros(model.vocab.n_tokens, np.float32)


def allowed(sampler: Any, row: Any) -> list[int]:
    """Return the tokens that a grammar leaves of a flat row, by either executor."""
    ids, logits, _, _ = sampler.apply(row)
    return sorted(np.asarray(ids)[np.asarray(logits) > -np.inf].tolist())


def both(chain: SamplerChain, model: _core.Model, seed: int = 1) -> list[Any]:
    """Return the chain as our executor runs it, and llama.cpp's."""
    return [chain.with_executor(e).compile(model, seed) for e in EXECUTORS]  # type: ignore[arg-type]


def fused(text: str, model: _core.Model) -> Any:
    return SamplerChain().grammar(text).compile(model, 1)


def with_piece(vocab: _core.Vocab, piece: bytes) -> int:
    """Return a token that spells the piece; the last is an ordinary one, not a byte."""
    return max(i for i in range(vocab.n_tokens) if vocab.piece(i, True) == piece)


def is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def pick(ids: list[int], vocab: _core.Vocab, rng: np.random.Generator) -> int:
    """Choose one of the tokens: often one that is no whole text, seldom an end."""
    few = [ids[int(i)] for i in rng.integers(0, len(ids), 16)]
    if rng.random() < 0.4:
        few = [i for i in few if not is_whole(vocab.piece(i, True))] or few
    if rng.random() < 0.9:
        few = [i for i in few if not vocab.is_eog(i)] or few
    return few[0]


def walk(
    model: _core.Model, text: str, n_steps: int, *, stride: int = 1, seed: int = 0
) -> Counter[str]:
    """Accept random allowed tokens; at every `stride`-th of them the masks must be the same.

    Returns how many sets were compared, in how many the answer may end, before how many the text
    stopped inside a character, and how many ends were accepted.
    """
    rng = np.random.default_rng(seed)
    vocab, row = model.vocab, zeros(model)
    ours, theirs = both(SamplerChain().grammar(text), model)
    seen: Counter[str] = Counter()
    answer: list[int] = []
    for step in range(n_steps):
        ids = sorted(ours.apply(row)[0])
        if step % stride == stride - 1:
            assert ids == allowed(theirs, row), (text, answer)
            seen["compared"] += 1
            seen["end"] += any(map(vocab.is_eog, ids))
            seen["inside"] += not is_whole(b"".join(vocab.piece(i, True) for i in answer))
        token = pick(ids, vocab, rng)
        answer.append(token)
        ours.accept(token)
        theirs.accept(token)
        if vocab.is_eog(token):
            # What follows an end is up to the caller; the state has not moved.
            assert sorted(ours.apply(row)[0]) == ids
            seen["ended"] += 1
            ours.reset()
            theirs.reset()
            answer.clear()
    return seen


def _with_full(short: list[Any], *full: tuple[Any, ...]) -> list[Any]:
    return [*short, *(pytest.param(*args, marks=pytest.mark.full) for args in full)]


# Vocabulary, steps, and how often llama.cpp, which takes up to 60 ms, is asked.
WALKS = _with_full(
    [
        ("tiny", 40, 1), ("swa", 40, 1), ("llama-spm", 6, 3), ("gpt-2", 5, 5), ("phi-3", 4, 4),
        ("smol", 4, 4), ("qwen2", 4, 4), ("llama-bpe", 3, 3),
    ],
    ("tiny", 1000, 1), ("swa", 1000, 1), ("llama-spm", 100, 1), ("gpt-2", 100, 1),
    ("phi-3", 60, 2), ("smol", 60, 2), ("qwen2", 40, 4), ("llama-bpe", 40, 4), ("gemma", 12, 6),
)  # fmt: skip
# Vocabulary and rows for every chain.
DRAWS = _with_full([("tiny", 80)], ("tiny", 3000), ("llama-spm", 50), ("smol", 50))


def check_walks(model: _core.Model, tree: Path, n_steps: int, stride: int) -> None:
    # Of large vocabularies few masks are compared: a single one for every other grammar.
    names = (*OWN, *FILES)[stride % 2 :: 2] if stride == n_steps else (*OWN, *FILES)
    total: Counter[str] = Counter()
    for seed, name in enumerate(names):
        total += walk(model, grammar_text(name, tree), n_steps, stride=stride, seed=seed)
    print(total)
    assert total["compared"] == len(names) * (n_steps // stride)
    assert total["end"] >= 2
    if stride == 1:
        # The hard places were met: inside a character, and past an end.
        assert total["inside"] >= total["compared"] // 10
        assert total["ended"] >= 10


def check_obeys(model: _core.Model, text: str, sequence: Sequence) -> None:
    """Llama.cpp must accept the tokens, and where the answer ended allow the end."""
    checker = _core.Sampler.grammar(model.vocab, text, "root")
    for token in sequence.tokens:
        checker.accept(token)
    if sequence.finish_reason == "stop":
        assert set(model.vocab.eog_tokens) <= set(allowed(checker, zeros(model)))


# Mask, then chain.

TEXTS = {
    "wide": 'root ::= [^a]+ "a"? .*',
    "narrow": 'root ::= ("red" | "green" | "blue" | [0-9]{1,3}) (", " root)?',
    "mixed": r'root ::= "{" ([^"{}]{1,6} "\"" [a-f]{1,2} "\"")* "}"?',
}

# Chains to run behind a grammar; infill may choose an end that the grammar refuses.
CHAINS = {
    "temp": SamplerChain().temp(0.7),
    "greedy": SamplerChain().greedy(),
    "top_k": SamplerChain().top_k(5),
    "top_k all": SamplerChain().top_k(700).temp(1.3),
    "top_p": SamplerChain().top_p(0.8),
    "min_p": SamplerChain().min_p(0.05).temp(0.9),
    "typical": SamplerChain().typical(0.7),
    "sigma": SamplerChain().top_n_sigma(1.0),
    "temp_ext": SamplerChain().temp_ext(0.8, 0.4),
    "mirostat": SamplerChain().mirostat(tau=3.0),
    "mirostat_v2": SamplerChain().mirostat_v2(tau=3.0),
    "adaptive_p": SamplerChain().adaptive_p(0.3),
    "plain adaptive_p": SamplerChain().adaptive_p(-1.0),
    "penalties": SamplerChain().penalties(32, 1.3, 0.2, 0.1).temp(0.9),
    "dry": SamplerChain().dry(0.8, dry_allowed_length=1),
    "xtc": SamplerChain().xtc(0.5, 0.05).temp(0.9),
    "logit_bias": SamplerChain().logit_bias({300: 2.0, 40: -1.0, 2: 1.5, 700: -np.inf}),
    "chat": SamplerChain.chat(),
    "code": SamplerChain.code(),
    "default": SamplerChain.default(),
    "creative": SamplerChain.creative(),
}
# Those of which llama.cpp makes sense after a grammar: its typical multiplies 0 by log(0).
COMPARABLE = [name for name in CHAINS if name != "typical"]


def random_rows(n: int, n_vocab: int, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    # Sharp where there are many: llama.cpp's sums of thousands of like terms have float's errors.
    scale = 3.0 if n_vocab < 1000 else 9.0
    return [(rng.normal(size=n_vocab) * scale).astype(np.float32) for _ in range(n)]


def count_different(chain: SamplerChain, model: _core.Model, rows: list[Any], seed: int) -> int:
    """Draw from all rows; where the executors differ both start over."""
    samplers = both(chain, model, seed)
    different = 0
    for row in rows:
        ours, theirs = (sampler.select(row) for sampler in samplers)
        different += ours != theirs
        if ours != theirs or model.vocab.is_eog(ours):
            for sampler in samplers:
                sampler.reset()
    return different


# Lazy grammars.

# Patterns, what is said before and in the trigger, and the grammar, which starts at the group.
CALL = r'root ::= "<call>" [a-z]{1,3} ("(" [0-9é]* ")")?'
LAZY = {
    "pattern": ((r"[\s\S]*?(<call>)[\s\S]*",), "so <call>", CALL),
    "group in a token": ((r"[\s\S]*?st(ring[\s\S]*)",), "a string", 'root ::= "ring" [a-z]* "!"'),
    "anchored": ((r"^ ?xx ([\s\S]+)$",), "xx <", CALL),
    "second pattern": ((r"never()", r"[\s\S]*(<cal)$"), "<<cal", CALL),
    "no group": ((r"<call>",), "say <call>", r'root ::= "<call>" [0-9]+'),
    "beyond the trigger": ((r"[\s\S]*?(<c)[\s\S]*",), "it<call", CALL),
}


def check_lazy(model: _core.Model, samplers: list[Any], said: list[int]) -> None:
    """Say it, then walk; then the same with clones of the samplers that wait, and after a reset."""
    rng = np.random.default_rng(1)
    row = zeros(model)
    clones = [sampler.clone() for sampler in samplers]
    for attempt, pair in enumerate((samplers, clones, samplers)):
        for sampler in pair if attempt == 2 else ():
            sampler.reset()
        n_waiting = 0
        for token in said:
            sets = [allowed(sampler, row) for sampler in pair]
            assert sets[0] == sets[1]
            n_waiting += len(sets[0]) == model.vocab.n_tokens
            for sampler in pair:
                sampler.accept(token)
        assert n_waiting >= 1
        for _ in range(6):
            sets = [allowed(sampler, row) for sampler in pair]
            assert sets[0] == sets[1]
            assert len(sets[0]) < model.vocab.n_tokens
            token = sets[0][int(rng.integers(len(sets[0])))]
            for sampler in pair:
                sampler.accept(token)


# Through the engine.

# 24 tokens by their ids, and bytes that no merge of the vocabulary touches.
TOKENS = prompt_of(24, 5)
LITERALS = {
    "tiny": " ".join(f"<[{token}]>" for token in TOKENS),
    "swa": '"QZ#é日本🦀{}QZé<>🦀"',
}

# How many tokens come (None: all), how it ends, whether steps are saved, and what is asked for.
FORCED: dict[str, tuple[int | None, str, bool, dict[str, Any]]] = {
    "plain": (None, "stop", True, {}),
    "stream": (None, "stop", True, {"stream": True}),
    "max_tokens": (7, "length", True, {"n_tokens": 7}),
    "max_tokens 1": (1, "length", False, {"n_tokens": 1}),
    "stop token": (9, "stop", True, {}),
    "stop token that streams": (9, "stop", True, {"stream": True}),
    "stop token after min_tokens": (9, "stop", True, {"min_tokens": 9}),
    "min_tokens": (None, "stop", True, {"min_tokens": 24}),
    "n": (None, "stop", True, {"n": 3, "best_of": 3}),
    "n at once": (None, "stop", True, {"n": 3, "best_of": 3, "context": {"n_seq_max": 3}}),
    "best_of": (None, "stop", False, {"n": 1, "best_of": 2}),
    "logprobs": (None, "stop", False, {"logprobs": 2}),
    "n_batch 1": (None, "stop", True, {"context": {"n_batch": 1, "n_ubatch": 1}}),
    "n_batch 2": (None, "stop", True, {"context": {"n_batch": 2, "n_ubatch": 2}}),
    "n_ubatch 1": (None, "stop", True, {"context": {"n_batch": 8, "n_ubatch": 1}}),
    "context full": (
        16, "length", True,
        {"n_tokens": None, "prompt": [*range(260, 500), 260], "context": {"n_ctx": 256}},
    ),
}  # fmt: skip


def forced_tokens(model: _core.Model, text: str) -> list[int]:
    """Return the tokens of a grammar that allows a single one everywhere, by llama.cpp."""
    sampler = _core.Sampler.grammar(model.vocab, text, "root")
    tokens: list[int] = []
    while (only := allowed(sampler, zeros(model))) != list(model.vocab.eog_tokens):
        assert len(only) == 1
        sampler.accept(only[0])
        tokens += only
    return tokens


def outcome(request: Request) -> Any:
    fields = [
        (s.tokens, s.text, s.finish_reason, s.stop_reason, len(s.logprobs))
        for s in request.sequences
    ]
    return type(request.error), fields


@contextmanager
def scheduler_of(model: _core.Model, **fields: Any) -> Iterator[Scheduler]:
    fields = {
        "n_ctx": 512, "n_batch": 64, "n_ubatch": 32, "n_seq_max": 1,
        "n_threads": 1, "n_threads_batch": 1, **fields,
    }  # fmt: skip
    with _core.Context(model, **fields) as context:
        yield Scheduler(context)


def by_both(
    model: _core.Model,
    chain: SamplerChain,
    n_tokens: int | None = 60,
    context: dict[str, Any] | None = None,
    **fields: Any,
) -> tuple[Request, list[int]]:
    """Run a request with either executor, twice; return ours and the steps each took.

    The answers must be the same, also from the cached prompt, and so must what follows them.
    """
    fields = {"ignore_eos": False, "prompt": list(range(260, 280)), **fields}
    requests, steps, later = [], [], []
    for executor in EXECUTORS:
        fields["sampler"] = chain.with_executor(executor)  # type: ignore[arg-type]
        with scheduler_of(model, **(context or {})) as scheduler:
            for _ in range(2):
                request = ask(0, n_tokens, **fields)
                steps.append(run(scheduler, request))
                requests.append(request)
            # Of the last forced tokens some were never decoded.
            later.append(ask(0, 4, prompt=[*request.prompt, *request.sequences[0].tokens][:250]))
            run(scheduler, later[-1])
        if request.stream:
            told = list(request.news)
            assert "".join(news.text for news in told) == request.sequences[0].text
            assert [i for news in told for i in news.tokens] == answer(request)
    assert all(outcome(request) == outcome(requests[0]) for request in requests)
    assert answer(later[0]) == answer(later[1])
    return requests[0], steps[::2]


# Errors.

# A chain, and what the error says.
NOT_GRAMMARS = [
    *(
        (SamplerChain().grammar(text), match)
        for text, match in (
            ('root ::= "a', "does not parse"),
            ("root ::= [a-z", "does not parse"),
            ('root "a"', "does not parse"),
            ('root ::= ("a"', "does not parse"),
            ('root ::= "a"{2,1}', "maximum below its minimum"),
            ('root ::= "a"{99999999999999999999}', "does not parse"),
            ("root ::= <[x]>", "does not parse"),
            ("root ::= " + "(" * 300 + '"a"' + ")" * 300, "nested groups"),
            ('expr ::= "a"', "no rule 'root'"),
            ("root ::= missing", "no rule 'missing'"),
            ('root ::= root "a" | "b"', "left recursive"),
            ('root ::= a\na ::= "" | b\nb ::= "" a "x"', "left recursive"),
            ('root ::= ("a" | )*', "left recursive"),
            (" \n\t", "empty"),
            ("# a comment", "no rule 'root'"),
        )
    ),
    (SamplerChain().grammar('root ::= "a"', "other"), "no rule 'other'"),
    *(
        (SamplerChain().grammar_lazy(CALL, trigger_patterns=["a", pattern]), "expression")
        for pattern in ("(", "[z-a]", "a{2,1}", "*a")
    ),
]

# Each is to end in an error or to work: what makes parsers recurse and automata explode.
HOSTILE = {
    "starred stars": 'root ::= ((((((((("a"?)*)*)*)*)*)*)*)*)* "b"',
    "doubled nullables": "root ::= r0 r0\n"
    + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(60))
    + 'r60 ::= "" | "a"\n',
    "nullable choices": 'root ::= r0 "a"\n'
    + "".join(f'r{i} ::= r{i + 1} r{i + 1} | ""\n' for i in range(60))
    + 'r60 ::= "" | "a"\n',
    "catalan": 'root ::= s+\ns ::= "a" s s | "a" s "b" | "a" s | "a"',
    "any count": 'root ::= s\ns ::= "a" s s s s s | "a" s{1,40} | "a"',
    "counts of counts": 'root ::= a{1,60}\na ::= b{1,60}\nb ::= c{1,60}\nc ::= "a"{1,60}\n',
    "backwards": 'root ::= "a"{5,1}',
    "counters": 'root ::= (("a" | "aa" | "aaa"){0,500} ("a" | "b"){0,500}){0,50} "c"',
    "long chain": "root ::= r0\n"
    + "".join(f"r{i} ::= r{i + 1}\n" for i in range(20_000))
    + 'r20000 ::= "a"\n',
    "long sequence": "root ::= " + '"a" ' * 50_000,
    "long choice": "root ::= " + " | ".join(f'"a{n}"' for n in range(30_000)),
    "right spine": 'root ::= "a" root? root? root? root?',
    "many sets": "root ::= " + " | ".join(f"[\\u{0x100 + 2 * n:04x}]" for n in range(20_000)),
    "open groups": "root ::= " + "(" * 1_000_000,
    "closed groups": "root ::= " + "(" * 250 + '"a"' + ")*" * 250,
    "copies of copies": 'root ::= ((("abc"{2000}){2000}){2000}){2000}',
}  # fmt: skip


def survive(model: _core.Model, text: str, n_steps: int) -> str:
    """Run a grammar for some steps; return the class of the error, or "works"."""
    row = zeros(model)
    try:
        sampler = SamplerChain().grammar(text).greedy().compile(model, 1)
        row[[i for i in range(row.size) if model.vocab.piece(i, True) == b"a"]] = 1.0
        for _ in range(n_steps):
            if model.vocab.is_eog(sampler.select(row)):
                break
    except SamplerError as error:
        return type(error).__name__
    return "works"


def main(path: str) -> None:
    """Run the hostile grammars, with 768 MiB more than the model takes."""
    with _core.Model(path) as model:
        if sys.platform == "linux":
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (768 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for name, text in HOSTILE.items():
            print(name, survive(model, text, 200), sep=": ")


if __name__ == "__main__":
    main(sys.argv[1])
