"""Every figure is drawn on data like the tutorial's, and what it shows is compared with them."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from embedding_tutorial import figures
from embedding_tutorial.figures import style

TITLE = "Recall@1 rose from 0.651 to 0.709 on 86 held-out queries, which no training pair repeats"
NAN = float("nan")
RNG = np.random.default_rng(0)
QUERIES = ["Count vowels per word", "Rotate a matrix", "Is the version newer?", "Saddle points"]
CODES = ["vowels(text)", "rotate(m)", "newer(a, b)", "scan(table)"]
SCORES, TAUS = [0.9, 0.8, 0.5, 0.2], [1, 0.1]
LENGTHS, GROUPS = [30, 90, 55, 20, 62, 41], [[1, 4], [2, 5, 0, 3]]
RATES, ORIGINAL = [1e-4, 2e-4, 1.5e-4, 5e-5, 0.0], [1e-4, 2e-4, 1.9e-4, 1.7e-4, 1.6e-4]
HISTORY = {
    "step_losses": [None, 0.7, 0.5, 0.4, 0.3, 0.2], "epoch": [1, 2, 3],
    "epoch_loss": [None, 0.45, 0.25], "epoch_acc": [0.8, 0.9, 0.95],
    "eval": [
        {"epoch": i + 1, "recall@1": v, "mrr": v + 0.07} for i, v in enumerate((0.68, 0.70, 0.71))],
}  # fmt: skip
BEFORE = {"recall@1": 0.65, "mrr": 0.72}
PAIRS = {"batch 4": 4, "batch 8": 8, "batch 40": 40}
CURVES = {name: list(np.log(n) * np.exp(-np.arange(1, 400 // n) / 9)) for name, n in PAIRS.items()}
COSTS = [
    {"name": "this project", "seconds": 41.2, "memory_gb": 1.9, "ours": True},
    {"name": "sentence-transformers 5.1", "seconds": 121.5, "memory_gb": 13.8, "ours": False},
]
ROWS = [
    {"label": label, "value": value, "lo": value - 0.02, "hi": value + 0.03, "group": group}
    for label, value, group in (
        ("merged", 0.84, "strong"), ("base", 0.81, "strong"), ("BM25", 0.41, "weak"))
]  # fmt: skip
RESULT = {"base": (0.779, 0.686, 0.86), "merged": (0.837, 0.756, 0.907)}
RESULT |= {"difference": (0.058, -0.012, 0.128)}
RESULTS = {"Recall@1": RESULT}
COSINES = RNG.normal(0.3, 0.1, (4, 4))
POINTS = {"base": RNG.normal(size=(2, 10, 2)), "merged": RNG.normal(size=(2, 10, 2))}
TABLES = {
    name: {"nDCG": {"1": 0.87 + shift, "10": 0.81 + shift}, "MRR": {"1": 0.87 + shift, "10": 0.9}}
    for name, shift in (("base", 0), ("fine-tuned", -0.1), ("merged", 0.02))
}
MIX = [
    {"alpha": a, "code": (0.65 + 0.06 * a, 0.63 + 0.06 * a, 0.68 + 0.06 * a),
     "general": (0.81 - 0.05 * a**3, 0.80 - 0.05 * a**3, 0.815 - 0.05 * a**3)}
    for a in (1, 0, 0.25, 0.5, 0.75)
]  # fmt: skip
OTHERS = {"averaged": ((0.70, 0.68, 0.72), (0.79, 0.78, 0.80))}

GROWTH = {"merged": [(20, (0.6, 0.5, 0.7)), (40, (0.7, 0.65, 0.74))], "fine-tuned": [(20, (0.5, 0.4, 0.6))]}
CALLS = {
    "in_batch_diagram": (QUERIES, CODES), "building_blocks": (), "padding": (LENGTHS, GROUPS),
    "temperature_bars": (SCORES, TAUS), "learning_rate": (RATES, 2), "loss_curves": (CURVES,),
    "training_curves": (HISTORY, BEFORE), "time_and_memory": (COSTS,), "intervals": (ROWS,),
    "before_after": (RESULTS,), "projection": (POINTS, [f"task {i}" for i in range(10)]),
    "similarity_heatmaps": (COSINES, COSINES + np.eye(4) / 3, QUERIES),
    "worked_ndcg": ([0, 2, 1], [2, 1]), "metric_bars": (TABLES,), "metric_differences": (TABLES,),
    "mixture": (MIX, 0.5), "curve": (GROWTH,),
}  # fmt: skip
OPTIONS = {"learning_rate": {"original": ORIGINAL}, "loss_curves": {"pairs_per_step": PAIRS}}
LINE = {"xlabel": "MRR", "reference": 0.81, "reference_label": "base: 0.810"}
OPTIONS |= {"intervals": LINE, "time_and_memory": {"time_label": "seconds per epoch"}}
OPTIONS |= {"curve": {"xlabel": "pairs", "ylabel": "MRR", "reference": ("base", 0.55)}}
OPTIONS |= {"mixture": {"xlabel": "code", "ylabel": "general", "others": OTHERS}}


def draw(name, path=None, **options):
    options |= OPTIONS.get(name, {})
    return getattr(figures, name)(*CALLS[name], TITLE, path, **options)


def bars(ax):
    """What the bars of one panel measure, in the order of drawing."""
    return [bar.get_height() for bar in ax.patches if bar.get_height()]


def whiskers(ax, axis):
    """(lo, hi) of every error bar along one axis (0: x, 1: y)."""
    found = []
    for drawn in ax.containers:
        if isinstance(drawn, mpl.container.ErrorbarContainer):
            segments = [line.get_segments()[0] for line in drawn.lines[2]]
            found += [(a[axis], b[axis]) for a, b in segments if a[1 - axis] == b[1 - axis]]
    return found


def same(drawn, expected):
    np.testing.assert_allclose(np.asarray(drawn, float), np.asarray(expected, float), atol=1e-9)


def overlaps(fig, monkeypatch):
    """Texts that leave the figure or lie over one another, as a draw really puts them down."""
    seen, original = [], Text.draw

    def spy(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip():
            seen.append(self)
        return original(self, renderer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", spy)
        fig.canvas.draw()
    page = fig.bbox.padded(1)
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in dict.fromkeys(seen)]
    found = [
        text for text, box in boxes if not (page.contains(*box.min) and page.contains(*box.max))
    ]
    pairs = combinations([(text, box.padded(-1)) for text, box in boxes], 2)
    return found + [(a, b) for (a, one), (b, two) in pairs if one.overlaps(two)]


def test_every_figure_is_drawn_here():
    drawing = {name for name, thing in vars(figures).items() if hasattr(thing, "__wrapped__")}
    assert drawing == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_figure(name, tmp_path, monkeypatch):
    paths, settings = [tmp_path / "made" / f"{letter}.png" for letter in "ab"], dict(mpl.rcParams)
    fig = draw(name, path=paths[0], source="run: pocket, seed 42")
    draw(name, path=str(paths[1]), source="run: pocket, seed 42")
    assert isinstance(fig, Figure)
    assert not plt.get_fignums(), "pyplot still holds the figure: a notebook would show it twice"
    assert dict(mpl.rcParams) == settings
    assert sorted(os.listdir(paths[0].parent)) == ["a.png", "b.png"]
    content = paths[0].read_bytes()
    assert content.startswith(b"\x89PNG") and b"Software" not in content
    assert content == paths[1].read_bytes()
    assert plt.imread(paths[0]).shape[1] <= 11.3 * 150
    assert " ".join(fig.get_suptitle().split()) == TITLE
    assert fig.get_supxlabel() == "run: pocket, seed 42"
    assert overlaps(fig, monkeypatch) == []


def test_idea():
    [ax] = draw("in_batch_diagram").axes
    words = [text.get_text().replace("\n", " ") for text in ax.texts]
    assert [i for i, word in enumerate(words) if word == "positive"] == [0, 5, 10, 15]
    assert words.count("in-batch negative") == 12
    assert words[-1] == "this query: 1 positive, 3 negatives"
    marks = [(0, 1), (0, 0.5), (0.1, -np.log(0.1))]
    for ax, mark in zip(draw("building_blocks").axes, marks, strict=True):
        same(ax.lines[1].get_xydata(), [mark])
        assert abs(np.interp(mark[0], *ax.lines[0].get_data()) - mark[1]) < 2e-2
    [ax] = draw("temperature_bars").axes
    powers = [np.exp(np.array(SCORES) / tau) for tau in TAUS]
    same(bars(ax), np.concatenate([power / power.sum() for power in powers]))


def test_padding():
    padded, packed = draw("padding").axes
    widths = [bar.get_width() for bar in padded.patches]
    same(widths[:6], LENGTHS)
    same(np.add(widths[:6], widths[6:]), [90] * 6)
    spans = [(bar.get_x(), bar.get_width()) for bar in packed.patches]
    same(sorted(spans), sorted([(0, 90), (90, 62), (0, 55), (55, 41), (96, 30), (126, 20)]))
    titles = [ax.get_title(loc="left") for ax in (padded, packed)]
    assert titles == ["540 positions computed", "298 positions computed"]


def test_training():
    [ax] = draw("learning_rate").axes
    for line, rates in zip(ax.lines, (RATES, ORIGINAL), strict=True):
        same(line.get_data(), [range(1, 6), rates])
    assert ax.lines[1].get_label() == "original article, last: 1.6e-4"
    loss, accuracy, scores = draw("training_curves").axes
    same(loss.lines[0].get_xdata(), [0.5, 1, 1.5, 2, 2.5, 3])
    same(loss.lines[0].get_ydata(), [NAN, *HISTORY["step_losses"][1:]])
    same(loss.lines[1].get_data(), [[0.5, 1.5, 2.5], [NAN, 0.45, 0.25]])
    same(accuracy.lines[0].get_ydata(), HISTORY["epoch_acc"])
    recall, mrr = (line for line in scores.lines if len(line.get_xdata()) == 4)
    same(recall.get_data(), [range(4), [0.65, 0.68, 0.70, 0.71]])
    same(mrr.get_ydata(), [0.72, 0.75, 0.77, 0.78])
    first = next(line for line in scores.lines if list(line.get_xdata()) == [0])
    assert first.get_markerfacecolor() == "white"


def test_loss_and_cost():
    [ax] = draw("loss_curves").axes
    raw = [line for line in ax.lines if line.get_alpha() == 0.25]
    for line, (label, losses) in zip(raw, CURVES.items(), strict=True):
        same(line.get_ydata(), losses)
        same(line.get_xdata(), np.arange(1, len(losses) + 1) * PAIRS[label])
    time, memory = draw("time_and_memory").axes
    same([bar.get_width() for bar in time.patches], [41.2, 121.5])
    same([bar.get_width() for bar in memory.patches], [1.9, 13.8])
    assert [text.get_text() for text in memory.texts] == ["1.9", "13.8"]


def test_results():
    strong, weak = draw("intervals").axes
    same(whiskers(strong, 0) + whiskers(weak, 0), [(row["lo"], row["hi"]) for row in ROWS])
    assert strong.containers[0].lines[0].get_color() == figures.MODELS["merged"]["color"]
    assert weak.lines[-1].get_xdata()[0] == 0.81
    assert weak.texts[0].get_text() == "0.410  [0.390, 0.440]"
    scores, change = draw("before_after").axes
    same(whiskers(scores, 1), [RESULTS["Recall@1"][model][1:] for model in ("base", "merged")])
    same(whiskers(change, 1), [(-0.012, 0.128)])
    base, merged, _ = draw("similarity_heatmaps").axes
    same(base.images[0].get_array(), COSINES)
    assert base.images[0].get_clim() == merged.images[0].get_clim()
    assert merged.texts[0].get_text() == f"{COSINES[0, 0] + 1 / 3:.2f}"
    base, merged, _ = draw("projection").axes
    assert (base.get_xlim(), base.get_ylim()) == (merged.get_xlim(), merged.get_ylim())
    same([line.get_xydata() for line in base.lines[:10]], np.swapaxes(POINTS["base"], 0, 1))


def test_a_curve_has_every_interval_and_names_its_reference():
    [ax] = draw("curve").axes
    same(whiskers(ax, 1), [score[1:] for points in GROWTH.values() for _, score in points])
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.get_xticklabels()] == ["20", "40"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [*GROWTH, "base"]


def test_retrieval():
    found, ideal = draw("worked_ndcg").axes
    same(bars(found), [2, 1, 2 / np.log2(3), 0.5])
    same(bars(ideal), [2, 1, 2, 1 / np.log2(3)])
    assert ideal.get_title(loc="left") == f"ideal order: IDCG = {2 + 1 / np.log2(3):.3f}"
    ndcg = draw("metric_bars").axes[0]
    same(bars(ndcg), [0.87, 0.81, 0.77, 0.71, 0.89, 0.83])
    same(bars(draw("metric_differences").axes[0]), [-0.1, -0.1, 0.02, 0.02])
    colour = mpl.colors.to_rgba(figures.MODELS["fine-tuned"]["color"])
    assert ndcg.patches[2].get_facecolor() == colour
    [ax] = draw("mixture").axes
    ordered = sorted(MIX, key=lambda row: row["alpha"])
    same(whiskers(ax, 0), [row["code"][1:] for row in ordered] + [(0.68, 0.72)])
    same(whiskers(ax, 1), [row["general"][1:] for row in ordered] + [(0.78, 0.80)])
    texts = "α = 0 (base)|α = 0.25|α = 0.5 (merged)|α = 0.75|α = 1 (fine-tuned)|averaged"
    assert "|".join(text.get_text() for text in ax.texts) == texts


def test_number():
    assert style.number(-0.25, 2) == "−0.25" and style.number(0.058, signed=True) == "+0.058"
    assert style.number(-0.0001, signed=True) == "0.000"


@pytest.mark.filterwarnings("error:Glyph")
def test_titles_wrap_in_english_and_chinese():
    assert style.wrap("one two three", 0.5, 10).splitlines() == ["one", "two", "three"]
    chinese = "微调之后代码检索的召回率上升，通用检索不变。"
    lines = style.wrap(chinese, 1.0, 10).splitlines()
    assert len(lines) > 1 and "".join(lines) == chinese
    assert not any(line[0] in "，。" for line in lines)


def test_import_changes_no_setting_and_names_only_installed_fonts():
    code = (
        "import matplotlib as mpl; old = dict(mpl.rcParams)\n"
        "import embedding_tutorial.figures.style as style\n"
        "new = dict(mpl.rcParams); old.pop('backend'), new.pop('backend'); assert old == new\n"
        "[mpl.font_manager.findfont(name, fallback_to_default=False) for name in style.FONTS]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.filterwarnings("error:Glyph")
def test_chinese_is_drawn_on_every_machine(tmp_path):
    labels = ["台风来之前为什么特别热", "厕所堵了怎么办", "骑车膝盖疼怎么调整"]
    figures.similarity_heatmaps(np.eye(3), np.eye(3), labels, path=tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    draw("building_blocks", path=path)
    old = path.read_bytes()

    def half(self, target, **options):
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        draw("building_blocks", path=path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["figure.png"]
