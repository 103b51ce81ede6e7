"""A benchmark's rows as bars, by matplotlib."""

from __future__ import annotations

import os
from pathlib import Path

from .bench_report import BenchReport


def require_matplotlib() -> None:
    """Raise ImportError, saying what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a plot needs matplotlib: pip install 'llama-crab[plot]'", name="matplotlib"
        ) from error


def plot(report: BenchReport, path: str | os.PathLike[str]) -> None:
    """Draw median and spread of each measured row into an image; its suffix is the format.

    Tests of different speed get axes of their own: a prefill's bar would hide a decode's.
    Raises ImportError without matplotlib, ValueError for an unknown suffix or without any row.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[tuple[str, float, float]]] = {}
    for row in report.rows:
        samples = row.samples
        if samples is not None:
            bars = groups.setdefault(f"{row.group} [{row.unit}]", [])
            bars.append((report.label(row), samples.median, samples.spread))
    if not groups:
        raise ValueError("nothing was measured that could be drawn")
    sizes = [len(bars) for bars in groups.values()]
    figure = Figure(figsize=(9, 1.0 * len(sizes) + 0.35 * sum(sizes) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=[n + 1 for n in sizes])
    for axis, (title, bars) in zip(axes[:, 0], groups.items(), strict=True):
        labels, medians, spreads = zip(*bars, strict=True)
        places = range(len(bars))
        axis.barh(places, medians, xerr=spreads, height=0.6, color="#4477aa", ecolor="#222222")
        axis.set_yticks(places, labels)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_title(title, loc="left", fontsize="medium")
        axis.set_xlim(0.0, 1.15 * max(m + s for m, s in zip(medians, spreads, strict=True)))
        axis.bar_label(axis.containers[-1], fmt=" %.1f")
    models = sorted({row.model for row in report.rows})
    figure.suptitle(f"{', '.join(models)}, llama_crab {report.machine.get('version', '')}")
    figure.savefig(Path(path), dpi=120)
