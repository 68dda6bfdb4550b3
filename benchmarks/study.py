"""The study behind the default recipe: what each choice is worth, on 427 queries instead of 86.

    python benchmarks/study.py                    # every recipe; goes on where an earlier run stopped
    python benchmarks/study.py --only default     # some of them
    python benchmarks/study.py --report           # only the table and the figures, from what is there
    python benchmarks/study.py --data data/pocket_mbpp.json --out benchmarks/results/study_pocket.json \
        --only base default "10 epochs, rate 2e-4" rewrites    # the default's gain on the pocket data

Five-fold cross-validation: each query is judged once, by a model that saw neither its pair nor a pair with
the same text, against all codes. A cell is one (recipe, seed, fold) and ends in the ranks of its queries;
study_report.py computes every figure from them. Two cells run at a time, each on one thread: on 2 cores that
is faster than one cell on two.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import common
import memory_ladder
import numpy as np
import torch
import transformers
from study_report import ALPHAS, FILES, FOLDS, SEEDS, SIZES, TEN_EPOCHS, report

from embedding_tutorial import encoder as enc
from embedding_tutorial import evaluation, pairs, pocket_task, training
from embedding_tutorial import finetune as ft
from embedding_tutorial.assets import pocket_model_path, sanitized_mbpp_path
from embedding_tutorial.files import TutorialError, read_json, relative, sha256_of, write_json
from embedding_tutorial.profiles import PROFILES, rewrites_path, training_precision
from embedding_tutorial.words import whole_state

BOTH = ("other_queries", "other_pos_docs")
# What the questions are asked of: cheap enough to train often, and each row changes one thing of it.
PLAIN = {"learning_rate": 5e-5, "temperature": 0.05, "epochs": 5, "batch_size": 80, "dropout": 0.0}
TEN = {"epochs": 10}  # what was the default until five were seen to do as well


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of the study. config: what differs from TrainConfig's defaults."""

    config: dict = dataclasses.field(default_factory=dict)
    extra: str = ""  # further training pairs: "pocket" or "renamed"
    hard_negatives: int = 0  # of the base model's best wrong codes, per query
    negatives_below: float = 0.0  # of the right code's score, what a hard negative may have; 0: any
    every_epoch: bool = False  # also ranks after each epoch, and of their average
    soup: bool = False  # also the mean of the weights of all seeds' runs
    library: str = ""  # its trainer and its defaults; with "our settings" the config's batch, rate and epochs
    leaking: bool = False  # the original loop's faulty accumulation
    change: str = ""  # a function of memory_ladder.py: another optimizer, or LoRA
    rewrites: tuple = ()  # of BOTH: what of the rewrites training sees
    pairs: int = 0  # so many of the training pairs, drawn by the seed; 0: all


def plain(**changes):
    return Recipe(config=PLAIN | changes)


RECIPES = {
    "base": plain(epochs=0),
    "default": Recipe(),
    TEN_EPOCHS: Recipe(TEN, soup=True),
    "rewrites": Recipe(TEN, rewrites=BOTH, every_epoch=True, soup=True),
    "original": Recipe(config=common.ORIGINAL),
    **{name: Recipe(config=PLAIN, library=name) for name in ("sentence-transformers", "FlagEmbedding")},
    "sentence-transformers, our settings": Recipe(TEN, library="sentence-transformers, our settings"),
    "plain": Recipe(config=PLAIN, every_epoch=True),
    **{f"batch {size}": plain(batch_size=size) for size in (8, 16)},
    "batch 341": plain(batch_size=None, backward="gradcache"),
    "accumulation": plain(micro_batch=16),
    **{f"tau {tau}": plain(temperature=tau) for tau in (0.01, 0.02, 0.2)},
    "dropout 0.1": plain(dropout=None),
    "lr 2e-5": plain(learning_rate=2e-5),
    "10 epochs": plain(epochs=10),
    "symmetric": plain(symmetric=True),
    "queue 160": plain(queue=160),
    "duplicates kept": plain(mask_duplicates=False),
    "hard negatives": Recipe(config=PLAIN, hard_negatives=2),
    "hard negatives, margin": Recipe(config=PLAIN, hard_negatives=2, negatives_below=0.95),
    "pocket pairs": Recipe(config=PLAIN, extra="pocket"),
    "renamed codes": Recipe(config=PLAIN, extra="renamed"),
    "rewritten queries": Recipe(TEN, rewrites=BOTH[:1]),
    "rewritten codes": Recipe(TEN, rewrites=BOTH[1:]),
    **{f"{count} epochs, rate 2e-4": Recipe(config={"epochs": count}) for count in (2, 3)},
    **{f"{count} pairs": Recipe(pairs=count) for count in SIZES},
    **{f"{count} pairs, rewrites": Recipe(pairs=count, rewrites=BOTH) for count in SIZES},
    "all pairs, rewrites": Recipe(rewrites=BOTH),
    "faulty schedule": Recipe(config=common.ORIGINAL, leaking=True),
    # Their rates are their own: Adafactor's counts in a matrix's own size, and LoRA starts from zero.
    "Adafactor": Recipe(TEN | {"learning_rate": 4e-3}, change="with_adafactor"),
    "LoRA": Recipe(TEN | {"learning_rate": 1e-3}, change="with_lora"),
}


def fold_numbers(rows, folds=FOLDS, seed=0):
    """The fold (n,) of each pair. Pairs with an equal query or an equal code share a fold: no text leaks."""
    group = list(range(len(rows)))
    for side in ("query", "pos_doc"):
        first = {}
        for i, pair in enumerate(rows):
            old, new = group[i], group[first.setdefault(pair[side], i)]
            group = [new if g == old else g for g in group]
    numbers, sizes = np.empty(len(rows), dtype=int), [0] * folds
    for g in np.random.default_rng(seed).permutation(sorted(set(group))):
        members = [i for i, own in enumerate(group) if own == g]
        numbers[members] = smallest = sizes.index(min(sizes))
        sizes[smallest] += len(members)
    return numbers


def with_hard_negatives(rows, base, count, below=0.0):
    """The pairs with a "neg" list: the `count` wrong codes that the base model ranks highest.

    below: only codes with at most this share of the right code's score, of the first 60; 0: any.
    """
    from recipes.data import mined  # only here: it brings faiss

    options = {"window": (1, count), "margin": -2}
    if below:
        options = {"window": (1, 60), "margin": 0, "share": below, "hardest": True}
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        found = list(mined(rows, enc.Encoder(base), count, **options))
    return [{**pair, "neg": row["neg"]} for pair, (row, _) in zip(rows, found, strict=True)]


def renamed_codes(rows):
    """Each query with its code once more, whose functions are called f0, f1, …: no name gives it away."""
    found = []
    for pair in rows:
        nodes = list(ast.walk(tree := ast.parse(pair["pos_doc"])))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        names = {name: f"f{i}" for i, name in enumerate(dict.fromkeys(node.name for node in functions))}
        for node in functions:
            node.name = names[node.name]
        for node in nodes:
            if isinstance(node, ast.Name):
                node.id = names.get(node.id, node.id)
        found.append({"query": pair["query"], "pos_doc": ast.unparse(tree)})
    return found


def rewrites_of(data):
    """The file of rewrites of a data file; TutorialError where there is none."""
    if found := rewrites_path(data):
        return found
    raise TutorialError(f"No rewrites of {relative(data)} in data/. Leave out what needs them (--only).")


def training_pairs(recipe, rows, judged, data, base, seed=SEEDS[0]):
    """What a cell trains on: rows or a part of them, and what the recipe adds, but for texts of the `judged`
    pairs. The seed draws the part; a larger part has the smaller one in it."""
    own = {pair[side] for pair in judged for side in ("query", "pos_doc")}
    if recipe.pairs:
        drawn = np.random.default_rng(seed).permutation(len(rows))[: recipe.pairs]
        rows = [rows[i] for i in drawn]
    if recipe.extra:
        extra = renamed_codes(rows) if recipe.extra == "renamed" else pairs.read_mbpp(common.POCKET_PAIRS)
        rows = rows + [pair for pair in extra if not own & {pair["query"], pair["pos_doc"]}]
    if recipe.rewrites:
        rewrites = pairs.read_rewrites(rewrites_of(data))
        chosen = {
            task: {kind: [text for text in lists[kind] if text not in own] for kind in recipe.rewrites}
            for task, lists in rewrites.items()
        }
        rows = pairs.with_rewrites(rows, chosen)
    if recipe.hard_negatives:
        return with_hard_negatives(rows, base, recipe.hard_negatives, recipe.negatives_below)
    return rows


def train_with_library(library, base, rows, config, folder):
    """Fine-tune with a library's own trainer and its default settings; returns the backbone's weights."""
    if library == "FlagEmbedding":
        # Its lengths of 32 and 128 would cut the codes.
        options = f"--query_max_len 512 --passage_max_len 512 --seed {config.seed}".split()
        runner = common.flagembedding_runner(base, enc.read_pooling(base), rows, folder, options)
        runner.trainer.train()
        return runner.model.model.state_dict()
    import datasets
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import losses

    model = st.SentenceTransformer(str(base), device="cpu")
    table = datasets.Dataset.from_list([{"query": p["query"], "passage": p["pos_doc"]} for p in rows])
    options = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    loss = losses.MultipleNegativesRankingLoss(model)
    if library.endswith("our settings"):
        options |= {"learning_rate": config.learning_rate, "num_train_epochs": config.epochs}
        options["per_device_train_batch_size"], model.max_seq_length = config.batch_size, config.max_length
        # The same loss, in parts of so many tokens: a whole batch of 80 takes several GB.
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=config.token_budget)
    options = st.SentenceTransformerTrainingArguments(str(folder), seed=config.seed, use_cpu=True, **options)
    st.SentenceTransformerTrainer(model, options, train_dataset=table, loss=loss).train()
    return model.transformers_model.state_dict()


def leaking_epoch(run, epoch):
    """One epoch as the original loop runs it: a step after every second micro-batch of 80.

    With 5 micro-batches the fifth's gradient stays and leaks into the next epoch's first step, and of the 25
    steps that the schedule counts in 10 epochs 20 happen.
    """
    config, n, size = run.config, len(run.data["query"]), run.config.micro_batch
    order = ft.batch_of(epoch, n, dataclasses.replace(config, batch_size=n))
    parts = [order[start : start + size] for start in range(0, n, size)]
    counted, losses = config.epochs * len(parts) * size // config.batch_size, run.history["step_losses"]
    for number, part in enumerate(parts, 1):

        def loss_of(vectors, part=part):
            loss, _ = training.batch_loss(vectors, run.data, part, config)
            losses.append(loss.item())
            return loss * size / config.batch_size

        rows = training.batch_rows(run.data, part)
        ft.backward_whole(run.encoder, rows, loss_of, run.token_budget, config.precision)
        if number % (config.batch_size // size) == 0:
            rate = ft.lr_share(run.update, counted, round(config.warmup * counted))
            for group in run.optimizer.param_groups:
                group["lr"] = config.learning_rate * rate
            torch.nn.utils.clip_grad_norm_(run.encoder.parameters(), config.clip)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.update += 1


def copy_of(encoder):
    return {name: w.detach().clone() for name, w in whole_state(encoder).items()}


def epochs_of_run(recipe, config, base, rows):
    """The weights after each epoch of one training, and its loss per step."""
    run = training.start_run(base, lambda encoder: training.tokenize_pairs(encoder, rows), config, "cpu", ())
    if recipe.change:
        getattr(memory_ladder, recipe.change)(run)
    run.encoder.train()
    epochs = []
    for epoch in range(config.epochs):
        if recipe.leaking:
            leaking_epoch(run, epoch)
        else:
            for _ in range(ft.updates_per_epoch(len(rows), config)):
                training.one_update(run)
        epochs.append(copy_of(run.encoder))
    return epochs, run.history["step_losses"]


def weights_of_cell(recipe, config, base, rows):
    """{readout: weights} of one cell, and the loss per step of its training.

    "last" and "halfway" to the base; with every_epoch "average" of the last three epochs, "average, halfway",
    "epoch N", and "alpha 0.25" and "alpha 0.75" of the way from base to last; with soup and the last seed
    "mean of runs" with all SEEDS (model soups, arXiv 2203.05482), and parts of the way from the base to it.
    """
    start, losses = copy_of(enc.Encoder(base)), []
    if not config.epochs:
        return {"last": start}, losses

    def part_of(way, alpha):
        return ft.mix([start, way], [1 - alpha, alpha])

    if recipe.library:
        with tempfile.TemporaryDirectory() as folder:
            last = train_with_library(recipe.library, base, rows, config, Path(folder))
        last = {name: last[name].detach() for name in start}
    else:
        epochs, losses = epochs_of_run(recipe, config, base, rows)
        last = epochs[-1]
    found = {"last": last, "halfway": part_of(last, 0.5)}
    if recipe.soup and config.seed == SEEDS[-1]:
        others = (dataclasses.replace(config, seed=seed) for seed in SEEDS[:-1])
        states = [last, *(epochs_of_run(recipe, other, base, rows)[0][-1] for other in others)]
        found["mean of runs"] = soup = ft.mix(states, [1 / len(SEEDS)] * len(SEEDS))
        found |= {f"mean of runs, alpha {alpha}": part_of(soup, alpha) for alpha in ALPHAS}
    if recipe.every_epoch:
        found["average"] = mean = ft.mix(epochs[-3:], [1 / 3] * 3)
        found["average, halfway"] = part_of(mean, 0.5)
        found |= {f"epoch {n}": weights for n, weights in enumerate(epochs, 1)}
        found |= {f"alpha {alpha}": part_of(last, alpha) for alpha in (0.25, 0.75)}
    return found, losses


def general_ndcg(encoder):
    """nDCG@10 on the English half of Pocket T2, gain = grade, as mteb computes it."""
    corpus, queries, relevant = pocket_task.read_language(common.ROOT / "data" / "pocket_t2" / "en")
    with torch.no_grad():
        q = enc.embed(encoder, [row["text"] for row in queries]).numpy()
        p = enc.embed(encoder, [f"{row['title']} {row['text']}".strip() for row in corpus]).numpy()
    judged = [relevant[row["id"]] for row in queries]
    found = evaluation.grades_found(q, p, [row["id"] for row in corpus], judged)
    return float(np.mean([evaluation.ndcg(f, j.values()) for f, j in zip(found, judged, strict=True)]))


def config_of(recipe, seed, count, precision):
    """The TrainConfig of a cell with `count` training pairs. batch_size None: all of them at once."""
    config = ft.TrainConfig(**recipe.config, seed=seed, precision="fp32" if recipe.library else precision)
    return dataclasses.replace(config, batch_size=min(config.batch_size or count, count))


def run_cell(task):
    """Train and judge one cell, in a process of its own; returns what is kept of it."""
    name, seed, fold, data, precision = task
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started, base, recipe = time.process_time(), pocket_model_path(), RECIPES[name]
    everything = pairs.read_mbpp(data)
    held_out = fold_numbers(everything) == fold
    judged, rest = (np.array(everything)[part].tolist() for part in (held_out, ~held_out))
    rows = training_pairs(recipe, rest, judged, data, base, seed)
    config = config_of(recipe, seed, len(rows), precision)
    found, losses = weights_of_cell(recipe, config, base, rows)
    trained, encoder, ranks, general = time.process_time() - started, enc.Encoder(base).eval(), {}, {}
    for readout, weights in found.items():
        encoder.backbone.load_state_dict(weights)
        ranks[readout] = " ".join(map(str, ft.evaluate(encoder, judged, candidates=everything)["ranks"]))
        if fold == 0 and not readout.startswith(("epoch", "alpha")):  # one fold per seed tells enough
            general[readout] = round(general_ndcg(encoder), 4)
    return {
        "queries": " ".join(map(str, np.flatnonzero(held_out))),
        "ranks": ranks,
        "seconds": None if "mean of runs" in found else round(trained, 1),  # of one training, on one thread
        "precision": config.precision,
        "train_pairs": len(rows),
        **({"general": general} if general else {}),
        **({"losses": [round(x, 4) for x in losses]} if fold == 0 and seed == SEEDS[0] else {}),
    }


def settings_of(recipe, data):
    """What a cell's weights depend on, as JSON: cells with other settings are not mixed.

    Seed and precision stand in the cells, so that a study can go on on another machine.
    """
    usual = dataclasses.asdict(Recipe(recipe.config))
    unseen = ["seed", "precision", "checkpointing", "keep_checkpoints", "save_every", "save_minutes"]
    unseen += ["lora_rank"] if not recipe.config.get("lora_rank") else []
    own = {key: value for key, value in dataclasses.asdict(recipe).items() if value != usual[key]}
    own |= dataclasses.asdict(config_of(recipe, 0, 10**6, "fp32"))
    if recipe.rewrites:
        own["rewrites_sha256"] = sha256_of(rewrites_of(data))[:16]
    return json.loads(json.dumps({key: value for key, value in own.items() if key not in unseen}))


def measure(names, data, out, precision="fp32"):
    """Run the cells that are missing, writing after each one."""
    sha = sha256_of(data)[:16]
    study = read_json(out) if out.is_file() else {"data": data.name, "data_sha256": sha, "recipes": {}}
    if study["data_sha256"] != sha:
        raise TutorialError(f"{relative(out)} was measured on another {data.name}. Move it to start afresh.")
    here = common.machine(("torch", "transformers", "sentence-transformers", "FlagEmbedding"))["summary"]
    study["machines"] = list(dict.fromkeys([*study.get("machines", []), here]))
    todo, recipes = [], study["recipes"]
    for name in names:
        settings = settings_of(RECIPES[name], data)
        if recipes.get(name, {"settings": settings})["settings"] != settings:
            print(f"{name}: other settings than before, measured again.")
            del recipes[name]
        recipes.setdefault(name, {"settings": settings, "cells": {}})
        seeds = SEEDS if settings["epochs"] else SEEDS[:1]  # in the base nothing is random
        wanted = [(name, seed, fold) for seed in seeds for fold in range(FOLDS)]
        todo += [cell for cell in wanted if f"{cell[1]}-{cell[2]}" not in recipes[name]["cells"]]
    study["recipes"] = {name: recipes[name] for name in [*RECIPES, *recipes] if name in recipes}
    todo.sort(key=lambda cell: SEEDS.index(cell[1]))  # every recipe's first seed before any second one
    started, spawn = time.perf_counter(), multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        waiting = {pool.submit(run_cell, (*cell, data, precision)): cell for cell in todo}
        for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            name, seed, fold = waiting[future]
            if future.exception():
                pool.shutdown(cancel_futures=True)
            study["recipes"][name]["cells"][f"{seed}-{fold}"] = result = future.result()
            write_json(out, study)
            left = (time.perf_counter() - started) / done * (len(todo) - done) / 60
            score = ft.mrr(np.array(result["ranks"]["last"].split(), int))
            place = f"{done}/{len(todo)} {name}, seed {seed}, fold {fold}"
            print(f"{place}: fine-tuned MRR {score:.3f}; {left:.0f} min left", flush=True)
    return study


def main():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--data", type=Path, help="sanitized-mbpp.json, where it is not in data/")
    parser.add_argument("--out", type=Path, default=common.RESULTS / FILES[0])
    usual = training_precision(PROFILES["pocket"], "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=usual, help=f"here {usual}")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.report:
        measure(args.only, args.data or sanitized_mbpp_path(download=True), args.out, args.precision)
    report(read_json(args.out), args.out)
    print(f"Table in {relative(common.README)}, figures in images/.")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # finished cells are on disk
        main()
