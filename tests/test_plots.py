"""Every figure is drawn on data like the tutorial's; its title must say what the data say."""

import inspect
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

from embedding_tutorial import plots

RUN = "run: pocket, MiniLM, seed 42"
CUTS = (1, 3, 5, 10)


def history(epochs=10, per_epoch=5, first=1, rising=False, interval=True):
    rng = np.random.default_rng(0)
    n = epochs * per_epoch
    loss = 0.04 + 0.71 * np.exp(-np.arange(n) / (n / 4))
    noisy = loss + rng.normal(0, 0.12, n) * loss
    mean = noisy.reshape(epochs, per_epoch).mean(1)
    recall = 0.779 + 0.058 * (1 - np.exp(-np.arange(epochs) / 1.0))
    if epochs > 3:
        recall[2] = 0.884
    if rising:
        noisy, mean, recall = noisy[::-1], mean[::-1], 0.779 - 0.01 * np.arange(1, epochs + 1)
    entries = [
        {"epoch": first + i, "recall@1": float(r), "mrr": float(r) + 0.05} for i, r in enumerate(recall)
    ]
    if interval:
        for entry in entries:
            entry["recall@1_interval"] = [entry["recall@1"] - 0.08, entry["recall@1"] + 0.07]
    return {
        "step_losses": list(noisy),
        "step_accs": list(1 - noisy / 4),
        "epoch": list(range(first, first + epochs)),
        "epoch_loss": list(mean),
        "epoch_acc": list(1 - mean / 4),
        "eval": entries,
        "learning_rates": list(np.linspace(0, 2e-4, n)),
    }


BEFORE = {"recall@1": 0.779, "mrr": 0.838}


def cosines(n=16, margin=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(0.35 + rng.normal(0, 0.06, (n, n)) + margin * np.eye(n), -1, 1)


def cloud(n=40, spread=0.3, seed=0):
    rng = np.random.default_rng(seed)
    queries = rng.normal(0, 1, (n, 2))
    return queries, queries + rng.normal(0, spread, (n, 2))


def table(shift=0.0):
    base = {
        "nDCG": (0.871, 0.82, 0.81, 0.814),
        "MAP": (0.25, 0.51, 0.64, 0.731),
        "Recall": (0.26, 0.56, 0.70, 0.805),
        "Precision": (0.871, 0.75, 0.64, 0.406),
        "MRR": (0.871, 0.897, 0.901, 0.903),
    }
    return {m: {k: v + shift for k, v in zip(CUTS, values, strict=True)} for m, values in base.items()}


TABLES = {"BGE-M3": table(), "fine-tuned": table(-0.114)}
FOUR = TABLES | {"interpolated, α = 0.4": table(-0.004), "MiniLM": table(-0.2)}

RESULTS = {
    "Recall@1": {
        "before": (0.779, 0.686, 0.860),
        "after": (0.837, 0.756, 0.907),
        "difference": (0.058, -0.012, 0.128),
        "p": 0.18,
    },
    "MRR": {
        "before": (0.838, 0.768, 0.900),
        "after": (0.889, 0.830, 0.940),
        "difference": (0.051, 0.004, 0.101),
        "p": 0.034,
    },
}
CONFIG = {
    "profile": ("pocket", "no CUDA device was found"),
    "model": ("all-MiniLM-L6-v2", "22.7 M parameters, in a wheel that pip can install"),
    "epochs": (10, "the validation loss is flat after six; ten shows what over-training costs"),
    "batch size": (80, "each query sees 79 in-batch negatives"),
    "learning rate": ("2e-4", "swept over 1e-5 … 5e-4"),
    "temperature": (0.02, "BGE-M3's own"),
}
LONG = {f"setting {i}": value for i, value in enumerate([80, 2e-4, "cosine", True, None, "CLS", 512] * 3)}
LONG["checkpoint folder"] = "models/all-MiniLM-L6-v2-finetuned-with-validation-seed-42/best"
ALPHAS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
CODE = [0.779, 0.80, 0.815, 0.826, 0.833, 0.838, 0.84, 0.841, 0.841, 0.84, 0.837]
GENERAL = [0.814, 0.8145, 0.814, 0.8125, 0.81, 0.806, 0.798, 0.785, 0.765, 0.738, 0.70]
OTHERS = {"learning rate 2e-5": (0.82, 0.80), "LoRA": (0.812, 0.79)}
ROWS = [
    {"name": "this project", "seconds": 41.2, "memory_gb": 1.9, "ours": True},
    {"name": "sentence-transformers 5.1", "seconds": 47.9, "memory_gb": 2.3, "ours": False},
    {"name": "FlagEmbedding 1.3", "seconds": 95.0, "memory_gb": 3.1, "ours": False},
    {"name": "the tutorial before this one", "seconds": 121.5, "memory_gb": None, "ours": False},
]
METHODS = [
    {
        "name": name,
        "batch": batch,
        "memory_gb": memory * (batch / 80 if name == "one batch" else 1) + 2,
        "seconds": s,
    }
    for name, memory, s in (
        ("one batch", 43, 30),
        ("accumulation", 6, 33),
        ("GradCache", 6.5, 45),
        ("queue", 8, 32),
    )
    for batch in (16, 80, 320)
    if (name, batch) != ("one batch", 320)
]
INTERVALS = [
    {"label": "base", "value": 0.0, "lo": -0.004, "hi": 0.004},
    {"label": "batch 80", "value": 0.058, "lo": -0.012, "hi": 0.128},
    {"label": "GradCache, 341 pairs in one step", "value": 0.071, "lo": 0.01, "hi": 0.13},
    {"label": "interpolated", "value": -0.05, "lo": -0.09, "hi": -0.01},
]
RNG = np.random.default_rng(3)
TOKENS = (RNG.integers(9, 60, 427), RNG.lognormal(4.1, 0.6, 427).astype(int) + 5)
RATES = [2e-4 * min((i + 1) / 3, 0.5 * (1 + np.cos(np.pi * max(0, i - 2) / 22))) for i in range(25)]
CURVES = {
    f"batch {b}": list(np.log(b) * (0.05 + 0.4 * np.exp(-np.arange(3410 // b) * b / 700)))
    for b in (8, 16, 80)
}
PAIRS = {"batch 8": 8, "batch 16": 16, "batch 80": 80}

# name: (draw, words that the title must hold)
CASES = {
    "temperature_lines": (
        lambda p: plots.temperature_lines([0.9, 0.8, 0.5, 0.2], [1, 0.1], p, RUN),
        ["0.326 at τ = 1, 0.721 at τ = 0.1"],
    ),
    "temperature_lines_many": (
        lambda p: plots.temperature_lines([0.9, 0.8, 0.5, 0.2], [1, 0.5, 0.2, 0.1, 0.05, 0.02], p),
        ["0.993 at τ = 0.02"],
    ),
    "temperature_bars": (
        lambda p: plots.temperature_bars([0.9, 0.8, 0.5, 0.2], [1, 0.1], p),
        ["0.326", "0.721"],
    ),
    "temperature_bars_many": (
        lambda p: plots.temperature_bars([0.9, 0.8, 0.5, 0.2], [1, 0.5, 0.2, 0.1, 0.02], p, RUN),
        ["0.993"],
    ),
    "building_blocks": (lambda p: plots.building_blocks(p, RUN), ["−log p"]),
    "lengths": (
        lambda p: plots.lengths(*TOKENS, 128, p, RUN),
        [
            "0 of 427 queries (0.0 %)",
            f"{(TOKENS[1] > 128).sum()} of 427 passages ({100 * (TOKENS[1] > 128).mean():.1f} %)",
            "128 tokens",
        ],
    ),
    "lengths_uncut": (lambda p: plots.lengths(*TOKENS, 8192, p), ["nothing is truncated", "8192"]),
    "learning_rate": (
        lambda p: plots.learning_rate(RATES, 3, p, RUN),
        ["2e-4", "update 3", f"ends at {plots._rate(RATES[-1])}", "25 updates"],
    ),
    "learning_rate_one": (lambda p: plots.learning_rate([0.0], 0, p), ["ends at 0", "1 update"]),
    "run_configuration": (lambda p: plots.run_configuration(CONFIG, p, RUN), ["(6)"]),
    "run_configuration_long": (lambda p: plots.run_configuration(LONG, p, RUN), ["(22)"]),
    "training_curves": (
        lambda p: plots.training_curves(history(), BEFORE, p, RUN),
        ["Loss fell", "in 10 epochs", "Recall@1 rose from 0.779 to 0.837", "best: 0.884, epoch 3"],
    ),
    "training_curves_rising": (
        lambda p: plots.training_curves(history(rising=True), BEFORE, p, RUN),
        ["Loss rose", "Recall@1 fell from 0.779 to 0.679", "best: 0.769, epoch 1"],
    ),
    "training_curves_one_epoch": (
        lambda p: plots.training_curves(history(1, 1, interval=False), BEFORE, p, RUN),
        ["mean loss of epoch 1 is 0.7", "Recall@1 stayed at 0.779"],
    ),
    "training_curves_resumed": (
        lambda p: plots.training_curves(history(4, 80, first=7), {}, p, RUN),
        ["between epochs 7 and 10", "Recall@1 is"],
    ),
    "training_curves_no_eval": (
        lambda p: plots.training_curves(history() | {"eval": []}, None, p),
        ["Loss fell"],
    ),
    "loss_curves": (
        lambda p: plots.loss_curves(CURVES, p, PAIRS, RUN),
        ["last tenth", "(batch 8)", "(batch 80)"],
    ),
    "before_after": (
        lambda p: plots.before_after(RESULTS, p, n_queries=86, source=RUN),
        ["86 queries", "Recall@1 +0.058 (95 % interval includes 0)", "MRR +0.051 (95 % interval excludes 0)"],
    ),
    "similarity_heatmaps": (
        lambda p: plots.similarity_heatmaps(cosines(), cosines(margin=0.5), p, source=RUN),
        ["rose from 0.304 to 0.504"],
    ),
    "similarity_heatmaps_labels": (
        lambda p: plots.similarity_heatmaps(
            cosines(), cosines(margin=0.1), p, [f"task {i}" for i in range(16)]
        ),
        ["fell from"],
    ),
    "projection": (
        lambda p: plots.projection(*cloud(spread=0.8), *cloud(spread=0.2), p, source=RUN),
        ["fell from", "PCA"],
    ),
    "retrieval_bars": (
        lambda p: plots.retrieval_bars(TABLES, p, "T2Retrieval, 22,812 queries", RUN),
        ["nDCG@10 fell from 0.814 (BGE-M3) to 0.700 (fine-tuned)", "T2Retrieval, 22,812 queries: nDCG"],
    ),
    "retrieval_bars_four": (lambda p: plots.retrieval_bars(FOUR, p, source=RUN), ["fell from 0.814"]),
    "retrieval_difference": (
        lambda p: plots.retrieval_difference(TABLES, p, RUN),
        ["nDCG@10 against BGE-M3", "−0.114 (fine-tuned)", "20 of 20 scores lower"],
    ),
    "retrieval_difference_four": (lambda p: plots.retrieval_difference(FOUR, p, RUN), ["−0.200 (MiniLM)"]),
    "interpolation_tradeoff": (
        lambda p: plots.interpolation_tradeoff(
            ALPHAS, CODE, GENERAL, 0.4, p, other_points=OTHERS, source=RUN
        ),
        ["α = 0.4 keeps 93 % of the gain", "loses 0.004 on general"],
    ),
    "time_and_memory": (
        lambda p: plots.time_and_memory(ROWS, p, source=RUN),
        ["0.34 × the time of the slowest peer", "0.86 × that of the fastest (sentence-transformers 5.1)"],
    ),
    "memory_by_method": (
        lambda p: plots.memory_by_method(METHODS, p, RUN),
        [
            "At 80 pairs per batch, accumulation needs the least memory: 8 GB, 33 s",
            "one batch the most: 45 GB, 30 s",
        ],
    ),
    "intervals": (
        lambda p: plots.grouped_bars_with_intervals(INTERVALS, p, "change of Recall@1", None, 0, "base", RUN),
        ["Highest: GradCache", "0.071", "1 above 0.000 and 1 below"],
    ),
}


def title_of(fig):
    return " ".join(fig.get_suptitle().split())


def drawn_texts(fig, monkeypatch):
    """The texts that a draw really puts on the figure, with their boxes in pixels."""
    seen, draw = [], Text.draw

    def spy(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip():
            seen.append(self)
        return draw(self, renderer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", spy)
        fig.canvas.draw()
    return [(text.get_text(), Text.get_window_extent(text)) for text in dict.fromkeys(seen)]


@pytest.mark.parametrize("name", CASES)
def test_figure(name, tmp_path, monkeypatch):
    draw, words = CASES[name]
    path = tmp_path / "made" / f"{name}.png"
    settings = dict(mpl.rcParams)
    fig = draw(path)

    assert isinstance(fig, Figure)
    assert not plt.get_fignums(), "pyplot still holds the figure: a notebook would show it twice"
    assert dict(mpl.rcParams) == settings
    assert os.listdir(path.parent) == [path.name], "a temporary file was left"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5_000
    assert b"Software" not in content
    pixels = plt.imread(path)
    assert pixels[..., :3].std() > 0.02
    assert pixels.shape[1] <= 11.3 * 150

    for word in words:
        assert word in title_of(fig), title_of(fig)

    texts = drawn_texts(fig, monkeypatch)
    page = fig.bbox.padded(1)
    for text, box in texts:
        inside = page.contains(*box.min) and page.contains(*box.max)
        assert inside, f"{text!r} leaves the figure"
    for (a, box_a), (b, box_b) in combinations(texts, 2):
        assert not box_a.padded(-1).overlaps(box_b.padded(-1)), f"{a!r} lies over {b!r}"


def test_every_figure_is_tested():
    public = {
        name
        for name, function in inspect.getmembers(plots, inspect.isfunction)
        if function.__module__ == plots.__name__ and not name.startswith("_")
    }
    public -= {"save", "grouped_bars_with_intervals", "interval_rows"}  # tested as "intervals"
    assert public <= set(CASES)


def test_same_data_same_bytes(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    for path in (first, second):
        plots.training_curves(history(), BEFORE, str(path), RUN)
    assert first.read_bytes() == second.read_bytes()


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    fig = plots.building_blocks(path)
    old = path.read_bytes()

    def half(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plots.save(fig, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["figure.png"]


def test_only_png(tmp_path):
    with pytest.raises(ValueError, match=r"figure\.jpg"):
        plots.building_blocks(tmp_path / "figure.jpg")


def test_import_changes_no_setting():
    code = (
        "import matplotlib as mpl; old = dict(mpl.rcParams)\n"
        "import embedding_tutorial.plots\n"
        "new = dict(mpl.rcParams); old.pop('backend'), new.pop('backend'); assert old == new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(plots.__file__).parents[1])


# ---- titles turn when the data turn -------------------------------------------------------------------


def test_unchanged_reads_unchanged():
    same = history()
    same["epoch_loss"] = [0.5] * 10
    for entry in same["eval"]:
        entry["recall@1"], entry["recall@1_interval"] = 0.779, None
    assert title_of(plots.training_curves(same, BEFORE)) == (
        "Loss stayed at 0.50 in 10 epochs; Recall@1 stayed at 0.779 after epoch 10"
    )
    assert "is 0.814 for both" in title_of(plots.retrieval_bars({"a": table(), "b": table()}))
    matrix = cosines()
    assert "stayed at" in title_of(plots.similarity_heatmaps(matrix, matrix))


def test_resumed_run_counts_the_later_record():
    run = history(3)
    for key, value in (("epoch", 3), ("epoch_loss", 0.123), ("epoch_acc", 0.9)):
        run[key].append(value)
    assert "to 0.12 in 3 epochs" in title_of(plots.training_curves(run, BEFORE))


def test_before_after_verdicts():
    both = {
        name: result | {"difference": (result["difference"][0], 0.01, 0.1)}
        for name, result in RESULTS.items()
    }
    assert title_of(plots.before_after(both, n_queries=86)) == (
        "On 86 queries: Recall@1 +0.058, MRR +0.051; both 95 % intervals exclude 0"
    )
    worse = {"MRR": {"before": (0.9, 0.8, 1), "after": (0.8, 0.7, 0.9), "difference": (-0.1, -0.2, 0.01)}}
    assert title_of(plots.before_after(worse, n_queries=1)) == (
        "On 1 query: MRR −0.100; the 95 % interval includes 0"
    )


def test_retrieval_directions():
    assert "rose from 0.814 (BGE-M3) to 0.914 (tuned)" in title_of(
        plots.retrieval_bars({"BGE-M3": table(), "tuned": table(0.1)})
    )
    assert "+0.050 (tuned); 0 of 20 scores lower" in title_of(
        plots.retrieval_difference({"base": table(), "tuned": table(0.05)})
    )


def test_retrieval_takes_json_keys():
    text_keys = {m: {str(k): v for k, v in cuts.items()} for m, cuts in table().items()}
    title = title_of(plots.retrieval_bars({"a": text_keys, "b": text_keys}))
    assert title.startswith("nDCG@10")


def test_interpolation_directions():
    def title(code, general, chosen=0.5):
        return title_of(plots.interpolation_tradeoff([0, 0.5, 1], code, general, chosen))

    assert title([0.5, 0.6, 0.7], [0.8, 0.81, 0.7]) == (
        "α = 0.5 keeps 50 % of the gain on code (+0.200) and gains 0.010 on general retrieval"
    )
    assert title([0.5, 0.45, 0.4], [0.8, 0.8, 0.7]) == (
        "α = 0.5 moves code retrieval by −0.050 (fine-tuned: −0.100)"
        " and keeps general retrieval within 0.0005"
    )


def test_time_direction():
    rows = [
        {"name": "ours", "seconds": 200, "memory_gb": 2, "ours": True},
        {"name": "peer", "seconds": 100, "memory_gb": 1, "ours": False},
    ]
    assert title_of(plots.time_and_memory(rows)) == "Ours takes 2.00 × the time of peer"


def test_projection_ratio():
    queries = np.array([[0.0, 0.0], [10.0, 0.0]])
    five, one = np.array([0, 5]), np.array([0, 1])
    title = title_of(plots.projection(queries, queries + five, queries, queries + one))
    assert f"fell from {5 / np.hypot(10, 5):.2f} to {1 / np.hypot(10, 1):.2f}" in title


# ---- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.temperature_lines([], [1]), "scores"),
        (lambda: plots.temperature_bars([1, 2], []), "taus"),
        (lambda: plots.temperature_lines([1, 2], [0]), "above 0"),
        (lambda: plots.lengths([], [1], 5), "query_lengths"),
        (lambda: plots.lengths([1], [1], 0), "max_length"),
        (lambda: plots.learning_rate([], 0), "rates"),
        (lambda: plots.learning_rate([1e-4, float("nan")], 0), "value 1 is not a finite"),
        (lambda: plots.learning_rate([-1.0], 0), "below 0"),
        (lambda: plots.learning_rate([1.0], -1), "warmup_steps"),
        (lambda: plots.run_configuration({}), "config"),
        (lambda: plots.training_curves(history() | {"step_losses": []}, BEFORE), "step_losses"),
        (lambda: plots.training_curves(history() | {"epoch": [1]}, BEFORE), "lengths differ"),
        (lambda: plots.loss_curves({}), "curves"),
        (lambda: plots.loss_curves({"a": [1]}, None, {"b": 1}), "nothing for"),
        (lambda: plots.before_after({}, n_queries=1), "results"),
        (lambda: plots.before_after(RESULTS, n_queries=0), "n_queries"),
        (
            lambda: plots.before_after({"MRR": RESULTS["MRR"] | {"after": (0.8, 0.7, 0.9)}}, n_queries=9),
            "not after",
        ),
        (
            lambda: plots.before_after({"MRR": RESULTS["MRR"] | {"after": (0.889, 1, 0)}}, n_queries=9),
            "upside down",
        ),
        (lambda: plots.similarity_heatmaps(np.ones((2, 3)), np.eye(2)), "square"),
        (lambda: plots.similarity_heatmaps(np.eye(2), np.eye(3)), "3 x 3"),
        (lambda: plots.similarity_heatmaps(np.eye(2), np.eye(2), labels=["a"]), "lengths differ"),
        (lambda: plots.similarity_heatmaps(np.eye(2), np.full((2, 2), np.nan)), "not finite"),
        (lambda: plots.projection([], [], [], []), "before_q"),
        (lambda: plots.projection(*cloud(3), cloud(4)[0], cloud(5)[1]), "lengths differ"),
        (lambda: plots.projection(*[np.zeros((3, 2))] * 4), "one point"),
        (lambda: plots.retrieval_bars({"a": table()}), "2 to 4"),
        (lambda: plots.retrieval_difference({"a": table(), "b": {"nDCG": {10: 1}}}), "other cut-offs"),
        (lambda: plots.retrieval_bars({"a": {}, "b": {}}), "nothing to plot"),
        (lambda: plots.interpolation_tradeoff([0, 1], [1, 2], [1], 0), "general"),
        (lambda: plots.interpolation_tradeoff([0, 0.5], [1, 2], [1, 2], 0), "from 0"),
        (lambda: plots.interpolation_tradeoff([0, 1], [1, 2], [1, 2], 0.3), "chosen"),
        (lambda: plots.time_and_memory([]), "rows"),
        (lambda: plots.time_and_memory(ROWS[1:]), "ours"),
        (lambda: plots.time_and_memory([ROWS[0] | {"seconds": -1}]), "above 0"),
        (lambda: plots.memory_by_method([]), "rows"),
        (lambda: plots.memory_by_method(METHODS[:1] * 2), "twice"),
        (lambda: plots.grouped_bars_with_intervals([]), "rows"),
        (lambda: plots.interval_rows([{"label": "a", "value": 1, "lo": 2, "hi": 0}]), "upside down"),
    ],
)
def test_bad_input(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
