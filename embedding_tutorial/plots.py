"""Every figure of the tutorial, one function each.

Each function takes plain data, writes a PNG to `path` where one is given, and returns the matplotlib
`Figure`, which Jupyter shows when it is a cell's last value. The title states what the data show and is
computed from them, so that it turns when they turn. `source` names the run, in small print below.

Colours are safe for colour-blind readers and differ in lightness; hatches, markers and line styles
differ as well, so every figure can be read in greyscale. Nothing here changes matplotlib's global
settings: `STYLE` holds only while a figure is drawn.

Every function raises `ValueError` where its data are empty, not finite, or do not fit together, and
where `path` does not end in ".png".
"""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

INK, MUTED, PALE = "#222222", "#5F6670", "#EEF1F4"
BEFORE, AFTER, THIRD, FOURTH = "#F2C85B", "#0B2F5B", "#5FA8D3", "#B5482A"  # lightness 82, 20, 66, 45
PALETTE = (BEFORE, AFTER, THIRD, FOURTH)
LINES = (AFTER, FOURTH, THIRD, MUTED)  # the pale yellow of BEFORE is too weak for a thin line
HATCHES = ("///", "", "...", "xxx")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":")

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.usetex": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "white",
    "grid.color": "#DDE1E6",
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "figure.dpi": 100,
}
_styled = mpl.rc_context(STYLE)


# ---- helpers ------------------------------------------------------------------------------------------


def _vector(name: str, values, at_least: int = 1) -> np.ndarray:
    """`values` as a 1-D float array; ValueError where it is too short or not finite."""
    array = np.asarray(list(values), dtype=float)
    if array.ndim != 1 or len(array) < at_least:
        raise ValueError(f"{name}: expected at least {at_least} number(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: value {int(np.argmin(np.isfinite(array)))} is not a finite number")
    return array


def _same_length(**columns) -> None:
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"lengths differ: {sizes}")


def _filled(name: str, container) -> None:
    if not container:
        raise ValueError(f"{name}: nothing to plot")


def _interval(name: str, triple) -> tuple[float, float, float]:
    value, lo, hi = _vector(name, triple, 3)
    if lo > hi:
        raise ValueError(f"{name}: the interval [{lo}, {hi}] is upside down")
    return float(value), float(lo), float(hi)


def _number(value: float, digits: int = 3, signed: bool = False) -> str:
    """Fixed digits, a true minus sign, and never "−0.000"."""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def _loss(value: float) -> str:
    return _number(value, 2) if abs(value) >= 0.0095 or value == 0 else f"{value:.2g}".replace("-", "−")


def _rate(value: float) -> str:
    """2e-4 rather than 0.0002 or 2.00e-04."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _size(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _moved(first: float, last: float, show=_number, where: tuple[str, str] = ("", "")) -> str:
    """ "fell from 0.75 to 0.04", "rose from …", or "stayed at …" where both read the same."""
    a, b = show(first), show(last)
    if a == b:
        return f"stayed at {a}"
    return f"{'fell' if last < first else 'rose'} from {a}{where[0]} to {b}{where[1]}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _width(text: str, size: float, weight: str = "normal") -> float:
    """Width of one line of text in inches."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, False)[0] / 72


def _wrap(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """Broken at spaces into as few lines as fit, of about equal length."""

    def lines(limit: float) -> list[str]:
        out = [""]
        for word in text.split():
            longer = f"{out[-1]} {word}".strip()
            if out[-1] and _width(longer, size, weight) > limit:
                out.append(word)
            else:
                out[-1] = longer
        return out

    fewest = len(lines(inches))
    while fewest > 1 and len(lines(inches * 0.95)) == fewest and inches > 0.5:
        inches *= 0.95
    return "\n".join(lines(inches))


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """Figure and axes that pyplot no longer holds, so that a notebook does not show them twice."""
    fig, axes = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )
    fig.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.04)
    plt.close(fig)
    return fig, axes


def _finish(fig: Figure, title: str, path, source: str | None) -> Figure:
    """Add the title and the source, save where asked, and hand the figure back."""
    width = fig.get_figwidth()
    margin = 0.1 / width
    fig.suptitle(_wrap(title, width - 0.25, 11.5, "bold"), x=margin, ha="left")
    if source:
        small = _wrap(str(source), width - 0.25, 7)
        fig.supxlabel(small, x=1 - margin, ha="right", fontsize=7, fontweight="normal", color=MUTED)
    if path is not None:
        save(fig, path)
    return fig


def save(fig: Figure, path: str | Path) -> Path:
    """Write `fig` as a PNG (150 dpi) in one step: a reader sees the old file or the new one, never half.

    Makes the parent folder. Raises ValueError where `path` does not end in ".png".
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: figures are saved as .png, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fig.savefig(
            temporary,
            format="png",
            dpi=150,
            bbox_inches="tight",
            facecolor="white",
            metadata={"Software": None},  # the same data give the same bytes
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _legend_above(ax, columns: int, handles=None) -> None:
    """A legend over the axes, where it cannot hide data."""
    options = {} if handles is None else {"handles": handles}
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncol=columns,
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.9,
        **options,
    )


def _line_styles(n: int) -> list[dict]:
    """`n` line styles that differ in lightness, marker and dash."""
    colours = LINES if n <= len(LINES) else mpl.colormaps["cividis"](np.linspace(0, 0.85, n))
    return [
        {"color": colours[i], "marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
        for i in range(n)
    ]


def _bar_styles(n: int) -> list[dict]:
    """`n` bar styles that differ in lightness and hatch; the first two are before and after."""
    colours = PALETTE if n <= len(PALETTE) else mpl.colormaps["cividis"](np.linspace(0.95, 0, n))
    return [
        {
            "color": colours[i],
            "hatch": HATCHES[i % len(HATCHES)],
            "edgecolor": "#FFFFFFB0" if colours[i] is FOURTH else "#22222266",
            "linewidth": 0.5,
        }
        for i in range(n)
    ]


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over about `window` values around each one, over fewer at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    half = np.minimum(np.minimum(at, at[::-1]), window // 2)
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def _window(n: int) -> int:
    """An odd number of steps, a twentieth of all: the mean stays centred."""
    return round(n / 40) * 2 + 1


def _softmax(scores: np.ndarray, tau: float) -> np.ndarray:
    shifted = np.exp((scores - scores.max()) / tau)
    return shifted / shifted.sum()


# ---- temperature and the loss -------------------------------------------------------------------------


def _temperatures(scores, taus):
    """The checked scores, the temperatures from high to low, and one softmax for each."""
    scores, taus = _vector("scores", scores, 2), np.sort(_vector("taus", taus))[::-1]
    if (taus <= 0).any():
        raise ValueError(f"taus: a temperature must be above 0, got {taus.min():g}")
    shares = [_softmax(scores, tau) for tau in taus]
    best = [share.max() for share in shares]
    title = f"The best of {len(scores)} passages gets probability {best[0]:.3f} at τ = {taus[0]:g}"
    if len(taus) > 1:
        title += f", {best[-1]:.3f} at τ = {taus[-1]:g}"
    return scores, taus, shares, title


def _score_axis(ax, scores) -> None:
    ax.set_xticks(range(len(scores)), [f"{score:g}" for score in scores])
    ax.set_xlabel("passage, named by its cosine similarity to the query")
    ax.set_ylabel("softmax(score / τ), probability")


@_styled
def temperature_lines(scores, taus, path=None, source=None) -> Figure:
    """softmax(scores / tau) over the passages, one line per temperature.

    scores: (n,) similarities of one query to n >= 2 passages. taus: temperatures above 0.
    """
    scores, taus, shares, title = _temperatures(scores, taus)
    fig, [[ax]] = _figure(7, 4)
    for tau, share, style in zip(taus, shares, _line_styles(len(taus)), strict=True):
        ax.plot(range(len(scores)), share, label=f"τ = {tau:g}", **style)
    top = max(share.max() for share in shares)
    ax.set_ylim(-0.02 * top, 1.08 * top)
    _score_axis(ax, scores)
    ax.legend(loc="best")
    return _finish(fig, title, path, source)


@_styled
def temperature_bars(scores, taus, path=None, source=None) -> Figure:
    """The data of `temperature_lines` as grouped bars, with the probability above each bar."""
    scores, taus, shares, title = _temperatures(scores, taus)
    bars = len(scores) * len(taus)
    fig, [[ax]] = _figure(min(11, max(7, 0.45 * bars + 0.25 * len(scores) + 1)), 4)
    upright = bars > 18
    width = 0.84 / len(taus)
    for i, (tau, share, style) in enumerate(zip(taus, shares, _bar_styles(len(taus)), strict=True)):
        at = np.arange(len(scores)) + (i - (len(taus) - 1) / 2) * width
        drawn = ax.bar(at, share, width * 0.94, label=f"τ = {tau:g}", **style)
        ax.bar_label(drawn, fmt="%.3f", padding=2, fontsize=8 if not upright else 7, rotation=90 * upright)
    ax.set_ylim(0, max(share.max() for share in shares) * (1.25 if upright else 1.1))
    ax.tick_params(axis="x", length=0)
    _score_axis(ax, scores)
    _legend_above(ax, len(taus))
    return _finish(fig, title, path, source)


@_styled
def building_blocks(path=None, source=None) -> Figure:
    """The three functions inside InfoNCE: e^x, the two-way softmax, and log x with the loss −log p."""
    fig, [[power, share, log]] = _figure(10.5, 3.9, 1, 3)
    x = np.linspace(-3, 3, 200)
    power.plot(x, np.exp(x), color=AFTER)
    power.plot([0], [1], "o", color=AFTER)
    power.annotate("e⁰ = 1", (0, 1), (-8, 10), textcoords="offset points", ha="right")
    power.set(xlabel="score x", ylabel="eˣ", title="eˣ: any score becomes positive")

    x = np.linspace(-6, 6, 200)
    share.plot(x, 1 / (1 + np.exp(-x)), color=AFTER)
    share.plot([0], [0.5], "o", color=AFTER)
    share.annotate("equal scores: 0.5", (0, 0.5), (10, -4), textcoords="offset points")
    share.set(xlabel="score x, against a score of 0", ylabel="eˣ / (eˣ + e⁰), probability")
    share.set_title("softmax: scores become shares of 1")

    p = np.linspace(0.02, 1, 300)
    log.plot(p, np.log(p), color=AFTER, label="log p")
    log.plot(p, -np.log(p), color=FOURTH, linestyle="--", label="−log p, the loss")
    log.axhline(0, color=MUTED, linewidth=0.8)
    log.plot([0.1], [-np.log(0.1)], "s", color=FOURTH)
    log.annotate("p = 0.1: loss 2.30", (0.1, -np.log(0.1)), (9, 0), textcoords="offset points")
    log.set(xlabel="probability p of the right passage", ylabel="log p and −log p (nats)")
    log.set_title("log: a small share costs much")
    log.legend(loc="lower right")
    title = "From scores to a loss: eˣ makes them positive, softmax makes them sum to 1, "
    title += "−log p charges 0 only at p = 1"
    return _finish(fig, title, path, source)


# ---- data and settings --------------------------------------------------------------------------------


@_styled
def lengths(query_lengths, passage_lengths, max_length, path=None, source=None) -> Figure:
    """Histograms of token counts, with median, 95th percentile and the limit.

    query_lengths, passage_lengths: (n,) and (m,) token counts before truncation, special tokens
    included. max_length: the limit in tokens; a text is cut where its count is above it.
    """
    texts = {"query": _vector("query_lengths", query_lengths)}
    texts |= {"passage": _vector("passage_lengths", passage_lengths)}
    if max_length <= 0:
        raise ValueError(f"max_length: must be above 0, got {max_length}")
    fig, [axes] = _figure(10, 3.9, 1, 2)
    plural, cut = {"query": "queries", "passage": "passages"}, {}
    for ax, (name, counts), colour in zip(axes, texts.items(), (BEFORE, THIRD), strict=True):
        cut[name] = int((counts > max_length).sum())
        top = counts.max()
        # at most 40 bins, each a whole number of tokens wide
        step = max(1, math.ceil((top - counts.min() + 1) / 40))
        edges = np.arange(counts.min() - 0.5, top + step + 0.5, step)
        ax.hist(counts, bins=edges, color=colour, edgecolor="#22222266", linewidth=0.5)
        median, p95 = np.median(counts), np.percentile(counts, 95)
        ax.axvline(median, color=INK, label=f"median {median:g}")
        ax.axvline(p95, color=INK, linestyle="--", label=f"p95 {p95:.0f}")
        if max_length <= top * 1.3:
            ax.axvline(max_length, color=FOURTH, linestyle=":", linewidth=2.4, label=f"limit {max_length}")
        else:
            ax.plot([], [], color=FOURTH, linestyle=":", label=f"limit {max_length} (off the axis)")
        ax.set(xlabel=f"tokens per {name}, special tokens included", ylabel=f"number of {plural[name]}")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend_above(ax, 3)
    if not any(cut.values()):
        title = f"No query or passage is longer than {max_length} tokens: nothing is truncated"
    else:
        shares = [
            f"{cut[name]:,} of {len(counts):,} {plural[name]} ({cut[name] / len(counts):.1%})".replace(
                "%", " %"
            )
            for name, counts in texts.items()
        ]
        title = f"{' and '.join(shares)} are longer than {max_length} tokens and get truncated"
    return _finish(fig, title, path, source)


@_styled
def learning_rate(rates, warmup_steps, path=None, source=None) -> Figure:
    """The learning rate that each optimizer update used.

    rates: (n,) one rate per update, in order. warmup_steps: how many updates the warm-up took.
    """
    rates = _vector("rates", rates)
    if (rates < 0).any():
        raise ValueError("rates: a learning rate is below 0")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: must not be below 0, got {warmup_steps}")
    n, peak = len(rates), int(rates.argmax())
    updates = np.arange(1, n + 1)
    fig, [[ax]] = _figure(8, 3.8)
    if warmup_steps:
        ax.axvspan(
            0.5, min(warmup_steps, n) + 0.5, color=PALE, label=f"warm-up: {_count(warmup_steps, 'update')}"
        )
    ax.plot(updates, rates, color=AFTER, marker="." if n <= 80 else None)
    ax.plot(
        peak + 1,
        rates[peak],
        "^",
        color=FOURTH,
        markersize=9,
        label=f"peak {_rate(rates[peak])}, update {peak + 1}",
    )
    ax.plot(
        n, rates[-1], "s", color=BEFORE, markeredgecolor=INK, markersize=7, label=f"last {_rate(rates[-1])}"
    )
    ax.set(xlabel="optimizer update", ylabel="learning rate", xlim=(0.5, n + 0.5 + 0.01 * n))
    ax.set_ylim(-0.04 * (rates.max() or 1), 1.08 * (rates.max() or 1))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if rates.max() > 0:
        exponent = math.floor(math.log10(rates.max()))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value / 10**exponent:g}")
        ax.set_ylabel(f"learning rate, × $10^{{{exponent}}}$".replace("-", "{-}"))
    _legend_above(ax, 3)
    title = (
        f"The learning rate peaks at {_rate(rates[peak])} (update {peak + 1}) and ends at {_rate(rates[-1])}"
    )
    return _finish(fig, f"{title} after {_count(n, 'update')}", path, source)


@_styled
def run_configuration(config, path=None, source=None, title=None) -> Figure:
    """A table of the run's settings.

    config: {name: value} or {name: (value, why)}. More than 12 settings without reasons stand in two
    pairs of columns. title: "Settings of this run (n)" where none is given.
    """
    _filled("config", config)
    rows = []
    for name, value in config.items():
        pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str)
        rows.append((str(name), str(value[0]), value[1]) if pair else (str(name), str(value), ""))
    reasons = any(why for *_, why in rows)
    halves = 1 if reasons or len(rows) <= 12 else 2
    size, gap, line = 9, 0.3, 0.17  # points, inches, inches
    widest = {0: 2.6, 1: 2.6, 2: 4.8}
    cells = [[_wrap_cell(text, widest[i], size) for i, text in enumerate(row)] for row in rows]
    used = range(3 if reasons else 2)
    columns = [max(_width(part, size) for row in cells for part in row[i].split("\n")) + gap for i in used]
    pair_width = sum(columns)
    heads = ("setting", "value", "why")
    title = title or f"Settings of this run ({len(rows)})"
    width = min(11, max(pair_width * halves + 0.3 * (halves - 1) + 0.2, _width(title, 11.5, "bold") + 0.4, 4))

    per_half = math.ceil(len(rows) / halves)
    heights = [line * (1 + max(text.count("\n") for text in row)) + 0.09 for row in cells]
    table = 0.3 + max(sum(heights[h * per_half : (h + 1) * per_half]) for h in range(halves))
    above, below = 0.4, 0.3 if source else 0.08
    height = above + table + below
    fig = plt.figure(figsize=(width, height))
    plt.close(fig)
    ax = fig.add_axes((0, below / height, 1, table / height))
    ax.set(xlim=(0, width), ylim=(table, 0))
    ax.axis("off")
    for half in range(halves):
        left = 0.1 + half * (pair_width + 0.3)
        edges = left + np.concatenate([[0], np.cumsum(columns)])
        for i in used:
            ax.text(edges[i] + 0.06, 0.15, heads[i], fontsize=8, color=MUTED, va="center")
        ax.plot([left, edges[-1]], [0.28, 0.28], color=MUTED, linewidth=0.8)
        top = 0.3
        for index in range(half * per_half, min((half + 1) * per_half, len(rows))):
            if (index - half * per_half) % 2 == 0:
                ax.axhspan(
                    top, top + heights[index], left / width, edges[-1] / width, color=PALE, linewidth=0
                )
            for i in used:
                middle = top + heights[index] / 2
                colour = (AFTER, INK, MUTED)[i]
                ax.text(edges[i] + 0.06, middle, cells[index][i], fontsize=size, va="center", color=colour)
            top += heights[index]
    return _finish(fig, title, path, source)


def _wrap_cell(text: str, inches: float, size: float) -> str:
    """Wrapped at spaces and hyphens; a word too long for its column is broken."""
    return "\n".join(textwrap.wrap(text, max(8, int(inches / _width("n", size))))) or " "


# ---- training -----------------------------------------------------------------------------------------


@_styled
def training_curves(history, before=None, path=None, source=None) -> Figure:
    """Step loss; loss and accuracy per epoch; Recall@1 and MRR per epoch against those before training.

    history: {"step_losses": (s,), "step_accs": (s,), "epoch": [int], "epoch_loss": (e,), "epoch_acc":
    (e,), "eval": [{"epoch": int, "recall@1": float, "mrr": float, "recall@1_interval": [lo, hi]}]}; the
    interval is optional and other keys are passed over. Losses in nats, the rest between 0 and 1. Of an
    epoch that occurs twice (a resumed run) the later record counts. before: {"recall@1": float, "mrr":
    float}, the scores before training, or None.
    """
    steps = _vector("history['step_losses']", history["step_losses"])
    columns = [history["epoch"], history["epoch_loss"], history["epoch_acc"]]
    _same_length(epoch=columns[0], epoch_loss=columns[1], epoch_acc=columns[2])
    _vector("history['epoch']", columns[0])
    records = {int(epoch): (loss, acc) for epoch, loss, acc in zip(*columns, strict=True)}
    epochs = sorted(records)
    loss = _vector("history['epoch_loss']", [records[epoch][0] for epoch in epochs])
    acc = _vector("history['epoch_acc']", [records[epoch][1] for epoch in epochs])
    scores = {int(entry["epoch"]): entry for entry in history.get("eval") or []}
    scores = [scores[epoch] for epoch in sorted(scores)]
    before = before or {}

    fig, [[step_ax, epoch_ax, eval_ax]] = _figure(11, 4.1, 1, 3)
    window = _window(len(steps))
    x = np.arange(1, len(steps) + 1)
    step_ax.plot(
        x,
        steps,
        color=THIRD,
        linewidth=0.8,
        marker="." if len(steps) < 60 else None,
        markersize=3 if len(steps) > 1 else 10,
        label="one step",
    )
    if window > 1:
        step_ax.plot(x, _smooth(steps, window), color=AFTER, linewidth=2, label=f"mean over {window} steps")
    step_ax.set(xlabel="training step", ylabel="InfoNCE loss of a step (nats)")
    step_ax.set_ylim(bottom=min(0, steps.min()))
    step_ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    _legend_above(step_ax, 2)

    left = epoch_ax.plot(epochs, loss, color=AFTER, marker="o", label="loss (left)")
    epoch_ax.set(xlabel="epoch", ylabel="mean InfoNCE loss (nats)")
    epoch_ax.set_ylim(min(0, loss.min()), max(loss.max(), 1e-9) * 1.08)
    right_ax = epoch_ax.twinx()
    right = right_ax.plot(epochs, acc, color=FOURTH, marker="s", linestyle="--", label="accuracy (right)")
    right_ax.set(ylabel="accuracy within the batch", ylim=(min(0.5, math.floor(acc.min() * 10) / 10), 1.03))
    right_ax.grid(False)
    right_ax.spines["right"].set_visible(True)
    _legend_above(epoch_ax, 2, left + right)

    seen = [int(entry["epoch"]) for entry in scores]
    for key, name, style, dash in (
        ("recall@1", "Recall@1", {"color": AFTER, "marker": "o"}, (0, (5, 2))),
        ("mrr", "MRR", {"color": FOURTH, "marker": "s"}, (0, (1.5, 1.5))),
    ):
        if scores:
            eval_ax.plot(
                seen, _vector(f"history['eval'] {key}", [e[key] for e in scores]), label=name, **style
            )
        if key in before:
            eval_ax.axhline(
                before[key],
                color=style["color"],
                linestyle=dash,
                linewidth=1.3,
                label=f"before: {before[key]:.3f}",
            )
    for entry in scores:
        if entry.get("recall@1_interval") is not None:
            _, lo, hi = _interval("recall@1_interval", [entry["recall@1"], *entry["recall@1_interval"]])
            eval_ax.vlines(entry["epoch"], lo, hi, color=AFTER, linewidth=5, alpha=0.18)
    bars = any(entry.get("recall@1_interval") is not None for entry in scores)
    note = "\n(bars: 95 % interval of Recall@1)" if bars else ""
    eval_ax.set(xlabel="epoch", ylabel="score on the validation queries" + note)
    if scores or before:
        _legend_above(eval_ax, 2)
    else:
        eval_ax.text(0.5, 0.5, "not evaluated", transform=eval_ax.transAxes, ha="center", color=MUTED)
        eval_ax.set_yticks([])
    for ax, marks in ((epoch_ax, epochs), (eval_ax, seen or epochs)):
        ax.set_xlim(min(marks) - 0.5, max(marks) + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=11, min_n_ticks=1))

    if len(epochs) == 1:
        title = f"The mean loss of epoch {epochs[0]} is {_loss(loss[0])}"
    else:
        span = (
            f"in {len(epochs)} epochs" if epochs[0] <= 1 else f"between epochs {epochs[0]} and {epochs[-1]}"
        )
        title = f"Loss {_moved(loss[0], loss[-1], _loss)} {span}"
    if scores:
        last, best = scores[-1], max(scores, key=lambda entry: entry["recall@1"])
        after = f" after epoch {last['epoch']}"
        if "recall@1" in before:
            title += f"; Recall@1 {_moved(before['recall@1'], last['recall@1'])}"
        else:
            title += f"; Recall@1 is {last['recall@1']:.3f}"
        title += after
        if _number(best["recall@1"]) != _number(last["recall@1"]):
            title += f" (best: {best['recall@1']:.3f}, epoch {best['epoch']})"
    return _finish(fig, title, path, source)


@_styled
def loss_curves(curves, path=None, pairs_per_step=None, source=None) -> Figure:
    """Smoothed loss of several runs against the training pairs seen.

    curves: {label: (s,) loss of each step, nats}. pairs_per_step: {label: pairs in one step}, 1 where
    none is given: then the axis counts steps. Each run may have its own length.
    """
    _filled("curves", curves)
    if pairs_per_step is not None and set(curves) - set(pairs_per_step):
        raise ValueError(f"pairs_per_step: nothing for {sorted(set(curves) - set(pairs_per_step))}")
    fig, [[ax]] = _figure(8.5, 4.3)
    ends = []
    for (label, losses), style in zip(curves.items(), _line_styles(len(curves)), strict=True):
        losses = _vector(f"curves[{label!r}]", losses)
        x = np.arange(1, len(losses) + 1) * (pairs_per_step[label] if pairs_per_step else 1)
        window = _window(len(losses))
        ax.plot(x, losses, color=style["color"], alpha=0.22, linewidth=0.7)
        tail = float(losses[-max(1, round(len(losses) / 10)) :].mean())
        style |= {"markevery": max(1, len(losses) // 8)}
        ax.plot(
            x,
            _smooth(losses, window),
            label=f"{label} (mean over {window} steps)" if window > 1 else label,
            **style,
        )
        ends.append(f"{_loss(tail)} ({label})")
    ax.set_xlabel("training pairs seen" if pairs_per_step else "training step")
    ax.set_ylabel("InfoNCE loss of a step (nats)")
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]) if ax.get_ylim()[0] < 0 else 0)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.legend(loc="upper right")
    return _finish(fig, "Mean loss over the last tenth of the steps: " + ", ".join(ends), path, source)


# ---- before and after ---------------------------------------------------------------------------------


def _p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


@_styled
def before_after(results, path=None, *, n_queries, source=None) -> Figure:
    """Scores before and after training with 95 % intervals, and the paired difference against 0.

    results: {metric: {"before": (value, lo, hi), "after": (value, lo, hi), "difference": (value, lo, hi),
    "p": float}}; "p" may be left out. n_queries: how many queries each score is a mean over.
    """
    _filled("results", results)
    if n_queries < 1:
        raise ValueError(f"n_queries: must be at least 1, got {n_queries}")
    fig, [[bars, change]] = _figure(9.5, 4.3, 1, 2, gridspec_kw={"width_ratios": [3, 2]})
    width, findings, top = 0.36, [], 0.0
    for side, (key, style) in enumerate(zip(("before", "after"), _bar_styles(2), strict=True)):
        for i, (metric, result) in enumerate(results.items()):
            value, lo, hi = _interval(f"results[{metric!r}][{key!r}]", result[key])
            at = i + (side - 0.5) * (width + 0.03)
            bars.bar(at, value, width, label=f"{key} training" if i == 0 else None, **style)
            ends = np.array([at - 0.04, at + 0.04])
            outline = [withStroke(linewidth=4, foreground="white")]
            for x, y in ((2 * [at], [lo, hi]), (ends, 2 * [lo]), (ends, 2 * [hi])):
                bars.plot(x, y, color=INK, linewidth=1.5, path_effects=outline)
            bars.annotate(
                f"{value:.3f}", (at, max(hi, value)), (0, 4), textcoords="offset points", ha="center"
            )
            top = max(top, hi, value)
    bars.set(ylabel="score (mean over the queries), 95 % interval", ylim=(0, top * 1.1))
    bars.set_xticks(range(len(results)), list(results))
    bars.tick_params(axis="x", length=0)
    _legend_above(bars, 2)

    for i, (metric, result) in enumerate(results.items()):
        value, lo, hi = _interval(f"results[{metric!r}]['difference']", result["difference"])
        if abs(result["after"][0] - result["before"][0] - value) > 2e-3:
            raise ValueError(f"results[{metric!r}]: the difference {value} is not after - before")
        change.vlines(i, lo, hi, color=AFTER, linewidth=2)
        change.plot([i - 0.05, i + 0.05], [lo, lo], [i - 0.05, i + 0.05], [hi, hi], color=AFTER, linewidth=2)
        change.plot(i, value, "o", color=AFTER, markersize=7)
        note = _number(value, signed=True)
        if result.get("p") is not None:
            note += "\n" + _p_value(result["p"])
        change.annotate(note, (i, value), (11, 0), textcoords="offset points", va="center")
        verdict = "excludes 0" if lo > 0 or hi < 0 else "includes 0"
        findings.append((f"{metric} {_number(value, signed=True)}", verdict))
    change.axhline(0, color=INK, linewidth=1)
    low, high = change.get_ylim()
    change.set(xlim=(-0.5, len(results) - 0.2), ylim=(low, high), ylabel="after − before, 95 % interval")
    change.set_xticks(range(len(results)), list(results))
    change.tick_params(axis="x", length=0)

    verdicts = {verdict for _, verdict in findings}
    title = f"On {n_queries:,} {'query' if n_queries == 1 else 'queries'}: "
    if len(verdicts) == 1:
        both = {1: "the 95 % interval", 2: "both 95 % intervals"}.get(len(findings), "all 95 % intervals")
        verb = verdicts.pop() if len(findings) == 1 else verdicts.pop().replace("cludes", "clude")
        title += ", ".join(change for change, _ in findings) + f"; {both} {verb}"
    else:
        title += "; ".join(f"{change} (95 % interval {verdict})" for change, verdict in findings)
    return _finish(fig, title, path, source)


def _square(name: str, matrix) -> np.ndarray:
    matrix = np.asarray(matrix, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"{name}: expected a square matrix of at least 2 x 2, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: holds a value that is not finite")
    return matrix


@_styled
def similarity_heatmaps(before, after, path=None, labels=None, source=None) -> Figure:
    """Cosine similarity of each query to each passage before and after training, on one colour scale.

    before, after: (n, n); row i is query i, column j passage j, the pairs on the diagonal. labels: n short
    names for the rows and columns.
    """
    matrices = {"before": _square("before", before), "after": _square("after", after)}
    n = len(matrices["before"])
    if len(matrices["after"]) != n:
        raise ValueError(f"before is {n} x {n}, after {len(matrices['after'])} x {len(matrices['after'])}")
    if labels is not None:
        _same_length(labels=labels, matrix=matrices["before"])
    low = min(matrix.min() for matrix in matrices.values())
    high = max(matrix.max() for matrix in matrices.values())
    fig, [axes] = _figure(10, 5.6, 1, 2, sharey=True)
    margins = {}
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        pairs = float(np.diag(matrix).mean())
        others = float(matrix[~np.eye(n, dtype=bool)].mean())
        margins[name] = pairs - others
        image = ax.imshow(matrix, cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
        ax.set_title(
            f"{name} training: pairs {_number(pairs, 2)}, other passages {_number(others, 2)}", pad=7
        )
        ax.grid(False)
        ax.set_xlabel("passage")
        if labels is not None:
            ax.set_xticks(range(n), labels, rotation=90, fontsize=7)
            ax.set_yticks(range(n), labels, fontsize=7)
        else:
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes[0].set_ylabel("query")
    fig.colorbar(image, ax=list(axes), label="cosine similarity", shrink=0.8, pad=0.02)
    moved = _moved(margins["before"], margins["after"])
    return _finish(fig, f"Mean cosine of pairs minus that of non-pairs {moved}", path, source)


def _points(name: str, points) -> np.ndarray:
    points = np.asarray(points, dtype=float)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2 or not np.isfinite(points).all():
        raise ValueError(f"{name}: expected finite coordinates (n, 2) with n >= 2, got shape {points.shape}")
    return points


@_styled
def projection(before_q, before_p, after_q, after_p, path=None, method="PCA", source=None) -> Figure:
    """Queries and their passages in two dimensions, each pair joined, before and after training.

    before_q, before_p, after_q, after_p: (n, 2) coordinates; row i of queries and passages is a pair.
    method: what made the coordinates. The title's ratio is the median distance of pairs over the median
    distance of all non-pairs, both in the two dimensions shown.
    """
    panels = {"before": (before_q, before_p), "after": (after_q, after_p)}
    fig, [axes] = _figure(10, 5.3, 1, 2)
    ratios = {}
    for ax, (name, (queries, passages)) in zip(axes, panels.items(), strict=True):
        queries, passages = _points(f"{name}_q", queries), _points(f"{name}_p", passages)
        _same_length(queries=queries, passages=passages)
        distance = np.linalg.norm(queries[:, None] - passages[None], axis=-1)
        others = float(np.median(distance[~np.eye(len(queries), dtype=bool)]))
        if others == 0:
            raise ValueError(f"{name}: the non-pairs lie on one point")
        ratios[name] = float(np.median(np.diag(distance))) / others
        for query, passage in zip(queries, passages, strict=True):
            ax.plot(*zip(query, passage, strict=True), color=MUTED, linewidth=0.7, alpha=0.55, zorder=1)
        ax.scatter(
            *queries.T, s=30, marker="o", color=BEFORE, edgecolor=INK, linewidth=0.6, label="query", zorder=3
        )
        ax.scatter(
            *passages.T,
            s=26,
            marker="s",
            color=AFTER,
            edgecolor="white",
            linewidth=0.4,
            label="code",
            zorder=2,
        )
        ax.set_title(f"{name} training")
        ax.set(xlabel=f"{method} 1", ylabel=f"{method} 2")
        ax.set_aspect("equal", adjustable="datalim")
        ax.grid(True, axis="both")
    axes[0].legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")
    moved = _moved(ratios["before"], ratios["after"], lambda value: _number(value, 2))
    title = f"Distance within a pair, relative to that between non-pairs, {moved} (medians, {method} in 2-D)"
    return _finish(fig, title, path, source)


# ---- retrieval ----------------------------------------------------------------------------------------


def _tables(tables) -> dict[str, dict[str, dict[int, float]]]:
    """Checked copies with whole-number cut-offs, which JSON turns into strings."""
    if not 2 <= len(tables) <= 4:
        raise ValueError(f"tables: expected 2 to 4 models, got {len(tables)}")
    clean = {
        model: {
            metric: {int(k): float(v) for k, v in sorted(cuts.items(), key=lambda cut: int(cut[0]))}
            for metric, cuts in table.items()
        }
        for model, table in tables.items()
    }
    first = next(iter(clean.values()))
    _filled("tables", first)
    for model, table in clean.items():
        for metric in first:
            if metric not in table or list(table[metric]) != list(first[metric]) or not first[metric]:
                raise ValueError(f"tables[{model!r}]: {metric} is missing or has other cut-offs")
            _vector(f"tables[{model!r}][{metric!r}]", table[metric].values())
    return clean


def _main_metric(tables) -> tuple[str, int]:
    first = next(iter(tables.values()))
    metric = "nDCG" if "nDCG" in first else next(iter(first))
    return metric, 10 if 10 in first[metric] else max(first[metric])


def _metric_panels(shown, styles, label, ylabel):
    """One panel of grouped bars per metric on one y axis, and a cell for the legend."""
    metrics = list(next(iter(shown.values())))
    columns = 3 if len(metrics) > 2 else len(metrics)
    rows = math.ceil((len(metrics) + 1) / columns)
    fig, axes = _figure(10.5, 0.7 + 2.5 * rows, rows, columns, sharey=True)
    cells = list(axes.flat)
    width = 0.84 / len(shown)
    values = [v for table in shown.values() for cuts in table.values() for v in cuts.values()]
    low, high = min(*values, 0.0), max(*values, 0.0)
    if low == high:
        low, high = -0.01, 0.01
    # in a panel about 1.75 inches high, an upright label takes 0.45 inches at each end that has bars
    pad = (high - low) * 0.45 / (1.75 - 0.45 * ((low < 0) + (high > 0)))
    handles = []
    for cell, metric in zip(cells, metrics, strict=False):
        for i, ((model, table), style) in enumerate(zip(shown.items(), styles, strict=True)):
            cuts = table[metric]
            at = np.arange(len(cuts)) + (i - (len(shown) - 1) / 2) * width
            drawn = cell.bar(at, list(cuts.values()), width * 0.94, label=model, **style)
            texts = [label(value) for value in cuts.values()]
            cell.bar_label(drawn, texts, padding=3, fontsize=7, rotation=90)
            if metric == metrics[0]:
                handles.append(drawn)
        cell.set_xticks(range(len(cuts)), [f"@{k}" for k in cuts])
        cell.tick_params(axis="x", length=0)
        cell.set_title(metric)
        cell.axhline(0, color=INK, linewidth=0.8)
    cells[0].set_ylim(low - pad * (low < 0), high + pad * (high > 0))
    if 0.6 < high <= 1 and low == 0:
        cells[0].set_yticks(np.linspace(0, 1, 6))  # no tick above 1, where no score can be
    for row in axes:
        row[0].set_ylabel(ylabel)
    for cell in cells[len(metrics) :]:
        cell.axis("off")
    cells[-1].legend(
        handles=handles, loc="center left", fontsize=9, handlelength=2.2, handleheight=1.3, labelspacing=0.9
    )
    return fig


@_styled
def retrieval_bars(tables, path=None, title_note="", source=None) -> Figure:
    """Retrieval scores of 2 to 4 models at several cut-offs, one panel per metric on one y axis.

    tables: {model: {metric: {cut-off: score}}}, the same metrics and cut-offs for every model; the first
    model is the base. title_note: put before the title, e.g. what was searched.
    """
    tables = _tables(tables)
    metric, k = _main_metric(tables)
    (base, base_table), (other, other_table) = list(tables.items())[:2]
    fig = _metric_panels(tables, _bar_styles(len(tables)), lambda value: f"{value:.3f}", "score")
    a, b = base_table[metric][k], other_table[metric][k]
    if _number(a) == _number(b):
        title = f"{metric}@{k} is {_number(a)} for both {base} and {other}"
    else:
        title = f"{metric}@{k} {_moved(a, b, where=(f' ({base})', f' ({other})'))}"
    return _finish(fig, f"{title_note}: {title}" if title_note else title, path, source)


@_styled
def retrieval_difference(tables, path=None, source=None) -> Figure:
    """Scores of the second and further models minus those of the first; tables: as for `retrieval_bars`."""
    tables = _tables(tables)
    metric, k = _main_metric(tables)
    base, *others = tables
    shown = {
        f"{model} − {base}": {
            name: {cut: score - tables[base][name][cut] for cut, score in tables[model][name].items()}
            for name in tables[base]
        }
        for model in others
    }
    fig = _metric_panels(
        shown, _bar_styles(len(tables))[1:], lambda value: _number(value, signed=True), "difference of scores"
    )
    changes = [f"{_number(shown[f'{model} − {base}'][metric][k], signed=True)} ({model})" for model in others]
    scores = [score for table in shown.values() for cuts in table.values() for score in cuts.values()]
    lower = sum(_number(score).startswith("−") for score in scores)
    title = f"{metric}@{k} against {base}: " + ", ".join(changes)
    return _finish(fig, f"{title}; {lower} of {_count(len(scores), 'score')} lower", path, source)


# ---- interpolation ------------------------------------------------------------------------------------


def _place_labels(ax, points, texts, lines) -> None:
    """Write each text near its point where it covers no other text, point or line; layout first."""
    fig = ax.figure
    fig.draw_without_rendering()
    to_pixels, inside = ax.transData.transform, ax.get_window_extent()
    dots = to_pixels(np.asarray(points, dtype=float))
    on_lines = [
        to_pixels(np.linspace(a, b, 60)) for line in lines for a, b in pairwise(np.asarray(line, dtype=float))
    ]
    busy = np.concatenate([dots, *on_lines]) if on_lines else dots
    taken = []
    for point, text in zip(points, texts, strict=True):
        best = None
        for radius in (11, 16, 24, 36, 50):
            for angle in (45, 135, 315, 225, 90, 270, 0, 180):
                dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                note = ax.annotate(
                    text, point, (radius * dx, radius * dy), textcoords="offset points", fontsize=8,
                    ha="left" if dx > 0.1 else "right" if dx < -0.1 else "center",
                    va="bottom" if dy > 0.1 else "top" if dy < -0.1 else "center",
                )  # fmt: skip
                note.set_in_layout(False)
                box = note.get_window_extent().padded(2)
                note.remove()
                cost = radius / 10
                cost += 50 * sum(box.overlaps(other) for other in taken)
                cost += 3 * int(((busy > box.min) & (busy < box.max)).all(axis=1).sum())
                cost += 100 * (not (inside.contains(*box.min) and inside.contains(*box.max)))
                if best is None or cost < best[0]:
                    best = (cost, radius, note, box)
        _, radius, note, box = best
        taken.append(box)
        arrow = (
            {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            if radius > 16
            else None
        )
        final = ax.annotate(
            text, point, note.xyann, textcoords="offset points", fontsize=8,
            ha=note.get_ha(), va=note.get_va(), arrowprops=arrow, zorder=6,
        )  # fmt: skip
        final.set_in_layout(False)


@_styled
def interpolation_tradeoff(
    alphas,
    code,
    general,
    chosen,
    path=None,
    code_label="code retrieval (Recall@1)",
    general_label="general retrieval (nDCG@10)",
    other_points=None,
    source=None,
    allowed_loss=0.005,
) -> Figure:
    """What interpolated weights (1 − alpha) · base + alpha · fine-tuned gain on code and lose elsewhere.

    alphas: (n,) with 0 (base) and 1 (fine-tuned) among them. code, general: (n,) scores at each alpha.
    chosen: one of `alphas`. other_points: {label: (code score, general score)} of other models. A guide
    line stands `allowed_loss` below the base's general score.
    """
    alphas, code, general = (
        _vector("alphas", alphas, 2),
        _vector("code", code, 2),
        _vector("general", general, 2),
    )
    _same_length(alphas=alphas, code=code, general=general)
    order = np.argsort(alphas)
    alphas, code, general = alphas[order], code[order], general[order]
    if not (np.isclose(alphas[0], 0) and np.isclose(alphas[-1], 1)):
        raise ValueError(
            f"alphas: must run from 0 (base) to 1 (fine-tuned), got {alphas[0]:g} to {alphas[-1]:g}"
        )
    match = np.flatnonzero(np.isclose(alphas, chosen))
    if len(match) != 1:
        raise ValueError(f"chosen: {chosen:g} is not one of the alphas")
    pick = int(match[0])
    others = {
        label: tuple(_vector(f"other_points[{label!r}]", xy, 2)) for label, xy in (other_points or {}).items()
    }

    fig, [[ax]] = _figure(8.5, 5.4)
    ax.grid(True, axis="both")
    ax.axhline(
        general[0] - allowed_loss,
        color=MUTED,
        linestyle="--",
        linewidth=1.1,
        label=f"base − {allowed_loss:g}: {general[0] - allowed_loss:.3f}",
    )
    ax.plot(code, general, color=AFTER, marker="o", zorder=3, label="interpolated weights")
    ax.plot(
        code[pick],
        general[pick],
        "*",
        color=BEFORE,
        markeredgecolor=INK,
        markersize=17,
        zorder=4,
        linestyle="none",
        label=f"chosen: α = {alphas[pick]:g}",
    )
    if others:
        ax.plot(
            *zip(*others.values(), strict=True),
            "D",
            color=FOURTH,
            zorder=3,
            label="other models",
            linestyle="none",
        )
    ax.margins(0.12)
    ax.set(xlabel=code_label, ylabel=general_label)
    _legend_above(ax, 4)

    names = [f"α = {alpha:g}" for alpha in alphas]
    names[0], names[-1] = "α = 0, base", "α = 1, fine-tuned"
    names[pick] += f": {code[pick]:.3f}, {general[pick]:.3f}"
    track = list(zip(code, general, strict=True))
    edges = [(ax.get_xlim()[0], general[0] - allowed_loss), (ax.get_xlim()[1], general[0] - allowed_loss)]

    gain, kept = code[-1] - code[0], code[pick] - code[0]
    lost = general[0] - general[pick]
    title = f"α = {alphas[pick]:g} "
    if _number(gain) == _number(0) or gain < 0 or kept > gain:
        title += (
            f"moves code retrieval by {_number(kept, signed=True)} (fine-tuned: {_number(gain, signed=True)})"
        )
    else:
        title += f"keeps {_number(100 * kept / gain, 0)} % of the gain on code ({_number(gain, signed=True)})"
    if _number(lost) == _number(0):
        title += " and keeps general retrieval within 0.0005"
    else:
        title += f" and {'loses' if lost > 0 else 'gains'} {_number(abs(lost))} on general retrieval"
    _finish(fig, title, None, source)
    _place_labels(ax, track + list(others.values()), names + list(others), [track, edges])
    if path is not None:
        save(fig, path)
    return fig


# ---- time and memory ----------------------------------------------------------------------------------


def _measurement(row, key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"rows: {key} of {row['name']!r} must be above 0, got {value}")
    return float(value)


@_styled
def time_and_memory(
    rows,
    path=None,
    time_label="seconds per epoch",
    memory_label="peak memory of the process, GB",
    source=None,
) -> Figure:
    """Time and memory of this project and its peers, side by side.

    rows: [{"name": str, "seconds": float, "memory_gb": float, "ours": bool}], drawn from top to bottom; a
    measurement of None is shown as "not measured". The title compares the first row of ours with the
    slowest and the fastest of the others, in the unit of `time_label`.
    """
    _filled("rows", rows)
    names = [row["name"] for row in rows]
    if not any(row.get("ours") for row in rows):
        raise ValueError("rows: none is marked as ours")
    fig, [axes] = _figure(10, 1.6 + 0.42 * len(rows), 1, 2, sharey=True)
    mine, theirs = _bar_styles(2)[1], _bar_styles(1)[0]
    at = range(len(rows))
    for ax, key, label in zip(axes, ("seconds", "memory_gb"), (time_label, memory_label), strict=True):
        values = [_measurement(row, key) for row in rows]
        longest = max((value for value in values if value is not None), default=1.0)
        for y, (row, value) in enumerate(zip(rows, values, strict=True)):
            if value is not None:
                ax.barh(y, value, 0.66, **(mine if row.get("ours") else theirs))
            ax.annotate(
                "not measured" if value is None else _size(value),
                (value or 0, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=MUTED if value is None else INK,
            )
        ax.set(xlabel=label, xlim=(0, longest * 1.17))
        ax.grid(False, axis="y")
        ax.grid(True, axis="x")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(at, [_wrap(name, 2.4, 8.5) for name in names])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    for tick, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row.get("ours") else "normal")

    ours = next(row for row in rows if row.get("ours"))
    name = ours["name"][:1].upper() + ours["name"][1:]
    peers = [row for row in rows if not row.get("ours") and row.get("seconds") is not None]
    if ours.get("seconds") is None:
        title = f"{name}: no time measured"
    elif not peers:
        title = f"{name}: {_size(ours['seconds'])} {time_label}"
    else:
        slow, fast = max(peers, key=lambda r: r["seconds"]), min(peers, key=lambda r: r["seconds"])
        title = f"{name} takes {ours['seconds'] / slow['seconds']:.2f} × the time of "
        if slow is fast:
            title += f"{slow['name']}"
        else:
            title += (
                f"the slowest peer ({slow['name']}) and {ours['seconds'] / fast['seconds']:.2f} × that of "
            )
            title += f"the fastest ({fast['name']})"
    return _finish(fig, title, path, source)


@_styled
def memory_by_method(rows, path=None, source=None) -> Figure:
    """Peak memory and time of ways to get more negatives, at several batch sizes.

    rows: [{"name": str, "batch": int, "memory_gb": float, "seconds": float}], one per method and batch
    size; a missing one, or a measurement of None, leaves a gap. The title speaks of the largest of the
    batch sizes that the most methods share.
    """
    _filled("rows", rows)
    names, batches = list(dict.fromkeys(row["name"] for row in rows)), sorted({row["batch"] for row in rows})
    found = {(row["name"], row["batch"]): row for row in rows}
    if len(found) != len(rows):
        raise ValueError("rows: a method occurs twice at one batch size")
    fig, [axes] = _figure(10.5, 4.2, 1, 2)
    width = 0.84 / len(names)
    labels = ("peak memory, GB", "time, seconds")
    for ax, key, label in zip(axes, ("memory_gb", "seconds"), labels, strict=True):
        top = 0.0
        for i, (name, style) in enumerate(zip(names, _bar_styles(len(names)), strict=True)):
            cells = [
                (j, value)
                for j, batch in enumerate(batches)
                if (value := _measurement(found.get((name, batch), {"name": name}), key)) is not None
            ]
            at = [j + (i - (len(names) - 1) / 2) * width for j, _ in cells]
            drawn = ax.bar(at, [value for _, value in cells], width * 0.94, label=name, **style)
            turned = 90 if len(names) * len(batches) > 8 else 0
            ax.bar_label(
                drawn, [_size(value) for _, value in cells], padding=2, fontsize=7.5, rotation=turned
            )
            top = max([top, *(value for _, value in cells)])
        ax.set_xticks(range(len(batches)), [f"{batch:,}" for batch in batches])
        ax.set(
            xlabel="pairs per batch",
            ylabel=label,
            ylim=(0, (top or 1) * 1.17),
            xlim=(-0.55, len(batches) - 0.45),
        )
        ax.tick_params(axis="x", length=0)
    _legend_above(axes[0], 2 if len(names) == 4 else 3)

    measured = {b: [r for r in rows if r["batch"] == b and r.get("memory_gb") is not None] for b in batches}
    most = max(len(group) for group in measured.values())
    if most == 0:
        raise ValueError("rows: no memory was measured")
    batch = max(b for b, group in measured.items() if len(group) == most)
    least = min(measured[batch], key=lambda row: row["memory_gb"])
    worst = max(measured[batch], key=lambda row: row["memory_gb"])

    def cost(row) -> str:
        seconds = _measurement(row, "seconds")
        return f"{_size(row['memory_gb'])} GB" + (f", {_size(seconds)} s" if seconds else "")

    title = f"At {batch:,} pairs per batch, {least['name']} needs the least memory: {cost(least)}"
    if worst is not least:
        title += f"; {worst['name']} the most: {cost(worst)}"
    return _finish(fig, title, path, source)


# ---- intervals ----------------------------------------------------------------------------------------


@_styled
def grouped_bars_with_intervals(
    rows: Sequence[Mapping],
    path=None,
    xlabel="score",
    title=None,
    reference=None,
    reference_label=None,
    source=None,
) -> Figure:
    """One dot with its interval per row, against a reference line.

    rows: [{"label": str, "value": float, "lo": float, "hi": float}], drawn from top to bottom. reference:
    where the line stands, None for no line. title: computed where none is given; a caller who gives one
    must compute it from the same data.
    """
    _filled("rows", rows)
    triples = [_interval(f"rows: {row['label']!r}", (row["value"], row["lo"], row["hi"])) for row in rows]
    fig, [[ax]] = _figure(8.5, 1.45 + 0.4 * len(rows))
    if reference is not None:
        ax.axvline(
            reference,
            color=FOURTH,
            linestyle="--",
            linewidth=1.4,
            zorder=1,
            label=reference_label or f"reference: {_number(reference)}",
        )
        _legend_above(ax, 1)
    edge = max(hi for *_, hi in triples)
    for y, (value, lo, hi) in enumerate(triples):
        ax.hlines(y, lo, hi, color=THIRD, linewidth=5, zorder=2)
        ax.plot(value, y, "o", color=AFTER, markersize=8, zorder=3)
        note = f"{_number(value)}  [{_number(lo)}, {_number(hi)}]"
        ax.annotate(note, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
    ax.set_yticks(range(len(rows)), [_wrap(row["label"], 2.8, 8.5) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"{xlabel}, 95 % interval")
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")
    low = min(lo for _, lo, _ in triples)
    ends = [low, edge, *([] if reference is None else [reference])]
    pad = 0.06 * (max(ends) - min(ends) or 1)
    ax.set_xlim(min(ends) - pad, max(ends) + pad)
    if title is None:
        best = max(range(len(rows)), key=lambda i: triples[i][0])
        title = f"Highest: {rows[best]['label']}, {_number(triples[best][0])}"
        if reference is not None:
            above = sum(lo > reference for _, lo, _ in triples)
            below = sum(hi < reference for *_, hi in triples)
            title += (
                f"; of {_count(len(rows), 'interval')}, {above} above {_number(reference)} and {below} below"
            )
    return _finish(fig, title, path, source)


interval_rows = grouped_bars_with_intervals  # the README's main figure
