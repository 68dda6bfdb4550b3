"""The recipes without torchrun: data, output folders, commands, checks, comparison."""

import argparse
import json
import math
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from embedding_tutorial import profiles
from embedding_tutorial.assets import pocket_model_path
from embedding_tutorial.batches import drawn_batches
from embedding_tutorial.encoder import Encoder, embed
from embedding_tutorial.files import ROOT, TutorialError, read_json, write_json
from embedding_tutorial.finetune import evaluate as notebook_evaluate
from embedding_tutorial.finetune import split_pairs
from embedding_tutorial.pairs import read_mbpp, write_pairs
from recipes import checked_run, compare, data, dense, engine, models, raw_bert, run_all, steps, unified


def make_pairs(n=16):
    return [
        {"query": f"add {i} to a number", "pos_doc": f"def add_{i}(x):\n    return x + {i}"} for i in range(n)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return models.small_bert(tmp_path_factory.mktemp("models") / "tiny", layers=1, hidden=32)


# ---------------------------------------------------------------- data


def test_random_negatives_are_never_right():
    pairs = [*make_pairs(6), {"query": "add 0 to a number", "pos_doc": "lambda x: x"}]
    rows = list(data.random_negatives(pairs, 5))
    for row in rows:
        assert len(set(row["neg"])) == 5
        assert not set(row["neg"]) & data.positives_of(pairs)[row["query"]]
    assert list(data.random_negatives(pairs, 5)) == rows
    assert list(data.random_negatives(pairs, 5, seed=1)) != rows
    with pytest.raises(TutorialError, match="Row 1 can have 5 negatives, not 6"):
        list(data.random_negatives(pairs, 6))


def test_a_rows_own_negatives_stay_in_front(tmp_path, monkeypatch, capsys):
    """FlagEmbedding's rows keep their negatives; what fills up is random or mined, and counted."""
    pairs = make_pairs(8)
    codes = [pair["pos_doc"] for pair in pairs]
    lines = [{"query": p["query"], "pos": [p["pos_doc"]], "neg": []} for p in pairs]
    lines[0]["neg"] = ["mine", codes[3], "mine", codes[0]]  # one twice, and one that is right
    lines[1]["neg"] = [f"other {i}" for i in range(5)]  # more than --count
    lines.append({"query": pairs[2]["query"], "pos": ["lambda x: x"], "neg": ["later", codes[4]]})
    write_pairs(tmp_path / "rows.jsonl", lines)
    on_a_line(monkeypatch, {text: 9 * i for i, text in enumerate([*codes, "lambda x: x", "c"])}
              | {p["query"]: 9 * i - 1 for i, p in enumerate(pairs)})  # fmt: skip
    monkeypatch.setattr(models, "load", lambda *args: None)
    for kind in ("random", "hard"):
        made = data.make(kind, tmp_path / kind, count=4, data=tmp_path / "rows.jsonl")
        rows = [json.loads(line) for line in made.open()]
        assert rows[0]["neg"][:2] == ["mine", codes[3]] and codes[0] not in rows[0]["neg"]
        assert rows[1]["neg"] == lines[1]["neg"] and rows[2]["neg"][:2] == ["later", codes[4]]
        assert all(len({*row["neg"]}) == 4 for n, row in enumerate(rows) if n != 1)
        assert "1 negatives are right answers of the same query: left out" in capsys.readouterr().out
    # Of row 2 one answer stands far away, and hardly anything scores below it: two random ones.
    assert read_json(tmp_path / "hard" / "done.json")["random_fill_ins"] == 2
    full = [pair | {"neg": ["a", "b"]} for pair in pairs[:2]]  # nothing is left to draw, and nothing missing
    assert [row["neg"] for row in data.random_negatives(full, 2)] == [["a", "b"]] * 2
    with pytest.raises(TutorialError, match="Row 1 can have 3 negatives, not 4"):
        list(data.random_negatives(full, 4))


def test_random_negatives_are_drawn_evenly():
    """Each wrong passage about as often as any other, those beside the right one included."""
    pairs = [*make_pairs(8), {"query": "add 3 to a number", "pos_doc": "lambda x: x + 3"}]
    counts = {}
    for seed in range(2000):
        rows = data.random_negatives(pairs, 2, seed)
        row = next(row for row in rows if row["query"] == "add 3 to a number")
        for text in row["neg"]:
            counts[text] = counts.get(text, 0) + 1
    assert len(counts) == 7 and max(abs(n - 4000 / 7) for n in counts.values()) < 100


def hard_negatives(pairs, encoder, *settings, **more):
    """(all rows that are mined, number of random fill-ins)."""
    found = list(data.mined(pairs, encoder, *settings, **more))
    return [row for row, _ in found], sum(filled for _, filled in found)


def on_a_line(monkeypatch, place):
    """Give texts two-dimensional unit vectors at the angles `place[text]`, in degrees."""
    angle = {text: math.radians(value) for text, value in place.items()}
    monkeypatch.setattr(
        data,
        "vectors",
        lambda encoder, texts: np.array(
            [[math.cos(angle[t]), math.sin(angle[t])] for t in texts], np.float32
        ),
    )


def test_hard_negatives_keep_window_and_margin(monkeypatch):
    pairs = [{"query": f"q{i}", "pos_doc": f"p{i}"} for i in range(6)]
    # q0's positive stands at 20 degrees; p1 is nearer (suspicious), then p2, p3, p4, p5.
    on_a_line(
        monkeypatch,
        {"p0": 20, "p1": 10, "p2": 25, "p3": 40, "p4": 60, "p5": 80} | {f"q{i}": 0 for i in range(6)},
    )
    rows, filled = hard_negatives(pairs, None, count=2, window=(2, 4), margin=0.1)
    assert set(rows[0]["neg"]) == {"p3", "p4"}  # p1 is rank 1; p2 is closer than the margin to the positive
    assert all(row["pos"][0] not in row["neg"] and len(set(row["neg"])) == 2 for row in rows)
    # Nothing scores below p5's own positive: its negatives are random fill-ins, and are counted.
    assert filled >= 2
    with pytest.raises(TutorialError, match="ranks 2 to 3 do not hold 3"):
        hard_negatives(pairs, None, count=3, window=(2, 3))


def test_hard_negatives_stay_below_a_share_of_the_positive(monkeypatch):
    # Scores of q0: its positive 0.90; near 0.87 (0.966 of it), edge 0.85 (0.944), then far ones. The corpus
    # holds "near" and "edge", which are nobody's answers.
    scores = {"p0": 0.90, "near": 0.87, "edge": 0.85, "p1": 0.50, "p2": 0.10}
    queries = {"q0": 0.0, "q1": 170.0, "q2": 190.0}
    on_a_line(monkeypatch, queries | {t: math.degrees(math.acos(s)) for t, s in scores.items()})
    pairs = [{"query": f"q{i}", "pos_doc": f"p{i}"} for i in range(3)]

    def mined(**options):
        found, _ = hard_negatives(pairs, None, 1, hardest=True, corpus=["near", "edge"], **options)
        return found[0]["neg"]

    assert mined(margin=-2) == mined(margin=0) == ["near"]
    assert mined(margin=0, share=0.95) == mined(margin=0.04) == ["edge"]
    assert mined(margin=0.04, share=0.9) == mined(margin=0.1, share=0.95) == ["p1"]
    # q1 points away from everything: its positive's score is negative, and the share still lies below it.
    found, _ = hard_negatives(pairs, None, 1, margin=0, share=0.95, hardest=True)
    own, other = (math.cos(math.radians(170 - math.degrees(math.acos(s)))) for s in (0.50, 0.10))
    assert own < 0 and (other > own) and found[1]["neg"] == ["p0"]


def test_teacher_scores_are_cosines_over_temperature(monkeypatch):
    on_a_line(monkeypatch, {"q": 0, "p": 0, "n": 60})
    (row,) = data.teacher_scores(
        [{"query": "q", "pos": ["p"], "neg": ["n"]}], data.cosines(None), temperature=0.5
    )
    assert row["pos_scores"] == [2.0] and row["neg_scores"] == [1.0]
    assert data.target_of(row) == pytest.approx([1 / (1 + math.exp(-1))])
    assert data.target_of({"pos_scores": [-900.0], "neg_scores": [900.0]})[0] < 1e-300


def test_a_cross_encoder_scores_pairs_by_its_logits(tmp_path, tiny):
    config = BertConfig.from_pretrained(tiny, num_labels=1)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "cross")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "cross")
    models.describe_pooling(tmp_path / "cross", 32, "mean")  # data.make takes its fingerprint as of any model
    file = tmp_path / "train.jsonl"
    write_pairs(file, [{"query": f"q{i}", "pos": [f"p{i}"], "neg": ["n", "m"]} for i in range(3)])
    data.main(["teacher", "--cross", "--temperature", "1", "--data", str(file),
               "--model", str(tmp_path / "cross"), "--output", str(tmp_path / "out")])  # fmt: skip
    row = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[1])
    tokens = AutoTokenizer.from_pretrained(tiny)(
        ["q1"] * 3, ["p1", "n", "m"], padding=True, return_tensors="pt"
    )
    model = BertForSequenceClassification.from_pretrained(tmp_path / "cross").eval()
    with torch.no_grad():
        logits = model(**tokens).logits.flatten().tolist()
    assert [*row["pos_scores"], *row["neg_scores"]] == pytest.approx(logits, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": " "}, "'query' is no text"),
        ({"pos": []}, "'pos' is empty"),
        ({"pos": "p"}, "'pos' must be a list"),
        ({"neg": None}, "'neg' must be a list"),
        ({"neg": ["p "]}, "a negative equals a positive"),
        ({"neg": []}, "a group of 2 needs a negative"),
        ({"pos_scores": [1.0]}, "'neg_scores' must have one number"),
        ({"pos_scores": [1.0], "neg_scores": [math.nan]}, "no finite number"),
        ({"pos_scores": [1.0, 2.0], "neg_scores": [0.0]}, "'pos_scores' must have one number"),
        ({"query": "q"}, "the query of row 1 again"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    good = {"query": "q", "pos": ["p"], "neg": ["n"]}
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (good, good | {"query": "other"} | change)))
    with pytest.raises(TutorialError, match="train.jsonl, row 2: .*" + message):
        data.check_file(file, group=2)


def test_a_row_that_is_no_json_is_named(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"query": "q", "pos": ["p"], "neg": []}\n{"query": ')
    with pytest.raises(TutorialError, match="row 2"):
        data.check_file(file)
    file.write_text("")
    with pytest.raises(TutorialError, match="no rows"):
        data.check_file(file)
    file.write_text('{"query": "q", "pos": ["p"], "neg": []}')
    assert data.check_file(file, group=1)
    with pytest.raises(TutorialError, match="row 1: 'pos_scores'"):
        data.check_file(file, scores=True)


def test_rows_with_one_positive_are_counted(tmp_path, capsys):
    file = tmp_path / "train.jsonl"
    rows = [{"query": f"q{i}", "pos": ["same" if i < 3 else f"p{i}"], "neg": []} for i in range(30)]
    write_pairs(file, rows)
    assert data.check_file(file)["shared"] == 3  # of three rows each two
    data.main(["check", str(file), "--batch", "10"])
    assert "3 pairs of rows have a positive in common" in (said := capsys.readouterr().out)
    # Each of the two that meet sees its right answer as the other's: 2 × 3 × (10 × 9) / (30 × 29).
    assert "0.62 times in a batch of 10" in said


def test_a_negative_that_is_right_for_another_row_is_counted_as_often_as_it_is_drawn(tmp_path, capsys):
    rows = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}", f"m{i}"]} for i in range(40)]
    for i in range(10):
        rows[i]["neg"][0] = f"p{i + 20}"
    rows[20]["pos"].append("p21")  # shared, and one of two
    rows[39]["neg"] = ["p0"]  # fewer than a group of 3 draws
    write_pairs(tmp_path / "train.jsonl", rows)
    found = data.check_file(tmp_path / "train.jsonl", group=2)
    assert (found["shared"], found["crossed"], found["few"]) == (1, 11, [])
    # p21 by row 21, and by row 20 every second time; of nine negatives half; p21 is right for two; p0 always.
    assert found["clash"] == pytest.approx((1 + 0.5) + (9 * 0.5 + 2 * 0.5) + 1)
    different, queries, often = drawn_batches(rows, 20, 2, batches=4000)
    assert often == pytest.approx(data.clashes(found, 20), rel=0.05) and 0 < queries <= often
    assert 38 < different < 39  # of 40, and some stand there twice
    alone = data.check_file(tmp_path / "train.jsonl")  # a group of 1 draws no negative
    assert alone["clash"] == 1.5 and data.clashes(alone, 99) == data.clashes(alone, 40) == 1.5
    assert not list(data.remarks(alone | {"clash": 0}, 1, 20))
    data.main(["check", str(tmp_path / "train.jsonl"), "--group", "3", "--batch", "20"])
    said = capsys.readouterr().out
    assert "40 rows, all in order; 11 have a negative that is another row's positive." in said
    assert "1 pairs of rows have a positive in common, 11 rows have a negative that is another row's" in said
    assert "1 rows have fewer than 2 negatives, which are repeated: rows 40." in said
    more = data.check_file(tmp_path / "train.jsonl", group=3)
    assert f"{data.clashes(more, 20):.2f} times in a batch of 20.\n" in said and data.clashes(more, 20) > 2


def test_length_groups_of_rows_without_negatives(tmp_path, tiny):
    write_pairs(tmp_path / "t.jsonl", [{"query": f"q{i}", "pos": [f"p{i}"], "neg": []} for i in range(8)])
    typed = ["lengths", "--data", str(tmp_path / "t.jsonl"), "--model", str(tiny), "--output"]
    made = data.main([*typed, str(tmp_path / "one"), "--bounds", "16", "--tokens", "64"])
    assert len((made / "up-to-16.jsonl").read_text().splitlines()) == 8
    with pytest.raises(TutorialError, match="row 1: 'neg' is empty"):
        data.main([*typed, str(tmp_path / "two"), "--group", "2"])


def test_pairs_with_one_query_become_one_row(tmp_path):
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, [*make_pairs(6), {"query": "add 0 to a number", "pos_doc": "lambda x: x"}])
    rows = [json.loads(line) for line in data.make("random", tmp_path / "out", count=3, data=file).open()]
    assert len(rows) == 6 and rows[0]["pos"] == [make_pairs(1)[0]["pos_doc"], "lambda x: x"]
    assert not any(set(row["pos"]) & set(row["neg"]) for row in rows)


def test_many_passages_are_searched_in_lists(monkeypatch):
    """Above EXACT passages the search is approximate: nearly all true neighbours, the same rules."""
    monkeypatch.setattr(data, "EXACT", 1000)
    monkeypatch.setattr(data, "BLOCK", 700)
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(40, 16))
    p = centres[generator.integers(40, size=3000)] + 0.3 * generator.normal(size=(3000, 16))
    p = (p / np.linalg.norm(p, axis=1, keepdims=True)).astype(np.float16)
    q = p[:200].astype(np.float32)
    true = np.argsort(-(q @ p.astype(np.float32).T), axis=1, kind="stable")[:, :10]
    found = data.index_of(p).search(q, 10)[1]
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, true, strict=True)]) > 0.9
    monkeypatch.setattr(data, "EXACT", 5000)
    assert (data.index_of(p).search(q, 10)[1][:, 0] == true[:, 0]).mean() > 0.99

    pairs = [{"query": f"q{i}", "pos_doc": f"p{i}"} for i in range(3000)]
    monkeypatch.setattr(data, "EXACT", 1000)
    monkeypatch.setattr(data, "vectors", lambda encoder, texts: p[[int(text[1:]) for text in texts]])
    rows, filled = hard_negatives(pairs, None, 3, (1, 20), 0.0)
    assert filled < 50 and all(row["pos"][0] not in row["neg"] and len({*row["neg"]}) == 3 for row in rows)
    scores = [q[i] @ p[int(text[1:])] for i in range(200) for text in rows[i]["neg"]]
    assert np.mean(scores) > np.mean(q @ p.T) + 0.3


def test_length_groups_hold_every_row_once(tmp_path, tiny, capsys):
    words = "one two three four five six seven eight nine ten".split()
    rows = [
        {"query": f"query {i}", "pos": [" ".join([f"p{i}", *words * n])], "neg": ["x"]}
        for i, n in enumerate([0] * 40 + [3] * 30 + [6] * 3 + [20] * 7)
    ]
    write_pairs(tmp_path / "train.jsonl", rows)
    typed = ["lengths", "--data", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "out")]
    sizes = ["--bounds", "16", "48", "80", "128", "--tokens", "512"]
    made = data.main([*typed, "--model", str(tiny), *sizes])
    files = {file.name: [json.loads(line) for line in file.open()] for file in made.iterdir()}
    # The 3 rows of up to 80 tokens are fewer than a batch of 2 × 3: they join the longest ones.
    assert {name: len(found) for name, found in files.items()} == {
        "up-to-16.jsonl": 40, "up-to-48.jsonl": 30, "up-to-128.jsonl": 10
    }  # fmt: skip
    batches = {name: {row.pop("batch_size") for row in found} for name, found in files.items()}
    assert batches == {"up-to-16.jsonl": {16}, "up-to-48.jsonl": {5}, "up-to-128.jsonl": {2}}
    assert sorted(sum(files.values(), []), key=str) == sorted(rows, key=str)
    assert "up to 16 tokens: 40 rows, 16 queries" in capsys.readouterr().out


def test_the_data_recipe_as_a_command(tmp_path, tiny, capsys):
    write_pairs(tmp_path / "pairs.jsonl", make_pairs())
    common = ["--data", str(tmp_path / "pairs.jsonl")]
    data.main(["random", *common, "--count", "3", "--output", str(tmp_path / "random")])
    write_pairs(tmp_path / "corpus.jsonl", make_pairs(20)[16:])
    data.main(["hard", *common, "--count", "3", "--window", "1", "12", "--margin", "0", "--model", str(tiny),
               "--share", "0.99", "--corpus", str(tmp_path / "corpus.jsonl"),
               "--output", str(tmp_path / "hard")])  # fmt: skip
    file = tmp_path / "hard" / "train.jsonl"
    data.main(["teacher", "--data", str(file), "--model", str(tiny), "--output", str(tmp_path / "teacher")])
    file_taught = tmp_path / "teacher" / "train.jsonl"
    targets = [target for line in file_taught.open() for target in data.target_of(json.loads(line))]
    shown = f"mean {np.mean(targets):.3f}, median {np.median(targets):.3f}"
    assert f"target on the positive: {shown}" in capsys.readouterr().out and len(targets) == 48
    assert data.check_file(file_taught, group=2, scores=True)["rows"] == 16
    assert all(len(json.loads(line)["neg_scores"]) == 3 for line in file_taught.open())
    capsys.readouterr()
    data.main(["random", *common, "--count", "3", "--output", str(tmp_path / "random")])
    assert "already finished" in capsys.readouterr().out
    data.main(["check", str(file), "--group", "2"])
    assert "16 rows, all in order" in capsys.readouterr().out


def test_the_split_of_the_notebook_is_made_where_it_is_missing(tmp_path, capsys):
    train, validation = data.tutorial_pairs(tmp_path / "train.jsonl", tmp_path / "val.jsonl")
    assert "splitting" in capsys.readouterr().out
    assert len(train) == 341 and len(validation) == 86
    source = profiles.mbpp_path(profiles.PROFILES["pocket"])
    assert (train, validation) == split_pairs(read_mbpp(source))
    assert data.tutorial_pairs(tmp_path / "train.jsonl", tmp_path / "val.jsonl") == (train, validation)
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(TutorialError, match="val.jsonl does not exist"):
        data.tutorial_pairs(tmp_path / "train.jsonl", tmp_path / "val.jsonl")


# ---------------------------------------------------------------- output folders


def test_a_finished_step_is_skipped_and_an_unfinished_one_emptied(tmp_path, capsys):
    folder = tmp_path / "step"
    assert steps.open_step(folder, {"seed": 1}) is None
    (folder / "half").write_text("x")
    (folder / "work").mkdir()
    assert steps.open_step(folder, {"seed": 1}) is None
    assert "did not finish" in capsys.readouterr().out
    assert [entry.name for entry in folder.iterdir()] == ["recipe.json"]
    steps.close_step(folder, {"rows": 3})
    assert steps.open_step(folder, {"seed": 1})["rows"] == 3
    assert "skipped" in capsys.readouterr().out


def test_other_settings_keep_the_old_result_beside(tmp_path, capsys):
    folder = tmp_path / "step"
    steps.open_step(folder, {"seed": 1})
    steps.close_step(folder, {"rows": 3})
    assert steps.open_step(folder, {"seed": 2}) is None
    assert "other settings (seed)" in capsys.readouterr().out
    assert read_json(tmp_path / "step.previous" / "done.json")["rows"] == 3


def test_other_settings_keep_the_checkpoints_of_a_run_that_was_cut_off(tmp_path, capsys):
    folder = tmp_path / "run"
    keep = ("work", "train.log")
    steps.open_step(folder, {"seed": 1, "rate": 1}, keep)
    (folder / "work" / "checkpoint-200").mkdir(parents=True)
    (folder / "work" / "checkpoint-200" / "model.safetensors").write_text("hours")
    assert steps.open_step(folder, {"seed": 2, "rate": 1}, keep) is None
    assert "(seed) and cut off; its checkpoints are kept: now run.previous." in capsys.readouterr().out
    assert (tmp_path / "run.previous/work/checkpoint-200/model.safetensors").read_text() == "hours"
    assert [entry.name for entry in folder.iterdir()] == ["recipe.json"]
    steps.open_step(folder, {"seed": 3, "rate": 1}, keep)  # nothing worth keeping: emptied, not moved
    assert "did not finish" in capsys.readouterr().out
    assert (tmp_path / "run.previous" / "work").exists()
    steps.close_step(folder, {"rows": 3})
    steps.open_step(folder, {"seed": 4, "rate": 1}, keep)
    assert "now run.previous, in place of an older one." in capsys.readouterr().out


def test_a_foreign_folder_is_refused_and_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(TutorialError, match="no recipe made it"):
        steps.open_step(tmp_path, {})
    assert (tmp_path / "mine.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert steps.open_step(tmp_path / "empty", {}) is None


# ---------------------------------------------------------------- commands and checks


@pytest.fixture
def eight_gpus(monkeypatch):
    """What FlagEmbedding's parser asks of the machine that it runs on, DeepSpeed included."""
    import accelerate.utils.deepspeed as accelerate
    import transformers.training_args as arguments
    from transformers.integrations import deepspeed

    class Config(accelerate.HfDeepSpeedConfig):  # transformers' own begins with what only DeepSpeed brings
        def trainer_config_process(self, args):
            assert self.config["zero_optimization"]["stage"] == 1

    monkeypatch.setattr(deepspeed, "HfTrainerDeepSpeedConfig", Config)
    monkeypatch.setattr("accelerate.utils.DeepSpeedPlugin", lambda hf_ds_config: hf_ds_config)
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda *args: True, raising=False)
    monkeypatch.setattr(models.assets, "local_bge_m3", lambda: None)
    monkeypatch.setattr(models, "ROOT", models.ROOT / "no such folder")


def printed(recipe, words, capsys):
    """(engine, processes, folder, FlagEmbedding's words) of the line that a recipe prints."""
    capsys.readouterr()
    assert recipe.main(words) is None
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert line[:2] == [sys.executable, engine.__file__] and line[3].isdigit()
    assert not any("…" in word or word.startswith(("recipes/", "models/")) for word in line)
    return line[2], int(line[3]), line[4], line[5:]


def without_data(line):
    """The words of a line with a file that is there: FlagEmbedding's parser looks for it."""
    options = engine.options_of(line) | {"train_data": [str(ROOT / "README.md")], "output_dir": ["work"]}
    return engine.words_of(options)


VARIANTS = [
    (dense, [], {"train_group_size": 1}),
    (dense, ["--hard"], {"train_group_size": 2}),
    (dense, ["--teacher", "minilm"], {"train_group_size": 4, "kd_loss_type": "kl_div"}),
    (unified, [], {"use_self_distill": True, "unified_finetuning": True}),
    (unified, ["--plain"], {"use_self_distill": False, "knowledge_distillation": False}),
    (unified, ["--teacher", "minilm"], {"knowledge_distillation": True, "kd_loss_type": "m3_kd_loss"}),
    (raw_bert, ["--negatives", "50"], {"train_group_size": 51}),
]


@pytest.mark.parametrize("scale", ["pocket", "full"])
@pytest.mark.parametrize("deepspeed", [False, True])
@pytest.mark.parametrize(("recipe", "words", "wanted"), VARIANTS)
def test_flagembedding_parses_every_printed_line(
    recipe, words, wanted, deepspeed, scale, tmp_path, tiny, capsys, eight_gpus, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [{"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1.0], "neg_scores": [0.0]}]
    write_pairs(tmp_path / "my own.jsonl", rows)
    own = ["--data", "my own.jsonl", "--model", str(tiny), "--output", "my run", "--scale", scale, "--print"]
    own += ["--deepspeed"] if deepspeed else []
    theirs = ["--", "--learning_rate", "3e-5", "--num_train_epochs=7", "--bf16_full_eval"]
    theirs += ["--query_instruction_for_retrieval", "Find: ", "--query-max-len", "33"]
    kind, processes, folder, line = printed(recipe, [*words, *own, *theirs], capsys)
    assert processes == (8 if scale == "full" else 2) and folder == str(tmp_path / "my run")
    line += ["--output_dir", "work"]
    model, data_, training = checked_run.arguments_of(kind, line)
    assert model.model_name_or_path == str(tiny) and data_.train_data == [str(tmp_path / "my own.jsonl")]
    assert training.learning_rate == 3e-5 and training.num_train_epochs == 7 and training.bf16_full_eval
    assert data_.query_instruction_for_retrieval == "Find: " and data_.query_max_len == 33
    assert training.sentence_pooling_method == "mean" and training.negatives_cross_device
    assert training.use_cpu == (scale == "pocket") and training.max_grad_norm == 1
    assert training.warmup_steps == 0.1 and str(training.save_strategy) == "SaveStrategy.STEPS"
    assert training.deepspeed == (str(engine.DEEPSPEED) if deepspeed else None)
    for name, value in wanted.items():
        assert getattr(data_, name, None) == value or getattr(training, name, None) == value
    assert recipe is not raw_bert or training.max_steps > 0  # as many updates for every number of negatives


def test_the_line_for_gpus_knows_models_that_are_not_here(capsys, eight_gpus):
    for recipe, name, pooling in ((dense, "bge-m3", "cls"), (raw_bert, "bert-base-uncased", "mean")):
        *_, line = printed(recipe, ["--scale", "full", "--print"], capsys)
        options = engine.options_of(line)
        assert options["model_name_or_path"] == [str(models.ROOT / "models" / name)]
        assert options["sentence_pooling_method"] == [pooling] and options["bf16"] == ["True"]
        assert "use_cpu" not in options
    theirs = ["--", "--bf16", "False", "--fp16", "True"]  # V100 and T4
    kind, *_, line = printed(dense, ["--scale", "full", "--print", *theirs], capsys)
    training = checked_run.arguments_of(kind, without_data(line))[2]
    assert training.fp16 and not training.bf16


def test_runs_that_differ_have_folders_that_differ(tmp_path, tiny, capsys, eight_gpus):
    write_pairs(tmp_path / "mine.jsonl", [{"query": "q", "pos": ["p"], "neg": ["n"]}])
    lines = [[*words, *more] for _, words, _ in VARIANTS[:3] for more in (
        [], ["--scale", "full"], ["--processes", "4"], ["--model", str(tiny)],
        ["--data", str(tmp_path / "mine.jsonl")], ["--deepspeed"], ["--", "--seed", "7"],
        ["--", "--seed", "8"],
    )]  # fmt: skip
    folders = []
    for words in lines:
        cut = words.index("--") if "--" in words else len(words)
        folders.append(printed(dense, [*words[:cut], "--print", *words[cut:]], capsys)[2])
    folders += [printed(raw_bert, ["--negatives", n, "--print"], capsys)[2] for n in ("10", "50")]
    folders += [printed(unified, [*words, "--print"], capsys)[2] for _, words, _ in VARIANTS[3:6]]
    assert len(set(folders)) == len(folders)
    kinds = [
        ("random", {"count": 10}),
        ("random", {"count": 50}),
        ("hard", {}),
        ("hard", {"model": str(tiny)}),
    ]
    kinds += [
        ("teacher", {"data": "a.jsonl"}),
        ("teacher", {"data": "b.jsonl"}),
        ("lengths", {"data": "a.jsonl"}),
    ]
    assert len({data.place(kind, **options) for kind, options in kinds}) == len(kinds)


def test_pooling_is_read_from_the_model(tmp_path, tiny, capsys):
    config = XLMRobertaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=1)
    XLMRobertaModel(config).save_pretrained(tmp_path / "cls")
    words = ["--print", "--model", str(tmp_path / "cls")]
    with pytest.raises(TutorialError, match="no 1_Pooling/config.json, which says how its vectors are made"):
        dense.main(words)
    options = engine.options_of(printed(dense, [*words, "--", "--sentence_pooling_method", "cls"], capsys)[3])
    assert options["sentence_pooling_method"] == ["cls"]
    for pooling in ("cls", "mean"):
        models.describe_pooling(tmp_path / "cls", 32, pooling)
        options = engine.options_of(printed(dense, words, capsys)[3])
        assert options["sentence_pooling_method"] == [pooling]


def test_one_gpu_does_not_stop_anything(monkeypatch, capsys):
    """`make recipes` on a machine with one GPU: one process, nothing to gather, no --use_cpu."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(engine.profiles, "training_precision", lambda profile, device: "fp16")
    monkeypatch.setattr(engine, "require_run_space", lambda *args, **kwargs: None)
    file, ran = ROOT / "data" / "pocket_mbpp.json", []
    checked = dict.fromkeys(("shared", "crossed", "clash"), 0) | {"rows": 1000, "batch_size": None, "few": []}
    monkeypatch.setattr(data, "check_file", lambda *args: checked)
    monkeypatch.setattr(data, "make", lambda step, **options: file)

    def run(kind, processes, folder, options):
        engine.require(processes, options, folder, models.find_model(options["model_name_or_path"][0]))
        ran.append((processes, options))

    monkeypatch.setattr(engine, "run", run)
    for recipe, words in run_all.commands():
        if recipe is not data:  # what earlier steps make is not there
            words = words.replace(run_all.DENSE_HARD, "minilm").replace(run_all.DENSE, "minilm").split()
            recipe.main([str(file) if word.startswith(run_all.DATA) else word for word in words])
    assert len(ran) == len(run_all.RUNS)
    for processes, options in ran:
        assert processes == 1 and "use_cpu" not in options and "negatives_cross_device" not in options
        assert options["fp16"] == ["True"]


def test_what_the_recipe_sets_itself_is_refused_behind_the_dashes(tiny):
    for name, own in engine.OURS.items():
        with pytest.raises(TutorialError, match=f"--{name} is set by the recipe's own {own}"):
            dense.main(["--print", "--", f"--{name}", "x"])
    with pytest.raises(TutorialError, match="'3' follows no name"):
        dense.main(["--print", "--", "3"])


def test_a_folder_of_length_groups_asks_no_query_with_none(tmp_path, capsys):
    options = engine.options_of(printed(dense, ["--data", str(tmp_path), "--print"], capsys)[3])
    assert options["same_dataset_within_batch"] == ["True"] and options[
        "query_instruction_for_retrieval"
    ] == [""]


def test_the_batch_that_fits_is_counted(capsys, eight_gpus):
    """44 bytes per token, layer and hidden unit are what a layer keeps for its backward pass."""

    def kept(layers, texts, length=32, width=64):
        torch.manual_seed(0)
        config = XLMRobertaConfig(vocab_size=100, hidden_size=width, num_hidden_layers=layers,
                                  num_attention_heads=1, intermediate_size=4 * width,
                                  attention_probs_dropout_prob=0.0)  # fmt: skip
        model, sizes = XLMRobertaModel(config).train(), {}
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
            return tensor

        held = []
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", torch.bfloat16),
        ):
            model(input_ids=torch.randint(5, 100, (texts, length)))
        return sum(sizes.values())

    of_two_layers = kept(4, 8) - kept(2, 8) - (kept(4, 4) - kept(2, 4))  # without what texts have in common
    assert of_two_layers / (2 * 64 * 4 * 32) == pytest.approx(engine.KEPT, rel=0.05)
    config, options = models.ABSENT["bge-m3"][1], f"{engine.COMMON} {engine.SCALES['full']}"
    sizes = [engine.fitting_batch(gb, config, engine.options_of(options)) for gb in (8, 24, 80)]
    assert sizes[0] < 0 < sizes[1] < sizes[2]
    once = engine.options_of(f"{options} --gradient_checkpointing True")
    assert engine.fitting_batch(80, config, once) > 5 * sizes[2]
    batch = engine.options_of(printed(dense, ["--scale", "full", "--print", "--gpu-gb", "24"], capsys)[3])
    assert batch["per_device_train_batch_size"] == [str(sizes[1])]
    with pytest.raises(TutorialError, match="Not one query fits"):
        dense.main(["--scale", "full", "--print", "--gpu-gb", "8"])


def test_scores_are_computed_in_fp32():
    draws = [torch.randn(8, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    q, p = (torch.nn.functional.normalize(draw, dim=-1) for draw in draws)
    exact = q @ p.T / 0.02
    with torch.autocast("cpu", torch.bfloat16):
        rounded = q @ p.T / 0.02
        mended = checked_run.in_fp32(lambda a, b: a @ b.T / 0.02)(q, p)
    assert (rounded - exact).abs().max() > 0.02 and (mended - exact).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("recipe", "theirs", "said"),
    [
        (dense, "", ["80 queries an update, each against 80 passages: 79 negatives."]),
        (dense, "--gradient_accumulation_steps 3",  # gives no negatives
         ["240 queries an update, each against 80 passages: 79 negatives."]),
        (dense, "--negatives_cross_device False",
         ["80 queries an update, each against 40 passages: 39 negatives."]),
        (unified, "", ["32 queries an update, each against 64 passages: 63 negatives.",
                       "So for the dense loss; sparse, ColBERT and sum see their own process: 31."]),
        (unified, "--negatives_cross_device False",
         ["32 queries an update, each against 32 passages: 31 negatives."]),
    ],
)  # fmt: skip
def test_the_negatives_of_each_loss_are_said(recipe, theirs, said, tmp_path, tiny, capsys):
    write_pairs(tmp_path / "t.jsonl", [{"query": "q", "pos": ["p"], "neg": ["n"]}])
    words = ["--data", str(tmp_path / "t.jsonl"), "--model", str(tiny), "--cpu", "--print"]
    recipe.main([*words, *(["--", *theirs.split()] if theirs else [])])
    assert capsys.readouterr().out.splitlines()[:-1] == said


def test_what_a_run_cuts_off_and_takes_for_wrong_is_said_before_it(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr(engine, "require_run_space", lambda *args, **kwargs: None)
    texts = [("word " * (n + 1), f"p{n} {'word ' * 20}") for n in range(12)]
    rows = [{"query": q, "pos": [p], "neg": [f"n{n}"]} for n, (q, p) in enumerate(texts)]
    rows[0]["neg"] = [rows[5]["pos"][0]]
    write_pairs(tmp_path / "t.jsonl", rows)
    options = engine.options_of(
        f"{engine.COMMON} --train_data {tmp_path / 't.jsonl'} --per_device_train_batch_size 3 --use_cpu True "
        "--negatives_cross_device True --query_max_len 8 --passage_max_len 16 --train_group_size 3"
    )
    rows_of = engine.require(2, options, tmp_path / "out", tiny)
    said = capsys.readouterr().out
    assert "t.jsonl: 12 rows have fewer than 2 negatives, which are repeated: rows 1, 2, 3, 4, 5, …." in said
    assert f"wrong: {1 * 6 * 5 / (12 * 11):.2f} times in a batch of 6." in said  # of both processes
    engine.say_lengths(tiny, options, rows_of)
    said = capsys.readouterr().out.splitlines()  # a query of n words has n + 2 tokens
    assert said == ["6 of 12 queries looked at are longer than 8 tokens: cut there.",
                    "12 of 23 passages looked at are longer than 16 tokens: cut there."]  # fmt: skip
    options |= {"train_group_size": ["1"], "query_instruction_for_retrieval": ["word "]}
    engine.say_lengths(tiny, options, rows_of)
    said = capsys.readouterr().out
    assert said.startswith("7 of 12 queries") and "12 of 12 passages" in said
    monkeypatch.setattr(engine, "say_what_is_cut", lambda tokenizer, texts, *more: seen.append(texts))
    seen = []
    engine.say_lengths(tiny, options, {tmp_path / "t.jsonl": 4000})  # each fourth row
    assert [text.count("word") - 1 for text in seen[0]] == [1, 5, 9]
    options |= {"negatives_cross_device": ["False"], "train_group_size": ["2"]}
    engine.require(2, options, tmp_path / "out", tiny)
    assert f"wrong: {1 * 3 * 2 / (12 * 11):.2f} times in a batch of 3." in capsys.readouterr().out


def test_the_deepspeed_configuration_keeps_parameters_whole():
    config = json.loads(engine.DEEPSPEED.read_text())
    assert config["zero_optimization"]["stage"] == 1  # stage 3 would part them and with them the checksums


@pytest.mark.parametrize(
    ("more", "processes", "message"),
    [
        ("--use_cpu False", 64, "GPUs here"),
        ("--deepspeed x.json", 2, "DeepSpeed is not installed"),
        ("--per_device_train_batch_size 16", 2, "fewer than one batch"),
        ("--train_group_size 2", 2, "row 1: 'neg' is empty"),
        ("--knowledge_distillation True", 2, "'pos_scores'"),
        ("--model_name_or_path no/such/model", 2, "nor a folder"),
        ("--per_device_train_batch_size many", 2, "takes a number"),
    ],
)
def test_what_would_fail_fails_before_torchrun(tmp_path, tiny, more, processes, message):
    file = tmp_path / "train.jsonl"
    write_pairs(file, [{"query": p["query"], "pos": [p["pos_doc"]], "neg": []} for p in make_pairs()])
    options = engine.options_of(
        f"{engine.COMMON} --model_name_or_path {tiny} --train_data {file} --sentence_pooling_method mean "
        f"--per_device_train_batch_size 4 --use_cpu True {more}"
    )
    with pytest.raises(TutorialError, match=message):
        engine.run("base", processes, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_the_engine_says_where_its_line_comes_from():
    with pytest.raises(TutorialError, match="is printed by the recipes"):
        engine.main(["base", "two"])


def write_reports(folder, **second):
    good = {"started": 2, "group_size": 2, "before": "a", "after": "b", "not_finite": []}
    for rank, report in enumerate((good, {**good, **second})):
        report = {"first_batch": f"rows {rank}", **report}
        write_json(folder / f"rank-{rank}.json", {"rank": rank, **report})


def test_reports_of_processes_that_trained_together_pass(tmp_path):
    write_reports(tmp_path)
    assert engine.check_ranks(tmp_path, 2)["after"] == "b"


def test_reports_that_show_a_silent_failure_do_not(tmp_path):
    write_reports(tmp_path, after="c")
    with pytest.raises(TutorialError, match="different parameters"):
        engine.check_ranks(tmp_path, 2)
    write_reports(tmp_path, first_batch="rows 0")  # equal parameters: both trained alone on the same rows
    with pytest.raises(TutorialError, match="same first batch"):
        engine.check_ranks(tmp_path, 2)
    write_reports(tmp_path, group_size=1)
    with pytest.raises(TutorialError, match=r"sizes \[2, 1\]"):
        engine.check_ranks(tmp_path, 2)
    with pytest.raises(TutorialError, match=r"Processes \[2\] of 3 left no report"):
        engine.check_ranks(tmp_path, 3)
    for name, change in (
        ("not finite", {"not_finite": ["w"]}), ("no parameter", {"after": "a"}),
        ("Not trained in fp32: ..w", {"not_fp32": ["w"]}),
    ):  # fmt: skip
        write_reports(tmp_path)
        for rank in range(2):
            path = tmp_path / f"rank-{rank}.json"
            write_json(path, read_json(path) | change)
        with pytest.raises(TutorialError, match=name):
            engine.check_ranks(tmp_path, 2)


# ---------------------------------------------------------------- models


def test_the_trimmed_vocabulary_changes_no_vector(tmp_path):
    texts = [text for pair in make_pairs(4) for text in pair.values()]
    folder = models.pocket_m3(tmp_path / "m3", texts)
    old, new = AutoTokenizer.from_pretrained(pocket_model_path()), AutoTokenizer.from_pretrained(folder)
    assert [new.tokenize(text) for text in texts] == [old.tokenize(text) for text in texts]
    assert len(new) < len(old) / 5 and new.eos_token == "[SEP]"
    with torch.no_grad():
        v = [embed(Encoder(f, 64).eval(), texts) for f in (pocket_model_path(), folder)]
    assert torch.allclose(*v, atol=1e-6)
    assert (folder / "colbert_linear.pt").exists() and (folder / "sparse_linear.pt").exists()


def test_the_pocket_base_knows_the_words_of_an_own_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unified, "BASE", tmp_path / "base" / "m3")
    monkeypatch.setattr(data, "tutorial_pairs", lambda: (make_pairs(4), make_pairs(2)))
    for name, word in (("own", "rheumatism"), ("pocket", "add 1 to a number")):
        row = {"query": word, "pos": [make_pairs(1)[0]["pos_doc"]], "neg": [make_pairs(2)[1]["pos_doc"]]}
        write_pairs(tmp_path / f"{name}.jsonl", [row])
    bases = {}
    for name in ("own", "pocket"):
        words = ["--data", str(tmp_path / f"{name}.jsonl"), "--print"]
        bases[name] = engine.options_of(printed(unified, words, capsys)[3])["model_name_or_path"][0]
    assert bases["pocket"] == str(unified.pocket_base()) and bases["own"] == f"{bases['pocket']}-whole"
    own, cut = (AutoTokenizer.from_pretrained(folder) for folder in bases.values())
    known = AutoTokenizer.from_pretrained(pocket_model_path())
    assert own.tokenize("rheumatism") == known.tokenize("rheumatism") and len(own) == len(known)
    assert len(cut.tokenize("rheumatism")) == 10  # a letter each
    whole = Encoder(bases["own"], 16).eval(), Encoder(pocket_model_path(), 16).eval()
    with torch.no_grad():
        assert torch.allclose(*(embed(encoder, ["my rheumatism"]) for encoder in whole), atol=1e-6)


def test_a_model_that_is_not_here_says_how_to_fetch_it():
    for name in ("no/such/model", ROOT / "models" / "bert-base-uncased"):
        with pytest.raises(TutorialError, match="hf download"):
            models.find_model(name)


# ---------------------------------------------------------------- comparison


def test_the_ranks_are_those_of_the_notebook(tiny):
    pairs = make_pairs(30)
    pairs.append({"query": "another", "pos_doc": pairs[0]["pos_doc"]})  # a code that two queries share
    theirs = notebook_evaluate(Encoder(tiny), pairs[:12], candidates=pairs)
    ours = compare.compare([("tiny", str(tiny))], pairs[:12], pairs)
    assert ours["passages"] == 30
    assert ours["rows"][0]["ranks"] == theirs["ranks"].tolist()
    assert ours["rows"][0]["mrr"][0] == pytest.approx(theirs["mrr"])


def on_axes(places):
    """An encoder of texts as given vectors."""
    return lambda texts: {"dense": np.array([places[text] for text in texts], np.float32)}


def test_ties_count_against_the_model_and_right_answers_not_against_each_other(monkeypatch):
    places = {"q": [1, 0], "r": [1, 0], "a": [0.5, 0], "b": [0.5, 0], "c": [0.1, 0], "d": [0.9, 0]}
    monkeypatch.setattr(compare, "PASSAGES", 1)  # blocks of one passage
    encode = on_axes(places)
    asked = [{"query": "q", "pos_doc": "a"}]
    assert [r.tolist() for r in compare.evaluate(encode, asked, ["b", "c"])[0]["dense"]] == [[2]]
    asked = [{"query": "q", "pos_doc": "c", "other_pos_docs": ["a", "b"]}, {"query": "r", "pos_doc": "c"}]
    for cells in (1, 1000):
        monkeypatch.setattr(compare, "CELLS", cells)  # one query at a time, or all
        ranks = compare.evaluate(encode, asked, ["d"])[0]["dense"]
        assert [r.tolist() for r in ranks] == [[2, 3, 4], [4]]


def test_metrics_of_known_ranks():
    one = [np.array([rank]) for rank in (1, 2, 11)]
    row = compare.row_of("m", "dense", one, one)
    assert row["recall@1"][0] == pytest.approx(1 / 3)
    assert row["recall@10"][0] == pytest.approx(2 / 3) and row["recall@20"][0] == row["recall@100"][0] == 1
    assert row["mrr"][0] == pytest.approx((1 + 1 / 2 + 1 / 11) / 3)
    assert row["ndcg@10"][0] == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert row["mrr_gain"][0] == 0 and row["p"] == 1
    low, high = row["mrr"][1:]
    assert low < row["mrr"][0] < high
    several = compare.metrics_of([np.array([2, 3, 40])])
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert several["ndcg@10"][0] == pytest.approx((1 / math.log2(3) + 1 / 2) / ideal)
    assert several["recall@1"][0] == 0 and several["recall@5"][0] == 1 and several["mrr"][0] == 0.5
    assert compare.metrics_of([np.arange(1, 16)])["ndcg@10"][0] == pytest.approx(1)


def test_colbert_and_sparse_scores_are_those_of_flagembedding():
    from FlagEmbedding import BGEM3FlagModel

    generator = np.random.default_rng(0)
    q = [generator.normal(size=(n, 4)).astype(np.float32) for n in (2, 5)]
    p = [generator.normal(size=(n, 4)).astype(np.float32) for n in (3, 1, 4)]
    theirs = [[float(BGEM3FlagModel.colbert_score(None, a, b)) for b in p] for a in q]
    assert np.allclose(compare.colbert_scores(q, p), theirs, atol=1e-5)
    q, p = [{"3": 0.5, "7": 1.0}, {}], [{"7": 2.0}, {"1": 1.0}, {"3": 1.0, "7": 0.5}]
    theirs = BGEM3FlagModel.compute_lexical_matching_score(None, q, p)
    ours = (compare.sparse_matrix(q, 8) @ compare.sparse_matrix(p, 8).T).toarray()
    assert np.allclose(ours, theirs)


def test_the_half_precision_of_a_gpu_is_scored_in_fp32(tmp_path, tiny, monkeypatch):
    """On a GPU FlagEmbedding gives float16: 1 and the next number below it are 0.0005 apart."""
    import FlagEmbedding

    vectors = np.array([[1, 0], [0.9995, 0.0316]], np.float16)

    class Half:
        def __init__(self, *args, **kwargs):
            self.tokenizer = range(9)

        def encode(self, texts, **kwargs):
            asked.append(kwargs["max_length"])
            return {"dense_vecs": vectors, "lexical_weights": [{"3": np.float16(0.1)}] * 2,
                    "colbert_vecs": [vectors, vectors[:1]]}  # fmt: skip

    asked = []
    m3 = models.pocket_m3(tmp_path / "m3", ["a"], base=tiny)
    monkeypatch.setattr(FlagEmbedding, "BGEM3FlagModel", Half)
    found = compare.encoder_of(m3, max_length=77)(["a", "b"])
    scores = compare.all_scores(found, found)
    assert asked == [77] and {values.dtype for values in scores.values()} == {np.dtype(np.float32)}
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    assert np.abs(scores["dense"] - exact).max() < 1e-6


def test_the_comparison_as_a_command(tmp_path, tiny, capsys, monkeypatch):
    """Own queries in FlagEmbedding's format, two answers each, a corpus of one's own, and nothing else."""
    for name in ("TRAIN", "VALIDATION"):  # as in a clone in which notebook 01 has not run
        monkeypatch.setattr(data, name, tmp_path / "no such file.jsonl")
    pairs = make_pairs()
    lines = [
        {"query": p["query"], "pos": [p["pos_doc"], p["pos_doc"] + "  # again"], "neg": []} for p in pairs
    ]
    write_pairs(tmp_path / "val.jsonl", lines[10:])
    (tmp_path / "corpus.txt").write_text("one\ntwo\nthree\n")
    words_used = [text for row in lines for text in (row["query"], *row["pos"])]
    m3 = models.pocket_m3(tmp_path / "m3", [*words_used, "one", "two", "three"], base=tiny)
    words = ["--checkpoint", f"tiny={tiny}", "--checkpoint", f"tiny M3={m3}",
             "--checkpoint", f"short={tiny}@8",
             "--queries", str(tmp_path / "val.jsonl"), "--corpus", str(tmp_path / "corpus.txt"),
             "--output", str(tmp_path / "out"), "--max-length", "64"]  # fmt: skip
    compare.main(words)
    assert read_json(tmp_path / "out" / "recipe.json")["max_length"] == 64
    results = read_json(tmp_path / "out" / "results.json")
    assert results["queries"] == 6 and results["passages"] == 12 + 3
    modes = [row["mode"] for row in results["rows"]]
    assert modes == ["dense", "dense", "sparse", "ColBERT", "weighted sum", "dense"]
    assert (
        results["rows"][0]["ranks"] == results["rows"][1]["ranks"]
    )  # the heads leave the dense vectors alone
    with torch.no_grad():
        texts = [row["query"] for row in lines[10:]], [text for row in lines[10:] for text in row["pos"]]
        q, p = (embed(Encoder(tiny), part)[:, :8] for part in (texts[0], [*texts[1], "one", "two", "three"]))
        near = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(p, dim=1).T
    best = [max(near[i, 2 * i], near[i, 2 * i + 1]) for i in range(6)]
    wrong = [[s for j, s in enumerate(near[i]) if j not in (2 * i, 2 * i + 1)] for i in range(6)]
    expected = [1 + sum(s >= b for s in others) for others, b in zip(wrong, best, strict=True)]
    assert results["rows"][5]["ranks"] == expected
    assert all(row["queries_per_second"] > 0 for row in results["rows"])
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n") == 8 and "tiny M3, ColBERT" in table and "Recall@100" in table
    capsys.readouterr()
    compare.main(words)
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(TutorialError, match="NAME=MODEL"):
        compare.main(["--checkpoint", str(tiny), *words[6:]])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TutorialError, match="typo.jsonl does not exist"):
        compare.main(
            [*words[:6], "--queries", str(tmp_path / "typo.jsonl"), "--output", str(tmp_path / "no")]
        )
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written where a path was mistyped


def test_top_is_the_order_of_the_scores(tiny):
    passages = [pair["pos_doc"] for pair in make_pairs(9)]
    found = compare.top(str(tiny), "add 4 to a number", passages, k=9)
    with torch.no_grad():
        q, p = embed(Encoder(tiny), ["add 4 to a number"]), embed(Encoder(tiny), passages)
    scores = (q @ p.T)[0]
    assert [text for _, text in found] == [passages[i] for i in scores.argsort(descending=True)]
    assert [score for score, _ in found] == pytest.approx(
        scores.sort(descending=True).values.tolist(), abs=1e-6
    )


def test_the_figure_gives_weak_models_an_axis_of_their_own(tmp_path, monkeypatch):
    def row(name, mean, low, high):
        return {"name": name, "mode": "dense", "heads": False, "mrr": [mean, low, high]}

    rows = [
        row("ready-made", 0.78, 0.72, 0.84),
        row("raw", 0.28, 0.22, 0.35),
        row("tuned", 0.9, 0.85, 0.95),
        row("weak", 0.45, 0.37, 0.53),  # its interval reaches two thirds of the reference
    ]
    drawn = []
    monkeypatch.setattr(compare.figures, "intervals", lambda *args, **kwargs: drawn.append((args, kwargs)))
    compare.figure({"queries": 86, "passages": 427, "rows": rows}, tmp_path / "x.png")
    ((shown, title, path), options) = drawn[0]
    assert [(row["label"], "group" in row) for row in shown] == [
        ("ready-made", False), ("tuned", False), ("weak", False), ("raw", True)
    ]  # fmt: skip
    assert shown[3]["value"] == 0.28 and (shown[3]["lo"], shown[3]["hi"]) == (0.22, 0.35)
    assert title.startswith(
        "Highest MRR: tuned, 0.900. Of 4 intervals, 1 lie above the reference's 0.780 and 2"
    )
    assert path == tmp_path / "x.png" and options["reference"] == 0.78
    assert options["reference_label"] == "ready-made: 0.780"


def test_findings_follow_the_numbers():
    def row(name, ranks):
        return {"name": name, "mode": "dense", "ranks": ranks}

    worse, better = [10] * 30, [1] * 30
    rows = [row("small BERT, 10 negatives", worse), row("small BERT, 50 negatives", better)]
    (sentence,) = run_all.findings(rows)
    assert "0.100 → 1.000" in sentence and sentence.endswith("better.")
    rows[1]["ranks"] = worse
    (sentence,) = run_all.findings(rows)
    assert sentence.startswith("No difference that these queries can show: small BERT, 10 negatives → ")
    rows = [row("small BERT, 10 negatives", better), row("small BERT, 50 negatives", worse)]
    assert run_all.findings(rows)[0].endswith("worse.")


def test_every_question_asks_about_rows_that_are_made():
    assert {name for pair in run_all.PAIRS for name in pair} <= {*run_all.MODELS, "notebook 01"}
    made = {*(folder for _, folder, *_ in run_all.RUNS), "minilm-m3", "small-bert"}
    places = [model.split("@")[0].split("/") for model in run_all.MODELS.values() if model != "minilm"]
    assert {place[2] for place in places} == made


def test_the_readme_keeps_what_is_outside_its_markers(tmp_path):
    path = tmp_path / "README.md"
    start = "<!-- x: generated -->"
    path.write_text(f"before\n{start}\nold\n{run_all.END}\nafter\n<!-- y: generated -->\n{run_all.END}\n")
    for text in ("new", "newer"):
        run_all.write_part("x", text, path)
        assert path.read_text() == (
            f"before\n{start}\n{text}\n{run_all.END}\nafter\n<!-- y: generated -->\n{run_all.END}\n"
        )


def test_results_are_gathered_from_the_steps(tmp_path, monkeypatch):
    step = {
        "processes": 2,
        "precision": "fp32",
        "updates": 3,
        "passages_per_update": 204,
        "wall_seconds": 5.0,
        "cpu_seconds_of_one_process": 3.5,
        "peak_memory_gb_of_one_process": 1.0,
        "losses": [2.0, 1.0],
    }
    for name in (*(folder for _, folder, *_ in run_all.RUNS), "dense.previous"):
        write_json(tmp_path / "output" / name / "done.json", step)
    ranks = {name: [2, 2, 1] for name in run_all.MODELS} | {"dense": [1, 2, 1]}
    reference = [np.array([rank]) for rank in ranks["MiniLM, ready-made"]]
    rows = [
        compare.row_of(name, "dense", [np.array([rank]) for rank in r], reference)
        | {"heads": False, "queries_per_second": 7.0}
        for name, r in ranks.items()
    ]
    write_json(
        tmp_path / "output" / "comparison" / "results.json",
        {"queries": 3, "passages": 9, "reference": "MiniLM, ready-made", "rows": rows},
    )
    monkeypatch.setattr(steps, "OUTPUT", tmp_path / "output")
    for name in ("RESULTS", "README", "FIGURE"):
        monkeypatch.setattr(run_all, name, tmp_path / getattr(run_all, name).name)
    monkeypatch.setattr(run_all, "RANDOM", str(tmp_path / "random.jsonl"))
    for count in (1, 10, 50):
        codes = [pair["pos_doc"] for pair in make_pairs(204)]
        own = [{"query": f"q{i}", "pos": [code], "neg": (codes[i + 1 :] + codes[:i])[:count]}
               for i, code in enumerate(codes)]  # fmt: skip
        (tmp_path / "output" / "data" / f"random-{count}").mkdir(parents=True)
        write_pairs(tmp_path / "output" / "data" / f"random-{count}" / "train.jsonl", own)
    write_pairs(tmp_path / "random.jsonl", [{"query": "a | b", "pos": ["p"], "neg": list("nmklj")}])
    pairs = make_pairs(9)
    monkeypatch.setattr(data, "tutorial_pairs", lambda: (pairs[3:], pairs[:3]))
    found = [(1 - i / 10, pairs[i]["pos_doc"]) for i in range(5)]
    monkeypatch.setattr(compare, "top", lambda model, query, passages: found if len(passages) == 9 else None)
    run_all.README.write_text(
        "above\n"
        + "".join(f"<!-- {name}: generated -->\n{run_all.END}\n" for name in run_all.PARTS)
        + "below\n"
    )
    run_all.collect()
    results = read_json(run_all.RESULTS)
    assert results["wall_seconds"] == 5.0 * len(run_all.RUNS)  # what was moved aside does not count
    assert results["runs"]["dense"]["updates"] == 3 and "losses" not in results["runs"]["dense"]
    text = run_all.README.read_text(encoding="utf-8")
    assert text.startswith("above") and text.endswith("below\n")
    assert all(part(results) in text for part in run_all.PARTS.values())
    assert "MiniLM, ready-made → dense (dense) +0.167 [" in text
    assert "| query | `a \\| b` |" in text and "2 negatives more" in text
    assert "| 10 | 18 | 204 | 203 |" in text and "| 50 | 4 | 204 | 203 |" in text
    assert "| 0 | 204 | 204 | 203 | 204 | 0.0 |" in text and 0 < results["batches"]["50"][1] < 4
    assert 100 < results["batches"]["10"][0] < 198 and 0 < results["batches"]["10"][1] < 18
    assert results["search"]["query"] == "add 0 to a number" and "1.000 **right** `def add_0" in text
    assert run_all.FIGURE.stat().st_size > 10_000


def test_the_committed_readme_holds_the_committed_results_and_nothing_else():
    results, text = read_json(run_all.RESULTS), run_all.README.read_text(encoding="utf-8")
    for name, part in run_all.PARTS.items():
        assert f"<!-- {name}: generated -->\n{part(results)}\n{run_all.END}" in text
    assert run_all.findings(results["rows"]) == results["findings"]
    assert str(ROOT) not in run_all.RESULTS.read_text(encoding="utf-8")


def test_help_needs_no_faiss():
    program = """
import contextlib, importlib, sys
sys.modules["faiss"] = None
for name in ("data", "dense", "unified", "raw_bert", "compare", "run_all"):
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"recipes.{name}").main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count("usage:") == 6, done.stderr[-500:]


def test_without_faiss_a_search_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(TutorialError, match="pip install -r recipes/requirements.txt"):
        data.exact_index(np.zeros((2, 2)))


@pytest.mark.parametrize("recipe", [data, dense, unified, raw_bert, compare, run_all])
def test_every_recipe_has_a_help_text(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--help"])
    assert stop.value.code == 0
    assert recipe.__doc__.splitlines()[0] in capsys.readouterr().out


def test_an_error_ends_the_program_with_its_message():
    def fails():
        raise TutorialError("the remedy")

    with pytest.raises(SystemExit, match="Stopped: the remedy"):
        steps.run(fails)
    assert isinstance(steps.parser("x"), argparse.ArgumentParser)
