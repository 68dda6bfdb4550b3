"""Training: padding, learning rate, loss, and what it costs."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import style as st


@st.styled
def padding(lengths, groups, title, path=None, source=None) -> Figure:
    """One batch padded to its longest text, and the same texts packed without padding.
    lengths: (n,) tokens of each text in batch order. groups: lists of the indices 0 … n − 1, each
    list one row of texts laid end to end. Rows are equally thick in both panels."""
    lengths = np.array(lengths)
    n, longest = len(lengths), lengths.max()
    widest = max(lengths[group].sum() for group in groups)
    ratios = {"width_ratios": [1, float(np.clip(widest / longest, 0.5, 2.2))]}
    fig, [[padded, packed]] = st.figure(10.5, 1.6 + min(0.27 * n, 5.5), 1, 2, gridspec_kw=ratios)
    pale = {"color": "#D5DAE1", "hatch": "...", "edgecolor": "white", "label": "padding"}
    padded.barh(range(n), lengths, 0.8, color=st.NAVY, label="tokens of the text")
    padded.barh(range(n), longest - lengths, 0.8, lengths, **pale)
    st.legend_above(padded)
    for row, group in enumerate(groups):
        left = np.cumsum(lengths[group]) - lengths[group]
        for first, face, ink in ((0, st.NAVY, "white"), (1, st.BLUE, st.INK)):
            wide, names = lengths[group][first::2], np.array(group)[first::2] + 1
            drawn = packed.barh([row] * len(wide), wide, 0.8, left[first::2], color=face)
            packed.bar_label(drawn, names, label_type="center", color=ink, fontsize=7.5)
    st.rows_down(padded, range(1, n + 1))
    st.rows_down(packed, range(1, len(groups) + 1), n)
    padded.set(xlabel="tokens", ylabel="text, in batch order", xlim=(0, longest))
    packed.set(xlabel="tokens (a number names the text)", ylabel="group", xlim=(0, widest))
    padded.set_title(f"{n * longest:,.0f} positions computed", pad=22)
    packed.set_title(f"{lengths.sum():,.0f} positions computed", pad=22)
    return st.finish(fig, title, path, source)


def _rate(value: float) -> str:
    """2e-4 rather than 0.0002 or 2.00e-04."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


@st.styled
def learning_rate(rates, warmup_updates, title, path=None, *, original, source=None) -> Figure:
    """The learning rate of each optimizer update, the warm-up shaded.
    rates: (n,) in order of the updates. warmup_updates: how many updates the warm-up takes.
    original: (m,) rates of the original article's schedule, drawn dashed with its last point."""
    lines = [("this run", rates, "o-", st.NAVY), ("original article", original, "s--", st.RUST)]
    fig, [[ax]] = st.figure(8, 3.9)
    shade = {"color": st.PALE, "linewidth": 0, "label": f"warm-up: {warmup_updates} updates"}
    ax.axvspan(0.5, warmup_updates + 0.5, **shade)
    for name, line, mark, color in lines:
        style = {"label": f"{name}, last: {_rate(line[-1])}", "markevery": [-1], "markersize": 8}
        ax.plot(np.arange(1, len(line) + 1), line, mark, color=color, **style)
    ax.set(xlabel="optimizer update", ylabel="learning rate")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.yaxis.set_major_formatter(lambda value, _: _rate(value))
    st.legend_above(ax)
    return st.finish(fig, title, path, source)


@st.styled
def training_curves(history, before, title, path=None, source=None) -> Figure:
    """Loss, accuracy within the batch, and held-out Recall@1 and MRR against the epoch.
    history: "step_losses" (s,) nats per update, "epoch" (e,), "epoch_loss" (e,) nats, "epoch_acc"
    (e,), "eval": [{"epoch", "recall@1", "mrr"}]; a loss may be None. before: {"recall@1", "mrr"}
    before training."""
    steps, losses = (np.array(history[key], float) for key in ("step_losses", "epoch_loss"))
    epochs, records = np.array(history["epoch"]), [{"epoch": 0, **before}, *history["eval"]]
    fig, [[loss_ax, acc_ax, eval_ax]] = st.figure(11, 4, 1, 3)
    x = np.arange(1, len(steps) + 1) * len(epochs) / len(steps)
    loss_ax.plot(x, steps, ".", color=st.BLUE, alpha=0.5, markersize=4, label="one update")
    for ax, means in ((loss_ax, losses), (acc_ax, history["epoch_acc"])):
        ax.plot(epochs - 0.5, means, "o-", color=st.NAVY, label="mean of an epoch")
    at = [record["epoch"] for record in records]
    lines = {"recall@1": ("Recall@1", st.NAVY, "o-"), "mrr": ("MRR", st.RUST, "s--")}
    for key, (name, color, mark) in lines.items():
        scores = [record[key] for record in records]
        eval_ax.plot(at, scores, mark, color=color, label=name)
        eval_ax.plot(0, scores[0], mark[0], color=color, mfc="white")
    eval_ax.plot([], [], "o", color=st.MUTED, mfc="white", label="before training")
    ylabels = ("InfoNCE loss (nats)", "accuracy within the batch", "score on the held-out queries")
    for ax, ylabel in zip((loss_ax, acc_ax, eval_ax), ylabels, strict=True):
        ax.set(xlabel="epoch", xlim=(-0.3, epochs[-1] + 0.3), ylabel=ylabel)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
        st.legend_above(ax)
    loss_ax.set_ylim(0, np.nanmax(steps) * 1.05)
    return st.finish(fig, title, path, source)


@st.styled
def loss_curves(curves, title, path, pairs_per_step, source=None) -> Figure:
    """Smoothed loss of several runs against the pairs seen.
    curves: {label: (s,) losses in nats}. pairs_per_step: {label: number}."""
    fig, [[ax]] = st.figure(8.5, 4.3)
    for (label, losses), look in zip(curves.items(), st.looks(curves), strict=True):
        x = np.arange(1, len(losses) + 1) * pairs_per_step[label]
        ax.plot(x, losses, color=look["color"], alpha=0.25, linewidth=0.7)
        line = {"linestyle": "-", "markevery": max(1, len(x) // 8), "markersize": 6}
        window = np.ones(2 * round(len(x) / 40) + 1)  # a twentieth of the updates
        counts = np.convolve(np.ones(len(x)), window, "same")  # fewer at the ends
        smooth = np.convolve(losses, window, "same") / counts
        ax.plot(x, smooth, label=label, **st.point_style(look) | line)
    ax.set(xlabel="training pairs seen", ylabel="InfoNCE loss of an update (nats)", ylim=(0, None))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.legend(loc="upper right")
    return st.finish(fig, title, path, source)


@st.styled
def time_and_memory(rows, title, path, time_label, source=None) -> Figure:
    """Time and peak memory (GB) of this project and its peers, side by side.
    rows: [{"name": str, "seconds": float, "memory_gb": float, "ours": bool}], from top to bottom."""
    fig, [axes] = st.figure(10, 1.6 + 0.42 * len(rows), 1, 2, sharey=True)
    labels = (("seconds", time_label), ("memory_gb", "peak memory of the process, GB"))
    for ax, (key, label) in zip(axes, labels, strict=True):
        for y, row in enumerate(rows):
            value, look = row[key], st.OTHERS[1 if row["ours"] else 0]
            drawn = ax.barh(y, value, 0.66, **st.bar_style(look))
            ax.bar_label(drawn, [f"{value:,.0f}" if value >= 100 else f"{value:.3g}"], padding=4)
        st.rows_down(ax, [row["name"] for row in rows])
        ax.set(xlabel=label, xlim=(0, max(row[key] for row in rows) * 1.17))
    for tick, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row["ours"] else "normal")
    return st.finish(fig, title, path, source)
