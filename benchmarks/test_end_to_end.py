"""Whole answers under each kind of chain against llama-bench's tg128, interleaved in one run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from side_by_side import GPU_LAYERS, N_THREADS, Native, spread

from llama_crab import Llama, SamplerChain

ROUNDS = 15
N_GEN = 128

# An object with strings, integers, an enumeration and arrays, as a JSON schema becomes one.
JSON = r"""
root     ::= ("{" ws "\"name\"" ws ":" ws string "," ws "\"age\"" ws ":" ws integer "," ws
              "\"role\"" ws ":" ws role "," ws "\"tags\"" ws ":" ws strings "," ws
              "\"scores\"" ws ":" ws integers "," ws "\"notes\"" ws ":" ws strings ws "}")
role     ::= "\"admin\"" | "\"editor\"" | "\"viewer\""
strings  ::= "[" ws string ("," ws string){5,8} ws "]"
integers ::= "[" ws integer ("," ws integer){5,8} ws "]"
integer  ::= "-"? ([0-9] | [1-9] [0-9]{0,15})
string   ::= "\"" char{8,40} "\""
char     ::= [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4})
ws       ::= | " " | "\n" [ \t]{0,20}
"""
_STRING = {"type": "string", "minLength": 8, "maxLength": 40}
_STRINGS = {"type": "array", "items": _STRING, "minItems": 6, "maxItems": 9}
_INTEGERS = {"type": "array", "items": {"type": "integer"}, "minItems": 6, "maxItems": 9}
# The same object as a JSON schema; the notes have no limit, as most strings of schemas.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": _STRING,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "editor", "viewer"]},
        "tags": _STRINGS,
        "scores": _INTEGERS,
        "notes": {**_STRINGS, "items": {"type": "string"}},
    },
    "required": ["name", "age", "role", "tags", "scores", "notes"],
    "additionalProperties": False,
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"sampler": SamplerChain.benchmark()},
    "default": {"sampler": SamplerChain.default()},
    "code": {"sampler": SamplerChain.code()},
    "chat": {"sampler": SamplerChain.chat()},
    "creative": {"sampler": SamplerChain.creative()},
    "mirostat_v2": {"sampler": SamplerChain().mirostat_v2()},
    "logprobs_5": {"sampler": SamplerChain.chat(), "logprobs": 5},
    "json": {"sampler": SamplerChain.structured(JSON), "ignore_eos": False},
    "json_schema": {
        "sampler": SamplerChain().temp(0.7).top_p(0.9),
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        "ignore_eos": False,
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.benchmark(group="end to end")
def test_end_to_end(
    benchmark: BenchmarkFixture,
    native: Native,
    figures: dict[str, Any],
    model_path: Path,
    name: str,
) -> None:
    """128 tokens after a 16-token prompt, fewer if the grammar is complete before."""
    prompt = list(range(1000, 1016))
    ours: list[float] = []
    theirs: list[float] = []
    sampling: list[float] = []
    paired: list[float] = []
    with Llama(
        model_path,
        n_ctx=len(prompt) + N_GEN + 1,
        flash_attn_type=True,
        n_threads=N_THREADS,
        n_gpu_layers=GPU_LAYERS or None,
    ) as llama:

        def before() -> None:
            theirs.append(native.bench(model_path, n_gen=N_GEN, depth=len(prompt)))

        def run() -> None:
            options = {"ignore_eos": True, **CASES[name]}
            result = llama.create_completion(
                prompt, N_GEN + 1, seed=len(ours), cache_prompt=False, **options
            )
            timings = result.timings
            assert timings.predicted_n > N_GEN // 2
            ours.append((timings.predicted_n - 1) / timings.predicted_sec)
            sampling.append(timings.sample_sec / timings.predicted_n * 1e6)

        run()
        ours.clear()
        sampling.clear()
        benchmark.pedantic(run, setup=before, rounds=ROUNDS)
        paired.extend(mine / native for mine, native in zip(ours, theirs, strict=True))
    figure = {
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 4),
        "paired_ratio": round(statistics.median(paired), 4),
        "ours_tok_s": spread(ours),
        "llama_bench_tok_s": spread(theirs),
        "sample_us_per_token": spread(sampling),
    }
    benchmark.extra_info.update(figure)
    figures[f"end_to_end/{name}/{model_path.stem}"] = figure
