"""benchmarks/study.py: folds without leaks, choices that do not see what they report, resuming."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import study  # noqa: E402

from embedding_tutorial import checkpoints, finetune  # noqa: E402
from embedding_tutorial.assets import AssetError  # noqa: E402


def pair(query, code):
    return {"query": query, "pos_doc": code, "meta": {"task_id": 0}}


def entry(ranks_by_readout, seeds=(42,), queries=10):
    """A recipe's cells: fold f judges queries f, f + 5, …"""
    cells = {}
    for seed in seeds:
        for fold in range(study.FOLDS):
            own = list(range(fold, queries, study.FOLDS))
            ranks = {name: " ".join(str(r[i]) for i in own) for name, r in ranks_by_readout.items()}
            cells[f"{seed}-{fold}"] = {
                "queries": " ".join(map(str, own)),
                "ranks": ranks,
                "seconds": 60.0,
                "precision": "fp32",
            }
    return {"settings": {}, "cells": cells}


def test_folds_are_even_and_equal_texts_stay_together():
    pairs = [pair(f"q{i}", f"c{i}") for i in range(50)]
    pairs += [pair("q0", "other code"), pair("other query", "c1"), pair("other query", "third code")]
    folds = study.fold_numbers(pairs)
    assert folds[0] == folds[50] and folds[1] == folds[51] == folds[52]
    sizes = np.bincount(folds, minlength=5)
    assert sizes.sum() == 53 and sizes.max() - sizes.min() <= 3
    assert (folds == study.fold_numbers(pairs)).all()


def test_hard_negatives_are_never_right_answers(tiny_bert):
    pairs = [
        pair("add two numbers", "def add"),
        pair("add two numbers", "def plus"),
        pair("sort a list", "def sort"),
    ]
    rows = study.with_hard_negatives(pairs, tiny_bert, 1)
    assert rows[0]["neg"] == rows[1]["neg"] == ["def sort"]
    assert rows[2]["neg"][0] in ("def add", "def plus") and len(rows[2]["neg"]) == 1


def test_ranks_are_put_back_into_the_order_of_the_queries():
    ranks = list(range(1, 11))
    table = study.rank_table(entry({"last": ranks}, seeds=(42, 43)), "last")
    assert table.tolist() == [ranks, ranks]
    assert study.rank_table(entry({"last": ranks}), "no such readout") is None


def test_a_row_compares_query_by_query():
    base, tuned = [2] * 10, [1] * 10
    found = {"recipes": {"a": entry({"last": base}), "b": entry({"last": tuned})}}
    row = study.row_of(found, "b", against=[("base", "a", "last")])
    assert row["recall@1"][0] == row["mrr"][0] == 1.0 and row["mrr - base"] == (0.5, 0.5, 0.5)
    assert row["p base"] < 0.05 and row["seeds"] == 1 and row["queries"] == 10


def test_recipes_are_compared_on_the_seeds_that_both_have():
    lucky, other = entry({"last": [1] * 10}), entry({"last": [2] * 10})["cells"]
    lucky["cells"] |= {key.replace("42", "43"): cell for key, cell in other.items()}
    found = {"recipes": {"a": lucky, "b": entry({"last": [1] * 10, "mean of runs": [1] * 10})}}
    assert study.row_of(found, "b", "last", [("a", "a", "last")])["mrr - a"][0] == 0
    assert study.row_of(found, "b", "mean of runs", [("a", "a", "last")])["mrr - a"][0] == 0.25
    found["recipes"]["b"]["settings"] = {"epochs": 0}
    assert study.row_of(found, "b", "last", [("a", "a", "last")])["mrr - a"][0] == 0.25


def test_times_are_compared_in_the_same_precision_only():
    quick, slow = entry({"last": [1] * 10}), entry({"last": [1] * 10, "mean of runs": [1] * 10}, study.SEEDS)
    for key, cell in slow["cells"].items():
        cell |= {"seconds": 30.0, "precision": "bf16"} if key.startswith("42") else {"seconds": 120.0}
    assert study.time_ratio(slow, quick) == 2
    found = {"recipes": {"a": quick, "b": slow}}
    assert study.row_of(found, "b", "mean of runs", [("base", "a", "last")])["time / base"] == 6
    assert study.time_ratio(entry({}), {"cells": {}}) is None


def test_the_choice_does_not_see_the_fold_it_is_judged_on():
    # In fold 0 (queries 0 and 5) "b" is far better, everywhere else "a" is: fold 0 must be judged by "a".
    a = [9 if i % 5 == 0 else 1 for i in range(10)]
    b = [1 if i % 5 == 0 else 2 for i in range(10)]
    found = {"recipes": {"a": entry({"last": a}), "b": entry({"last": b})}}
    (recall, reciprocal), choices = study.chosen_elsewhere(found, [("a", "last"), ("b", "last")])
    assert choices[0] == ("a", "last") and reciprocal[0] == reciprocal[5] == 1 / 9 and recall[0] == 0


def test_a_readout_of_fewer_seeds_is_not_reported():
    found = {"recipes": {"plain": entry({"last": [1] * 10, "average": [1] * 10})}}
    cells = found["recipes"]["plain"]["cells"]
    cells |= entry({"last": [2] * 10}, seeds=(43,))["cells"]
    assert study.measured(found, "plain") and not study.measured(found, "plain", "average")
    del cells["43-4"]  # a seed that is not whole counts for nothing
    assert study.measured(found, "plain", "average")
    assert not study.measured(found, "default") and not study.measured(found, "plain", study.OURS)


def test_the_noise_of_seeds_is_pooled_within_recipes():
    noise = study.seed_noise({"a": np.array([0.8, 0.81, 0.82]), "b": np.array([0.4, 0.42, 0.44])})
    assert noise["sd"] == pytest.approx(((0.01**2 + 0.02**2) / 2) ** 0.5)
    assert noise["standard error"] == pytest.approx(noise["sd"] * (2 / 3) ** 0.5)
    assert noise["widest"] == ["b", 0.4, 0.44] and noise["recipes"] == 2


def test_a_verdict_that_needs_the_other_seeds_is_named():
    plain, other, same = entry({"last": [2] * 10}), entry({"last": [2] * 10}), entry({"last": [1] * 10})
    for recipe, ranks in ((plain, [2] * 10), (other, [1] * 10), (same, [1] * 10)):
        recipe["cells"] |= entry({"last": ranks}, seeds=(43,))["cells"]
    found = {"recipes": {"plain": plain, "other": other, "same": same}}
    rows = [study.row_of(found, name, against=[("plain", "plain", "last")]) for name in found["recipes"]]
    assert study.otherwise_with_one_seed(found, rows) == {"other": (0, 0, 0)}


def test_averages_and_lines_between_weights():
    import torch

    one, three = {"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}
    assert study.average([one, three])["w"].tolist() == [2, 2]
    assert finetune.between(one, three, 0.25)["w"].tolist() == [1.5, 1.5]


def test_ndcg_of_the_base_model_is_the_one_that_mteb_reports():
    """benchmarks/results/predecessor.json and notebook 02 print 0.828 for English."""
    encoder = finetune.Encoder(study.pocket_model_path()).eval()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{study.general_ndcg(encoder):.3f}" in text


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch, capsys):
    data = tmp_path / "sanitized-mbpp.json"
    data.write_text("[]", encoding="utf-8")
    ran = []

    def cell(task):
        ran.append(task[:3])
        return {"queries": str(task[2]), "ranks": {"last": "1"}, "seconds": 1.0, "train_pairs": 3}

    class Here:
        """Runs what is submitted at once, in this process."""

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return False

        def submit(self, function, task):
            future = study.concurrent.futures.Future()
            future.set_result(function(task))
            return future

    monkeypatch.setattr(study, "run_cell", cell)
    monkeypatch.setattr(study.concurrent.futures, "ProcessPoolExecutor", Here)
    once = functools.partial(study.Recipe, seeds=(42,))
    monkeypatch.setattr(study, "RECIPES", {"a": once(), "b": once(config={"epochs": 2})})
    out = tmp_path / "study.json"
    study.measure(["a"], data, out, 1)
    assert len(ran) == 5 and "5/5 a, seed 42" in capsys.readouterr().out
    study.measure(["a", "b"], data, out, 1)
    assert len(ran) == 10 and {name for name, *_ in ran[5:]} == {"b"}
    monkeypatch.setattr(study, "RECIPES", {"a": once(config={"epochs": 3})})
    study.measure(["a"], data, out, 1)
    assert len(ran) == 15 and "measured again" in capsys.readouterr().out
    assert len(checkpoints.read_json(out)["recipes"]["b"]["cells"]) == 5
    data.write_text("[1]", encoding="utf-8")
    with pytest.raises(AssetError, match="another sanitized-mbpp.json"):
        study.measure(["a"], data, out, 1)


def test_missing_data_is_named(tmp_path):
    with pytest.raises(AssetError, match="--data FILE"):
        study.find_data(tmp_path / "nothing.json")


def test_settings_are_json_and_tell_recipes_apart():
    one, two = (
        study.settings_of(recipe, study.POCKET)
        for recipe in (study.Recipe(), study.Recipe(config={"temperature": 0.1}))
    )
    assert json.loads(json.dumps(one)) == one and one != two


def test_rewrites_are_training_pairs_only_and_never_what_is_judged():
    rewrites = finetune.read_rewrites(study.rewrites_of(study.POCKET))
    task, lists = next(iter(rewrites.items()))
    pairs = [pair("own words", "own code") | {"meta": {"task_id": task}}]
    judged = {lists["other_queries"][0], lists["other_pos_docs"][1]}
    (found,) = study.rewritten(pairs, study.BOTH, judged, study.POCKET)
    assert found["other_queries"] == lists["other_queries"][1:]
    assert found["other_pos_docs"] == [t for t in lists["other_pos_docs"] if t not in judged]
    (found,) = study.rewritten(pairs, study.BOTH[:1], set(), study.POCKET)
    assert "other_pos_docs" not in found and found["other_queries"] == lists["other_queries"]


def test_the_faulty_schedule_is_the_one_that_is_described(tiny_bert):
    """Micro-batches of 80, a step after every second: with 5 of them 2 steps an epoch, and one left over."""
    pairs = [pair(f"query {i}", f"def code_{i}(): pass") for i in range(10)]
    config = finetune.TrainConfig(epochs=10, batch_size=4, micro_batch=2, max_length=32)
    run = finetune.start_run(tiny_bert, lambda e: finetune.tokenize_pairs(e, pairs), config, "cpu")
    rates = []
    for epoch in range(10):
        study.leaking_epoch(run, epoch)
        rates.append(run.optimizer.param_groups[0]["lr"])
        assert any(w.grad is not None and w.grad.any() for w in run.encoder.parameters())
    assert run.update == 20 and len(run.history["step_losses"]) == 50
    assert rates[-1] > 0.1 * max(rates), "the schedule counts 25 updates, so that it ends far from 0"


def test_rewrites_that_nobody_wrote_are_named(tmp_path):
    with pytest.raises(AssetError, match="--only"):
        study.rewrites_of(tmp_path / "unknown.json")


def test_each_data_file_has_figures_and_a_section_of_its_own(tmp_path):
    readme, figures = tmp_path / "README.md", tmp_path / "images"
    readme.write_text("<!-- study_x:start -->\n<!-- study_x:end -->\n", encoding="utf-8")
    figures.mkdir()
    base, tuned = entry({"last": [2] * 10}), entry({"last": [1] * 10, "epoch 1": [1] * 10}, study.SEEDS)
    found = {"data": "x.json", "machines": ["here"], "recipes": {"none": base, "default": tuned}}
    study.report(found, tmp_path / "study_x.json", figures, readme)
    text = readme.read_text(encoding="utf-8")
    assert [f.name for f in figures.iterdir()] == ["study_x_recipes.png"] and "study_x_recipes.png" in text
    assert "--data data/x.json" in text and "+0.500 [+0.500, +0.500]" in text


def test_the_readme_quotes_the_study():
    """Each figure that the README takes from study.json and study_pocket.json, as it stands there today."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("**", "").split())
    rows = {}
    for file in ("study.json", "study_pocket.json"):
        summary = checkpoints.read_json(ROOT / "benchmarks" / "results" / file)["summary"]
        rows[file] = {(row["recipe"], row["readout"]): row for row in summary["rows"]}
    ours, pocket = (found["default", study.OURS] for found in rows.values())
    none, before = (found["none", "last"] for found in rows.values())
    original, fault, accumulated = (
        rows["study.json"][name, "last"] for name in ("original", "faulty schedule", "accumulation")
    )
    longer, harder = (rows["study.json"][name, "halfway"] for name in ("10 epochs", "hard negatives"))
    last, halfway = (rows["study.json"]["default", readout] for readout in ("last", "halfway"))
    both = [f"{row['recall@1'][0]:.3f} and {row['mrr'][0]:.3f}" for row in (none, original)]
    signed = functools.partial(study.shown, sign=True)
    for quote in (
        f"Recall@1 {ours['recall@1'][0]:.3f} and MRR {study.shown(ours['mrr'])}",
        f"(no training: {both[0]}; the original recipe: {both[1]}; paired",
        f"difference of the MRRs {signed(ours['mrr - original'])}",
        f"nDCG@10 {none['general']:.3f} → {ours['general']:.3f}",
        f"rewrites of the training problems ({signed(last['mrr - without rewrites'])}",
        f"halfway back to the base ({signed(halfway['mrr - default, last'])})",
        f"({signed(ours['mrr - default, halfway'])} more)",
        f"5 × 16 against 80 at once {signed(accumulated['mrr - plain'])} MRR",
        f"the fault costs no MRR ({signed(fault['mrr - original'])} with it",
        f"ten epochs ({signed(longer['mrr - plain, halfway'])}) and",
        f"hard negatives ({signed(harder['mrr - plain, halfway'])}) are ahead",
        *(
            f"{signed(pocket[f'{key} - base'])} {name} ({before[key][0]:.3f} → {pocket[key][0]:.3f})"
            for key, name in (("mrr", "MRR"), ("recall@1", "Recall@1"))
        ),
    ):
        assert quote in text, quote
