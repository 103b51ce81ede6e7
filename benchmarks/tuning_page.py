"""The figures of docs/performance-tuning.md: measured on a machine, then written into the page.

usage: tuning_page.py measure NAME [--model FILE] [--budget SEC]   results/tuning-page-NAME.json
       tuning_page.py write                     the tables of the page, from all these records

`write` replaces what stands between ``<!-- table: X -->`` and ``<!-- end -->``; the text around it
is the page's own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import fetch_models  # noqa: E402
from side_by_side import ROOT, machine  # noqa: E402

from llama_crab import _core  # noqa: E402
from llama_crab.tuning import BenchReport, bench, tune, tune_report  # noqa: E402
from llama_crab.tuning.workloads import (  # noqa: E402
    PRESETS,
    Complete,
    Generate,
    Parallel,
    Prefill,
    Workload,
)

PAGE = ROOT / "docs" / "performance-tuning.md"
ROUNDS = 5
_THREADS = (1, 2, 4, 8, 16, 32)
_SEQUENCES = (1, 2, 4, 8, 16)

Record = dict[str, Any]


def _rows(report: BenchReport, *settings: str) -> list[dict[str, Any]]:
    """Return what the page shows of a run: the settings that vary, rate, spread and parts."""
    rows = []
    for row in report.rows:
        shown: dict[str, Any] = {"test": row.test, "unit": row.unit, "error": row.error}
        shown |= {name: row.config.get(name) for name in settings}
        if row.samples is not None:
            shown |= {"median": row.samples.median, "spread": row.samples.spread}
        rows.append({**shown, "parts": dict(row.parts)})
    return rows


def measure(path: Path, budget_sec: float) -> Record:
    """Take the page's steps on this machine."""

    def run(*workloads: Workload, **axes: Iterable[Any]) -> list[dict[str, Any]]:
        lists = {name: list(values) for name, values in axes.items()}
        return _rows(bench(path, workloads, axes=lists, rounds=ROUNDS), *axes)

    with _core.Model(str(path), no_alloc=True, load_mode="none") as model:
        n_layers, desc = model.n_layer + 1, model.desc
    most = os.cpu_count() or 1
    record: Record = {
        "model": f"{path.name} ({desc})",
        "backend": _core.build_backend(),
        "measure": run(Complete(64, 128)),
        "backend_speed": run(Prefill(512), Generate(128)),
        "threads": run(Prefill(128), Generate(64), n_threads=[n for n in _THREADS if n <= most]),
        "batch": run(*[Parallel(n, 32) for n in _SEQUENCES]),
        "flash_attention": run(
            Generate(32), Generate(32, 2000), flash_attn_type=["enabled", "disabled"]
        ),
        "sampler": run(*[Complete(64, 128, preset) for preset in PRESETS]),
    }
    if _core.supports_gpu_offload():
        layers = [n_layers * i // 4 for i in range(5)]
        record["offload"] = run(Prefill(512), Generate(64), n_gpu_layers=layers)
    report = tune(path, budget_sec=budget_sec, save=False)
    record["worked_example"] = {
        "rows": tune_report.table(report),
        "conclusion": tune_report.conclusion(report),
        "seconds": report.elapsed_sec,
        "notes": list(report.notes),
    }
    return record


def _rate(row: dict[str, Any]) -> str:
    if "median" not in row:
        return f"not measured: {row['error']}"
    return f"{row['median']:.1f} ± {row['spread']:.1f}"


def _by_setting(name: str, key: str) -> Callable[[list[tuple[str, Record]]], str]:
    """Return a writer of tables with a row per value of a setting and a column per test."""

    def write(records: list[tuple[str, Record]]) -> str:
        tables = []
        for where, record in records:
            rows = record["figures"].get(name, [])
            tests = list(dict.fromkeys(row["test"] for row in rows))
            values = list(dict.fromkeys(row[key] for row in rows))
            cells = {(row[key], row["test"]): _rate(row) for row in rows}
            if rows:
                tables.append(
                    _table(
                        [f"{where}: `{key}`", *tests],
                        [[str(v), *(cells[v, test] for test in tests)] for v in values],
                    )
                )
        return "\n\n".join(tables)

    return write


def _by_test(name: str, title: str) -> Callable[[list[tuple[str, Record]]], str]:
    """Return a writer of one table with a row per test and a column per machine."""

    def write(records: list[tuple[str, Record]]) -> str:
        tests = list(dict.fromkeys(r["test"] for _, rec in records for r in rec["figures"][name]))
        cells = {
            (where, row["test"]): _rate(row)
            for where, record in records
            for row in record["figures"][name]
        }
        places = [where for where, _ in records]
        return _table(
            [title, *places],
            [[test, *(cells.get((place, test), "") for place in places)] for test in tests],
        )

    return write


def _measured(records: list[tuple[str, Record]]) -> str:
    parts = ("first_token", "prefill", "decode", "sample", "text")
    rows = []
    for where, record in records:
        (row,) = record["figures"]["measure"]
        rows.append([where, _rate(row), *(f"{row['parts'][p] * 1e3:.2f} ms" for p in parts)])
    return _table(
        ["64 + 128 tokens, greedy", "tokens/s", *(p.replace("_", " ") for p in parts)], rows
    )


def _worked(records: list[tuple[str, Record]]) -> str:
    tables = []
    for where, record in records:
        found = record["figures"]["worked_example"]
        (_, *head), *rows = found["rows"]
        notes = "".join(f" {note[:1].upper()}{note[1:]}." for note in found["notes"])
        table = _table([f"{where}: lever", *head], rows)
        tables.append(f"{table}\n\n{found['conclusion']} ({found['seconds']:.0f} s.){notes}")
    return "\n\n".join(tables)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _machines(records: list[tuple[str, Record]]) -> str:
    return _table(
        ["", "devices", "threads", "model", "measured"],
        [
            [
                where,
                ", ".join(device["description"].strip() for device in record["devices"]),
                str(record["n_threads"]),
                record["figures"]["model"],
                f"{record['date']}, {record['commit']}",
            ]
            for where, record in records
        ],
    )


TABLES: dict[str, Callable[[list[tuple[str, Record]]], str]] = {
    "machines": _machines,
    "measure": _measured,
    "backend": _by_test("backend_speed", "tokens/s"),
    "offload": _by_setting("offload", "n_gpu_layers"),
    "threads": _by_setting("threads", "n_threads"),
    "batch": _by_test("batch", "all sequences together, tokens/s"),
    "flash_attention": _by_setting("flash_attention", "flash_attn_type"),
    "sampler": _by_test("sampler", "whole answers, tokens/s"),
    "worked_example": _worked,
}


def write() -> None:
    """Put the tables of all records into the page."""
    records = [
        (path.stem.removeprefix("tuning-page-"), json.loads(path.read_text()))
        for path in sorted((HERE / "results").glob("tuning-page-*.json"))
    ]
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        block = f"<!-- table: {name} -->\n{table(records)}\n<!-- end -->"
        text, n = re.subn(
            rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.S
        )
        if n != 1:
            raise SystemExit(f"{PAGE.name}: {n} places for the table {name}, not one")
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("name", help="of the machine, for the page")
    measuring.add_argument("--model", type=Path, help="default: the demo model")
    measuring.add_argument("--budget", type=float, default=90.0, help="seconds for the tuner")
    commands.add_parser("write")
    args = parser.parse_args()
    if args.command == "write":
        write()
        return
    path = args.model or fetch_models.fetch(fetch_models.DEMO_MODEL)
    record = {**machine(), "figures": measure(path, args.budget)}
    target = HERE / "results" / f"tuning-page-{args.name}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
