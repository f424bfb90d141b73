"""Figures of the report: SVG in which text and axes take the color of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), told apart with any color vision; yellow comes last since it is weak on white
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#F0E442")
# the same colors for lines on gray pictures: the bright ones first
CONTOURS = ("#56B4E9", "#E69F00", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#FFFFFF", "#0072B2")
# as many as not to come round with the colors
_MARKERS = "os^DvPX"
_DASHES = ((), (5, 2), (2, 1.5), (6, 2, 1.5, 2), (8, 2, 2, 2, 2, 2), (1, 2))
# stands for the color of the page's text until the SVG is part of the page
_INK = "#123457"
_PANEL = (4.6, 3.1)


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure: color, marker and dashes differ, so that none is needed alone."""

    color: str
    marker: str
    dashes: tuple[float, ...]

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.color, "linestyle": (0, self.dashes) if self.dashes else "solid"}


def style(number: int) -> Style:
    """Style of the method with a number."""
    return Style(
        PALETTE[number % len(PALETTE)],
        _MARKERS[number % len(_MARKERS)],
        _DASHES[(number % len(PALETTE) + number // len(PALETTE)) % len(_DASHES)],
    )


def swatch(number: int) -> Markup:
    """The line and marker of a method, to stand before its name."""
    with _figure("", (0.55, 0.2)) as (figure, result):
        ax = figure.add_axes((0, 0, 1, 1))
        ax.plot([0, 1, 2], [0, 0, 0], marker=style(number).marker, markevery=[1], markersize=5, **style(number).line)
        ax.set_axis_off()
    return result[0]


def distribution(title: str, values: Mapping[str, NDArray[np.float64]], unit: str) -> Markup:
    """Box plot over a violin, and a point per case, of each method."""
    with _figure(f"{title}: distribution over the cases, by method", _PANEL) as (figure, result):
        ax = figure.subplots()
        ax.set(title=title, ylabel=unit)
        for number, (_, numbers) in enumerate(values.items()):
            own = numbers[np.isfinite(numbers)]
            color = style(number).color
            if np.unique(own).size > 2:
                for body in ax.violinplot(own, [number], widths=0.85, showextrema=False)["bodies"]:  # type: ignore[attr-defined]
                    body.set(facecolor=color, alpha=0.25)
            line = {"color": _INK, "linewidth": 1}
            ax.boxplot(own, positions=[number], widths=0.22, showfliers=False, boxprops=line, whiskerprops=line,
                       capprops=line, medianprops={**line, "linewidth": 2})  # fmt: skip
            spread = np.random.default_rng(0).uniform(-0.3, 0.3, own.size)
            ax.plot(number + spread, own, style(number).marker, color=color, markersize=2.6, alpha=0.7)
        _name_methods(ax, list(values))
    return result[0]


def case_plot(title: str, values: Mapping[str, NDArray[np.float64]], unit: str) -> Markup:
    """Values of each case by method; cases are ordered by the first method."""
    with _figure(f"{title}: value of every case, by method", (13.5, 4.2)) as (figure, result):
        ax = figure.subplots()
        order = np.argsort(next(iter(values.values())))
        for number, numbers in enumerate(values.values()):
            ax.plot(numbers[order], style(number).marker, color=style(number).color, markersize=5, alpha=0.85)
        ax.set(title=title, ylabel=unit, xlabel=f"cases, ordered by {next(iter(values))}", xticks=[])
    return result[0]


def gap_closed(shares: Mapping[str, tuple[float, tuple[float, float] | None]], ceiling: str) -> Markup:
    """Share of the gap between baseline and ceiling that each method closes, with its interval."""
    with _figure(f"share of the gap to {ceiling} that each method closes", (_PANEL[0], 0.9 + 0.4 * len(shares))) as (
        figure,
        result,
    ):
        ax = figure.subplots()
        for position, (share, interval) in enumerate(shares.values()):
            ax.barh(position, share, color=PALETTE[0], alpha=0.6, height=0.6)
            if interval is not None:
                ax.plot(interval, [position, position], color=_INK, linewidth=1.5, marker="|")
        ax.set_yticks(range(len(shares)), list(shares))
        ax.axvline(0, color=_INK, linewidth=0.8)
        ax.axvline(1, color=_INK, linewidth=0.8, linestyle="dashed")
        ax.invert_yaxis()
        ax.set(xlabel=f"0: baseline, 1: {ceiling}")
    return result[0]


def budget_curves(curves: Mapping[str, Sequence[tuple[int, float, tuple[float, float] | None]]], unit: str) -> Markup:
    """Mean and interval over the number of labeled cases, a line per method."""
    with _figure(f"{unit} by number of labeled cases", _PANEL) as (figure, result):
        ax = figure.subplots()
        for number, points in enumerate(curves.values()):
            budgets, means = [p[0] for p in points], [p[1] for p in points]
            ax.plot(budgets, means, marker=style(number).marker, **style(number).line)
            for budget, _, interval in points:
                if interval is not None:
                    ax.plot([budget, budget], interval, color=style(number).color, linewidth=1)
        ticks = sorted({point[0] for points in curves.values() for point in points})
        ax.set(xscale="log", xlabel="labeled cases", ylabel=unit)
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
    return result[0]


def curve(name: str, lines: Sequence[tuple[int, Sequence[float], Sequence[float]]]) -> Markup:
    """One loss over the epochs: number of the method, epochs, values."""
    from matplotlib.ticker import MaxNLocator

    with _figure(f"{name} over the epochs", (_PANEL[0], 2.5)) as (figure, result):
        ax = figure.subplots()
        for number, epochs, values in lines:
            marker = style(number).marker if len(epochs) < 30 else "none"
            ax.plot(epochs, values, linewidth=1.4, marker=marker, markersize=3, **style(number).line)
        ax.set(title=name, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return result[0]


@contextmanager
def _figure(label: str, size: tuple[float, float]) -> Iterator[tuple[Figure, list[Markup]]]:
    """A figure that is turned into SVG when the block ends; names in it are text, never formulas."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "text.parse_math": False,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    }
    result: list[Markup] = []
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained" if size[1] > 0.5 else None)
        yield figure, result
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    result.append(_inline(buffer.getvalue(), label))


def _inline(svg: str, label: str) -> Markup:
    """The element without the head of an SVG file, with the page's color, and a size that the page decides."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL).replace(_INK, "currentColor")
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    role = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    return Markup(svg.replace("<svg", f"<svg {role}", 1))


def _name_methods(ax: Axes, names: Sequence[str]) -> None:
    long = len(names) > 3 or sum(map(len, names)) > 30
    ax.set_xticks(range(len(names)), names, rotation=25 if long else 0, ha="right" if long else "center")
    ax.set_xlim(-0.6, len(names) - 0.4)
