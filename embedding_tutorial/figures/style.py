"""What all figures share: colours, fonts, page, title, error bars, label placement and saving.

The colours are safe for colour-blind readers and differ in lightness, hatch and marker, so that
every figure can be read in greyscale. `STYLE` holds only while a figure is drawn."""

import logging
import re
from importlib.metadata import distribution
from itertools import pairwise, product

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Bbox

from ..files import atomic_file

INK, MUTED, PALE = "#222222", "#5F6670", "#EEF1F4"
YELLOW, NAVY, BLUE, RUST = "#F2C85B", "#0B2F5B", "#5FA8D3", "#B5482A"  # lightness 82, 20, 66, 45
MODELS = {
    "base": {"color": YELLOW, "hatch": "///", "marker": "o"},
    "fine-tuned": {"color": RUST, "hatch": "xxx", "marker": "s"},
    "averaged": {"color": BLUE, "hatch": "...", "marker": "^"},
    "merged": {"color": NAVY, "hatch": "", "marker": "*"},
}
OTHERS = [  # for what is no model of the tutorial; lightness 81, 54, 66, 40, 20
    {"color": "#CFC6DC", "hatch": "///", "marker": "D"},
    {"color": "#3E8E7E", "hatch": "", "marker": "v"},
    {"color": "#9AA3AD", "hatch": "...", "marker": "P"},
    {"color": "#7A5195", "hatch": "xxx", "marker": "X"},
    {"color": "#2F2F3A", "hatch": "", "marker": "p"},
]
# DejaVu Sans comes with matplotlib but holds no Chinese. The package zhplot has Noto Sans SC (OFL); it is not
# imported, as that would change matplotlib's settings.
fontManager.addfont(distribution("zhplot").locate_file("zhplot/fonts/NotoSansSC-Regular.ttf"))
FONTS = ["DejaVu Sans", "Noto Sans SC"]
# It has no bold face and is drawn as it is; matplotlib would say so in every cell that draws.
logging.getLogger("matplotlib.font_manager").addFilter(lambda note: "font weight" not in note.getMessage())
STYLE = {
    "font.family": FONTS, "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#DDE1E6",
    "grid.linewidth": 0.7, "xtick.labelsize": 9, "ytick.labelsize": 9, "xtick.major.size": 0,
    "ytick.major.size": 0, "legend.fontsize": 8.5, "legend.frameon": False, "figure.dpi": 100,
    "lines.linewidth": 1.8, "lines.markersize": 5, "hatch.linewidth": 0.6,
    "figure.titlesize": 11.5, "figure.titleweight": "bold",
}  # fmt: skip
styled = mpl.rc_context(STYLE)  # decorates every function that draws


def number(value: float, digits: int = 3, signed: bool = False) -> str:
    """Fixed digits, a true minus sign, and never "−0.000"."""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def looks(names) -> list[dict]:
    """Colour, hatch and marker for each name; a model always has its own."""
    free = [name for name in names if name not in MODELS]
    return [MODELS.get(name) or OTHERS[free.index(name)] for name in names]


def bar_style(look: dict) -> dict:
    edge = "#22222266" if look["color"] in (YELLOW, BLUE) else "#FFFFFFB0"
    return {"color": look["color"], "hatch": look["hatch"], "edgecolor": edge, "linewidth": 0.5}


def point_style(look: dict) -> dict:
    edge = {"markeredgecolor": INK, "markeredgewidth": 0.7, "linestyle": "none"}
    size = 15 if look["marker"] == "*" else 8
    return {"color": look["color"], "marker": look["marker"], "markersize": size, **edge}


def error_bar(ax, x, y, ecolor=MUTED, width=1.6, **point) -> None:
    """A point with its interval; `x`, `y` or both are (value, lo, hi), the other a number."""
    at, reach = [], []
    for given in (x, y):
        value, lo, hi = given if np.ndim(given) else (given,) * 3
        at.append(value)
        reach.append(np.maximum(0, [[value - lo], [hi - value]]) if np.ndim(given) else None)
    ends = {"ecolor": ecolor, "elinewidth": width, "capsize": 2 * width, "capthick": width}
    ax.errorbar(*at, *reach[::-1], **ends, **point)


def grouped_bars(ax, columns, styles, show, **label) -> None:
    """Bars side by side, one colour per column {name: (n,) values}, each with its value above."""
    width = 0.84 / len(columns)
    for i, ((name, values), look) in enumerate(zip(columns.items(), styles, strict=False)):
        at = np.arange(len(values)) + (i - (len(columns) - 1) / 2) * width
        drawn = ax.bar(at, values, width * 0.94, label=name, **bar_style(look))
        ax.bar_label(drawn, [show(value) for value in values], padding=3, **label)


def wrap(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """Broken at spaces, or between Chinese characters, into lines at most `inches` wide."""
    font, lines = FontProperties(family=FONTS, size=size, weight=weight), [""]
    words = r" ?(?:[⺀-鿿][，。；：、！？）]*|[^ ⺀-鿿]+)"
    for word in re.findall(words, " ".join(str(text).split())):
        width, _, _ = text_to_path.get_text_width_height_descent(lines[-1] + word, font, False)
        if lines[-1] and width > 72 * inches:
            lines.append("")
        lines[-1] = (lines[-1] + word).lstrip()
    return "\n".join(lines)


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """Figure and (rows, columns) axes. pyplot lets go of it, or a notebook would show it twice."""
    options |= {"figsize": (width, height), "layout": "constrained", "squeeze": False}
    fig, axes = plt.subplots(rows, columns, **options)
    fig.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.04)
    plt.close(fig)
    return fig, axes


def legend_above(ax, columns: int = 3) -> None:
    """A legend over the axes, where it cannot hide data."""
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
    ax.legend(ncol=columns, columnspacing=1.2, **place)


def rows_down(ax, labels, height: float | None = None) -> None:
    """The y axis as named rows from top to bottom, at 0, 1, …; the grid along the x axis."""
    ax.set_yticks(range(len(labels)), [wrap(label, 2.6, 9) for label in labels])
    ax.set_ylim((height or len(labels)) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")


def finish(fig: Figure, title: str, path, source, labels=()) -> Figure:
    """Add title and source, place `labels` (arguments of `place_labels`), save if asked: as PNG, in
    one step and a folder made if needed."""
    width = fig.get_figwidth()
    fig.suptitle(wrap(title, width - 0.25, 11.5, "bold"), x=0.1 / width, ha="left")
    if source:
        small = {"fontsize": 7.5, "fontweight": "normal", "color": MUTED, "ha": "right"}
        fig.supxlabel(wrap(source, width - 0.25, 7.5), x=1 - 0.1 / width, **small)
    fig.draw_without_rendering()  # ticks take STYLE when they are first drawn
    for arguments in labels:
        place_labels(*arguments)
    if path is not None:
        options = {"dpi": 150, "bbox_inches": "tight", "facecolor": "white"}
        with atomic_file(path) as file:
            fig.savefig(file, format="png", metadata={"Software": None}, **options)
    return fig


def place_labels(ax, points, texts, lines=()) -> None:
    """Write each text near its point, away from other texts, points and lines; layout first.
    points: (n, 2) in data coordinates, the first len(texts) get a text. lines: lists of (x, y)."""
    to_pixels, scale, taken = ax.transData.transform, ax.figure.dpi / 72, []
    parts = [np.linspace(a, b, 60) for line in lines for a, b in pairwise(line)]
    busy, inside = to_pixels(np.concatenate([points, *parts])), ax.get_window_extent()
    ways = [np.array([np.cos(turn), np.sin(turn)]) for turn in np.radians(range(45, 405, 30))]
    style = {"ha": "center", "va": "center", "fontsize": 9, "in_layout": False, "zorder": 6}
    style |= {"path_effects": [withStroke(linewidth=2.5, foreground="white")]}
    style |= {"arrowprops": {"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkB": 4}}
    for point, text in zip(points, texts, strict=False):
        note = ax.annotate(text, point, (0, 0), textcoords="offset points", **style)
        half, tried = np.array(Text.get_window_extent(note).size) / 2, []
        for radius, way in product((7, 11, 18, 28, 44, 64), ways):
            offset = scale * radius * way + way.round(1).clip(-0.5, 0.5) * 2 * half
            box = Bbox(to_pixels(point) + offset + np.array([-half, half])).padded(3)
            cost = radius / 10 + 50 * sum(box.overlaps(other) for other in taken)
            cost += 3 * int(((busy > box.min) & (busy < box.max)).all(axis=1).sum())
            cost += 100 * (not (inside.contains(*box.min) and inside.contains(*box.max)))
            tried.append((cost, radius, offset / scale, box))
        _, radius, note.xyann, box = min(tried, key=lambda place: place[0])
        taken.append(box)
        note.arrow_patch.set_visible(radius > 11)  # far from its point a thin line leads there
