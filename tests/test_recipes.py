"""The recipes without torchrun: data, output folders, commands, checks, comparison."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from embedding_tutorial import profiles
from embedding_tutorial.assets import pocket_model_path
from embedding_tutorial.encoder import Encoder, embed
from embedding_tutorial.files import ROOT, TutorialError, read_json, write_json
from embedding_tutorial.finetune import evaluate as notebook_evaluate
from embedding_tutorial.finetune import rank_of_positive, split_pairs
from embedding_tutorial.pairs import read_mbpp, write_pairs
from recipes import compare, data, dense, engine, models, raw_bert, run_all, steps, unified
from recipes.engine import Training


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
    rows = data.random_negatives(pairs, 5)
    for row in rows:
        assert len(set(row["neg"])) == 5
        assert not set(row["neg"]) & data.positives_of(pairs)[row["query"]]
    assert data.random_negatives(pairs, 5) == rows
    assert data.random_negatives(pairs, 5, seed=1) != rows
    with pytest.raises(TutorialError, match="Row 1 can have 5 negatives, not 6"):
        data.random_negatives(pairs, 6)


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
    rows, filled = data.hard_negatives(pairs, None, count=2, window=(2, 4), margin=0.1)
    assert set(rows[0]["neg"]) == {"p3", "p4"}  # p1 is rank 1; p2 is closer than the margin to the positive
    assert all(row["pos"][0] not in row["neg"] and len(set(row["neg"])) == 2 for row in rows)
    # Nothing scores below p5's own positive: its negatives are random fill-ins, and are counted.
    assert filled >= 2
    with pytest.raises(TutorialError, match="ranks 2 to 3 do not hold 3"):
        data.hard_negatives(pairs, None, count=3, window=(2, 3))


def test_hard_negatives_stay_below_a_share_of_the_positive(monkeypatch, tmp_path):
    # Scores of q0: its positive 0.90; near 0.87 (0.966 of it), edge 0.85 (0.944), then far ones. The corpus
    # holds "near" and "edge", which are nobody's answers.
    scores = {"p0": 0.90, "near": 0.87, "edge": 0.85, "p1": 0.50, "p2": 0.10}
    queries = {"q0": 0.0, "q1": 170.0, "q2": 190.0}
    on_a_line(monkeypatch, queries | {t: math.degrees(math.acos(s)) for t, s in scores.items()})
    pairs = [{"query": f"q{i}", "pos_doc": f"p{i}"} for i in range(3)]

    def mined(**options):
        found, _ = data.hard_negatives(pairs, None, 1, hardest=True, corpus=["near", "edge"], **options)
        return found[0]["neg"]

    assert mined(margin=-2) == mined(margin=0) == ["near"]
    assert mined(margin=0, share=0.95) == mined(margin=0.04) == ["edge"]
    assert mined(margin=0.04, share=0.9) == mined(margin=0.1, share=0.95) == ["p1"]
    # q1 points away from everything: its positive's score is negative, and the share still lies below it.
    found, _ = data.hard_negatives(pairs, None, 1, margin=0, share=0.95, hardest=True)
    own, other = (math.cos(math.radians(170 - math.degrees(math.acos(s)))) for s in (0.50, 0.10))
    assert own < 0 and (other > own) and found[1]["neg"] == ["p0"]

    file = tmp_path / "corpus.jsonl"
    file.write_text('{"text": "near"}\n{"pos_doc": "edge"}\n')
    assert data.corpus_texts(file) == ["near", "edge"]
    file.write_text('{"text": "near"}\n{"title": "edge"}\n')
    with pytest.raises(TutorialError, match="corpus.jsonl, row 2: no field 'text' or 'pos_doc'"):
        data.corpus_texts(file)


def test_teacher_scores_are_cosines_over_temperature(monkeypatch):
    on_a_line(monkeypatch, {"q": 0, "p": 0, "n": 60})
    row = data.teacher_scores([{"query": "q", "pos": ["p"], "neg": ["n"]}], None, temperature=0.5)[0]
    assert row["pos_scores"] == [2.0] and row["neg_scores"] == [1.0]


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
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    good = {"query": "q", "pos": ["p"], "neg": ["n"]}
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (good, good | change)))
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


def test_the_data_recipe_as_a_command(tmp_path, tiny, capsys):
    write_pairs(tmp_path / "pairs.jsonl", make_pairs())
    common = ["--train", str(tmp_path / "pairs.jsonl")]
    # notebook 01's files are there or both absent; here they stand in a folder of their own
    write_pairs(tmp_path / "val.jsonl", make_pairs(2))
    data.main(["random", *common, "--count", "3", "--output", str(tmp_path / "random")])
    write_pairs(tmp_path / "corpus.jsonl", make_pairs(20)[16:])
    data.main(["hard", *common, "--count", "3", "--window", "1", "12", "--margin", "0", "--model", str(tiny),
               "--share", "0.99", "--corpus", str(tmp_path / "corpus.jsonl"),
               "--output", str(tmp_path / "hard")])  # fmt: skip
    file = tmp_path / "hard" / "train.jsonl"
    data.main(["teacher", "--data", str(file), "--model", str(tiny), "--output", str(tmp_path / "teacher")])
    rows = data.check_file(tmp_path / "teacher" / "train.jsonl", group=2, scores=True)
    assert len(rows) == 16 and all(len(row["neg_scores"]) == 3 for row in rows)
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


def test_a_foreign_folder_is_refused_and_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(TutorialError, match="no recipe made it"):
        steps.open_step(tmp_path, {})
    assert (tmp_path / "mine.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert steps.open_step(tmp_path / "empty", {}) is None


# ---------------------------------------------------------------- commands and checks


def line_of(t, **changes):
    values = {"cpu": True, **changes}
    return " ".join(engine.flags(t, "M", "T.jsonl", "W", 4, 0.5, **values))


def test_the_command_line_knows_the_traps():
    line = line_of(Training())
    assert "--use_cpu" in line and "--negatives_cross_device" in line and "--warmup_steps 0.1" in line
    assert "warmup_ratio" not in line and "overwrite_output_dir" not in line and "resume" not in line
    assert "--use_cpu" not in line_of(Training(precision="bf16"), cpu=False)
    sub = Training(engine="m3", sub_batch=4, passage_length=64, self_distill_from=3, freeze_positions=True)
    line = line_of(sub)
    assert "--sub_batch_size 4 --pad_to_multiple_of 64" in line and "--fix_position_embedding" in line
    assert "--use_self_distill True --self_distill_start_step 3" in line
    assert "--kd_loss_type m3_kd_loss" in line_of(Training(engine="m3", teacher=True))
    assert engine.clip_at(Training(), 4) == 0.25 and engine.clip_at(Training(cross_device=False), 4) == 1


@pytest.mark.parametrize(
    ("recipe", "words", "model"),
    [
        (dense, ["--hard"], "models/bge-m3"),
        (unified, [], "models/bge-m3"),
        (unified, ["--teacher", "minilm"], "models/bge-m3"),
        (raw_bert, ["--negatives", "50"], "bert-base-uncased"),
    ],
)
def test_the_gpu_command(recipe, words, model, capsys):
    recipe.main([*words, "--gpu-command"])
    text = capsys.readouterr().out
    assert "GPUS=2 BATCH=" in text and "GPUS=8 BATCH=" in text and "CLIP=0.125" in text
    assert f"--model_name_or_path {model} " in text and "--bf16" in text and "--use_cpu" not in text
    assert "recipes/deepspeed_stage1.json" in text and str(ROOT) not in text
    if words == ["--negatives", "50"]:
        assert "--train_group_size 51" in text


def test_the_deepspeed_configuration_keeps_parameters_whole():
    config = json.loads(engine.DEEPSPEED.read_text())
    assert config["zero_optimization"]["stage"] == 1  # stage 3 would part them and with them the checksums


@pytest.mark.parametrize(
    ("t", "options", "message"),
    [
        (Training(batch=9), {}, "does not divide"),
        (Training(batch=64), {"cpu": False, "processes": 64}, "GPUs here"),
        (Training(batch=8), {"deepspeed": "x.json"}, "DeepSpeed is not installed"),
        (Training(batch=32), {}, "fewer than one batch"),
        (Training(batch=8, group=2), {}, "row 1: 'neg' is empty"),
        (Training(batch=8, teacher=True), {}, "'pos_scores'"),
        (Training(batch=8, model="no/such/model"), {}, "nor a folder"),
    ],
)
def test_what_would_fail_fails_before_torchrun(tmp_path, tiny, t, options, message):
    file = tmp_path / "train.jsonl"
    rows = [{"query": p["query"], "pos": [p["pos_doc"]], "neg": []} for p in make_pairs()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if t.model == "minilm":
        t = Training(**{**vars(t), "model": str(tiny)})
    with pytest.raises(TutorialError, match=message):
        engine.train(t, file, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


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
    for name, change in (("not finite", {"not_finite": ["w"]}), ("no parameter", {"after": "a"})):
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


def test_a_start_model_is_announced(monkeypatch, capsys):
    assert raw_bert.start_model("auto", cpu=True) == "small"
    assert "random weights" in capsys.readouterr().out
    monkeypatch.setattr(raw_bert.network, "can_reach_hub", lambda: (True, "the hub answers"))
    assert raw_bert.start_model("auto", cpu=False) == "bert-base-uncased"
    assert "the hub answers" in capsys.readouterr().out


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_bert_base_needs_a_network(tmp_path, monkeypatch, switch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(switch, "1")
    with pytest.raises(TutorialError, match="--start small"):
        models.bert_base(tmp_path / "bert-base-uncased")


# ---------------------------------------------------------------- comparison


def test_faiss_gives_the_ranks_of_the_notebook(tiny):
    pairs = make_pairs(30)
    pairs.append({"query": "another", "pos_doc": pairs[0]["pos_doc"]})  # a code that two queries share
    theirs = notebook_evaluate(Encoder(tiny), pairs[:12], candidates=pairs)
    ours = compare.compare([("tiny", str(tiny))], pairs[:12], pairs)
    assert ours["passages"] == 30
    assert ours["rows"][0]["ranks"] == theirs["ranks"].tolist()
    assert ours["rows"][0]["mrr"][0] == pytest.approx(theirs["mrr"])


def test_ties_count_against_the_model():
    q, p = np.array([[1.0, 0.0]]), np.array([[0.5, 0.0], [0.5, 0.0], [0.1, 0.0]])
    ranks = rank_of_positive(compare.faiss_scores(q, p), [0])
    assert ranks.tolist() == [2]


def test_metrics_of_known_ranks():
    row = compare.row_of("m", "dense", np.array([1, 2, 11]), np.array([1, 2, 11]))
    assert row["recall@1"][0] == pytest.approx(1 / 3)
    assert row["recall@10"][0] == pytest.approx(2 / 3)
    assert row["mrr"][0] == pytest.approx((1 + 1 / 2 + 1 / 11) / 3)
    assert row["ndcg@10"][0] == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert row["mrr_gain"][0] == 0 and row["p"] == 1
    low, high = row["mrr"][1:]
    assert low < row["mrr"][0] < high


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


def test_the_comparison_as_a_command(tmp_path, tiny, capsys):
    pairs = make_pairs()
    write_pairs(tmp_path / "train.jsonl", pairs[:10])
    write_pairs(tmp_path / "val.jsonl", pairs[10:])
    m3 = models.pocket_m3(tmp_path / "m3", [text for pair in pairs for text in pair.values()], base=tiny)
    words = ["--checkpoint", f"tiny={tiny}", "--checkpoint", f"tiny M3={m3}",
             "--train", str(tmp_path / "train.jsonl"), "--validation", str(tmp_path / "val.jsonl"),
             "--output", str(tmp_path / "out")]  # fmt: skip
    compare.main(words)
    results = read_json(tmp_path / "out" / "results.json")
    modes = [row["mode"] for row in results["rows"]]
    assert modes == ["dense", "dense", "sparse", "ColBERT", "weighted sum"]
    assert (
        results["rows"][0]["ranks"] == results["rows"][1]["ranks"]
    )  # the heads leave the dense vectors alone
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n") == 7 and "tiny M3, ColBERT" in table
    capsys.readouterr()
    compare.main(words)
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(TutorialError, match="NAME=MODEL"):
        compare.main(["--checkpoint", str(tiny), *words[4:]])


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
    assert "no difference that these queries can show" in run_all.findings(rows)[0]
    rows = [row("small BERT, 10 negatives", better), row("small BERT, 50 negatives", worse)]
    assert run_all.findings(rows)[0].endswith("worse.")


def test_every_question_asks_about_rows_that_are_made():
    names = {*run_all.MODELS, "notebook 01"}
    assert {name for _, *sides in run_all.QUESTIONS for name, _ in sides} <= names


def test_the_readme_keeps_what_is_outside_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{run_all.START}\nold\n{run_all.END}\nafter\n")
    for text in ("new", "newer"):
        run_all.write_readme(f"{run_all.START}\n{text}\n{run_all.END}", path)
        assert path.read_text() == f"before\n{run_all.START}\n{text}\n{run_all.END}\nafter\n"


def test_results_are_gathered_from_the_steps(tmp_path, monkeypatch, capsys):
    step = {
        "processes": 2,
        "updates": 3,
        "cpu_seconds_of_one_process": 3.5,
        "wall_seconds": 5.0,
        "peak_memory_gb_of_one_process": 1.0,
        "first_loss": 2.0,
        "last_loss": 1.0,
        "losses": [2.0, 1.0],
    }
    for name in (*run_all.TRAINED, "dense.previous"):
        write_json(tmp_path / "output" / name / "done.json", step)
        write_json(tmp_path / "output" / name / "recipe.json", {"precision": "fp32"})
    ranks = {"MiniLM, ready-made": [2, 2, 1], "dense": [1, 2, 1]}
    reference = np.array(ranks["MiniLM, ready-made"])
    rows = [
        {**compare.row_of(name, "dense", np.array(r), reference), "heads": False} for name, r in ranks.items()
    ]
    write_json(
        tmp_path / "output" / "comparison" / "results.json",
        {"queries": 3, "passages": 9, "reference": "MiniLM, ready-made", "rows": rows},
    )
    monkeypatch.setattr(steps, "OUTPUT", tmp_path / "output")
    for name in ("RESULTS", "README", "FIGURE"):
        monkeypatch.setattr(run_all, name, tmp_path / getattr(run_all, name).name)
    run_all.README.write_text(f"above\n{run_all.START}\n{run_all.END}\nbelow\n")
    run_all.collect()
    results = read_json(run_all.RESULTS)
    assert results["wall_seconds"] == 5.0 * len(run_all.TRAINED)  # what was moved aside does not count
    assert results["runs"]["dense"]["updates"] == 3 and "losses" not in results["runs"]["dense"]
    text = run_all.README.read_text(encoding="utf-8")
    assert text.startswith("above") and text.endswith("below\n") and run_all.report(results) in text
    assert "Training at all (dense): MRR 0.667 → 0.833" in text
    assert run_all.FIGURE.stat().st_size > 10_000


def test_the_committed_readme_holds_the_committed_results_and_nothing_else():
    results = read_json(run_all.RESULTS)
    assert run_all.report(results) in run_all.README.read_text(encoding="utf-8")
    assert run_all.findings(results["rows"]) == results["findings"]
    assert str(ROOT) not in run_all.RESULTS.read_text(encoding="utf-8")


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
