"""A reader's own pairs from a file to a better model: what the commands of `__main__` and the notebooks call.

from embedding_tutorial import own_data
print(own_data.check("my_pairs.csv"))
own_data.train("my_pairs.csv", "models/mine")
"""

import dataclasses
import json
import os
import random
import sys
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import figures, profiles, reports, training
from .encoder import Encoder, embed, save_model
from .files import TutorialError, atomic_file, read_json, relative, require_disk, write_json
from .finetune import TrainConfig, bootstrap_interval, evaluate, mix, sign_flip_test, split_pairs
from .pairs import (
    ENOUGH,
    answers_of,
    columns_of,
    one_per_query,
    own_pairs,
    passages_of,
    read_corpus,
    read_pairs,
    tidied,
    write_pairs,
)
from .rows import read_rows

HELD_OUT = 1_000  # queries, at most: enough to see a gain of 0.02 MRR
WHOLE_GRAPH = 20_000  # tokens of a batch whose graph is kept whole: about 2 GB for MiniLM
PADDED = 11_000  # positions of section 5's padded batch, in fp32: about 3 GB for MiniLM
SAMPLE = 2_000  # pairs that `check` compares with each other
SMALLEST_CURVE, SEEDS = 20, (42, 43, 44)  # of a learning curve: its fewest pairs, doubled; its runs
ALPHA = 0.5  # of the way from base to fine-tuned: notebook 01, section 8
LICENCES = {"sentence-transformers/all-MiniLM-L6-v2": "apache-2.0", "BAAI/bge-m3": "mit"}


# ---------------------------------------------------------------- what the notebooks ask


def chosen_files(pairs=None, corpus=None):
    """(pairs, corpus) as paths or None: the arguments, else TUTORIAL_PAIRS and TUTORIAL_CORPUS."""
    names = pairs or os.environ.get("TUTORIAL_PAIRS"), corpus or os.environ.get("TUTORIAL_CORPUS")
    return tuple(Path(name) if name else None for name in names)


def train_share(pairs):
    """The share to train on: 0.8, and of many pairs more, so that about HELD_OUT are held out at most."""
    return max(0.8, 1 - HELD_OUT / max(1, len(pairs)))


def write_split(train_pairs, held_out, source, corpus, own):
    """Write `data/own_*.jsonl` or `data/mbpp_*.jsonl`; returns what notebook 02 has to know of it."""
    split = "data/own" if own else "data/mbpp"
    write_pairs(f"{split}_train.jsonl", train_pairs)
    write_pairs(f"{split}_val.jsonl", held_out)
    return {"split": split, "pairs": Path(source).name, "corpus": corpus and str(corpus)}


def texts_of_pairs(pairs):
    """The different texts of pairs, queries first."""
    return list(dict.fromkeys([pair["query"] for pair in pairs] + passages_of(pairs)))


def token_counts(tokenizer, texts, progress=False):
    """(tokens (n,), unknown (n,)): uncut lengths, special tokens included; a thousand texts at a time."""
    counts, unknown = [], []
    starts = range(0, len(texts), 1000)
    for start in tqdm(starts, desc="counting tokens", file=sys.stdout, disable=not progress):
        for row in tokenizer(texts[start : start + 1000], verbose=False)["input_ids"]:
            counts.append(len(row))
            unknown.append(row.count(tokenizer.unk_token_id))
    return np.array(counts), np.array(unknown)


def say_what_is_cut(tokenizer, texts, max_length, kind="training texts"):
    """Print how many texts are longer than the model reads here, and lose their end."""
    if cut := int((token_counts(tokenizer, texts)[0] > max_length).sum()):
        print(f"{cut} of {len(texts):,} {kind} are longer than {max_length} tokens: cut there.")


def fitted(config, encoder, pairs):
    """The settings, changed with a printed sentence where the training pairs ask for it.

    Fewer pairs than the batch: the batch is lowered. Long texts: GradCache, the same gradient in less memory.
    """
    say_what_is_cut(encoder.tokenizer, texts_of_pairs(pairs), encoder.max_length)
    if len(pairs) < config.batch_size:
        print(f"{len(pairs)} training pairs are fewer than the batch of {config.batch_size}: batch lowered.")
        config = dataclasses.replace(config, batch_size=len(pairs))
    sample = pairs[:: max(1, len(pairs) // 1000)]
    texts = [text for p in sample for text in (p["query"], p["pos_doc"], *p.get("neg", []))]
    tokens = np.minimum(token_counts(encoder.tokenizer, texts)[0], config.max_length).sum() / len(sample)
    if config.backward == "whole" and config.batch_size * tokens > WHOLE_GRAPH:
        print(f"{tokens:.0f} tokens in a pair on average: GradCache, for less memory (notebook 01, 6.6).")
        config = dataclasses.replace(config, backward="gradcache")
    return config


def padded_batch(encoder, pairs):
    """Pairs in a padded batch of section 5 such that the longest text does not blow it up: 2 to 32."""
    counts, _ = token_counts(encoder.tokenizer, texts_of_pairs(pairs)[:4000])
    return int(np.clip(PADDED // min(counts.max(), encoder.max_length), 2, 32))


# ---------------------------------------------------------------- check


def script_of(text):
    """The most frequent script of a text's letters: "LATIN", "CJK", "CYRILLIC", …, or "no letters"."""
    names = (unicodedata.name(letter, "?").split()[0] for letter in text[:200] if letter.isalpha())
    return next((name for name, _ in Counter(names).most_common(1)), "no letters")


def near_doubles(encoder, pairs, progress=False):
    """[(cosine, query, other query, kind)] of pairs that may answer each other, the closest first.

    Each two once: their queries or passages, without an equal text, with a cosine of 0.95 and more.
    """
    found, answers = {}, {}
    for pair in pairs:
        answers.setdefault(pair["query"], set()).update(answers_of(pair))
    for side in ("query", "pos_doc"):
        owner = {pair[side]: pair["query"] for pair in reversed(pairs)}
        texts = list(owner)
        with torch.no_grad():
            vectors = embed(encoder, texts, progress=progress).cpu()
        close = torch.triu(vectors @ vectors.T, diagonal=1)
        for i, j in (close >= 0.95).nonzero().tolist():
            both = tuple(sorted((owner[texts[i]], owner[texts[j]])))
            if both[0] != both[1] and len(answers[both[0]] | answers[both[1]]) > 1:  # equal ones are masked
                kind = "queries" if side == "query" else "passages"
                found[both] = max(found.get(both, (0,)), (close[i, j].item(), *both, kind))
    return sorted(found.values(), reverse=True)


def one_line(text):
    return reports.shortened("".join(c for c in " ".join(text.split()) if c.isprintable()), 50)


def repeated(counts):
    return sum(count > 1 for count in counts.values())


def check(path, model="pocket", query=None, passage=None, progress=False, device=None):
    """What is in a file of pairs, as text: columns, doubles, lengths, languages, likely false negatives."""
    rows, first = read_pairs(path, query, passage), next(read_rows(path))[1]
    columns = columns_of(first, query, passage, relative(path))
    others = ", ".join(str(name) for name in first if name not in columns)
    different = {(pair["query"], pair["pos_doc"]): pair for pair in rows}.values()
    queries, passages = Counter(p["query"] for p in different), Counter(p["pos_doc"] for p in different)
    encoder, texts = opened(model, device), texts_of_pairs(rows)
    counts, unknown = token_counts(encoder.tokenizer, texts, progress)
    scripts, cut = Counter(map(script_of, texts)), int((counts > encoder.max_length).sum())
    lines = [
        f"columns: {' → '.join(columns)}" + (f"; beside them: {others}" if others else ""),
        f"pairs: {len(rows):,}, of them {len(rows) - len(different)} twice; with hard negatives: "
        f"{sum(bool(pair.get('neg')) for pair in rows):,}",
        f"queries: {len(queries):,} different, {repeated(queries):,} with several passages",
        f"passages: {len(passages):,} different, {repeated(passages):,} of several queries "
        "(equal texts are never each other's negatives)",
        f"tokens of a text: {np.median(counts):.0f} in the middle, {counts.max():,} the longest; "
        f"{cut} longer than {encoder.max_length} are cut there",
        "scripts: " + ", ".join(f"{name} {count / len(texts):.0%}" for name, count in scripts.most_common(4)),
        f"pieces that {model} does not know: {unknown.sum() / counts.sum():.1%}",
    ]
    if model == "pocket" and scripts["LATIN"] + scripts["no letters"] < 0.95 * len(texts):
        lines.append("  The pocket model has learned from English alone: for other languages take bge-m3.")
    elif unknown.sum() > 0.05 * counts.sum():
        lines.append("  What a model does not know it can't tell apart: take another one.")
    sample = random.Random(0).sample(list(different), min(SAMPLE, len(different)))
    found = near_doubles(encoder, sample, progress)
    lines.append(f"likely false negatives: {len(found)} near doubles among {len(sample):,} pairs compared")
    for cosine, one, other, kind in found[:5]:
        lines.append(f"  {cosine:.2f} {kind} of: {one_line(one)} | {one_line(other)}")
    if same := sum(pair["query"] == pair["pos_doc"] for pair in different):
        lines.append(f"{same} pairs have equal texts on both sides, which teach nothing. Remove them.")
    if len(different) < ENOUGH:
        lines.append(f"Fewer than {ENOUGH} pairs: with so few no gain was clear in our study. Add pairs.")
    try:
        kept = tidied(rows, relative(path))
        split_pairs(kept, train_share=train_share(kept))
    except TutorialError as error:
        lines.append(f"`train` will refuse this file. {error}")
    return "\n".join(lines)


# ---------------------------------------------------------------- train


def base_model(model):
    """(folder, profile whose settings it gets, name) of "pocket", "bge-m3", or a model's folder."""
    names = {"pocket": "pocket", "bge-m3": "full"}
    if model in names:
        profile = profiles.PROFILES[names[model]]
        return profiles.model_path(profile), profile, profile.model
    if not (Path(model) / "config.json").is_file():
        raise TutorialError(
            f"{relative(model)} is no model folder. Take pocket, bge-m3, or a model's folder."
        )
    large = sum(file.stat().st_size for file in Path(model).iterdir() if file.is_file()) > 1e9
    return Path(model), profiles.PROFILES["full" if large else "pocket"], relative(model)


def opened(model, device=None):
    """The Encoder of "pocket", "bge-m3", or a model's folder, which reads as far as `train` did."""
    folder = base_model(str(model))[0]
    run = beside(folder, "-run") / "config.json"
    max_length = read_json(run)["max_length"] if run.is_file() else 512
    return Encoder(folder, max_length).to(device or profiles.device_of_this_machine()).eval()


def beside(folder, ending):
    """The path of what belongs to a folder and stands beside it, also where the folder is "."."""
    folder = Path(folder).resolve()
    return folder.with_name(folder.name + ending)


def require_own_folder(out, base=None):
    """Raise TutorialError where `out`, which gets replaced, is the base, or no model that `train` left."""
    out, run = Path(out).resolve(), beside(out, "-run")
    ours = (out / "model.safetensors").is_file() and run.is_dir()
    if out.is_file() or out == Path.cwd() or (out.is_dir() and any(out.iterdir()) and not ours):
        raise TutorialError(f"{relative(out)} exists and is no model of `train`. Name another with --out.")
    if base and {out, run, beside(run, ".previous")} & {base.resolve(), *base.resolve().parents}:
        raise TutorialError(f"{relative(base)} would be replaced or moved. Name a new folder with --out.")


def compare(before, after):
    """{metric: {"base", "merged", "difference": (mean, low, high), "p"}} of two results of `evaluate`."""
    results = {}
    for metric, score in (("Recall@1", lambda ranks: ranks == 1), ("MRR", lambda ranks: 1 / ranks)):
        old, new = (score(result["ranks"]).astype(float) for result in (before, after))
        results[metric] = {"base": bootstrap_interval(old), "merged": bootstrap_interval(new)}
        results[metric] |= {"difference": bootstrap_interval(new - old), "p": sign_flip_test(new - old)}
    return results


@dataclasses.dataclass
class Task:
    """What a training on a reader's file needs: `task_of` makes it."""

    folder: Path  # of the base model
    name: str
    base: Encoder
    train_pairs: list
    held_out: list
    candidates: list
    config: TrainConfig
    device: str

    def run(self, config, pairs, folder, progress=True):
        """One training; returns its last epoch's model."""
        return training.train(self.folder, pairs, self.held_out, config, folder, self.device, progress)[0]

    def judged(self, encoder, progress=True):
        return evaluate(encoder.to(self.device), self.held_out, self.candidates, progress=progress)

    def merge_into_base(self, tuned):
        """The base becomes the merged model: ALPHA of the way to the fine-tuned one."""
        states = [self.base.cpu().state_dict(), tuned.cpu().state_dict()]
        self.base.load_state_dict(mix(states, [1 - ALPHA, ALPHA]))
        return self.base


def task_of(path, model="pocket", corpus=None, query=None, passage=None, device=None, more=None, **settings):
    """The Task of a file. more: a file of further training pairs; those with a held-out text stay out."""
    everything, (folder, profile, name) = own_pairs(path, query, passage), base_model(model)
    device = device or profiles.device_of_this_machine()
    train_pairs, held_out = split_pairs(everything, train_share=train_share(everything))
    secret = set(texts_of_pairs(held_out))
    further = [p for p in (read_pairs(more) if more else []) if not secret & {p["query"], p["pos_doc"]}]
    candidates = passages_of(everything + read_corpus(corpus, preferred=passage))
    held_out = one_per_query(held_out)
    config = TrainConfig(**{**profile.config(device), **settings})
    base = Encoder(folder, config.max_length).eval()
    return Task(folder, name, base, train_pairs + further, held_out, candidates, config, device)


def train(path, out, model="pocket", runs=1, **options):
    """Train on a file of pairs with the notebook's recipe; leaves the merged model and its card in `out`.

    The run itself, its split, the passages searched and results.json stay in `out`-run; called again it goes
    on from there.
    runs: the mean of so many runs. options: of `task_of`. Returns what `compare` does.
    """
    require_own_folder(out)  # before anything is downloaded
    task, out = task_of(path, model, **options), Path(out)
    require_own_folder(out, task.folder)
    run, size = beside(out, "-run"), sum(w.numel() for w in task.base.parameters())
    require_disk(out.parent, size * 4e-9, "the merged model")
    config = fitted(task.config, task.base, task.train_pairs)
    counts = f"{len(task.train_pairs):,} pairs to train on, {len(task.held_out):,} queries held out"
    print(f"{counts}, {task.device}")
    if runs > 1:
        given = task.folder, task.train_pairs, task.held_out, config, run, task.device, runs
        tuned = reports.averaged_model(*given)
    else:
        tuned = task.run(config, task.train_pairs, run)
    before = task.judged(task.base)
    after = task.judged(task.merge_into_base(tuned))
    results = compare(before, after)
    save_model(task.base, out)
    for side, part in (("train", task.train_pairs), ("val", task.held_out)):
        write_pairs(run / f"{side}.jsonl", part)
    write_pairs(run / "passages.jsonl", [{"text": text} for text in task.candidates])
    sizes = {"training pairs": len(task.train_pairs), "held-out queries": len(task.held_out)}
    sizes |= {"passages searched": len(task.candidates), "runs": runs, "alpha": ALPHA}
    write_json(run / "results.json", {**sizes, "results": results})
    write_card(out, task.name, sizes, config, results)
    return results


def curve(path, out, model="pocket", seeds=SEEDS, **options):
    """How much more data would give: merged models trained on 20, 40, 80, … and all of the training pairs.

    Each size once for each seed, which draws other pairs. Every model's ranks go to `out`-curve.json as it
    is done, so a stopped curve goes on; the figure is `out`-curve.png.
    Returns {"base" or size: (MRR, low, high)}.
    """
    task, out = task_of(path, model, **options), Path(out)
    file, total = beside(out, "-curve.json"), len(task.train_pairs)
    sizes = [*(size for size in (SMALLEST_CURVE << n for n in range(20)) if size < total), total]
    identity = training.run_identity(task.folder, task.train_pairs, task.held_out, task.config)
    identity = json.loads(json.dumps(identity)) | {"passages": len(task.candidates)}
    known = read_json(file) if file.is_file() else {}
    cells = known.get("ranks", {}) if known.get("identity") == identity else {}
    wanted = [(0, "base"), *((size, seed) for seed in seeds for size in sizes)]
    todo = [cell for cell in wanted if "{}-{}".format(*cell) not in cells]
    if done := len(wanted) - len(todo):
        print(f"{done} of the curve's {len(wanted)} models are judged in {relative(file)} already.")
    start = {name: w.clone() for name, w in task.base.cpu().state_dict().items()}
    for size, seed in tqdm(todo, desc="learning curve", unit="model", file=sys.stdout):
        task.base.load_state_dict(start)
        if size:
            drawn = random.Random(seed).sample(task.train_pairs, total)[:size]
            with tempfile.TemporaryDirectory(dir=out.parent) as folder:
                config = fitted(dataclasses.replace(task.config, seed=seed), task.base, drawn)
                task.merge_into_base(task.run(config, drawn, Path(folder) / "run", progress=False))
        cells[f"{size}-{seed}"] = task.judged(task.base, progress=False)["ranks"].tolist()
        write_json(file, {"identity": identity, "ranks": cells})
    found = {"base": bootstrap_interval(1 / np.array(cells["0-base"]))}
    for size in sizes:
        ranks = np.array([cells[f"{size}-{seed}"] for seed in seeds])
        found[size] = bootstrap_interval((1 / ranks).mean(0))
    draw_curve(found, beside(out, "-curve.png"), len(task.held_out), Path(path).name)
    return found


def draw_curve(found, path, queries, source):
    """The figure of `curve`: its title says what the last doubling gave."""
    (before, last), base = list(found.items())[-2:], found["base"][0]
    doublings = np.log2(last[0] / before[0]) if before[0] != "base" else 1
    gain = (last[1][0] - before[1][0]) / doublings
    figures.curve(
        {"merged": [(size, score) for size, score in found.items() if size != "base"]},
        f"The last doubling of the pairs gave {gain:+.3f} MRR",
        path,
        xlabel="training pairs",
        ylabel=f"MRR on {queries} held-out queries",
        reference=(f"base: {base:.3f}", base),
        source=source,
    )


def table_of(results):
    """The results as rows of a Markdown table."""
    lines = ["| held-out | base | merged | difference | p |", "| --- | --- | --- | --- | --- |"]
    for metric, row in results.items():
        cells = reports.interval(row["base"]), reports.interval(row["merged"])
        change = reports.interval(row["difference"], sign=True)
        lines.append(f"| {metric} | {cells[0]} | {cells[1]} | {change} | {row['p']:.4f} |")
    return "\n".join(lines)


def write_card(folder, name, sizes, config, results):
    """README.md of a trained model: what it is, its figures, data, settings, and whose licences count."""
    licence = LICENCES.get(name, "unknown: look it up")
    shown = "epochs batch_size learning_rate temperature max_length precision seed".split()
    settings = "\n".join(f"| {key} | {getattr(config, key)} |" for key in shown)
    with atomic_file(Path(folder) / "README.md", "w") as file:
        file.write(f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {name}
license: other
license_name: to-be-filled-in
---

# {Path(folder).resolve().name}

{name}, fine-tuned on own pairs and taken {ALPHA:.0%} of the way from the base to the last epoch.
Made with the embedding tutorial (`python -m embedding_tutorial train`).

{table_of(results)}

In brackets: 95 % intervals over the held-out queries (paired bootstrap for the difference).

| data and settings | |
| --- | --- |
{"".join(f"| {key} | {value} |{chr(10)}" for key, value in sizes.items())}{settings}

Licence of the base model: {licence}. Licence of the data: to be filled in. Licence of this model: to be
filled in; it has to suit both.
""")


# ---------------------------------------------------------------- evaluate and search


def evaluate_file(folder, path, corpus=None, query=None, passage=None, device=None):
    """{metric: (mean, low, high)} of a model folder on a file of pairs, and how many queries and passages."""
    pairs = one_per_query(read_pairs(path, query, passage))
    candidates = passages_of(pairs + read_corpus(corpus, preferred=passage))
    run = beside(folder, "-run") / "train.jsonl"
    if run.is_file() and (seen := {p["query"] for p in read_pairs(run)} & {p["query"] for p in pairs}):
        print(f"{len(seen)} of {len(pairs)} queries were trained on; val.jsonl beside them was not.")
    encoder = opened(folder, device)
    ranks = evaluate(encoder, pairs, candidates, progress=True)["ranks"]
    scores = {"Recall@1": ranks == 1, "MRR": 1 / ranks}
    return {name: bootstrap_interval(v) for name, v in scores.items()}, len(pairs), len(candidates)


class Search:
    """Passages of a file of pairs or of a corpus, embedded once: `Search(folder, file)("query")`."""

    def __init__(self, folder, path, column=None, device=None):
        self.passages = read_corpus(path, column)
        self.encoder = opened(folder, device)
        with torch.no_grad():
            self.vectors = embed(self.encoder, self.passages, progress=True).cpu()

    def __call__(self, query, top=3):
        """[(similarity, passage)], the best first."""
        with torch.no_grad():
            scores = self.vectors @ embed(self.encoder, [query])[0].cpu()
        best = scores.topk(min(top, len(self.passages)))
        return [(s, self.passages[i]) for s, i in zip(*map(torch.Tensor.tolist, best), strict=True)]
