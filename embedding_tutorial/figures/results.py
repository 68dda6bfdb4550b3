"""Results: scores with their intervals, and what training moved in the embedding space."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from . import style as st


@st.styled
def intervals(rows, title, path, xlabel, reference, reference_label, source=None) -> Figure:
    """One dot with its 95 % interval per row; each group of rows has a panel and axis of its own.
    rows: [{"label": str, "value": float, "lo": float, "hi": float, "group": str (optional)}], from
    top to bottom. reference: where a dashed line stands in every panel (0 for differences)."""
    names = list(dict.fromkeys(row.get("group") for row in rows))
    groups = [[row for row in rows if row.get("group") == name] for name in names]
    sizes = {"height_ratios": [len(group) + 0.6 for group in groups]}
    height = 0.7 + 0.95 * len(groups) + 0.38 * len(rows)
    fig, axes = st.figure(8.5, height, len(groups), 1, gridspec_kw=sizes)
    for ax, name, group in zip(axes[:, 0], names, groups, strict=True):
        for y, row in enumerate(group):
            triple = [row[key] for key in ("value", "lo", "hi")]
            look = st.MODELS.get(row["label"], {"color": st.NAVY, "marker": "o"})
            st.error_bar(ax, triple, y, st.BLUE, 2.5, zorder=3, **st.point_style(look))
            sign = "+" if reference == 0 else ""  # a bound just below 0 keeps its sign: it decides
            note = "{}  [{}, {}]".format(*(f"{value:{sign}.3f}".replace("-", "−") for value in triple))
            ax.annotate(note, (1.02, y), xycoords=("axes fraction", "data"), va="center")
        ax.axvline(reference, color=st.RUST, ls="--", lw=1.4, zorder=1, label=reference_label)
        st.rows_down(ax, [row["label"] for row in group])
        ax.set_title(name or "", loc="right")
    st.legend_above(axes[0, 0])
    axes[-1, 0].set_xlabel(f"{xlabel}, 95 % interval")
    return st.finish(fig, title, path, source)


@st.styled
def curve(lines, title, path, xlabel, ylabel, reference, source=None) -> Figure:
    """Scores with 95 % intervals along a doubling axis: how they grow with data or minutes.
    lines: {label: [(x, (value, lo, hi))]}. reference: (label, value) of a dashed line across."""
    fig, [[ax]] = st.figure(8.5, 4.4)
    for i, ((label, points), look) in enumerate(zip(lines.items(), st.looks(lines), strict=True)):
        apart = 1.02 ** (i - (len(lines) - 1) / 2)  # bars of equal x would hide each other
        x, scores = [x * apart for x, _ in points], [score for _, score in points]
        for at, score in zip(x, scores, strict=True):
            st.error_bar(ax, at, score, look["color"], 1.2, zorder=3, **st.point_style(look))
        joined = {"linestyle": "-", "label": label, "zorder": 2}
        ax.plot(x, [value for value, _, _ in scores], **st.point_style(look) | joined)
    ax.axhline(reference[1], color=st.RUST, ls="--", lw=1.4, zorder=1, label=reference[0])
    ticks = sorted({x for points in lines.values() for x, _ in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    ax.set(xlabel=xlabel, ylabel=f"{ylabel}, 95 % interval")
    st.legend_above(ax, 4)
    return st.finish(fig, title, path, source)


@st.styled
def before_after(results, title, path=None, source=None) -> Figure:
    """Scores of base and merged with 95 % intervals, and their paired difference against 0.
    results: {metric: {"base": (value, lo, hi), "merged": (value, lo, hi), "difference": (value, lo,
    hi)}}; the difference is merged − base."""
    fig, [[scores, change]] = st.figure(9.5, 4.2, 1, 2, gridspec_kw={"width_ratios": [3, 2]})
    beside = {"textcoords": "offset points", "va": "center"}
    for i, result in enumerate(results.values()):
        for model, at in (("base", i - 0.17), ("merged", i + 0.17)):
            style = st.point_style(st.MODELS[model]) | {"label": None if i else model}
            st.error_bar(scores, at, result[model], **style)
            value = result[model][0]
            scores.annotate(st.number(value), (at, value), (11, 0), **beside)
        value = result["difference"][0]
        st.error_bar(change, i, result["difference"], marker="D", markersize=7, color=st.INK)
        change.annotate(st.number(value, signed=True), (i, value), (11, 0), **beside)
    change.axhline(0, color=st.RUST, linestyle="--", linewidth=1.4, zorder=1)
    ylabels = ("mean over the queries", "merged − base")
    for ax, ylabel in zip((scores, change), ylabels, strict=True):
        ax.set_xticks(range(len(results)), list(results))
        ax.set(xlim=(-0.5, len(results) - 0.4), ylabel=f"{ylabel}, 95 % interval")
    st.legend_above(scores)
    return st.finish(fig, title, path, source)


@st.styled
def similarity_heatmaps(base, merged, labels, title=None, path=None, source=None) -> Figure:
    """Cosine similarity of each query to each code in two models, on one colour scale.
    base, merged: (n, n); row i is query i, column j code j, the pairs on the diagonal. labels: n
    short strings. title: None says how far the pairs stand out from the others."""
    matrices, n = np.array([base, merged]), len(labels)
    means = [(m.diagonal().mean(), m[~np.eye(n, dtype=bool)].mean()) for m in matrices]
    before, after = (pairs - others for pairs, others in means)
    title = title or f"The diagonal stands out by {before:.2f} before training and by {after:.2f} after it"
    low, high = matrices.min(), matrices.max()
    fig, [axes] = st.figure(10.5, 5.4, 1, 2, sharey=True)
    frame = {"fill": False, "edgecolor": st.INK, "linewidth": 1.8, "zorder": 3}
    frame |= {"path_effects": [withStroke(linewidth=3.6, foreground="white")]}
    for ax, model, matrix, mean in zip(axes, ("base", "merged"), matrices, means, strict=True):
        image = ax.imshow(matrix, cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
        for i in range(n):
            ax.add_patch(Rectangle((i - 0.46, i - 0.46), 0.92, 0.92, **frame))
        for i, j in np.ndindex(n, n):
            ink = st.INK if matrix[i, j] > (low + high) / 2 else "white"
            ax.text(j, i, st.number(matrix[i, j], 2), ha="center", va="center", color=ink)
        ax.set_title(f"{model}: pairs {mean[0]:.2f}, others {mean[1]:.2f}", fontweight="bold")
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.set_xticks(range(n), labels, rotation=40, ha="right", rotation_mode="anchor")
        ax.set(yticks=range(n), yticklabels=labels, xlabel="passage (outlined: the right one)")
    axes[0].set_ylabel("query")
    fig.colorbar(image, ax=list(axes), label="cosine similarity", shrink=0.8, pad=0.02)
    return st.finish(fig, title, path, source)


@st.styled
def projection(points, labels, title, path=None, source=None) -> Figure:
    """About 10 pairs of query and code on two principal components, before and after training.
    points: {"base": (queries (n, 2), codes (n, 2)), "merged": (…)}, both in the coordinates of one
    PCA; row i of queries and codes is a pair. labels: n short strings, listed with numbers."""
    stacks = np.array([points["base"], points["merged"]])
    low, high = stacks.min((0, 1, 2)), stacks.max((0, 1, 2))
    reach = np.array([-0.58, 0.58]) * (high - low).max()  # one square for both panels
    fig, [[*axes, names]] = st.figure(11, 4.9, 1, 3, gridspec_kw={"width_ratios": [1, 1, 0.5]})
    texts, placed = [str(i) for i in range(1, len(labels) + 1)], []
    edge = {"linestyle": "none", "markeredgecolor": st.INK, "markeredgewidth": 0.6}
    for ax, model, (queries, codes) in zip(axes, ("base", "merged"), stacks, strict=True):
        pairs = np.stack([queries, codes])
        ax.plot(*pairs.transpose(2, 0, 1), color=st.MUTED, linewidth=1, zorder=1)
        ax.plot(*queries.T, "o", color="white", markersize=8, label="query", zorder=3, **edge)
        ax.plot(*codes.T, "s", color=st.INK, markersize=6, label="passage", zorder=2, **edge)
        ax.set(xlim=(low + high)[0] / 2 + reach, ylim=(low + high)[1] / 2 + reach, aspect="equal")
        ax.set(xlabel="principal component 1", ylabel="principal component 2")
        ax.set_title(model, fontweight="bold", loc="right")
        ax.grid(True, axis="both")
        ax.locator_params(nbins=6)
        placed.append((ax, np.concatenate([queries, codes]), texts, list(pairs.swapaxes(0, 1))))
    st.legend_above(axes[0])
    names.axis("off")
    listed = [f"{i}  {st.wrap(text, 1.75, 9)}" for i, text in zip(texts, labels, strict=True)]
    names.text(0, 1, "\n".join(listed), va="top", linespacing=1.5, transform=names.transAxes)
    return st.finish(fig, title, path, source, placed)
