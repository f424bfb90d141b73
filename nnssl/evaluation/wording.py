"""A comparison in words and as text: conclusions, what limits them, tables and headings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnssl.evaluation.runs import higher_is_better, perfect_value

if TYPE_CHECKING:
    from nnssl.evaluation.comparison import Row

ALPHA = 0.05
NOTHING_TO_COMPARE = "No class is in the reference or a prediction of any common case: there is nothing to compare."


def heading(metric: str, unit: str = "mm") -> str:
    """A metric with its unit (``unit`` of distances) and direction."""
    named = {
        "HD95": f"HD95 in {unit}",
        "ASSD": f"ASSD in {unit}",
        "volume_error": f"size of the volume error in {unit}" + ("^3" if unit == "mm" else ""),
    }
    return f"{named.get(metric, metric)} ({'higher' if higher_is_better(metric) else 'lower'} is better)"


def conclusion(row: Row) -> str:
    """What the row shows, and what it does not."""
    found = row.statistics
    pair = f"{row.metric}, {row.first} and {row.second}"
    by = f"mean difference {_signed(found.mean, row.metric)}"
    if found.interval is not None:
        by += f", 95 % interval {_span(found.interval, row.metric)}"
    if row.p_holm < ALPHA:
        return f"{pair}: {_better(row, by)}"
    if row.least_p_holm >= ALPHA:
        return (
            f"{pair}: too few cases ({found.n}) to show any difference at the 5 % level, however large; {by}, without "
            "a conclusion."
        )
    text = f"{pair}: no difference shown ({by}, {_p_is(row.p_holm)})."
    differing = found.n - found.ties
    if differing and row.least_p_holm_differing >= ALPHA:
        text += f" Only {differing} of {found.n} cases differ, too few to show a difference at the 5 % level."
    text += " This does not show that they are equal."
    if found.interval is not None and found.interval[0] * found.interval[1] > 0:
        text += " The interval, which is not corrected, leaves out 0: weak evidence at most."
    return text


def _better(row: Row, by: str) -> str:
    found = row.statistics
    better = row.first if row.effect > 0 else row.second
    wins = row.win_tie_loss[0 if row.effect > 0 else 2]
    text = f"{better} is better in {wins} of {found.n} cases ({by}, {_p_is(row.p_holm)})."
    # differences that are all equal have no interval, and nothing that could outweigh others
    uncertain = found.interval is not None and found.interval[0] * found.interval[1] <= 0
    if uncertain or found.mean * found.effect <= 0:
        text += " The mean does not show it: few cases with large differences may outweigh the others."
    return text


def limits(rows: Sequence[Row]) -> list[str]:
    """What no test over cases can tell about these runs."""
    if not rows:
        return [NOTHING_TO_COMPARE]
    sentences = []
    single = sorted({name for row in rows for name, n in zip((row.first, row.second), row.runs, strict=True) if n == 1})
    if single:
        sentences.append(
            f"One training each of {', '.join(single)}: differences are those of these trainings. Whether the methods "
            "differ takes several seeds, and several draws of the labeled cases."
        )
    if rows[0].comparisons > 1:
        sentences.append(f"p-values are corrected for {rows[0].comparisons} comparisons (Holm).")
    sentences.append("Conclusions hold for cases like these; a class absent in reference and predictions is left out.")
    return sentences


_HEAD = ["method", "minus", "class", "means", "difference [95 %]", "win/tie/loss", "effect", "p", "p Holm", "failures"]


def metric_table(rows: Sequence[Row], unit: str) -> str:
    """Rows of one metric below its heading; with a column for the number of cases where it differs between them."""
    metric = rows[0].metric
    counts = sorted({row.statistics.n for row in rows})
    lines = [_HEAD, *map(_cells, rows)]
    if len(counts) > 1:
        numbers = ["cases", *(str(row.statistics.n) for row in rows)]
        lines = [[*line[:3], number, *line[3:]] for line, number in zip(lines, numbers, strict=True)]
    shown = f"{counts[0]} cases" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} cases"
    return f"{heading(metric, unit)}, {shown}\n" + _aligned(lines)


def _cells(row: Row) -> list[str]:
    found = row.statistics
    difference = _signed(found.mean, row.metric)
    if found.interval is not None:
        difference += f" {_span(found.interval, row.metric)}"
    return [
        row.first,
        row.second,
        row.class_name,
        f"{_number(row.first_mean, row.metric)}, {_number(row.second_mean, row.metric)}",
        difference,
        "/".join(map(str, row.win_tie_loss)),
        f"{row.effect:+.2f}",
        _p(found.p_value),
        _p(row.p_holm),
        f"{row.first_failures}, {row.second_failures}",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _digits(metric: str) -> int:
    return 4 if perfect_value(metric) == 1 else 2


def _number(value: float, metric: str) -> str:
    return f"{value:.{_digits(metric)}f}"


def _signed(value: float, metric: str) -> str:
    return f"{value:+.{_digits(metric)}f}"


def _span(interval: tuple[float, float], metric: str) -> str:
    return f"[{_signed(interval[0], metric)}, {_signed(interval[1], metric)}]"


def _p_is(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.4f}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
