"""Two benchmark files: what became faster, slower, or cannot be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bench_report import BenchReport, BenchRow, missing
from .samples import Comparison, compare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True)
class BenchPair:
    """A row of each file; the comparison is None where one of them was not measured."""

    before: BenchRow
    after: BenchRow
    comparison: Comparison | None

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings in which the two differ: name to (before, after)."""
        one, two = self.before.config, self.after.config
        names = dict.fromkeys((*one, *two))
        return {
            name: (one.get(name), two.get(name))
            for name in names
            if _plain(one.get(name)) != _plain(two.get(name))
        }


@dataclass(frozen=True)
class BenchDifference:
    """The pairs of two reports, and the rows that only one has."""

    pairs: tuple[BenchPair, ...]
    only_before: tuple[BenchRow, ...]
    only_after: tuple[BenchRow, ...]


def compare_reports(before: BenchReport, after: BenchReport) -> BenchDifference:
    """Pair the rows of two reports and compare them.

    Rows pair up when model, test and settings agree; of the rest, those that are the only one of
    their model and test on both sides. The runs did not take turns, so both spreads count, and a
    change of the machine between them is not told from one of the program.
    """
    left, right = list(before.rows), list(after.rows)
    pairs = _pair(left, right, exact=True) + _pair(left, right, exact=False)
    order = {id(row): index for index, row in enumerate(before.rows)}
    pairs.sort(key=lambda pair: order[id(pair[0])])
    return BenchDifference(
        tuple(BenchPair(one, two, _compare(one, two)) for one, two in pairs),
        tuple(left),
        tuple(right),
    )


def _pair(
    left: list[BenchRow], right: list[BenchRow], *, exact: bool
) -> list[tuple[BenchRow, BenchRow]]:
    """Take what pairs up out of both lists."""
    pairs = []
    for row in list(left):
        key = _key(row, exact)
        mine = [other for other in left if _key(other, exact) == key]
        theirs = [other for other in right if _key(other, exact) == key]
        if len(theirs) == 1 and len(mine) == 1:
            pairs.append((row, theirs[0]))
            _take(left, row)
            _take(right, theirs[0])
    return pairs


def _take(rows: list[BenchRow], row: BenchRow) -> None:
    # By identity: two rows may be equal.
    del rows[next(index for index, other in enumerate(rows) if other is row)]


def _key(row: BenchRow, exact: bool) -> tuple[object, ...]:
    settings = sorted((k, _plain(v)) for k, v in row.config.items()) if exact else []
    return (row.model, row.test, row.unit, repr(settings))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _compare(before: BenchRow, after: BenchRow) -> Comparison | None:
    one, two = before.samples, after.samples
    return None if one is None or two is None else compare(one, two, paired=False)


def difference_table(difference: BenchDifference) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of a difference."""
    several = len({pair.before.model for pair in difference.pairs}) > 1
    header = ["model"] * several + ["test", "before", "after", "after / before"]
    changes = any(pair.changed for pair in difference.pairs)
    header += ["changed"] * changes
    rows = []
    for pair in difference.pairs:
        cells = [pair.before.model] * several + [pair.before.test]
        cells += [_median(pair.before), _median(pair.after)]
        cells.append("not measured" if pair.comparison is None else str(pair.comparison))
        changed = ", ".join(f"{k} {a} to {b}" for k, (a, b) in pair.changed.items())
        rows.append(cells + [changed] * changes)
    return header, rows


def _median(row: BenchRow) -> str:
    samples = row.samples
    return missing(row) if samples is None else f"{samples.median:.2f} {row.unit}"
