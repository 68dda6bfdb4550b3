"""Retrieval in general: nDCG by hand, models at several cut-offs, mixtures of two models."""

import functools
import math

import numpy as np
from matplotlib.figure import Figure

from . import style as st


@st.styled
def worked_ndcg(grades, ideal, title, path=None, source=None) -> Figure:
    """One nDCG worked out: gain and discounted gain of each rank, as found and in ideal order.
    grades: grades of the passages at ranks 1, 2, …. ideal: the best grades, falling; the shorter
    list is filled with 0. The discounted gain of rank r is grade / log2(r + 1)."""
    k, show = max(len(grades), len(ideal)), lambda x: f"{x:.2f}".removesuffix(".00")
    fig, [axes] = st.figure(10.5, 4, 1, 2, sharey=True)
    orders = {"found order: DCG": grades, "ideal order: IDCG": ideal}
    for ax, (name, gain) in zip(axes, orders.items(), strict=True):
        gain = np.pad(np.array(gain, float), (0, k - len(gain)))
        discounted = gain / np.log2(np.arange(k) + 2)
        columns = {"gain: the grade": gain, "discounted: grade / log₂(rank + 1)": discounted}
        st.grouped_bars(ax, columns, st.OTHERS, show, fontsize=7)
        ax.set_title(f"{name} = {discounted.sum():.3f}", pad=24)
        ax.set_xticks(range(k), range(1, k + 1))
        ax.set(xlabel="rank", ymargin=0.12)
    axes[0].set_ylabel("gain")
    st.legend_above(axes[0])
    return st.finish(fig, title, path, source)


def _panels(tables, looks, signed, ylabel, title, path, source) -> Figure:
    """One panel of grouped bars per metric on one y axis, and a cell for the legend."""
    first = next(iter(tables.values()))
    rows = math.ceil((len(first) + 1) / 3)
    fig, axes = st.figure(10.5, 0.7 + 2.6 * rows, rows, 3, sharey=True)
    show = functools.partial(st.number, signed=signed)
    for ax, (metric, cuts) in zip(axes.flat, first.items(), strict=False):
        bars = {name: list(table[metric].values()) for name, table in tables.items()}
        st.grouped_bars(ax, bars, looks, show, fontsize=7.5, rotation=90)
        ax.set_xticks(range(len(cuts)), [f"@{cut}" for cut in cuts])
        ax.set_title(metric)
        ax.axhline(0, color=st.INK, linewidth=0.8)
    for ax in axes.flat:  # room for the upright values, at both ends where bars point both ways
        ax.margins(y=0.6 if signed else 0.4)
    if not signed:
        axes[0, 0].set_yticks(np.linspace(0, 1, 6))  # no tick above 1, where no score can be
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    for ax in axes.flat[len(first) :]:
        ax.axis("off")
    handles, names = axes[0, 0].get_legend_handles_labels()
    axes[-1, -1].legend(handles, names, loc="center left", fontsize=9.5, labelspacing=0.9)
    return st.finish(fig, title, path, source)


@st.styled
def metric_bars(tables, title, path=None, source=None) -> Figure:
    """Scores of 2 to 4 models at several cut-offs, one panel per metric on one y axis.
    tables: {model: {metric: {cut-off: score}}}, the same metrics and cut-offs in every model."""
    return _panels(tables, st.looks(tables), False, "score", title, path, source)


@st.styled
def metric_differences(tables, title, path=None, source=None) -> Figure:
    """Scores of the second and further models minus those of the first; `tables` as above."""
    (first, base), *others = tables.items()
    less = {
        f"{name} − {first}": {
            metric: {cut: table[metric][cut] - score for cut, score in cuts.items()}
            for metric, cuts in base.items()
        }
        for name, table in others
    }
    looks = st.looks(tables)[1:]
    return _panels(less, looks, True, "difference of scores", title, path, source)


@st.styled
def mixture(rows, chosen, title, path, xlabel, ylabel, others=None, source=None) -> Figure:
    """What weights between base (alpha = 0) and fine-tuned (alpha = 1) score on code and elsewhere.
    rows: [{"alpha": float, "code": (value, lo, hi), "general": (value, lo, hi)}]. chosen: the alpha
    of the merged model. others: {label: ((value, lo, hi) on code, (value, lo, hi) in general)}."""
    rows = sorted(rows, key=lambda row: row["alpha"])
    names = {0: "base", 1: "fine-tuned", chosen: "merged"}
    points, dot = [], {"marker": "o", "color": st.MUTED, "markersize": 5}
    for row in rows:
        name, text = names.get(row["alpha"]), f"α = {row['alpha']:g}"
        style = st.point_style(st.MODELS[name]) if name else dot
        points.append((row["code"], row["general"], style, f"{text} ({name})" if name else text))
    for label, look in zip(others or {}, st.looks(others or {}), strict=True):
        points.append((*others[label], st.point_style(look), label))
    fig, [[ax]] = st.figure(9.5, 5.8)
    ax.grid(True, axis="both")
    for code, general, style, _ in points:
        st.error_bar(ax, code, general, "#C9CFD6", 0.8, zorder=3, **style)
    at = np.array([(code[0], general[0]) for code, general, *_ in points])
    ax.plot(*at[: len(rows)].T, color=st.MUTED, linewidth=1, zorder=2)
    ax.set(xlabel=f"{xlabel}, 95 % interval", ylabel=f"{ylabel}, 95 % interval")
    labels = (ax, at, [text for *_, text in points], [at[: len(rows)]])
    return st.finish(fig, title, path, source, [labels])
