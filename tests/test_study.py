"""benchmarks/study.py, study_report.py: folds without leaks, choices that do not see what they report."""

import concurrent.futures
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import study  # noqa: E402
import study_report as sr  # noqa: E402

from embedding_tutorial import finetune, training  # noqa: E402
from embedding_tutorial.encoder import Encoder  # noqa: E402
from embedding_tutorial.files import TutorialError, read_json  # noqa: E402
from embedding_tutorial.pairs import read_rewrites  # noqa: E402


def pair(query, code):
    return {"query": query, "pos_doc": code, "meta": {"task_id": 0}}


def entry(ranks_by_readout, seeds=(42,), queries=10, **settings):
    """A recipe's cells: fold f judges queries f, f + 5, …"""
    cells = {}
    for seed in seeds:
        for fold in range(sr.FOLDS):
            own = list(range(fold, queries, sr.FOLDS))
            ranks = {name: " ".join(str(r[i]) for i in own) for name, r in ranks_by_readout.items()}
            shared = {"queries": " ".join(map(str, own)), "seconds": 60.0, "precision": "fp32"}
            cells[f"{seed}-{fold}"] = shared | {"ranks": ranks}
    return {"settings": settings, "cells": cells}


def two_seeds(first, second, readout="last"):
    found = entry({readout: first})
    found["cells"] |= entry({readout: second}, seeds=(43,))["cells"]
    return found


def results(data="x.json", **recipes):
    return sr.Results({"data": data, "recipes": recipes})


def test_folds_are_even_and_equal_texts_stay_together():
    pairs = [pair(f"q{i}", f"c{i}") for i in range(50)]
    pairs += [pair("q0", "other code"), pair("other query", "c1"), pair("other query", "third code")]
    folds = study.fold_numbers(pairs)
    assert folds[0] == folds[50] and folds[1] == folds[51] == folds[52]
    assert np.ptp(np.bincount(folds, minlength=5)) <= 3 and len(folds) == 53
    assert (folds == study.fold_numbers(pairs)).all()


def test_hard_negatives_are_never_right_answers(tiny_bert, capsys):
    pairs = [
        pair("add two numbers", "def add"),
        pair("add two numbers", "def plus"),
        pair("sort a list", "def sort"),
    ]
    rows = study.with_hard_negatives(pairs, tiny_bert, 1)
    assert rows[0]["neg"] == rows[1]["neg"] == ["def sort"]
    assert rows[2]["neg"][0] in ("def add", "def plus") and len(rows[2]["neg"]) == 1
    assert not capsys.readouterr().out
    below = study.with_hard_negatives(pairs, tiny_bert, 1, below=0.95)
    assert all(len(row["neg"]) == 1 and row["pos_doc"] not in row["neg"] for row in below)


def test_renamed_functions_do_not_give_the_code_away():
    code = "def add(a):\n    return helper(add(a))\n\ndef helper(b):\n    return b"
    (row,) = study.renamed_codes([pair("own words", code)])
    assert row["query"] == "own words" and "f1(f0(a))" in row["pos_doc"] and "add" not in row["pos_doc"]


def test_ranks_are_put_back_into_the_order_of_the_queries():
    ranks = list(range(1, 11))
    found = results(a=entry({"last": ranks}, seeds=(42, 43)))
    assert (1 / found.scores.loc["a", "mrr"]).round().to_numpy().tolist() == [ranks, ranks]


def test_a_row_compares_query_by_query():
    found = results(base=entry({"last": [2] * 10}), b=entry({"last": [1] * 10}, soup=True))
    row = found.row("b", against=["base"])
    assert row["recall@1"][0] == row["mrr"][0] == 1.0 and row["mrr - base"] == (0.5, 0.5, 0.5)
    assert row["p base"] < 0.05 and row["seeds"] == 1 and row["queries"] == 10 and row["minutes"] == 1
    assert row["weights"] == "fine-tuned" and found.row("base")["weights"] == "base"


def test_recipes_are_compared_on_the_seeds_that_both_have():
    lucky, one = two_seeds([1] * 10, [2] * 10), entry({"last": [1] * 10, "mean of runs": [1] * 10})
    found = results(base=entry({"last": [1] * 10}), a=lucky, b=one)
    assert found.interval("b", "a")[0] == 0
    assert found.interval("b / mean of runs", "a")[0] == found.interval("base", "a")[0] == 0.25
    assert found.row("b / mean of runs")["seeds"] == found.row("b / mean of runs")["minutes"] == 3


def test_the_choice_does_not_see_the_fold_it_is_judged_on():
    # In fold 0 (queries 0 and 5) "b" is far better, everywhere else "a" is: fold 0 must be judged by "a".
    a = [9 if i % 5 == 0 else 1 for i in range(10)]
    b = [1 if i % 5 == 0 else 2 for i in range(10)]
    found = sr.across_recipes(results(a=entry({"last": a}), b=entry({"last": b})), {"a": {}, "b": {}})
    chosen = found["chosen on the other folds"]
    assert chosen["choices"] == ["a / fine-tuned"] * 5 and chosen["recall@1"][0] == 0.8
    assert chosen["mrr"][0] == pytest.approx((2 / 9 + 8) / 10)
    assert "seeds" not in found and "best epoch" not in found


def test_the_best_epoch_is_picked_in_a_way_that_flatters_and_in_one_that_does_not():
    epochs = {"epoch 1": [1 if i % 5 == 0 else 4 for i in range(10)], "epoch 2": [2] * 10, "last": [2] * 10}
    found = sr.across_recipes(results(a=entry(epochs)), {"a": {}})["best epoch"]["a"]
    assert found["on the same queries"] == pytest.approx({"recall@1": 0.2, "mrr": 0.6})
    assert found["on the other folds"] == found["last epoch"] == {"recall@1": 0, "mrr": 0.5}


def test_a_readout_of_fewer_seeds_is_not_reported():
    plain = entry({"last": [1] * 10, "average": [1] * 10})
    plain["cells"] |= entry({"last": [2] * 10}, seeds=(43,))["cells"]
    assert set(results(plain=plain).mrr.index) == {"plain"}
    del plain["cells"]["43-4"]  # a seed that is not whole counts for nothing
    assert set(results(plain=plain).mrr.index) == {"plain", "plain / average"}


def test_the_noise_of_seeds_is_pooled_within_recipes():
    places = pd.MultiIndex.from_product([["a", "b"], [42, 43, 44]], names=["recipe", "seed"])
    noise = sr.seed_noise(pd.Series([0.8, 0.81, 0.82, 0.4, 0.42, 0.44], index=places))
    assert noise["sd"] == pytest.approx(((0.01**2 + 0.02**2) / 2) ** 0.5)
    assert noise["standard error"] == pytest.approx(noise["sd"] * (2 / 3) ** 0.5)
    assert noise["widest"] == ["b", 0.4, 0.44] and noise["recipes"] == 2


def test_a_verdict_that_needs_the_other_seeds_is_named():
    plain, other, same = (two_seeds([2] * 10, second) for second in ([2] * 10, [1] * 10, [2] * 10))
    found = results(plain=plain, other=other, same=same)
    found = sr.across_recipes(found, {"plain": {}, "other": {}, "same": {}})
    assert found["seeds"]["otherwise with one"] == {"other": (0, 0, 0)} and found["seeds"]["recipes"] == 3


def test_a_costlier_row_stays_only_if_it_is_ahead_on_both_data_sets():
    one, better = {"last": [2] * 10, "halfway": [2] * 10}, {"last": [1] * 10, "halfway": [1] * 10}
    alpha = "mean of runs, alpha 0.5"
    ahead, level = ({sr.TEN_EPOCHS: entry(one | {alpha: [rank] * 10})} for rank in (1, 2))
    studies = [
        results("one", **ahead, rewrites=entry(better | {alpha: [1] * 10})),
        results("two", **level, rewrites=entry(better)),
    ]
    rule = sr.default_rule(studies)
    assert [row["stays"] for row in rule.values()] == [False, True, None]
    assert rule["three runs"]["mrr - one run"] == {"one": (0.5, 0.5, 0.5), "two": (0, 0, 0)}


def test_ndcg_of_the_base_model_is_the_one_that_mteb_reports():
    """benchmarks/results/predecessor.json and notebook 02 print 0.828 for English."""
    encoder = Encoder(study.pocket_model_path()).eval()
    assert f"{study.general_ndcg(encoder):.3f}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch, capsys):
    data, out, ran = tmp_path / "sanitized-mbpp.json", tmp_path / "study.json", []
    data.write_text("[]", encoding="utf-8")

    def cell(task):
        ran.append(task[:3])
        return {"queries": str(task[2]), "ranks": {"last": "1"}, "seconds": 1.0, "train_pairs": 3}

    monkeypatch.setattr(study, "run_cell", cell)
    pool = concurrent.futures.ThreadPoolExecutor  # here, where the replacement is seen
    monkeypatch.setattr(study.concurrent.futures, "ProcessPoolExecutor", lambda n, mp_context: pool(n))
    monkeypatch.setattr(study, "SEEDS", (42,))
    monkeypatch.setattr(study, "RECIPES", {"a": study.Recipe(), "b": study.Recipe(config={"epochs": 2})})
    study.measure(["b"], data, out)
    assert len(ran) == 5 and "5/5 b, seed 42" in capsys.readouterr().out
    study.measure(["a", "b"], data, out)
    assert len(ran) == 10 and {name for name, *_ in ran[5:]} == {"a"}
    assert list(read_json(out)["recipes"]) == ["a", "b"], "in the order of RECIPES"
    monkeypatch.setattr(study, "RECIPES", {"a": study.Recipe(config={"epochs": 3})})
    study.measure(["a"], data, out)
    assert len(ran) == 15 and "measured again" in capsys.readouterr().out
    assert len(read_json(out)["recipes"]["b"]["cells"]) == 5
    data.write_text("[1]", encoding="utf-8")
    with pytest.raises(TutorialError, match="another sanitized-mbpp.json"):
        study.measure(["a"], data, out)


def test_settings_are_json_and_tell_recipes_apart():
    recipes = study.Recipe(), study.Recipe(config={"temperature": 0.1})
    one, two = (study.settings_of(recipe, study.common.POCKET_PAIRS) for recipe in recipes)
    assert json.loads(json.dumps(one)) == one and one != two


def test_rewrites_are_training_pairs_only_and_never_what_is_judged():
    data = study.common.POCKET_PAIRS
    task, lists = next(iter(read_rewrites(study.rewrites_of(data)).items()))
    rows = [pair("own words", "own code") | {"meta": {"task_id": task}}]
    judged = [pair(lists["other_queries"][0], lists["other_pos_docs"][1])]
    (found,) = study.training_pairs(study.RECIPES["rewrites"], rows, judged, data, None)
    assert found["other_queries"] == lists["other_queries"][1:]
    assert lists["other_pos_docs"][1] not in found["other_pos_docs"]
    (found,) = study.training_pairs(study.Recipe(rewrites=study.BOTH[:1]), rows, [], data, None)
    assert "other_pos_docs" not in found and found["other_queries"] == lists["other_queries"]
    with pytest.raises(TutorialError, match="--only"):
        study.rewrites_of("unknown.json")


def test_a_smaller_part_of_the_pairs_lies_within_a_larger_one():
    rows = [pair(f"q{i}", f"c{i}") | {"meta": {"task_id": i}} for i in range(300)]

    def drawn(count, seed):
        found = study.training_pairs(study.Recipe(pairs=count), rows, [], None, None, seed)
        return {row["query"] for row in found}

    assert len(drawn(20, 42)) == 20 and drawn(20, 42) < drawn(40, 42) and drawn(20, 42) != drawn(20, 43)
    config = study.config_of(study.RECIPES["20 pairs"], 42, 20, "fp32")
    assert config.batch_size == 20 and config.epochs == 5


def test_the_curves_are_drawn_where_their_rows_are_measured(tmp_path, monkeypatch):
    recipes = {"base": entry({"last": [4] * 10}), "default": entry({"last": [1] * 10, "halfway": [1] * 10})}
    assert sr.how_much_data(results(**recipes), tmp_path / "x.png") is None
    for count in sr.SIZES:
        recipes[f"{count} pairs"] = entry({"last": [4] * 10, "halfway": [2] * 10})
    found = sr.how_much_data(results(**recipes), tmp_path / "size.png")
    assert (
        "From 20 to 341 pairs each doubling gives +0.122 [+0.122, +0.122] MRR" in found
        and "341 pairs against none: +0.750" in found
    )
    assert sr.quality_for_minutes(results(**recipes), tmp_path / "x.png") is None
    for place in sr.EPOCHS.values():
        recipes[place] = entry({"last": [2] * 10, "halfway": [1] * 10})
    found = sr.quality_for_minutes(results(**recipes), tmp_path / "minutes.png")
    assert "5 epochs (1.1 min) +0.000 [+0.000, +0.000]" in found
    assert sorted(f.name for f in tmp_path.iterdir()) == ["minutes.png", "size.png"]


def test_the_faulty_schedule_is_the_one_that_is_described(tiny_bert):
    """Micro-batches of 80, a step after every second: with 5 of them 2 steps an epoch, and one left over."""
    pairs = [pair(f"query {i}", f"def code_{i}(): pass") for i in range(10)]
    config = finetune.TrainConfig(epochs=10, batch_size=4, micro_batch=2, max_length=32)
    run = training.start_run(tiny_bert, lambda e: training.tokenize_pairs(e, pairs), config, "cpu")
    rates = []
    for epoch in range(10):
        study.leaking_epoch(run, epoch)
        rates.append(run.optimizer.param_groups[0]["lr"])
        assert any(w.grad is not None and w.grad.any() for w in run.encoder.parameters())
    assert run.update == 20 and len(run.history["step_losses"]) == 50
    assert rates[-1] > 0.1 * max(rates), "the schedule counts 25 updates, so that it ends far from 0"


def test_the_weights_of_a_cell(tiny_bert, monkeypatch):
    pairs = [pair(f"query {i}", f"def code_{i}(): pass") for i in range(6)]
    monkeypatch.setattr(study, "SEEDS", (42, 43))
    recipe = study.Recipe(config={"epochs": 3, "batch_size": 3}, soup=True, every_epoch=True)
    (first, _), (found, losses) = (
        study.weights_of_cell(recipe, study.config_of(recipe, seed, 6, "fp32"), tiny_bert, pairs)
        for seed in (42, 43)
    )
    assert len(losses) == 6 and set(sr.SOUPS) & set(first) == set() and set(sr.SOUPS) < set(found)
    name = max(found["last"], key=lambda key: found["last"][key].numel())
    assert found["mean of runs"][name].allclose((first["last"][name] + found["last"][name]) / 2)
    base = study.copy_of(Encoder(tiny_bert))[name]
    assert found["halfway"][name].allclose((base + found["last"][name]) / 2)
    assert found["epoch 3"][name].equal(found["last"][name])


def test_each_data_file_has_figures_and_a_section_of_its_own(tmp_path):
    readme, figures = tmp_path / "README.md", tmp_path / "images"
    readme.write_text("<!-- study_x:start -->\n<!-- study_x:end -->\n", encoding="utf-8")
    figures.mkdir()
    base, tuned = entry({"last": [2] * 10}), entry({"last": [1] * 10, "epoch 1": [1] * 10}, sr.SEEDS)
    found = {"data": "x.json", "machines": ["here"], "recipes": {"base": base, "default": tuned}}
    sr.report(found, tmp_path / "study_x.json", figures, readme)
    text = readme.read_text(encoding="utf-8")
    assert [f.name for f in figures.iterdir()] == ["study_x_recipes.png"] and "study_x_recipes.png" in text
    assert "--data data/x.json" in text and "+0.500 [+0.500, +0.500]" in text


def test_the_readme_quotes_the_study():
    """Each figure that benchmarks/README.md takes from study.json and study_pocket.json on its first page."""
    text = " ".join((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").replace("**", "").split())
    found, pocket = (
        {(row["recipe"], row["readout"]): row for row in read_json(file)["summary"]["rows"]}
        for file in (ROOT / "benchmarks" / "results" / name for name in sr.FILES)
    )
    merged, fault = found["default", "halfway"], found["faulty schedule", "last"]
    for place in (("base", "last"), ("original", "last"), ("default", "last"), ("default", "halfway")):
        row = found[place]
        assert f"| {row['recall@1'][0]:.3f} | {row['mrr'][0]:.3f} | {row['general']:.3f} |" in text, place
    assert f"against the base {sr.shown(merged['mrr - base'], sign=True)} MRR" in text
    assert f"against the original recipe {sr.shown(merged['mrr - original'], sign=True)}" in text
    assert f"the fault costs no MRR ({sr.shown(fault['mrr - original'], sign=True)} with it" in text
    gain, after, before = (pocket[key] for key in [("default", "halfway")] * 2 + [("base", "last")])
    shown = sr.shown(gain["mrr - base"], sign=True)
    assert f"{shown} ({before['mrr'][0]:.3f} → {after['mrr'][0]:.3f})" in text


def test_what_the_notebook_says_of_the_number_of_pairs():
    """"20 or 40 bring nothing", "cost 0.04 to 0.05", "from 160 on the gain is clear", "nearly 0.02"."""
    cells = read_json(ROOT / "01-train_embedding_with_validation.ipynb")["cells"]
    said = next(text for text in ("".join(cell["source"]) for cell in cells) if "**How many pairs?**" in text)
    assert "20 or 40 bring nothing" in said and "cost 0.04 to 0.05 MRR" in said and "nearly 0.02" in said
    found = sr.Results(read_json(ROOT / "benchmarks" / "results" / "study.json"))
    for count in (20, 40):
        merged = found.interval(f"{count} pairs / halfway", "base")
        assert merged[1] < 0 < merged[2] and abs(merged[0]) < 0.005
        last = found.interval(f"{count} pairs", "base")
        assert last[2] < 0 and -0.05 < last[0] < -0.04
    low = {count: found.interval(f"{count} pairs / halfway", "base")[1] for count in (80, 160)}
    assert low[80] < 0 < low[160]
    for more, fewer in (("160 pairs", "80 pairs"), ("default", "160 pairs")):
        assert 0.015 < found.interval(f"{more} / halfway", f"{fewer} / halfway")[0] < 0.02
    page = " ".join((ROOT / "data" / "README.md").read_text(encoding="utf-8").split())
    for count in (400, 800, 1500):
        ahead = found.interval(f"{count} synthetic / halfway", "default / halfway")
        assert sr.shown(ahead, True) in page and ahead[0] < 0, count  # "did not help"
    low = found.interval("40 pairs, rewrites / halfway", "40 pairs / halfway")[1]
    assert low > 0 and "Rewrites\nhelped a little with 40; further pairs" in said and "did not help" in said


def test_no_costlier_recipe_stays_the_default():
    """The README's and the notebook's reason for one run on the plain pairs."""
    for name in sr.FILES:
        rule = read_json(ROOT / "benchmarks" / "results" / name)["summary"]["default rule"]
        assert rule and not any(row["stays"] for row in rule.values()), name
