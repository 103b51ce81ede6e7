"""`SamplerChain` as a value: what it accepts, what it refuses, and what it says about itself."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_crab import sampling
from llama_crab.errors import SamplerError
from llama_crab.sampling import SamplerChain
from llama_crab.sampling_stages import GRAMMARS, SELECTORS, STAGES, Stage

ROOT = Path(__file__).parents[2]
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP_DIR") or ROOT / "third_party" / "llama.cpp")
GBNF = 'root ::= "yes" | "no"'

# One valid call of every stage method.
EXAMPLES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "dist": {"seed": 3},
    "top_k": {"k": 40},
    "top_p": {"p": 0.9, "min_keep": 2},
    "min_p": {"p": 0.05, "min_keep": 1},
    "typical": {"p": 0.5, "min_keep": 1},
    "temp": {"t": 0.8},
    "temp_ext": {"t": 0.8, "delta": 0.3, "exponent": 1.5},
    "xtc": {"p": 0.5, "t": 0.1, "min_keep": 1, "seed": 7},
    "top_n_sigma": {"n": 1.5},
    "mirostat": {"seed": 1, "tau": 4.0, "eta": 0.2, "m": 50},
    "mirostat_v2": {"seed": 1, "tau": 4.0, "eta": 0.2},
    "penalties": {
        "penalty_last_n": 32,
        "penalty_repeat": 1.2,
        "penalty_freq": 0.1,
        "penalty_present": -0.1,
    },
    "dry": {
        "dry_multiplier": 0.8,
        "dry_base": 1.5,
        "dry_allowed_length": 3,
        "dry_penalty_last_n": 100,
        "seq_breakers": ["\n", "."],
    },
    "adaptive_p": {"target": 0.4, "decay": 0.8, "seed": 2},
    "logit_bias": {"logit_bias": {15: -1.5, 2: float("-inf")}},
    "infill": {},
    "grammar": {"grammar_str": GBNF, "grammar_root": "root"},
    "grammar_lazy": {
        "grammar_str": GBNF,
        "grammar_root": "root",
        "trigger_patterns": ["(\\{)"],
        "trigger_tokens": [5, 6],
    },
}


def one(name: str, **changes: Any) -> SamplerChain:
    chain: SamplerChain = getattr(SamplerChain(), name)(**{**EXAMPLES[name], **changes})
    return chain


def names(chain: SamplerChain) -> list[str]:
    return [stage.name for stage in chain.stages]


# The face against llama.cpp's own headers.


def c_samplers() -> dict[str, list[str]]:
    """Parameter names of every ``llama_sampler_init_*`` in llama.h."""
    header = (LLAMA_CPP / "include" / "llama.h").read_text(encoding="utf-8")
    header = re.sub(r"//[^\n]*|/\*.*?\*/", "", header, flags=re.S)
    found = {}
    for name, params in re.findall(r"llama_sampler_init_(\w+)\s*\(([^;]*?)\)\s*[;,:]", header):
        words = [param.split()[-1].lstrip("*") for param in params.split(",") if param.strip()]
        found[name] = [word for word in words if word != "void"]
    return found


def test_every_sampler_of_llama_h_is_a_stage_with_its_parameter_names() -> None:
    c = c_samplers()
    c["grammar_lazy"] = c.pop("grammar_lazy_patterns")
    supplied = {"vocab", "n_vocab", "num_breakers", "n_logit_bias"}
    supplied |= {"num_trigger_patterns", "num_trigger_tokens"}
    assert len(c) == 19
    assert {name: [p for p in params if p not in supplied] for name, params in c.items()} == {
        name: list(checks) for name, checks in STAGES.items()
    }


@pytest.mark.parametrize("name", STAGES)
def test_methods_take_the_parameters_in_the_order_of_llama_h(name: str) -> None:
    signature = inspect.signature(getattr(SamplerChain, name))
    assert list(signature.parameters)[1:] == list(STAGES[name])


def test_defaults_are_those_of_llama_cpp() -> None:
    header = (LLAMA_CPP / "common" / "common.h").read_text(encoding="utf-8")
    body = header.split("struct common_params_sampling {")[1].split("\n};")[0]
    c = {k: float(v) for k, v in re.findall(r"(\w+)\s*=\s*(-?[\d.]+)f?;", body)}

    def default(name: str, param: str) -> Any:
        return inspect.signature(getattr(SamplerChain, name)).parameters[param].default

    for param in ("penalty_last_n", "penalty_repeat", "penalty_freq", "penalty_present"):
        assert default("penalties", param) == c[param]
    for param in ("dry_base", "dry_allowed_length", "dry_penalty_last_n"):
        assert default("dry", param) == c[param]
    for name in ("mirostat", "mirostat_v2"):
        assert (default(name, "tau"), default(name, "eta")) == (
            c["mirostat_tau"],
            c["mirostat_eta"],
        )
    assert default("xtc", "t") == c["xtc_threshold"]
    assert default("temp_ext", "exponent") == c["dynatemp_exponent"]
    assert default("adaptive_p", "decay") == c["adaptive_decay"]
    breakers = re.search(r"dry_sequence_breakers = \{(.*?)\};", body)
    assert breakers is not None
    assert list(default("dry", "seq_breakers")) == json.loads(f"[{breakers[1]}]")
    assert SamplerChain.default() == SamplerChain().top_k(int(c["top_k"])).top_p(c["top_p"]).min_p(
        c["min_p"]
    ).temp(c["temp"])


# Order, selectors, presets.


def test_presets_are_those_of_the_tuning_page() -> None:
    def steps(chain: SamplerChain) -> list[tuple[Any, ...]]:
        return [(s.name, *(v for k, v in s.items if k != "min_keep")) for s in chain.stages]

    assert steps(SamplerChain.benchmark()) == [("temp", 0.0), ("greedy",)]
    assert steps(SamplerChain.code()) == [("temp", 0.2), ("top_p", 0.95), ("dist", None)]
    assert steps(SamplerChain.code(temp=0)) == [("temp", 0.0), ("top_p", 0.95), ("greedy",)]
    assert steps(SamplerChain.chat()) == [
        ("penalties", 64, 1.1, 0.0, 0.0),
        ("temp", 0.7),
        ("top_p", 0.9),
        ("min_p", 0.05),
        ("dist", None),
    ]
    assert steps(SamplerChain.creative()) == [
        ("penalties", 128, 1.1, 0.1, 0.1),
        ("temp", 0.9),
        ("top_p", 0.95),
        ("min_p", 0.05),
        ("dist", None),
    ]
    assert steps(SamplerChain.structured(GBNF)) == [
        ("grammar", GBNF, "root"),
        ("temp", 0.7),
        ("top_p", 0.9),
        ("dist", None),
    ]


def test_each_method_returns_a_new_chain() -> None:
    base = SamplerChain().temp(0.8)
    longer = base.mirostat_v2(seed=1, tau=5.0, eta=0.1)
    assert names(base) == ["temp", "dist"]
    assert names(longer) == ["temp", "mirostat_v2"]
    assert longer.selector.params == {"seed": 1, "tau": 5.0, "eta": 0.1}
    assert (base.seed, longer.seed) == (None, 1)


@pytest.mark.parametrize(
    ("chain", "selector"),
    [
        (SamplerChain(), "dist"),
        (SamplerChain().temp(0), "greedy"),
        (SamplerChain().temp(0).top_k(5), "greedy"),
        (SamplerChain().temp_ext(0, 0), "greedy"),
        (SamplerChain().temp_ext(0, 0.5), "dist"),
        (SamplerChain().temp(0).dist(seed=1), "dist"),
        (SamplerChain().grammar(GBNF), "dist"),
        (SamplerChain().grammar(GBNF).temp(0), "greedy"),
    ],
)
def test_a_chain_without_a_selector_gets_one(chain: SamplerChain, selector: str) -> None:
    assert chain.selector.name == selector
    assert sum(stage.name in SELECTORS for stage in chain.stages) == 1


@pytest.mark.parametrize("selector", sorted(SELECTORS))
@pytest.mark.parametrize("late", sorted(STAGES))
def test_nothing_but_a_grammar_may_follow_a_selector(selector: str, late: str) -> None:
    chain = one(selector)
    if late in GRAMMARS:
        assert names(getattr(chain, late)(**EXAMPLES[late])) == [late, selector]
    else:
        with pytest.raises(SamplerError, match=f"^{late}: .*{selector}"):
            getattr(chain, late)(**EXAMPLES[late])


@given(st.integers(0, 4))
def test_a_grammar_comes_first_wherever_it_is_written(position: int) -> None:
    steps = [Stage("temp", t=0.5), Stage("top_k", k=9), Stage("infill"), Stage("dist", seed=1)]
    steps.insert(position, Stage("grammar", **EXAMPLES["grammar"]))
    chain = SamplerChain(steps)
    assert names(chain) == ["grammar", "temp", "top_k", "infill", "dist"]
    assert chain == SamplerChain().grammar(GBNF).temp(0.5).top_k(9).infill().dist(1)
    assert chain.constraint == steps[position]


def test_two_grammars_are_refused() -> None:
    with pytest.raises(SamplerError, match=r"^grammar_lazy: .*already"):
        one("grammar").grammar_lazy(GBNF, trigger_tokens=[1])


# Values.

BAD = [
    ("temp", "t", -0.1),
    ("temp", "t", 1e-38),  # 30 / 1e-38 is inf in float32
    ("temp", "t", 1e39),
    ("temp_ext", "t", -1.0),
    ("temp_ext", "delta", -0.1),
    ("temp_ext", "exponent", -1.0),  # 0 ** -1 at zero entropy
    ("top_k", "k", -1),
    ("top_k", "k", 2**31),
    ("top_k", "k", 1.5),
    ("top_p", "p", 1.01),
    ("top_p", "p", -0.01),
    ("top_p", "min_keep", -1),
    ("min_p", "p", 1.5),
    ("typical", "p", -1.0),
    ("xtc", "p", 2.0),
    ("xtc", "t", -0.5),
    ("xtc", "seed", 0xFFFFFFFF),
    ("top_n_sigma", "n", -1.0),
    ("dist", "seed", 0xFFFFFFFF),
    ("dist", "seed", -1),
    ("dist", "seed", 1.0),
    ("dist", "seed", True),
    ("mirostat", "m", 1),  # 0 / 0 in the estimate of s
    ("mirostat", "tau", -1.0),
    ("mirostat_v2", "eta", -0.1),
    ("penalties", "penalty_repeat", 0.0),
    ("penalties", "penalty_repeat", -1.1),
    ("penalties", "penalty_repeat", 1e-46),  # 0 in float32
    ("penalties", "penalty_last_n", -1),
    ("penalties", "penalty_last_n", 2**31 - 1),  # 8 GB of window
    ("dry", "dry_base", 0.5),
    ("dry", "dry_multiplier", -0.5),
    ("dry", "dry_allowed_length", -1),
    ("dry", "dry_penalty_last_n", 2**30),
    ("dry", "seq_breakers", "\n"),
    ("dry", "seq_breakers", [""]),
    ("dry", "seq_breakers", ["x" * 41]),
    ("dry", "seq_breakers", ["é" * 21]),
    ("dry", "seq_breakers", ["a\0b"]),
    ("dry", "seq_breakers", ["\ud800"]),
    ("dry", "seq_breakers", [b"x"]),
    ("adaptive_p", "target", 1.1),
    ("adaptive_p", "decay", 1.0),
    ("logit_bias", "logit_bias", {-1: 1.0}),
    ("logit_bias", "logit_bias", {2**31: 1.0}),
    ("logit_bias", "logit_bias", {1: math.nan}),
    ("logit_bias", "logit_bias", {1: math.inf}),
    ("logit_bias", "logit_bias", [(1, 1.0), (1, 2.0)]),
    ("logit_bias", "logit_bias", {"1": 1.0}),
    ("logit_bias", "logit_bias", [1, 2]),
    ("grammar", "grammar_str", ""),
    ("grammar", "grammar_str", "root ::= \0"),
    ("grammar", "grammar_root", ""),
    ("grammar_lazy", "trigger_patterns", ["a", ""]),
    ("grammar_lazy", "trigger_tokens", [-1]),
]


@pytest.mark.parametrize(("name", "param", "value"), BAD)
def test_values_out_of_range_name_stage_and_parameter(name: str, param: str, value: Any) -> None:
    with pytest.raises(SamplerError, match=f"^{name}: {param} .*got "):
        one(name, **{param: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1", b"1", True, [1.0]])
def test_no_numeric_parameter_takes_non_numbers(value: object) -> None:
    tried = 0
    for name, params in EXAMPLES.items():
        for param, example in params.items():
            if isinstance(example, (int, float)) and not (value is None and param == "seed"):
                with pytest.raises(SamplerError, match=f"^{name}: {param} "):
                    one(name, **{param: value})
                tried += 1
    assert tried > 25


def test_a_lazy_grammar_needs_a_trigger() -> None:
    with pytest.raises(SamplerError, match=r"^grammar_lazy: .*trigger"):
        SamplerChain().grammar_lazy(GBNF)


@pytest.mark.parametrize(
    ("name", "params"), [("nope", {}), ("temp", {}), ("temp", {"t": 1.0, "x": 1}), ("dist", {})]
)
def test_stage_wants_exactly_its_parameters(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(SamplerError, match=name):
        Stage(name, **params)


def test_numbers_of_other_types_become_plain_ones() -> None:
    np = pytest.importorskip("numpy", reason="numpy is a runtime dependency; absent here")
    chain = SamplerChain().top_k(np.int64(5)).temp(np.float32(0.5)).min_p(0)
    assert chain == SamplerChain().top_k(5).temp(0.5).min_p(0.0)
    assert [type(v) for s in chain.stages[:2] for _, v in s.items] == [int, float]
    assert repr(SamplerChain().temp(-0.0)) == "SamplerChain().temp(0.0)"


# Round trips.

unit = st.floats(0, 1)
window = st.integers(0, 2**24)
keep = st.integers(0, 2**31 - 1)
seeds = st.none() | st.integers(0, 0xFFFFFFFE)
scale = st.floats(0, 1e30)
signed = st.floats(-1e30, 1e30)
positive = st.floats(1e-30, 1e30)
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
biases = st.dictionaries(keep, signed | st.just(-math.inf))
FREE = {
    "top_k": {"k": keep},
    "top_p": {"p": unit, "min_keep": keep},
    "min_p": {"p": unit, "min_keep": keep},
    "typical": {"p": unit, "min_keep": keep},
    "temp": {"t": positive | st.just(0.0)},
    "temp_ext": {"t": positive, "delta": scale, "exponent": scale},
    "xtc": {"p": unit, "t": unit, "min_keep": keep, "seed": seeds},
    "top_n_sigma": {"n": scale},
    "penalties": {
        "penalty_last_n": window,
        "penalty_repeat": positive,
        "penalty_freq": signed,
        "penalty_present": signed,
    },
    "dry": {
        "dry_multiplier": scale,
        "dry_base": st.just(0.0) | st.floats(1, 1e30),
        "dry_allowed_length": keep,
        "dry_penalty_last_n": window,
        "seq_breakers": st.lists(text.filter(lambda s: len(s.encode()) <= 40), max_size=3),
    },
    "logit_bias": {"logit_bias": biases},
    "infill": {},
}
ENDS = {
    "greedy": {},
    "dist": {"seed": seeds},
    "mirostat": {"seed": seeds, "tau": scale, "eta": scale, "m": st.integers(2, 2**31 - 1)},
    "mirostat_v2": {"seed": seeds, "tau": scale, "eta": scale},
    "adaptive_p": {"target": st.floats(-1, 1), "decay": st.floats(0, 0.99), "seed": seeds},
}
LIMITS = {
    "grammar": {"grammar_str": text, "grammar_root": text},
    "grammar_lazy": {
        "grammar_str": text,
        "grammar_root": text,
        "trigger_patterns": st.lists(text, max_size=2),
        "trigger_tokens": st.lists(keep, min_size=1, max_size=2),
    },
}


def any_of(table: dict[str, dict[str, st.SearchStrategy[Any]]]) -> st.SearchStrategy[Stage]:
    return st.one_of(*(st.builds(Stage, st.just(name), **params) for name, params in table.items()))


chains = st.builds(
    lambda steps, end, limit: SamplerChain((*steps, *end, *limit)),
    st.lists(any_of(FREE), max_size=4),
    st.lists(any_of(ENDS), max_size=1),
    st.lists(any_of(LIMITS), max_size=1),
)


def test_the_strategies_cover_every_stage() -> None:
    assert {**FREE, **ENDS, **LIMITS}.keys() == STAGES.keys() == EXAMPLES.keys()


@given(chains)
def test_a_chain_survives_every_round_trip(chain: SamplerChain) -> None:
    copies = [
        pickle.loads(pickle.dumps(chain)),
        copy.deepcopy(chain),
        eval(repr(chain), {"SamplerChain": SamplerChain}),
        SamplerChain.from_dict(chain.to_dict()),
        SamplerChain.from_json(chain.to_json()),
        SamplerChain(eval(repr(list(chain.stages)), {"Stage": Stage})[: len(chain._written)]),
    ]
    for other in copies:
        assert other == chain
        assert hash(other) == hash(chain)
        assert other.stages == chain.stages

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(chain.to_json(), parse_constant=refuse)


@given(chains, chains)
def test_equality_is_equality_of_what_was_written(a: SamplerChain, b: SamplerChain) -> None:
    assert (a == b) == (a.to_dict() == b.to_dict())
    assert a != "SamplerChain()"


def test_repr_says_what_differs_from_the_defaults() -> None:
    assert repr(SamplerChain.creative()) == (
        "SamplerChain().penalties(penalty_last_n=128, penalty_repeat=1.1, penalty_freq=0.1,"
        " penalty_present=0.1).temp(0.9).top_p(0.95).min_p(0.05)"
    )
    assert repr(SamplerChain().mirostat_v2(1)) == "SamplerChain().mirostat_v2(seed=1)"
    assert repr(one("logit_bias")) == ("SamplerChain().logit_bias({2: float('-inf'), 15: -1.5})")


def test_chains_and_stages_are_immutable() -> None:
    chain = SamplerChain.chat()
    for target in (chain, chain.stages[0]):
        with pytest.raises(AttributeError, match="immutable"):
            target._stages = ()  # type: ignore[union-attr]
        with pytest.raises(AttributeError, match="immutable"):
            del target.name  # type: ignore[union-attr]
    chain.stages[0].params["penalty_last_n"] = 0
    assert chain == SamplerChain.chat()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "{",
        '{"stages": 1}',
        '{"stages": [1]}',
        '{"stages": [{}]}',
        '{"stages": [{"name": "chat"}]}',
        '{"stages": [{"name": ["temp"]}]}',
        '{"stages": [{"name": "temp"}]}',
        '{"stages": [{"name": "temp", "t": 1, "u": 1}]}',
        '{"stages": [{"name": "temp", "t": NaN}]}',
        '{"stages": [{"name": "dist"}, {"name": "temp", "t": 1}]}',
    ],
)
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(SamplerError):
        SamplerChain.from_json(text)


def test_json_may_leave_defaults_out() -> None:
    text = '{"stages": [{"name": "top_p", "p": 0.9}, {"name": "mirostat_v2"}]}'
    assert SamplerChain.from_json(text) == SamplerChain().top_p(0.9).mirostat_v2()


def test_importing_the_module_loads_nothing_heavy() -> None:
    # A stand-in package keeps llama_crab/__init__ (and the compiled core) out of the picture.
    program = (
        "import sys, types; package = types.ModuleType('llama_crab');"
        f"package.__path__ = [{str(Path(sampling.__file__).parent)!r}];"
        "sys.modules['llama_crab'] = package; import llama_crab.sampling;"
        "heavy = {'typing', 'dataclasses', 're', 'json', 'numpy', 'collections', 'enum'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


# What a chain says about itself.


@pytest.mark.parametrize(
    ("chain", "length"),
    [
        (SamplerChain.default(), 0),
        (SamplerChain.chat(), 64),
        (SamplerChain().penalties(64), 0),  # all three penalties at their neutral value
        (SamplerChain().penalties(0, 1.5), 0),
        (SamplerChain().penalties(8, penalty_present=0.5), 8),
        (SamplerChain().dry(0.8, dry_penalty_last_n=300).penalties(64, 1.1), 300),
        (SamplerChain().dry(0.0), 0),
        (SamplerChain().dry(0.8, dry_base=0.0), 0),
    ],
)
def test_needs_history_only_when_a_penalty_acts(chain: SamplerChain, length: int) -> None:
    assert chain.history_len == length
    assert chain.needs_history == (length > 0)


@pytest.mark.parametrize("written", [SamplerChain(), SamplerChain.chat().grammar(GBNF)], ids=repr)
def test_the_executor_is_part_of_the_chain(written: SamplerChain) -> None:
    assert written.executor == "fused"
    reference = written.with_executor("reference")
    assert reference.executor == reference.temp(0.5).executor == "reference"
    assert reference != written
    assert reference.with_executor("fused") == written
    assert len({reference, written}) == 2
    for copied in (
        pickle.loads(pickle.dumps(reference)),
        SamplerChain.from_json(reference.to_json()),
        eval(repr(reference)),
    ):
        assert copied == reference
    with pytest.raises(SamplerError, match="executor"):
        SamplerChain(executor="fastest")  # type: ignore[arg-type]


# Recommendations of the GGUF.


def recommended(**settings: str) -> SamplerChain | None:
    metadata = {f"general.sampling.{key}": value for key, value in settings.items()}
    model: Any = SimpleNamespace(metadata={"general.name": "m", **metadata})
    return SamplerChain.from_model(model)


def test_a_gguf_without_recommendations_gives_none() -> None:
    assert recommended() is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # llama.cpp prints floats with six decimals; what is left out keeps its default.
        (
            {"temp": "0.600000", "top_p": "0.950000", "top_k": "20"},
            SamplerChain().top_k(20).top_p(0.95).min_p(0.05).temp(0.6),
        ),
        ({"temp": "0.000000"}, SamplerChain().top_k(40).top_p(0.95).min_p(0.05).temp(0)),
        ({"temp": "-1"}, SamplerChain().top_k(40).top_p(0.95).min_p(0.05).temp(0)),
        ({"temp": "1", "top_k": "0", "top_p": "1", "min_p": "0"}, SamplerChain().temp(1.0)),
        ({"temp": "warm"}, SamplerChain.default()),
        ({"top_k": "nan"}, SamplerChain.default()),
        (
            {"penalty_repeat": "1.100000", "xtc_probability": "0.500000"},
            SamplerChain().penalties(64, 1.1).top_k(40).top_p(0.95).min_p(0.05).xtc(0.5).temp(0.8),
        ),
        (
            {"penalty_repeat": "1.1", "penalty_last_n": "-1"},
            SamplerChain.default(),
        ),
        (
            {"sequence": "Temperature;top-p;bogus;topk", "temp": "0.5"},
            SamplerChain().temp(0.5).top_p(0.95).top_k(40),
        ),
        ({"sequence": "adaptive_p;temp"}, SamplerChain().temp(0.8).adaptive_p(-1.0)),
        ({"sequence": "nucleus;infill"}, SamplerChain().top_p(0.95).infill()),
        ({"mirostat": "1", "mirostat_tau": "4"}, SamplerChain().temp(0.8).mirostat(tau=4.0)),
        (
            {"mirostat": "2", "mirostat_eta": "0.2", "temp": "1"},
            SamplerChain().temp(1.0).mirostat_v2(eta=0.2),
        ),
    ],
)
def test_recommendations_mean_what_they_mean_to_llama_cpp(
    settings: dict[str, str], expected: SamplerChain
) -> None:
    assert recommended(**settings) == expected


@pytest.mark.parametrize(
    "settings", [{"temp": "nan"}, {"top_p": "-0.5"}, {"mirostat": "3"}, {"penalty_repeat": "0"}]
)
def test_nonsense_in_the_gguf_is_named(settings: dict[str, str]) -> None:
    with pytest.raises(SamplerError, match="recommended by the GGUF"):
        recommended(**settings)
