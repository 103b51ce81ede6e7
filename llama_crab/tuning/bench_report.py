"""What a benchmark found: rows, and as table, JSON, CSV and Markdown."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import LlamaCrabError
from ..params import LlamaParams
from ..speculative import as_text
from .samples import Comparison, Samples, compare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .workloads import Measured, Workload

_FORMAT = "llama_crab bench"
_VERSION = 1
# How a model is loaded, and llama-bench's names for what they share with it.
_CONFIG = (
    *("n_gpu_layers", "split_mode", "main_gpu", "tensor_split", "devices", "load_mode"),
    *("n_threads", "n_threads_batch", "n_batch", "n_ubatch", "type_k", "type_v"),
    *("flash_attn_type", "offload_kqv", "op_offload", "swa_full", "kv_unified", "speculative"),
)
_COUNTS = ("n_prompt", "n_gen", "depth", "n_seq", "n_chars")
_PARTS = ("prefill", "decode", "sample", "text", "first_token")
_DRAFTS = ("drafted", "accepted", "acceptance")
_SHORT = {
    **{"n_gpu_layers": "ngl", "n_threads": "threads", "n_threads_batch": "threads_batch"},
    **{"flash_attn_type": "fa", "type_k": "ctk", "type_v": "ctv"},
}


class BenchFileError(LlamaCrabError, ValueError):
    """A file is not the JSON that a benchmark wrote."""


@dataclass(frozen=True)
class BenchRow:
    """One workload on one configuration.

    ``seconds`` has a value per round and ``rounds`` their numbers; without any, ``error`` says why
    there are none, or the run ended before. ``parts`` are medians, in seconds or tokens by name.
    """

    model: str
    test: str
    unit: str
    n_tokens: int
    config: Mapping[str, Any]
    counts: Mapping[str, Any] = field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    rounds: tuple[int, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        params: LlamaParams,
        workload: Workload,
        measured: Sequence[tuple[int, Measured]],
        error: Exception | None,
        facts: Mapping[str, Any],
    ) -> BenchRow:
        """Return the row of a configuration's measurements."""
        # A drafter of the user's own has a name, and no form that could be read again.
        values = params.replace(speculative=None).to_dict()
        values["speculative"] = params.speculative
        config = {name: values[name] for name in _CONFIG if name in values}
        config |= {name: value for name, value in facts.items() if name in _CONFIG}
        drafts = config.pop("speculative")
        if drafts is not None:
            config["speculative"] = as_text(drafts)
        names = sorted({name for _, item in measured for name in item.parts})
        return cls(
            model=os.path.basename(os.fspath(params.model or "")),
            test=workload.name,
            unit=workload.unit,
            n_tokens=workload.n_tokens,
            config=config,
            counts={name: getattr(workload, name) for name in _COUNTS if hasattr(workload, name)},
            seconds=tuple(item.seconds for _, item in measured),
            rounds=tuple(number for number, _ in measured),
            parts={
                name: statistics.median(item.parts[name] for _, item in measured) for name in names
            },
            error=None if error is None else _reason(error),
            facts={name: value for name, value in facts.items() if name not in _CONFIG},
        )

    @property
    def samples(self) -> Samples | None:
        """The rates, in ``unit``; None where nothing was measured."""
        if not self.seconds:
            return None
        return Samples(tuple(self.n_tokens / seconds for seconds in self.seconds))

    @property
    def group(self) -> str:
        """What may be compared within a run: the test, without its sampler chain."""
        kind, _, _ = self.test.rpartition(" ")
        return kind if self.test.startswith("answer ") else self.test

    def to_dict(self) -> dict[str, Any]:
        """Return flat JSON values, under llama-bench's names where it has them."""
        samples = self.samples
        rates = [] if samples is None else list(samples.values)
        return {
            "model_filename": self.model,
            **self.facts,
            **{name: self.config.get(name) for name in _CONFIG},
            **{name: self.counts.get(name) for name in _COUNTS if name != "depth"},
            "n_depth": self.counts.get("depth"),
            "test": self.test,
            "unit": self.unit,
            "n_tokens": self.n_tokens,
            "median_ts": None if samples is None else samples.median,
            "spread_ts": None if samples is None else samples.spread,
            "avg_ts": statistics.mean(rates) if rates else None,
            "stddev_ts": statistics.stdev(rates) if len(rates) > 1 else None,
            "samples_ns": [round(seconds * 1e9) for seconds in self.seconds],
            "samples_ts": rates,
            "rounds": list(self.rounds),
            "parts": dict(self.parts),
            "error": self.error,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchRow:
        """Build a row from what `to_dict` returned.

        Raises KeyError, TypeError, ValueError, OverflowError.
        """
        counts = {name: values.get(name) for name in _COUNTS}
        counts["depth"] = values.get("n_depth")
        seconds = tuple(float(nanoseconds) / 1e9 for nanoseconds in values["samples_ns"])
        rounds = tuple(map(int, values.get("rounds") or range(len(seconds))))
        if len(rounds) != len(seconds):
            raise ValueError(f"{len(seconds)} samples of {len(rounds)} rounds")
        n_tokens = int(values["n_tokens"])
        if n_tokens < 1:
            raise ValueError(f"n_tokens is {n_tokens}")
        if seconds:
            Samples(seconds, "seconds")  # refuses what is no time
        error = values.get("error")
        return cls(
            model=str(values["model_filename"]),
            test=str(values["test"]),
            unit=str(values["unit"]),
            n_tokens=n_tokens,
            config={name: values[name] for name in _CONFIG if values.get(name) is not None},
            counts={name: count for name, count in counts.items() if count is not None},
            seconds=seconds,
            rounds=rounds,
            parts={str(name): float(sec) for name, sec in dict(values.get("parts") or {}).items()},
            error=None if error is None else str(error),
            facts={k: v for k, v in values.items() if k.startswith("model_") and k != _FILE_NAME},
        )


_FILE_NAME = "model_filename"


@dataclass(frozen=True)
class BenchReport:
    """All rows of a run, the machine it ran on, and whether Ctrl-C ended it early."""

    rows: tuple[BenchRow, ...]
    n_rounds: int
    machine: Mapping[str, Any]
    interrupted: bool = False

    @classmethod
    def of(cls, rows: tuple[BenchRow, ...], n_rounds: int, interrupted: bool) -> BenchReport:
        """Return the report of a run on this machine."""
        return cls(rows, n_rounds, _machine(), interrupted)

    @property
    def failed(self) -> tuple[BenchRow, ...]:
        """The rows that have an error."""
        return tuple(row for row in self.rows if row.error is not None)

    def comparisons(self) -> dict[int, Comparison]:
        """Compare each row with the first one of its test that was measured; by index.

        Only rounds that both have count, pairwise.
        """
        first: dict[tuple[str, str], BenchRow] = {}
        found = {}
        for index, row in enumerate(self.rows):
            if not row.seconds:
                continue
            base = first.setdefault((row.group, row.unit), row)
            common = sorted(set(base.rounds) & set(row.rounds))
            if base is not row and common:
                found[index] = compare(_rates(base, common), _rates(row, common))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "machine": dict(self.machine),
            "n_rounds": self.n_rounds,
            "interrupted": self.interrupted,
            "rows": [row.to_dict() for row in self.rows],
        }

    @classmethod
    def from_dict(cls, values: Any) -> BenchReport:
        """Build a report from what `to_dict` returned. Raises `BenchFileError`."""
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            raise BenchFileError("not the JSON of llama-crab bench")
        if values.get("version") != _VERSION:
            raise BenchFileError(f"version {values.get('version')!r} of the format is not known")
        try:
            rows = tuple(BenchRow.from_dict(row) for row in values["rows"])
            machine = dict(values["machine"])
            return cls(rows, int(values["n_rounds"]), machine, bool(values["interrupted"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BenchFileError(f"damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BenchReport:
        """Read the JSON file of a run. Raises OSError, `BenchFileError`."""
        with open(path, encoding="utf-8") as file:
            try:
                values = json.load(file)
            except (ValueError, RecursionError) as error:
                raise BenchFileError(f"{os.fspath(path)}: not JSON: {error}") from error
        try:
            return cls.from_dict(values)
        except BenchFileError as error:
            raise BenchFileError(f"{os.fspath(path)}: {error}") from error.__cause__

    def to_json(self) -> str:
        """Return the report as JSON text; `load` reads it from a file."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1)

    def to_csv(self) -> str:
        """Return one line per row under a header; lists are JSON."""
        import csv
        import io

        records = [row.to_dict() for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for r in records for name in r)))
        writer.writeheader()
        for record in records:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in record.items()}
            )
        return text.getvalue()

    def to_markdown(self) -> str:
        """Return a table as llama-bench's, and the errors below it."""
        header, rows = self.table()
        lines = [_markdown(header), _markdown(["---"] * len(header))]
        lines += [_markdown(row) for row in rows]
        return "\n".join([*lines, *(["", *self.notes()] if self.notes() else [])])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the cells; settings that all rows share are left out."""
        settings = self.differing() or ["n_threads"]
        parts = [name for name in _PARTS if any(name in row.parts for row in self.rows)]
        drafts = _DRAFTS if any(name in row.parts for row in self.rows for name in _DRAFTS) else ()
        versus = self.comparisons()
        several = len({row.model for row in self.rows}) > 1
        header = ["model"] * several + [_SHORT.get(name, name) for name in settings]
        header += ["test", "rate", *(f"{name.replace('_', ' ')} ms" for name in parts)]
        header += drafts
        header += ["against the first"] * bool(versus)
        rows = []
        for index, row in enumerate(self.rows):
            cells = [row.model] * several + [_shown(row.config, name) for name in settings]
            cells += [row.test, _rate(row)]
            cells += [f"{row.parts[n] * 1e3:.1f}" if n in row.parts else "" for n in parts]
            cells += [_drafted(row.parts, n) for n in drafts]
            cells += [str(versus[index]) if index in versus else ""] * bool(versus)
            rows.append(cells)
        return header, rows

    def differing(self) -> list[str]:
        """Return the names of the settings in which rows differ."""
        found = []
        for name in _CONFIG:
            # A row that failed early does not know the defaults.
            known = [row.config for row in self.rows if row.seconds or name in row.config]
            if len({_setting(_chosen(config, name)) for config in known}) > 1:
                found.append(name)
        return found

    def notes(self) -> list[str]:
        """Return a line for each reason why rows failed, and one for a run that was interrupted."""
        by_reason: dict[str, list[BenchRow]] = {}
        for row in self.failed:
            reason = row.error or ""
            after = f" (after {len(row.seconds)} rounds)" if row.seconds else ""
            by_reason.setdefault(reason + after, []).append(row)
        lines = []
        for reason, rows in by_reason.items():
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            lines.append(f"{self.label(rows[0])}{more}: {reason}")
        if self.interrupted:
            lines.append("interrupted: the rounds until then are shown")
        return lines

    def label(self, row: BenchRow) -> str:
        """Return the row's test with the settings that tell it from others."""
        several = len({other.model for other in self.rows}) > 1
        words = [row.model] * several + [row.test]
        words += [
            f"{_SHORT.get(name, name)}={_setting(row.config[name])}"
            for name in self.differing()
            if name in row.config
        ]
        return " ".join(words)


def _reason(error: Exception) -> str:
    """Return the kind and the message in one line, with llama.cpp's first line of the cause."""
    lines = str(error).splitlines() or [""]
    log = error.log if isinstance(error, LlamaCrabError) else ()
    cause = f": {log[0].strip()}" if log and log[0].strip() not in lines[0] else ""
    return f"{type(error).__name__}: {lines[0]}{cause}"


def _chosen(config: Mapping[str, Any], name: str) -> Any:
    """Return a setting, or None for one that follows from the test or from another setting."""
    if name in ("swa_full", "kv_unified"):
        return None
    value = config.get(name)
    return None if name == "n_threads_batch" and value == config.get("n_threads") else value


def _rates(row: BenchRow, rounds: Iterable[int]) -> Samples:
    by_round = dict(zip(row.rounds, row.seconds, strict=True))
    return Samples(tuple(row.n_tokens / by_round[number] for number in rounds))


def missing(row: BenchRow) -> str:
    """Return what to say in place of the rate of a row without one."""
    return "failed" if row.error else "not measured"


def _rate(row: BenchRow) -> str:
    samples = row.samples
    if samples is None:
        return missing(row)
    digits = 0 if samples.median >= 10_000 else 2
    return f"{samples.median:.{digits}f} ± {samples.spread:.{digits}f} {row.unit}"


def _setting(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "/".join(map(str, value))
    return "default" if value is None else str(value)


def _shown(config: Mapping[str, Any], name: str) -> str:
    value = config.get(name)
    return "none" if name == "speculative" and value is None else _setting(value)


def _drafted(parts: Mapping[str, float], name: str) -> str:
    if not parts.get("drafted"):  # nothing was: there is no share of it
        return "0" if name == "drafted" and name in parts else ""
    return f"{parts[name]:.0%}" if name == "acceptance" else f"{parts[name]:.0f}"


def _markdown(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _machine() -> dict[str, Any]:
    from .. import _core
    from .._version import __version__
    from .probe import default_n_threads

    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "version": __version__,
        "llama_cpp": _core.build_commit(),
        "system_info": _core.system_info(),
        "devices": [
            {"name": device.name, "backend": device.backend, "description": device.description}
            for device in _core.devices()
        ],
        "default_n_threads": default_n_threads(),
    }
