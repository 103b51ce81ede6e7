"""The catalogue of sampler stages: names, parameters and ranges.

The ranges are those in which llama.cpp's samplers compute in float32 without overflow, division
by zero, assertion or silent correction; everything else is refused before it reaches C.
"""

from __future__ import annotations

from .errors import SamplerError

# Not imported from typing: that module alone costs more than this one may take to import.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, NoReturn

# Larger magnitudes overflow float32 once multiplied by a token count or divided by a temperature;
# smaller divisors turn an ordinary logit into inf.
_HUGE = 1e30
_TINY = 1e-30
_INT32_MAX = 2**31 - 1
# llama.cpp allocates the whole window up front (4 bytes a token), however short the sequence is.
_MAX_WINDOW = 2**24
# 0xFFFFFFFF asks llama.cpp for a random seed, which could not be reported.
N_SEEDS = 0xFFFFFFFF


def _real(low: float, high: float = _HUGE, *, or_zero: bool = False) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, (str, bytes, bool)):
            raise ValueError("must be a number")
        number = float(value) + 0.0  # -0.0 becomes 0.0: one value, one repr
        if not (low <= number <= high or (or_zero and number == 0.0)):  # NaN fails here too
            raise ValueError(f"must be {'0 or ' if or_zero else ''}in [{low:g}, {high:g}]")
        return number

    return check


def _integer(low: int, high: int = _INT32_MAX) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError("must be an integer")
        number = int(value.__index__())
        if not low <= number <= high:
            raise ValueError(f"must be in [{low}, {high}]")
        return number

    return check


def _seed(value: Any) -> int | None:
    return None if value is None else _integer(0, N_SEEDS - 1)(value)


def _text(value: Any, max_bytes: int | None = None) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a non-empty string")
    if "\0" in value:
        raise ValueError("must not contain NUL: C would stop reading there")
    if max_bytes is not None and len(value.encode()) > max_bytes:
        raise ValueError(f"must be at most {max_bytes} bytes of UTF-8")
    value.encode()
    return str(value)


def _items(check: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def check_all(values: Any) -> tuple[Any, ...]:
        if isinstance(values, (str, bytes)):
            raise ValueError("must be a sequence, not a string")
        return tuple(check(value) for value in values)

    return check_all


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = list(value.items() if hasattr(value, "items") else value)
    banned = float("-inf")
    token_id, bias = _integer(0), _real(-_HUGE)
    checked = {
        token_id(token): banned if amount in (banned, "-inf") else bias(amount)
        for token, amount in pairs
    }
    if len(checked) < len(pairs):
        raise ValueError("must name each token once")
    return tuple(sorted(checked.items()))


_unit = _real(0.0, 1.0)
_count = _integer(0)
# The catalogue: every stage, its parameters under llama.cpp's names and in its order.
STAGES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "greedy": {},
    "dist": {"seed": _seed},
    "top_k": {"k": _count},
    "top_p": {"p": _unit, "min_keep": _count},
    "min_p": {"p": _unit, "min_keep": _count},
    "typical": {"p": _unit, "min_keep": _count},
    "temp": {"t": _real(_TINY, or_zero=True)},
    "temp_ext": {"t": _real(_TINY, or_zero=True), "delta": _real(0.0), "exponent": _real(0.0)},
    "xtc": {"p": _unit, "t": _unit, "min_keep": _count, "seed": _seed},
    "top_n_sigma": {"n": _real(0.0)},
    "mirostat": {"seed": _seed, "tau": _real(0.0), "eta": _real(0.0), "m": _integer(2)},
    "mirostat_v2": {"seed": _seed, "tau": _real(0.0), "eta": _real(0.0)},
    "penalties": {
        "penalty_last_n": _integer(0, _MAX_WINDOW),
        "penalty_repeat": _real(_TINY),
        "penalty_freq": _real(-_HUGE),
        "penalty_present": _real(-_HUGE),
    },
    "dry": {
        "dry_multiplier": _real(0.0),
        "dry_base": _real(1.0, or_zero=True),
        "dry_allowed_length": _count,
        "dry_penalty_last_n": _integer(0, _MAX_WINDOW),
        # llama.cpp cuts longer ones silently, perhaps inside a character.
        "seq_breakers": _items(lambda value: _text(value, 40)),
    },
    "adaptive_p": {"target": _real(-1.0, 1.0), "decay": _real(0.0, 0.99), "seed": _seed},
    "logit_bias": {"logit_bias": _biases},
    "infill": {},
    "grammar": {"grammar_str": _text, "grammar_root": _text},
    "grammar_lazy": {
        "grammar_str": _text,
        "grammar_root": _text,
        "trigger_patterns": _items(_text),
        "trigger_tokens": _items(_count),
    },
}
SELECTORS = frozenset({"greedy", "dist", "mirostat", "mirostat_v2", "adaptive_p"})
GRAMMARS = frozenset({"grammar", "grammar_lazy"})
# The values with which llama.cpp leaves every row untouched.
_IDLE: dict[str, Callable[[dict[str, Any]], bool]] = {
    "top_k": lambda p: p["k"] == 0,
    "top_p": lambda p: p["p"] >= 1.0,
    "min_p": lambda p: p["p"] <= 0.0,
    "typical": lambda p: p["p"] >= 1.0,
    "temp": lambda p: p["t"] == 1.0,
    "temp_ext": lambda p: p["t"] == 1.0 and p["delta"] == 0.0,
    "xtc": lambda p: p["p"] <= 0.0 or p["t"] > 0.5,
    "top_n_sigma": lambda p: p["n"] <= 0.0,
    "penalties": lambda p: (
        p["penalty_last_n"] == 0
        or (p["penalty_repeat"], p["penalty_freq"], p["penalty_present"]) == (1.0, 0.0, 0.0)
    ),
    "dry": lambda p: not (p["dry_multiplier"] and p["dry_base"] and p["dry_penalty_last_n"]),
    "logit_bias": lambda p: all(bias == 0.0 for _, bias in p["logit_bias"]),
}


class Frozen:
    """Base of values whose attributes never change after construction."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable")


class Stage(Frozen):
    """One validated stage: `name` and `items`, its (parameter, value) pairs in llama.cpp's order.

    Raises SamplerError, naming stage and parameter, for an unknown, missing or out-of-range one.
    """

    __slots__ = ("items", "name")
    name: str
    items: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, /, **params: Any) -> None:
        checks = STAGES.get(name)
        if checks is None:
            raise SamplerError(f"unknown sampler stage {name!r}")
        if params.keys() != checks.keys():
            raise SamplerError(f"{name}: takes ({', '.join(checks)}), got ({', '.join(params)})")
        items = []
        for key, check in checks.items():
            try:
                items.append((key, check(params[key])))
            except (TypeError, ValueError, OverflowError) as error:
                reason = str(error) if type(error) is ValueError else "has the wrong type"
                raise SamplerError(f"{name}: {key} {reason}, got {params[key]!r:.80}") from None
        if name == "grammar_lazy" and not (params["trigger_patterns"] or params["trigger_tokens"]):
            raise SamplerError("grammar_lazy: trigger_patterns and trigger_tokens are both empty")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "items", tuple(items))

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as a new dict."""
        return dict(self.items)

    @property
    def is_noop(self) -> bool:
        """Whether llama.cpp leaves every candidate row untouched with these values."""
        idle = _IDLE.get(self.name)
        return idle is not None and idle(self.params)

    @property
    def is_zero_temp(self) -> bool:
        """Whether this is a temperature of 0, which bans every candidate but the best."""
        p = self.params
        return self.name in ("temp", "temp_ext") and p["t"] == 0.0 and p.get("delta", 0.0) == 0.0

    @property
    def history_len(self) -> int:
        """The number of tokens (prompt included) that this stage looks back on."""
        p = self.params
        return 0 if self.is_noop else p.get("penalty_last_n", p.get("dry_penalty_last_n", 0))

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"name": ..., parameter: value, ...}``, made of JSON types only."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in self.items}
        if self.name == "logit_bias":  # JSON has no infinities and no integer keys
            plain["logit_bias"] = [
                [token, "-inf" if bias == float("-inf") else bias]
                for token, bias in plain["logit_bias"]
            ]
        return {"name": self.name, **plain}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stage):
            return NotImplemented
        return (self.name, self.items) == (other.name, other.items)

    def __hash__(self) -> int:
        return hash((self.name, self.items))

    def __repr__(self) -> str:
        params = "".join(f", {key}={source(key, value)}" for key, value in self.items)
        return f"Stage({self.name!r}{params})"

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], Stage], tuple[dict[str, Any]]]:
        return stage_from_dict, (self.to_dict(),)


def stage_from_dict(fields: dict[str, Any]) -> Stage:
    """Return the stage that `Stage.to_dict` described."""
    params = dict(fields)
    return Stage(params.pop("name"), **params)


def source(key: str, value: Any) -> str:
    """Return the Python expression that gives this parameter value."""
    if key == "logit_bias":  # repr(-inf) is no expression
        pairs = (f"{t}: {b!r}" if b >= -_HUGE else f"{t}: float('-inf')" for t, b in value)
        return "{" + ", ".join(pairs) + "}"
    return repr(value)


_GGUF_PREFIX = "general.sampling."
# Names as llama.cpp's programs accept them, without "_" and "-". dry, top_n_sigma and typ_p are
# known there too, but no metadata key can switch them on.
_GGUF_NAMES = {"temperature": "temp", "nucleus": "topp"}
_GGUF_SEQUENCE = "penalties;top_k;top_p;min_p;xtc;temp"


def recommended_stages(metadata: Mapping[str, str]) -> list[Stage] | None:
    """Return the stages that a GGUF's ``general.sampling.*`` keys ask for; None without such keys.

    Follows ``common_init_sampler_from_model`` and ``common_sampler_init`` of llama.cpp.
    """
    start = len(_GGUF_PREFIX)
    found = {k[start:]: v for k, v in metadata.items() if k.startswith(_GGUF_PREFIX)}
    if not found:
        return None

    def real(key: str, default: float) -> float:
        try:
            return float(found[key])
        except (KeyError, ValueError):
            return default

    def whole(key: str, default: int) -> int:
        try:
            return int(float(found[key]))
        except (KeyError, ValueError, OverflowError):
            return default

    t = real("temp", 0.8)
    temp = Stage("temp", t=0.0 if t < 0.0 else t)
    mirostat = whole("mirostat", 0)
    if mirostat:
        target = {"tau": real("mirostat_tau", 5.0), "eta": real("mirostat_eta", 0.1)}
        if mirostat == 1:
            return [temp, Stage("mirostat", seed=None, m=100, **target)]
        if mirostat == 2:
            return [temp, Stage("mirostat_v2", seed=None, **target)]
        raise SamplerError(f"mirostat: must be 0, 1 or 2, got {mirostat}")
    repeat = {"penalty_repeat": real("penalty_repeat", 1.0)}
    repeat |= {"penalty_freq": 0.0, "penalty_present": 0.0}
    chance = {"p": real("xtc_probability", 0.0), "t": real("xtc_threshold", 0.1)}
    build: dict[str, Callable[[], Stage]] = {
        "penalties": lambda: Stage(
            "penalties", penalty_last_n=max(0, whole("penalty_last_n", 64)), **repeat
        ),
        "topk": lambda: Stage("top_k", k=max(0, whole("top_k", 40))),
        "topp": lambda: Stage("top_p", p=real("top_p", 0.95), min_keep=1),
        "minp": lambda: Stage("min_p", p=real("min_p", 0.05), min_keep=1),
        "xtc": lambda: Stage("xtc", **chance, min_keep=1, seed=None),
        "temp": lambda: temp,
        "infill": lambda: Stage("infill"),
    }
    stages: list[Stage] = []
    selector: list[Stage] = []
    for written in found.get("sequence", _GGUF_SEQUENCE).split(";"):
        name = written.lower().replace("_", "").replace("-", "")
        name = _GGUF_NAMES.get(name, name)
        if name == "adaptivep":  # llama.cpp puts it last, wherever it is named
            selector = [Stage("adaptive_p", target=-1.0, decay=0.9, seed=None)]
        elif name in build:
            stages.append(build[name]())
    return [stage for stage in stages if stage is temp or not stage.is_noop] + selector
