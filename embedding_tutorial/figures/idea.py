"""The idea of the loss: in-batch negatives, the functions inside InfoNCE, the temperature."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from . import style as st


@st.styled
def in_batch_diagram(queries, passages, title, path=None, source=None) -> Figure:
    """A batch as a grid: each query against each code, the pairs on the diagonal.
    queries, passages: n texts each (about 4); query i belongs to passage i."""
    n, middles = len(queries), np.arange(len(queries)) + 0.5
    rows = [st.wrap(text, 3, 10) for text in queries]
    columns = [st.wrap(text, 1.2, 10) for text in passages]
    height = max(0.75, 0.1 + 0.17 * max(row.count("\n") + 1 for row in rows))
    fig, [[ax]] = st.figure(4.4 + 1.45 * n, 1.5 + height * n)
    for row, column in np.ndindex(n, n):
        face, ink, text, weight = st.PALE, st.INK, "in-batch\nnegative", "normal"
        if row == column:
            face, ink, text, weight = st.NAVY, "white", "positive", "bold"
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", lw=3))
        style = {"color": ink, "fontweight": weight, "fontsize": 11}
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", **style)
    outline = {"fill": False, "edgecolor": st.RUST, "linewidth": 3, "clip_on": False}
    ax.add_patch(Rectangle((0, 1), n, 1, zorder=4, **outline))
    bold = {"fontsize": 11, "fontweight": "bold", "color": st.RUST}
    note = f"this query:\n1 positive,\n{n - 1} negatives"
    ax.text(n + 0.1, 1.5, note, va="center", **bold)
    ax.set(xlim=(0, n), ylim=(n, 0))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    longest = max(len(line) for column in columns for line in column.split("\n"))
    mono = {"family": ["DejaVu Sans Mono", *st.FONTS], "fontsize": min(10, 165 / longest)}
    ax.set_xticks(middles, columns, **mono)  # a long name is smaller: it must fit its column
    ax.set_yticks(middles, rows, fontsize=10)
    ax.set_xlabel("passages of the batch", fontsize=11, color=st.MUTED)
    ax.set_ylabel("queries of the batch", fontsize=11, color=st.MUTED)
    return st.finish(fig, title, path, source)


@st.styled
def building_blocks(title, path=None, source=None) -> Figure:
    """The three functions inside InfoNCE: e^x, the two-way softmax and −log p (nats)."""
    fig, [[power, share, loss]] = st.figure(10.5, 3.9, 1, 3)
    x, wide, p = np.linspace(-3, 3, 200), np.linspace(-6, 6, 200), np.linspace(0.02, 1, 300)
    for ax, at, values, mark, note, offset in (
        (power, x, np.exp(x), (0, 1), "e⁰ = 1", (-48, 10)),
        (share, wide, 1 / (1 + np.exp(-wide)), (0, 0.5), "equal scores: 0.5", (10, -4)),
        (loss, p, -np.log(p), (0.1, -np.log(0.1)), "p = 0.1: loss 2.30", (9, 2)),
    ):
        ax.plot(at, values, color=st.NAVY)
        ax.plot(*mark, "o", color=st.RUST, markersize=7)
        ax.annotate(note, mark, offset, textcoords="offset points")
    power.set(xlabel="score x", ylabel="eˣ", title="eˣ: any score becomes positive")
    share.set(xlabel="score x, against a score of 0", ylabel="eˣ / (eˣ + e⁰), probability")
    share.set_title("softmax: scores become shares of 1")
    loss.set(xlabel="probability p of the right code", ylabel="−log p (nats)", ylim=(-0.1, 4))
    loss.set_title("−log: a small share costs much")
    return st.finish(fig, title, path, source)


@st.styled
def temperature_bars(scores, taus, title, path=None, source=None) -> Figure:
    """softmax(scores / tau): grouped bars, one colour per temperature, the value above each bar.
    scores: (n,) cosine similarities of one query to n passages. taus: temperatures above 0."""
    scores = np.array(scores)
    shares = {f"τ = {tau:g}": np.exp((scores - scores.max()) / tau) for tau in taus}
    shares = {name: share / share.sum() for name, share in shares.items()}
    fig, [[ax]] = st.figure(9, 4)
    st.grouped_bars(ax, shares, st.looks(shares), st.number, fontsize=8.5)
    ax.set_xticks(range(len(scores)), [f"{score:g}" for score in scores])
    ax.set(xlabel="passage, named by its cosine similarity to the query", ymargin=0.2)
    ax.set_ylabel("softmax(score / τ), probability")
    st.legend_above(ax, len(taus))
    return st.finish(fig, title, path, source)
