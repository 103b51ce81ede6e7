"""A `TuneReport` for people: the worked example as a table, and a page or picture with plots."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import os
import statistics
from pathlib import Path

from ..params import ParameterError
from .tuner import TuneReport, explain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMATS = (".html", ".png")
_BEFORE, _AFTER = "#8a8a8a", "#c8452f"


def table(report: TuneReport) -> list[tuple[str, str, str, str]]:
    """Return the rows of the worked example: lever, before, after, gain; the total comes last.

    A lever's gain is what its races found. The total was measured again: the defaults and the
    result in turn.
    """
    rows = [("lever", "before", "after", "gain")]
    for row in report.rows:
        gain = f"{100 * row.gain:+.1f} %" if row.after != row.before else "best as it is"
        rows.append((row.lever, str(row.before), str(row.after), gain))
    if report.before:
        before, after = statistics.median(report.before), statistics.median(report.after)
        total = f"{100 * report.gain:+.1f} % ± {100 * report.uncertainty:.1f} %"
        rates = (f"{before:.1f} {report.unit}", f"{after:.1f} {report.unit}")
        rows.append(("total, measured again", *rates, total))
    return rows


def conclusion(report: TuneReport) -> str:
    """Return the result in one line."""
    if report.reverted:
        return "The final check does not find the gain again: the defaults are best here."
    if report.defaults_are_best:
        if report.ended == "converged":
            return "The defaults are best here."
        return "Nothing better than the defaults was found in the time there was."
    fields = ", ".join(f"{name}={value!r}" for name, value in report.profile.params.items())
    return f"Fastest here: {fields}"


def as_text(report: TuneReport) -> str:
    """Return the table, the result and the notes as text."""
    rows = table(report)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(f"{cell:<{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    lines = [line.rstrip() for line in lines]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if report.before:
        lines.insert(-1, lines[1])
    lines += ["", conclusion(report), *(f"Note: {note}." for note in report.notes)]
    lines.append(f"{report.n_measured} measurements in {report.elapsed_sec:.0f} s.")
    if report.profile_path is not None:
        lines.append(f'Saved for Llama(model, profile="auto"): {report.profile_path}')
    return "\n".join(lines)


def to_dict(report: TuneReport) -> dict[str, Any]:
    """Return everything in the report as JSON values."""
    values = dataclasses.asdict(report)
    values["conclusion"] = conclusion(report)
    values["defaults_are_best"] = report.defaults_are_best
    return values


def check_path(path: str | os.PathLike[str]) -> Path:
    """Return where a report is to go. Raises ParameterError for another kind of file."""
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ParameterError(f"report: {target.name} does not end in {' or '.join(FORMATS)}")
    if not target.parent.is_dir():
        raise ParameterError(f"report: there is no folder {target.parent}")
    return target


def require_matplotlib() -> None:
    """Raise ImportError with a hint where matplotlib is missing."""
    try:
        import matplotlib as _  # noqa: F401 - only whether it is there
    except ImportError as error:
        message = 'a report has plots, which need: pip install "llama-crab[plot]"'
        raise ImportError(message, name="matplotlib") from error


def write_report(report: TuneReport, path: str | os.PathLike[str]) -> Path:
    """Write a page (.html, one file that needs no other) or its plots (.png)."""
    target = check_path(path)
    require_matplotlib()
    if target.suffix.lower() == ".png":
        target.write_bytes(_draw(report, "png"))
    else:
        target.write_text(_page(report), encoding="utf-8")
    return target


def _draw(report: TuneReport, kind: str) -> bytes:
    """Draw the races, and the defaults against the result."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would choose a window system and keep the figure.
    steps = [step for step in report.steps if step.verdict != "infeasible"]
    figure = Figure(figsize=(11, max(3.2, 0.34 * len(steps) + 1.6)), layout="constrained")
    FigureCanvasAgg(figure)
    races, final = figure.subplots(1, 2, width_ratios=(2, 1))
    names = [f"{step.lever} {step.before} → {step.after}" for step in steps]
    colours = [_AFTER if step.kept else _BEFORE for step in steps]
    gains = [100 * step.gain for step in steps]
    errors = [100 * step.uncertainty for step in steps]
    races.barh(names, gains, xerr=errors, color=colours, ecolor="#444", capsize=2)
    races.invert_yaxis()
    races.axvline(0, color="black", linewidth=0.8)
    races.set(xlabel="change of speed, %", title="races (red: kept)")
    races.tick_params(axis="y", labelsize=8)
    if report.before:
        rounds = range(1, len(report.before) + 1)
        final.plot(rounds, report.before, "o-", color=_BEFORE, label="defaults")
        final.plot(rounds, report.after, "o-", color=_AFTER, label="result")
        final.set(xlabel="round", ylabel=report.unit, title="measured again, in turn")
        final.set_xticks(list(rounds))
        final.set_ylim(0, 1.15 * max(*report.before, *report.after))
        final.legend(fontsize=8)
    else:
        final.axis("off")
        final.text(0.5, 0.5, conclusion(report), ha="center", wrap=True, transform=final.transAxes)
    figure.suptitle(f"{report.model}, {report.goal}")
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=120)
    return out.getvalue()


def _page(report: TuneReport) -> str:
    """Return a page that holds its plot and its data."""
    svg = _draw(report, "svg").decode()
    svg = svg[svg.index("<svg") :]  # without the declaration, which has no place inside HTML
    escaped = html.escape
    header, *rows = table(report)
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    parts = "".join(
        f"<tr><td>{escaped(part)}</td><td>{escaped(where)}</td><td>{rate:.1f}</td></tr>"
        for part, by_point in report.part_rates.items()
        for where, rate in by_point.items()
    )
    steps = "".join(f"<li>{escaped(explain(step))}</li>" for step in report.steps)
    notes = "".join(f"<p>{escaped(note)}.</p>" for note in report.notes)
    # "</" would end the script element, wherever it stands.
    data = json.dumps(to_dict(report), indent=1).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escaped(report.model)}: tuning</title>
<style>body{{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;margin:1em 0}}td,th{{border:1px solid #ccc;padding:.3em .8em;
text-align:left}}svg{{max-width:100%;height:auto}}</style></head><body>
<h1>{escaped(report.model)}: {escaped(report.goal)}</h1>
<p>{escaped(report.machine)}; {escaped(", ".join(report.workloads))}; {report.n_measured}
measurements in {report.elapsed_sec:.0f} s of {report.budget_sec:g} s.</p>
<p><strong>{escaped(conclusion(report))}</strong></p>{notes}
<table><tr>{head}</tr>{body}</table>
{svg}
<h2>Workloads</h2><table><tr><th>workload</th><th>settings</th><th>tok/s</th></tr>{parts}</table>
<h2>Steps</h2><ol>{steps}</ol>
<script type="application/json" id="report">{data}</script>
</body></html>
"""
