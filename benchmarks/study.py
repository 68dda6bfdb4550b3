"""The study behind the default recipe: what each choice is worth, on 427 queries instead of 86.

    python benchmarks/study.py                    # every recipe; goes on where an earlier run stopped
    python benchmarks/study.py --only default     # some of them
    python benchmarks/study.py --report           # only the table and the figures, from what is there
    python benchmarks/study.py --data data/pocket_mbpp.json --out benchmarks/results/study_pocket.json \
        --only none default                       # the default run's gain on the pocket data

Five-fold cross-validation: each query is judged once, by a model that saw neither its pair
nor a pair with the same text, against all codes. A cell is one (recipe, seed, fold) and ends in the ranks of
its queries; every figure is computed from ranks. Intervals: bootstrap over queries, of the paired difference
where two recipes are compared. Two cells run at a time, each on one thread: on 2 cores that is faster than
one cell on two.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that might ask the hub something

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from embedding_tutorial import checkpoints, plots, pocket_task  # noqa: E402
from embedding_tutorial import finetune as ft  # noqa: E402
from embedding_tutorial.assets import AssetError, pocket_model_path  # noqa: E402
from embedding_tutorial.profiles import PROFILES, relative, rewrites_path, training_precision  # noqa: E402

OUT = common.RESULTS / "study.json"
PLACES = [ROOT / "data" / "sanitized-mbpp.json", ROOT.parent / "shared" / "data" / "sanitized-mbpp.json"]
POCKET = ROOT / "data" / "pocket_mbpp.json"
FOLDS, SEEDS = 5, (42, 43, 44)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of the study. config: what differs from TrainConfig's defaults."""

    config: dict = dataclasses.field(default_factory=dict)
    seeds: tuple = SEEDS
    extra: tuple = ()  # names in EXTRA: further training pairs
    hard_negatives: int = 0  # of the base model's best wrong codes, per query
    every_epoch: bool = False  # also ranks after each epoch, and of their average
    soup: bool = False  # also the mean of the weights of all seeds' runs
    library: str = ""  # "sentence-transformers" or "FlagEmbedding": their trainer, their defaults
    leaking: bool = False  # the original loop's faulty accumulation
    rewrites: tuple = ()  # of "other_queries" and "other_pos_docs": what of the rewrites training sees


# ---------------------------------------------------------------- data


def find_data(path=None):
    """The file of sanitized MBPP; AssetError with the places that were looked at."""
    for place in [Path(path)] if path else PLACES:
        if place.is_file():
            return place
    raise AssetError(
        "No sanitized-mbpp.json in data/ or ../shared/data. Put it into data/, or give --data FILE."
    )


def fold_numbers(pairs, folds=FOLDS, seed=0):
    """The fold (n,) of each pair. Pairs with an equal query or an equal code share a fold: no text leaks."""
    group = list(range(len(pairs)))
    for side in ("query", "pos_doc"):
        first = {}
        for i, pair in enumerate(pairs):
            old, new = group[i], group[first.setdefault(pair[side], i)]
            group = [new if g == old else g for g in group]
    numbers, sizes = np.empty(len(pairs), dtype=int), [0] * folds
    for g in np.random.default_rng(seed).permutation(sorted(set(group))):
        members = [i for i, own in enumerate(group) if own == g]
        smallest = sizes.index(min(sizes))
        numbers[members] = smallest
        sizes[smallest] += len(members)
    return numbers


def with_hard_negatives(pairs, base, count):
    """The pairs with a "neg" list: the `count` wrong codes that the base model ranks highest."""
    from recipes.data import positives_of  # only here: it brings faiss

    encoder = ft.Encoder(base).eval()
    codes = list(dict.fromkeys(pair["pos_doc"] for pair in pairs))
    right = positives_of(pairs)
    with torch.no_grad():
        scores = ft.embed(encoder, [p["query"] for p in pairs]) @ ft.embed(encoder, codes).T
    rows = []
    for pair, order in zip(pairs, scores.argsort(dim=1, descending=True).tolist(), strict=True):
        wrong = [codes[i] for i in order if codes[i] not in right[pair["query"]]]
        rows.append({**pair, "neg": wrong[:count]})
    return rows


def pocket_pairs(pairs, data):
    """The 427 pairs written for this project."""
    return ft.read_mbpp(POCKET)


class Rename(ast.NodeTransformer):
    def __init__(self, names):
        self.names = names

    def visit_Name(self, node):
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.name = self.names.get(node.name, node.name)
        return node


def renamed_codes(pairs, data):
    """Each query with its code once more, whose functions are called f0, f1, …: no name gives it away."""
    rows = []
    for pair in pairs:
        tree = ast.parse(pair["pos_doc"])
        functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        names = {name: f"f{i}" for i, name in enumerate(dict.fromkeys(functions))}
        rows.append({"query": pair["query"], "pos_doc": ast.unparse(Rename(names).visit(tree))})
    return rows


def rewrites_of(data):
    """The file of rewrites of a data file; AssetError where there is none."""
    found = rewrites_path(data)
    if found is None:
        raise AssetError(
            f"No rewrites of {relative(data)} in data/. Leave out the recipes that need them (--only)."
        )
    return found


def rewritten(pairs, kinds, kept_out, data):
    """The pairs with rewrites of these kinds, but for texts in kept_out (those that are judged)."""
    rewrites = ft.read_rewrites(rewrites_of(data))
    chosen = {
        task: {kind: [text for text in lists[kind] if text not in kept_out] for kind in kinds}
        for task, lists in rewrites.items()
    }
    return ft.with_rewrites(pairs, chosen)


# ---------------------------------------------------------------- one cell


def train_with_library(library, base, pairs, seed, folder):
    """Fine-tune with a library's own trainer and its default settings; returns the backbone's weights."""
    if library == "sentence-transformers":
        import datasets
        from sentence_transformers import (
            SentenceTransformer,
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from sentence_transformers.sentence_transformer import losses

        model = SentenceTransformer(str(base), device="cpu")
        rows = datasets.Dataset.from_list([{"query": p["query"], "passage": p["pos_doc"]} for p in pairs])
        quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
        options = SentenceTransformerTrainingArguments(str(folder), seed=seed, use_cpu=True, **quiet)
        loss = losses.MultipleNegativesRankingLoss(model)
        SentenceTransformerTrainer(model, options, train_dataset=rows, loss=loss).train()
        return {name: w.detach() for name, w in model.transformers_model.state_dict().items()}
    lengths = ["--query_max_len", "512", "--passage_max_len", "512"]  # its 32 and 128 would cut the codes
    options = [*lengths, "--seed", str(seed)]
    runner = common.flagembedding_runner(base, ft.read_pooling(base), pairs, folder, options)
    runner.trainer.train()
    return {name: w.detach() for name, w in runner.model.model.state_dict().items()}


def average(states):
    return {name: torch.stack([s[name].float() for s in states]).mean(0) for name in states[0]}


def copy_of(encoder):
    return {name: w.detach().clone() for name, w in encoder.backbone.state_dict().items()}


def leaking_epoch(run, epoch):
    """One epoch as the original loop runs it: a step after every second micro-batch of 80.

    With 5 micro-batches the fifth's gradient stays and leaks into the next epoch's first step, and of the 25
    steps that the schedule counts in 10 epochs 20 happen.
    """
    config, n, size = run.config, len(run.data["query"]), run.config.micro_batch
    order = ft.batch_of(epoch, n, dataclasses.replace(config, batch_size=n))
    parts = [order[start : start + size] for start in range(0, n, size)]
    counted = config.epochs * len(parts) * size // config.batch_size
    if not epoch:
        run.optimizer.zero_grad()
    for number, part in enumerate(parts, 1):
        loss, _, _ = ft.backward_whole(
            run.encoder,
            ft.batch_rows(run.data, part),
            lambda vectors, part=part: ft.batch_loss(vectors, run.data, part, config),
            config,
            run.token_budget,
            lambda loss: loss * size / config.batch_size,
        )
        run.history["step_losses"].append(loss)
        if number % (config.batch_size // size) == 0:
            rate = ft.lr_share(run.update, counted, round(config.warmup * counted))
            for group in run.optimizer.param_groups:
                group["lr"] = config.learning_rate * rate
            torch.nn.utils.clip_grad_norm_(run.encoder.parameters(), config.clip)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.update += 1


def epochs_of_run(recipe, config, base, train_pairs):
    """The weights after each epoch of one training, and its loss per step."""
    run = ft.start_run(base, lambda encoder: ft.tokenize_pairs(encoder, train_pairs), config, "cpu")
    run.encoder.train()
    per_epoch, epochs = ft.updates_per_epoch(len(train_pairs), config), []
    for epoch in range(config.epochs):
        if recipe.leaking:
            leaking_epoch(run, epoch)
        else:
            for _ in range(per_epoch):
                ft.one_update(run)
        epochs.append(copy_of(run.encoder))
    return epochs, run.history["step_losses"]


def mean_of_runs(recipe, config, base, train_pairs, kept):
    """The mean of the last weights of the runs with all SEEDS (model soups, arXiv 2203.05482).

    Other cells leave theirs in the folder `kept`; what is not there is trained.
    """
    states = []
    for seed in SEEDS:
        file = kept / f"{seed}.pt"
        if not file.is_file():
            config = dataclasses.replace(config, seed=seed)
            keep_weights(epochs_of_run(recipe, config, base, train_pairs)[0][-1], file)
        states.append(torch.load(file, weights_only=True))
    return average(states)


def keep_weights(weights, file):
    with checkpoints.atomic_file(file, "wb") as stream:
        torch.save(weights, stream)


def weights_of_cell(recipe, config, base, train_pairs, kept):
    """{readout: weights} of one cell, and the loss per step of its training.

    "last" and "halfway" to the base; with every_epoch "average" of the last three epochs,
    "average, halfway", "epoch N", and "alpha 0.25" and "alpha 0.75" of the way from base to last; with soup
    and the last seed "mean of runs", and parts of the way from the base to it.
    """
    start = copy_of(ft.Encoder(base))
    if not config.epochs:
        return {"last": start}, []
    if recipe.library:
        with tempfile.TemporaryDirectory() as folder:
            last = train_with_library(recipe.library, base, train_pairs, config.seed, Path(folder))
        last = {name: last[name] for name in start}
        return {"last": last, "halfway": ft.between(start, last, 0.5)}, []
    epochs, losses = epochs_of_run(recipe, config, base, train_pairs)
    last = epochs[-1]
    found = {"last": last, "halfway": ft.between(start, last, 0.5)}
    if recipe.soup:
        keep_weights(last, kept / f"{config.seed}.pt")
    if recipe.soup and config.seed == SEEDS[-1]:
        soup = mean_of_runs(recipe, config, base, train_pairs, kept)
        found["mean of runs"] = soup
        found |= {f"mean of runs, alpha {alpha}": ft.between(start, soup, alpha) for alpha in ALPHAS}
    if recipe.every_epoch:
        mean = average(epochs[-3:])
        found |= {"average": mean, "average, halfway": ft.between(start, mean, 0.5)}
        found |= {f"epoch {n}": weights for n, weights in enumerate(epochs, 1)}
        found |= {f"alpha {alpha}": ft.between(start, last, alpha) for alpha in (0.25, 0.75)}
    return found, losses


def general_ndcg(encoder):
    """nDCG@10 on the English half of Pocket T2, gain = grade, as mteb computes it."""
    corpus, queries, relevant = pocket_task.read_language(ROOT / "data" / "pocket_t2" / "en")
    with torch.no_grad():
        q = ft.embed(encoder, [row["text"] for row in queries])
        p = ft.embed(encoder, [f"{row['title']} {row['text']}".strip() for row in corpus])
    scores, discount = [], 1 / np.log2(np.arange(2, 12))
    for query, row in zip(queries, (q @ p.T).numpy(), strict=True):
        grades = relevant[query["id"]]
        found = [grades.get(corpus[i]["id"], 0) for i in np.argsort(-row, kind="stable")[:10]]
        ideal = sorted(grades.values(), reverse=True)[:10]
        scores.append((found * discount).sum() / (ideal * discount[: len(ideal)]).sum())
    return float(np.mean(scores))


def run_cell(task):
    """Train and judge one cell, in a process of its own; returns what is kept of it."""
    name, seed, fold, data, scratch = task
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    base, pairs, recipe = pocket_model_path(), ft.read_mbpp(data), RECIPES[name]
    folds = fold_numbers(pairs)
    train_pairs = [pair for pair, f in zip(pairs, folds, strict=True) if f != fold]
    test = [int(i) for i in np.flatnonzero(folds == fold)]
    own = {pairs[i][side] for i in test for side in ("query", "pos_doc")}
    cut = list(train_pairs)
    for source in recipe.extra:
        train_pairs += [
            p for p in EXTRA[source](cut, data) if p["query"] not in own and p["pos_doc"] not in own
        ]
    if recipe.rewrites:
        train_pairs = rewritten(train_pairs, recipe.rewrites, own, data)
    if recipe.hard_negatives:
        train_pairs = with_hard_negatives(train_pairs, base, recipe.hard_negatives)
    config = config_of(recipe, seed, len(train_pairs))
    torch.manual_seed(seed)
    kept = Path(scratch) / f"{list(RECIPES).index(name)}-{fold}"
    kept.mkdir(exist_ok=True)
    found, losses = weights_of_cell(recipe, config, base, train_pairs, kept)
    trained, encoder, ranks, general = time.perf_counter() - started, ft.Encoder(base).eval(), {}, {}
    for readout, weights in found.items():
        encoder.backbone.load_state_dict(weights)
        result = ft.evaluate(encoder, [pairs[i] for i in test], candidates=pairs)
        ranks[readout] = " ".join(map(str, result["ranks"]))
        if fold == 0 and not readout.startswith(("epoch", "alpha")):  # one fold per seed tells enough
            general[readout] = round(general_ndcg(encoder), 4)
    return {
        "queries": " ".join(map(str, test)),
        "ranks": ranks,
        "seconds": round(trained, 1),
        "precision": config.precision,
        "train_pairs": len(train_pairs),
        **({"general": general} if general else {}),
        **({"losses": [round(x, 4) for x in losses]} if fold == 0 and seed == SEEDS[0] else {}),
    }


def config_of(recipe, seed, pairs):
    """The TrainConfig of a cell. batch_size None: all pairs at once."""
    options = dict(recipe.config)
    if "batch_size" in options and options["batch_size"] is None:
        options["batch_size"] = pairs
    precision = training_precision(PROFILES["pocket"], "cpu")
    return ft.TrainConfig(seed=seed, **{"precision": precision, **options})


# ---------------------------------------------------------------- driver


def settings_of(recipe, data):
    """What a cell depends on, as JSON: cells with other settings are not mixed.

    Seeds and precision stand in the cells: bf16 where the CPU multiplies it, fp32 elsewhere, so that a study
    can go on on another machine.
    """
    usual = dataclasses.asdict(Recipe())
    own = {name: value for name, value in dataclasses.asdict(recipe).items() if value != usual[name]}
    settings = dataclasses.asdict(config_of(recipe, 0, 10**6)) | own
    if recipe.rewrites:
        settings["rewrites_sha256"] = hashlib.sha256(rewrites_of(data).read_bytes()).hexdigest()[:16]
    return json.loads(json.dumps(settings | {"seeds": None, "precision": None}))


def measure(names, data, out, workers):
    """Run the cells that are missing, writing after each one."""
    sha = hashlib.sha256(data.read_bytes()).hexdigest()[:16]
    study = (
        checkpoints.read_json(out)
        if out.is_file()
        else {"data": data.name, "data_sha256": sha, "recipes": {}}
    )
    if study["data_sha256"] != sha:
        raise AssetError(
            f"{relative(out)} was measured on another {data.name}. Move it away to start afresh."
        )
    here = common.machine(("torch", "transformers", "sentence-transformers", "FlagEmbedding"))["summary"]
    study["machines"] = list(dict.fromkeys([*study.get("machines", []), here]))
    todo = []
    for name in names:
        settings, old = settings_of(RECIPES[name], data), study["recipes"].get(name)
        if old and old["settings"] != settings:
            print(f"{name}: other settings than before, measured again.")
            old = None
        study["recipes"][name] = old or {"settings": settings, "cells": {}}
        wanted = [(name, seed, fold) for seed in RECIPES[name].seeds for fold in range(FOLDS)]
        todo += [cell for cell in wanted if f"{cell[1]}-{cell[2]}" not in study["recipes"][name]["cells"]]
    todo.sort(key=lambda cell: SEEDS.index(cell[1]))  # every recipe's first seed before any second one
    done, started = 0, time.perf_counter()
    print(f"{len(todo)} cells to do", flush=True)
    spawn = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers
    with (
        tempfile.TemporaryDirectory() as scratch,
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool,
    ):
        waiting = {pool.submit(run_cell, (*cell, data, scratch)): cell for cell in todo}
        for future in concurrent.futures.as_completed(waiting):
            name, seed, fold = waiting[future]
            if future.exception():
                pool.shutdown(cancel_futures=True)
            study["recipes"][name]["cells"][f"{seed}-{fold}"] = result = future.result()
            checkpoints.write_json(out, study)
            done += 1
            left = (time.perf_counter() - started) / done * (len(todo) - done) / 60
            scores = {
                r: np.mean(1 / np.array(result["ranks"][r].split(), float)) for r in list(result["ranks"])[:2]
            }
            shown = ", ".join(f"{readout} MRR {score:.3f}" for readout, score in scores.items())
            print(
                f"{done}/{len(todo)} {name}, seed {seed}, fold {fold}: {shown} "
                f"in {result['seconds']:.0f} s; {left:.0f} min left",
                flush=True,
            )
    return study


# ---------------------------------------------------------------- figures from ranks


def ranks_by_seed(entry, readout):
    """{seed: ranks (queries,) in the file's order} of a recipe's readout, for seeds with all FOLDS."""
    by_seed = collections.defaultdict(dict)
    for key, cell in entry["cells"].items():
        if readout in cell["ranks"]:
            seed, fold = key.split("-")
            columns = (map(int, column.split()) for column in (cell["queries"], cell["ranks"][readout]))
            by_seed[seed][fold] = dict(zip(*columns, strict=True))
    found = {}
    for seed, folds in sorted(by_seed.items()):
        if len(folds) == FOLDS:
            ranks = dict(collections.ChainMap(*folds.values()))
            found[seed] = np.array([ranks[i] for i in sorted(ranks)])
    return found


def rank_table(entry, readout):
    """Ranks (seeds, queries) of a recipe's readout; None where there are none."""
    found = ranks_by_seed(entry, readout)
    return np.array(list(found.values())) if found else None


def paired_ranks(study, one, two):
    """The rank tables of two (recipe, readout) for a comparison: of the seeds that both have.

    A seed can lie 0.01 MRR above the next one. Means of several runs and the untrained model belong to no
    seed; they are compared with all the seeds of the other.
    """
    ranks = [ranks_by_seed(study["recipes"][name], readout) for name, readout in (one, two)]
    unseeded = any(
        readout in SOUPS or study["recipes"][name]["settings"].get("epochs") == 0
        for name, readout in (one, two)
    )
    common = set(ranks[0]) & set(ranks[1])
    return [
        np.array([r for seed, r in own.items() if unseeded or not common or seed in common]) for own in ranks
    ]


def per_query(ranks):
    """(Recall@1, MRR) of each query, means over seeds: two arrays (queries,)."""
    return (ranks == 1).mean(axis=0), (1 / ranks).mean(axis=0)


def seconds_by_precision(entry):
    """{precision: median seconds of a training}, of the cells that were one clean training."""
    found = {}
    for cell in entry["cells"].values():
        if cell["seconds"]:
            found.setdefault(cell["precision"], []).append(cell["seconds"])
    return {precision: float(np.median(seconds)) for precision, seconds in found.items()}


def time_ratio(entry, other):
    """How many times as long a training takes as another's, in a precision (so a machine) that both have."""
    own, others = seconds_by_precision(entry), seconds_by_precision(other)
    return next((own[p] / others[p] for p in own if p in others), None)


def row_of(study, name, readout="last", against=()):
    """One row of the table. against: [(label, recipe, readout)] to compare with, paired by query."""
    entry = study["recipes"][name]
    ranks = rank_table(entry, readout)
    recall, reciprocal = per_query(ranks)
    cells = entry["cells"].values()
    seconds = [cell["seconds"] for cell in cells if cell["seconds"]]
    trainings = len(SEEDS) if readout in SOUPS else 1
    seeds = trainings if readout in SOUPS else len(ranks)
    row = {"recipe": name, "readout": readout, "seeds": seeds, "queries": ranks.shape[1]}
    row |= {"recall@1": ft.bootstrap_interval(recall), "mrr": ft.bootstrap_interval(reciprocal)}
    row |= {"mrr of seeds": (1 / ranks).mean(axis=1).tolist()}
    row |= {"minutes": round(float(np.median(seconds or [0])) * trainings / 60, 2)}
    general = [cell["general"][readout] for cell in cells if readout in cell.get("general", {})]
    row |= {"general": round(float(np.mean(general)), 4) if general else None}
    for label, other, other_readout in against:
        pair = paired_ranks(study, (name, readout), (other, other_readout))
        (own_r, own_m), (r, m) = map(per_query, pair)
        row[f"mrr - {label}"] = ft.bootstrap_interval(own_m - m)
        row[f"recall@1 - {label}"] = ft.bootstrap_interval(own_r - r)
        row[f"p {label}"] = ft.sign_flip_test(own_m - m)
        ratio = time_ratio(entry, study["recipes"][other])
        per_other = len(SEEDS) if other_readout in SOUPS else 1
        row[f"time / {label}"] = ratio and ratio * trainings / per_other
    return row


def folds_of(entry):
    """The fold (queries,) in which each query was held out."""
    folds = {}
    for key, cell in entry["cells"].items():
        folds |= dict.fromkeys(map(int, cell["queries"].split()), int(key.split("-")[1]))
    return np.array([folds[i] for i in sorted(folds)])


def chosen_elsewhere(study, candidates):
    """Each fold judged by the candidate that did best on the other folds.

    candidates: [(recipe, readout)], each scored by the mean of its seeds. Returns (Recall@1 and MRR of each
    query, the choice for each fold). The models of the other folds have seen this fold's pairs in training,
    but no figure of this fold takes part in its choice.
    """
    entries = study["recipes"]
    scores = {c: np.array(per_query(rank_table(entries[c[0]], c[1]))) for c in candidates}
    folds, choices = folds_of(entries[candidates[0][0]]), []
    found = np.empty((2, len(folds)))
    for fold in range(FOLDS):
        own = folds == fold
        best = max(candidates, key=lambda c, own=own: scores[c][1, ~own].mean())
        found[:, own] = scores[best][:, own]
        choices.append(best)
    return found, choices


def measured(study, name, readout="last"):
    """Whether a readout is reported: one with all folds of as many seeds as the recipe's last weights have.

    A mean of runs has its seeds inside.
    """
    entry = study["recipes"].get(name, {"cells": {}})
    seeds, own = (set(ranks_by_seed(entry, r)) for r in ("last", readout))
    return bool(own) and (readout in SOUPS or own == seeds)


@dataclasses.dataclass(frozen=True)
class Question:
    """One figure: rows [(label, recipe, readout)], the first of which is the reference of the others."""

    title: str
    rows: list
    figure: str  # its file in images/ is named after the results and this: study_recipes.png


ALPHAS = (0.5, 0.6, 0.7, 0.8)  # of the way from the base to the mean of runs
SOUPS = ("mean of runs", *(f"mean of runs, alpha {alpha}" for alpha in ALPHAS))
OURS = "mean of runs, alpha 0.6"  # what notebook 01 reports
READOUTS = ("last", "halfway", "average", "average, halfway", *SOUPS)
EXTRA = {"pocket": pocket_pairs, "renamed": renamed_codes}
# What the questions are asked of: cheap enough to train often, and each row changes one thing of it.
PLAIN = {"learning_rate": 5e-5, "temperature": 0.05, "epochs": 5, "batch_size": 80, "dropout": 0.0}
BOTH = ("other_queries", "other_pos_docs")


def plain(**changes):
    return PLAIN | changes


RECIPES = {
    "none": Recipe(config=plain(epochs=0), seeds=SEEDS[:1]),  # nothing in it is random
    "default": Recipe(rewrites=BOTH, every_epoch=True, soup=True),
    "original": Recipe(config=common.ORIGINAL),
    "sentence-transformers": Recipe(config=PLAIN, library="sentence-transformers"),
    "FlagEmbedding": Recipe(config=PLAIN, library="FlagEmbedding"),
    "plain": Recipe(config=PLAIN, every_epoch=True),
    "batch 8": Recipe(config=plain(batch_size=8)),
    "batch 16": Recipe(config=plain(batch_size=16)),
    "batch 341": Recipe(config=plain(batch_size=None, backward="gradcache")),
    "accumulation": Recipe(config=plain(micro_batch=16)),
    "tau 0.01": Recipe(config=plain(temperature=0.01)),
    "tau 0.2": Recipe(config=plain(temperature=0.2)),
    "lr 2e-5": Recipe(config=plain(learning_rate=2e-5)),
    "lr 2e-4": Recipe(config=plain(learning_rate=2e-4)),
    "10 epochs": Recipe(config=plain(epochs=10)),
    "symmetric": Recipe(config=plain(symmetric=True)),
    "queue 160": Recipe(config=plain(queue=160)),
    "hard negatives": Recipe(config=PLAIN, hard_negatives=2),
    "duplicates kept": Recipe(config=plain(mask_duplicates=False)),
    "pocket pairs": Recipe(config=PLAIN, extra=("pocket",)),
    "renamed codes": Recipe(config=PLAIN, extra=("renamed",)),
    "without rewrites": Recipe(),
    "rewritten queries": Recipe(rewrites=BOTH[:1]),
    "rewritten codes": Recipe(rewrites=BOTH[1:]),
    "faulty schedule": Recipe(config=common.ORIGINAL, leaking=True),
}
QUESTIONS = [
    Question(
        "How many negatives?",
        [
            ("80", "plain", "last"),
            ("8", "batch 8", "last"),
            ("16", "batch 16", "last"),
            ("all 341", "batch 341", "last"),
        ],
        "batch_size",
    ),
    Question(
        "80 in one graph, or 5 × 16 accumulated?",
        [("whole batch of 80", "plain", "last"), ("accumulated from 16", "accumulation", "last")],
        "accumulation",
    ),
    Question(
        "Which temperature?",
        [("0.05", "plain", "last"), ("0.01", "tau 0.01", "last"), ("0.2", "tau 0.2", "last")],
        "temperature",
    ),
    Question(
        "Which learning rate, how long?",
        [
            ("5e-5, 5 epochs", "plain", "last"),
            ("2e-5", "lr 2e-5", "last"),
            ("2e-4", "lr 2e-4", "last"),
            ("10 epochs", "10 epochs", "last"),
        ],
        "learning_rate",
    ),
    Question(
        "Symmetric loss, queue, duplicates?",
        [
            ("the plain recipe", "plain", "last"),
            ("symmetric", "symmetric", "last"),
            ("queue of 160", "queue 160", "last"),
            ("duplicates kept as negatives", "duplicates kept", "last"),
        ],
        "loss",
    ),
    Question(
        "More signal?",
        [
            ("the plain recipe", "plain", "last"),
            ("2 hard negatives each", "hard negatives", "last"),
            ("427 pocket pairs more", "pocket pairs", "last"),
            ("codes with renamed functions too", "renamed codes", "last"),
            ("rate 2e-4, 10 epochs: the default without rewrites", "without rewrites", "last"),
            ("the default with rewritten queries only", "rewritten queries", "last"),
            ("the default with rewritten codes only", "rewritten codes", "last"),
            ("the default: rewritten queries and codes", "default", "last"),
        ],
        "signal",
    ),
    Question(
        "Which weights of the run?",
        [
            ("plain: last", "plain", "last"),
            ("plain: average of the last three epochs", "plain", "average"),
            ("plain: a quarter of the way from the base", "plain", "alpha 0.25"),
            ("plain: halfway", "plain", "halfway"),
            ("plain: three quarters", "plain", "alpha 0.75"),
            ("default: last", "default", "last"),
            ("default: halfway", "default", "halfway"),
            *((f"default: {name}", "default", name) for name in SOUPS),
        ],
        "weights",
    ),
    Question(
        "Whose recipe?",
        [
            ("no training", "none", "last"),
            ("sentence-transformers' defaults", "sentence-transformers", "last"),
            ("FlagEmbedding's defaults", "FlagEmbedding", "last"),
            ("the original recipe", "original", "last"),
            ("the original recipe, halfway to the base", "original", "halfway"),
            ("our default, one run, last epoch", "default", "last"),
            (f"our default: {OURS}", "default", OURS),
        ],
        "recipes",
    ),
]


# ---------------------------------------------------------------- table, figures


def shown(interval, sign=False):
    value, low, high = interval
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" if sign else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def verdict(difference):
    """What an interval of a difference says, in words."""
    _, low, high = difference
    return "better" if low > 0 else "worse" if high < 0 else "no difference that 427 queries can show"


def answer(study, question):
    """The rows of a question that are measured: [(label, row)], and its finding in one or two sentences."""
    rows = [
        (label, name, readout) for label, name, readout in question.rows if measured(study, name, readout)
    ]
    first = rows[0]
    found = [(label, row_of(study, name, readout, [("first", *first[1:])])) for label, name, readout in rows]
    best = max(found, key=lambda item: item[1]["mrr"][0])
    text = f"Highest MRR: {best[0]}, {best[1]['mrr'][0]:.3f}. "
    groups = {}
    for label, row in found[1:]:
        groups.setdefault(verdict(row["mrr - first"]), []).append(
            f"{label} {shown(row['mrr - first'], True)}"
        )
    text += f"Against “{first[0]}” ({found[0][1]['mrr'][0]:.3f}) "
    return found, text + "; ".join(f"{name}: {', '.join(rows)}" for name, rows in groups.items()) + "."


def draw(study, question, figure_file):
    found, text = answer(study, question)
    best = max(found, key=lambda item: item[1]["mrr"][0])
    clear = [label for label, row in found[1:] if row["mrr - first"][1] > 0]
    worse = [label for label, row in found[1:] if row["mrr - first"][2] < 0]
    counts = [f"{len(rows)} clearly {way}" for way, rows in (("above", clear), ("below", worse)) if rows]
    tail = f"{' and '.join(counts) or 'none clearly above or below'} “{found[0][0]}” (paired)"
    bars = [
        dict(zip(("label", "value", "lo", "hi"), (label, *row["mrr"]), strict=True)) for label, row in found
    ]
    plots.grouped_bars_with_intervals(
        bars,
        figure_file,
        xlabel=f"MRR, {found[0][1]['queries']} held-out queries against all codes",
        title=f"{question.title} Highest: {best[0]}, {best[1]['mrr'][0]:.3f}; {tail}",
        reference=bars[0]["value"],
        reference_label=f"{found[0][0]}: {bars[0]['value']:.3f}",
        source=f"benchmarks/study.py: {study['data']}, 5-fold, MiniLM",
    )
    return text


def best_epoch(study, name):
    """MRR and Recall@1 of the epoch picked on the reported fold, of that picked on the others, of the last.

    Means over seeds. The first is what is usually reported; only the other two are fair.
    """
    entry = study["recipes"][name]
    epochs = list(
        dict.fromkeys(r for c in entry["cells"].values() for r in c["ranks"] if r.startswith("epoch "))
    )
    tables = [ranks_by_seed(entry, epoch) for epoch in epochs]
    folds, found = folds_of(entry), {"on the same queries": [], "on the other folds": [], "last epoch": []}
    for seed in tables[0]:
        ranks = np.array([table[seed] for table in tables])  # (epochs, queries)
        for fold in range(FOLDS):
            own = folds == fold
            inside, outside = ((1 / ranks[:, part]).mean(axis=1) for part in (own, ~own))
            for way, epoch in zip(found, (inside.argmax(), outside.argmax(), -1), strict=True):
                found[way].append(ranks[epoch, own])
    joined = {way: np.concatenate(r) for way, r in found.items()}
    return {
        way: {"mrr": float((1 / r).mean()), "recall@1": float((r == 1).mean())} for way, r in joined.items()
    }


def seed_noise(seeds):
    """How far runs of one recipe differ. seeds: {recipe: MRR of each seed}.

    "sd": the standard deviation within a recipe, pooled over recipes; "standard error": of the difference
    between two recipes' means over SEEDS, if nothing but the seeds differed.
    """
    degrees = sum(len(row) - 1 for row in seeds.values())
    sd = (sum(((row - row.mean()) ** 2).sum() for row in seeds.values()) / degrees) ** 0.5
    widest = max(seeds, key=lambda name: np.ptp(seeds[name]))
    found = {"recipes": len(seeds), "sd": float(sd), "standard error": float(sd * (2 / len(SEEDS)) ** 0.5)}
    return found | {"widest": [widest, float(min(seeds[widest])), float(max(seeds[widest]))]}


def otherwise_with_one_seed(study, rows):
    """{recipe: its difference from "plain" with the first seed alone}, where that ends in another verdict."""
    found = {}
    for row in rows:
        if row["readout"] == "last" and row["seeds"] > 1 and "mrr - plain" in row:
            own, plain_ranks = (rank_table(study["recipes"][n], "last")[0] for n in (row["recipe"], "plain"))
            one = ft.bootstrap_interval(1 / own - 1 / plain_ranks)
            if verdict(one) != verdict(row["mrr - plain"]):
                found[row["recipe"]] = one
    return found


def across_recipes(study, rows):
    """A choice of recipe that does not see what it reports, the luck of seeds, and of the best epoch."""
    result = {}
    candidates = [
        (name, readout)
        for name in RECIPES
        if not RECIPES[name].library
        for readout in READOUTS
        if measured(study, name, readout)
    ]
    if len(candidates) > 1:
        (recall, reciprocal), choices = chosen_elsewhere(study, candidates)
        scores = {"recall@1": ft.bootstrap_interval(recall), "mrr": ft.bootstrap_interval(reciprocal)}
        result["chosen on the other folds"] = {**scores, "choices": [" / ".join(c) for c in choices]}
    seeds = {
        row["recipe"]: np.array(row["mrr of seeds"])
        for row in rows
        # Where all pairs are one batch, the seed draws nothing.
        if row["readout"] == "last"
        and row["seeds"] > 1
        and RECIPES[row["recipe"]].config.get("batch_size", 80)
    }
    if seeds:
        result["seeds"] = seed_noise(seeds)
        result["seeds"]["otherwise with one"] = otherwise_with_one_seed(study, rows)
    for name in RECIPES:
        if measured(study, name, "epoch 1"):
            result.setdefault("best epoch", {})[name] = best_epoch(study, name)
    return result


def text_across_recipes(summary):
    lines = []
    if "chosen on the other folds" in summary:
        chosen = summary["chosen on the other folds"]
        counts = collections.Counter(chosen["choices"])
        lines.append(
            "**The recipe chosen for each fold on the other four**: "
            f"Recall@1 {shown(chosen['recall@1'])}, MRR {shown(chosen['mrr'])}; "
            f"chosen: {', '.join(f'{c} ({n} folds)' for c, n in counts.items())}."
        )
    if "seeds" in summary:
        noise, (widest, low, high) = summary["seeds"], summary["seeds"]["widest"]
        lines.append(
            f"**How far seeds differ**: the MRR of a recipe's last weights has a standard deviation of "
            f"{noise['sd']:.3f} over seeds, pooled over {noise['recipes']} recipes; widest: {widest}, "
            f"{low:.3f} to {high:.3f}. The intervals cover the choice of queries, not of seeds: two recipes "
            f"that differ in nothing else differ by {noise['standard error']:.3f} (one standard error) in "
            f"the means of {len(SEEDS)} seeds each."
        )
        if noise["otherwise with one"]:
            lines[-1] += f" With seed {SEEDS[0]} alone these would have another verdict against “plain”: "
            lines[-1] += (
                ", ".join(f"{n} {shown(d, True)}" for n, d in noise["otherwise with one"].items()) + "."
            )
    for name, ways in summary.get("best epoch", {}).items():
        parts = ", ".join(
            f"{way} MRR {v['mrr']:.3f} (Recall@1 {v['recall@1']:.3f})" for way, v in ways.items()
        )
        lines.append(f"**Choosing the epoch** ({name}): {parts}. The first one flatters.")
    return "\n\n".join(lines)


def report(study, out, figure_folder=ROOT / "images", readme=common.README):
    """Write the summary into study.json, the table into the README, and one figure per question."""
    against = [
        ("base", "none", "last"),
        ("original", "original", "last"),
        ("plain", "plain", "last"),
        ("without rewrites", "without rewrites", "last"),
        *((f"{name}, halfway", name, "halfway") for name in ("original", "plain", "without rewrites")),
        ("default, last", "default", "last"),
        ("default, halfway", "default", "halfway"),
        ("default", "default", OURS),
    ]
    against = [a for a in against if measured(study, *a[1:])]
    rows = []
    for name in (n for n in RECIPES if measured(study, n)):
        kept = [r for r in READOUTS if measured(study, name, r)]
        rows += [row_of(study, name, readout, against) for readout in kept]
    questions = [
        q
        for q in QUESTIONS
        if measured(study, *q.rows[0][1:]) and sum(measured(study, *r[1:]) for r in q.rows) > 1
    ]
    figures = {q.title: f"{out.stem}_{q.figure}.png" for q in questions}
    findings = {q.title: draw(study, q, figure_folder / figures[q.title]) for q in questions}
    study["summary"] = {"rows": rows, "findings": findings, **across_recipes(study, rows)}
    checkpoints.write_json(out, study)
    head = [
        "recipe",
        "weights",
        "seeds",
        "Recall@1",
        "MRR",
        "of each seed",
        "MRR − no training",
        "MRR − original recipe",
        "general nDCG@10",
        "minutes",
    ]
    table = [
        [
            row["recipe"], row["readout"], row["seeds"], shown(row["recall@1"]), shown(row["mrr"]),
            "" if len(row["mrr of seeds"]) < 2 else ", ".join(f"{x:.3f}" for x in row["mrr of seeds"]),
            *(shown(row[key], True) if (key := f"mrr - {x}") in row else "" for x in ("base", "original")),
            "" if row["general"] is None else f"{row['general']:.3f}", row["minutes"],
        ]
        for row in rows
    ]  # fmt: skip
    lines = "\n\n".join(
        f"**{title}** {text} ![{title}](../images/{figures[title]})" for title, text in findings.items()
    )
    cells = (cell for entry in study["recipes"].values() for cell in entry["cells"].values())
    kinds = collections.Counter(cell["precision"] for cell in cells)
    options = (
        ""
        if out.name == OUT.name
        else f" --data data/{study['data']} --out {relative(out)} --only none default"
    )
    text = f"""## Study: which recipe? ({study["data"]})

`python benchmarks/study.py{options}`: {FOLDS}-fold, all-MiniLM-L6-v2; each query judged once by a model
that did not see it, against all codes. Differences are paired by query, and by seed where both rows have
several. Minutes: one training on one thread. Measured on
{"; and on ".join(study["machines"])}.
Cells by the precision they were trained in: {", ".join(f"{n} {kind}" for kind, n in kinds.items())}.

{common.markdown_table(head, table)}

{lines}

{text_across_recipes(study["summary"])}
"""
    common.put_into_readme(out.stem, text, readme)
    return study


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(RECIPES), metavar="RECIPE", help="measure only these"
    )
    parser.add_argument("--data", type=Path, help="sanitized-mbpp.json, where it is not in data/")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    return parser.parse_args()


def main():
    args = arguments()
    study = (
        checkpoints.read_json(args.out)
        if args.report
        else measure(args.only or list(RECIPES), find_data(args.data), args.out, args.workers)
    )
    report(study, args.out)
    print(f"Table in {relative(common.README)}, figures in images/.")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # finished cells are on disk
        main()
