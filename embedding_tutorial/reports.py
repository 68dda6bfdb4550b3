"""Tables and small texts that the notebooks print: what only has to be laid out, not learned."""

import dataclasses
import itertools
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np
import pandas as pd

from .encoder import Encoder, embed, save_model, weights_file
from .files import TutorialError, only_process, read_json, relative, require_disk, write_json
from .finetune import bootstrap_interval, mix, sign_flip_test
from .pairs import answers_of, read_rewrites, with_rewrites
from .profiles import rewrites_path
from .runs import is_complete, keep_weights_only, run_size_gb
from .training import run_identity, train


def preview(code, lines=3):
    """The first lines of a code from its first `def` on, indented."""
    kept = [line for line in code.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(kept) if line.startswith("def ")), 0)
    return "\n".join("    " + shortened(line, 160) for line in kept[start : start + lines])


def shortened(text, width):
    """The text, cut with an ellipsis where it is wider than `width` letters; a Chinese one counts as two."""
    widths = itertools.accumulate(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
    kept = sum(used <= width for used in widths)
    return text if kept == len(text) else text[: kept - 1].rstrip() + " …"


def signature(code):
    """Name and arguments of a code's function."""
    return shortened(preview(code, 1).strip().removeprefix("def ").rstrip(":"), 70)


def short_label(pair):
    """A pair's first words, for an axis; of a text without spaces its first characters."""
    words = pair["query"].split()
    cut = shortened(" ".join(words[:5]), 44 if pair["query"].isascii() else 24)
    return cut if len(words) <= 5 or cut.endswith("…") else cut + " …"


def interval(triple, sign=False):
    """(mean, low, high) as text."""
    value, low, high = triple
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" if sign else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def score_table(results):
    """Recall@1 and MRR of several evaluations. results: {label: what `evaluate` returns}."""
    columns = {"Recall@1": "recall@1", "MRR": "mrr"}
    rows = {name: {label: r[key] for label, key in columns.items()} for name, r in results.items()}
    return pd.DataFrame.from_dict(rows, orient="index").style.format(precision=3)


def changed_queries(pairs, before, after, count=3):
    """Text: the queries whose reciprocal rank moved most, and what was found first before and after."""
    gain = 1 / after["ranks"] - 1 / before["ranks"]
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    lines = [f"{better} queries rank better than before, {worse} worse. The {count} that moved most:\n"]
    for i in np.argsort(-np.abs(gain), kind="stable")[:count]:
        lines.append(
            f"{shortened(pairs[i]['query'], 300)}\n  rank {before['ranks'][i]} → {after['ranks'][i]}"
        )
        for name, result in (("before", before), ("after", after)):
            right = "right" if result["top"][i] in answers_of(pairs[i]) else "wrong"
            lines.append(f"  {name}, {right}: {signature(result['top'][i])}")
        lines.append("")
    return "\n".join(lines)


def flat_vectors(models, pairs):
    """{name: (queries (n, 2), codes (n, 2))} of several Encoders, in the coordinates of one PCA over all."""
    import torch
    from sklearn.decomposition import PCA

    texts = [pair["query"] for pair in pairs] + [pair["pos_doc"] for pair in pairs]
    with torch.no_grad():
        vectors = {name: embed(model, texts).cpu().numpy() for name, model in models.items()}
    pca = PCA(n_components=2, random_state=0).fit(np.concatenate(list(vectors.values())))
    return {name: tuple(np.split(pca.transform(v), 2)) for name, v in vectors.items()}


def averaged_model(base, train_pairs, val_pairs, config, run, device, runs=3, rewrites_of=None):
    """The mean of the weights of `runs` runs with other seeds, as an Encoder, saved in `run`/averaged.

    rewrites_of: the data file whose rewrites (`data/*_rewrites.json`) the training pairs get; None: none.
    Of each run only the weights stay on the disk, and one model at a time is on the device. Raises
    TutorialError before the first run where the disk can't hold them all, and before the mean is saved where
    a run has other settings than the rest, as when the base was exchanged in between.
    """
    if rewrites_of is not None:
        file = rewrites_path(rewrites_of)
        train_pairs = with_rewrites(train_pairs, read_rewrites(file) if file else {})
        if not any("other_queries" in pair for pair in train_pairs):
            print(f"No rewrites belong to the pairs of {Path(rewrites_of).name}: training goes on without.")
    kind, mean = "-rewrites" if rewrites_of is not None else "", None
    seeds = [dataclasses.replace(config, seed=config.seed + n, keep_checkpoints=1) for n in range(runs)]
    wanted = {
        Path(f"{run}{kind}-seed-{one.seed}"): run_identity(base, train_pairs, val_pairs, one) for one in seeds
    }
    missing = sum(not is_complete(folder, identity) for folder, identity in wanted.items())
    size = weights_file(base).stat().st_size
    if missing:  # the last one needs the room of a run, the others leave their weights; then the mean
        require_disk(run, run_size_gb(size, 3 * size, 1) + missing * size / 1e9, f"{missing} runs")
    for n, (folder, one) in enumerate(zip(wanted, seeds, strict=True)):
        model = train(base, train_pairs, val_pairs, one, folder, device)[0].cpu()
        state = model.state_dict()
        mean = state if mean is None else mix([mean, state], [n / (n + 1), 1 / (n + 1)])
        keep_weights_only(folder)
        del model, state
    for folder, identity in wanted.items():
        if not is_complete(folder, identity):
            raise TutorialError(
                f"{relative(folder)} is not the run that was to be averaged: it has other settings, pairs or "
                "base. Another process has changed it, or the base model. Run this again."
            )
    model = Encoder(base, config.max_length)
    model.load_state_dict(mean)
    with only_process(Path(run) / "averaged"):
        save_model(model, Path(run) / "averaged")
    return model.to(device).eval()


# ---------------------------------------------------------------- from the measurements under benchmarks/

OWN_BATCH = {"batch 8": 8, "batch 16": 16, "plain": 80}  # recipes of the study that differ in the batch alone
WHOSE = {  # what a reader wants to tell apart: (recipe, weights of it), and what differs
    "base": ("base", "last", "no training"),
    "sentence-transformers' defaults": ("sentence-transformers", "last", "batch 8, 3 epochs, rate 5e-5"),
    "FlagEmbedding's defaults": ("FlagEmbedding", "last", "batch 8, 3 epochs, rate 5e-5, τ 0.02"),
    "sentence-transformers, our batch and rate": (
        "sentence-transformers, our settings", "last", "batch 80, 10 epochs, τ 0.05, dropout 0.1"),
    "the original article, as its loop ran": ("faulty schedule", "last", "2 × 80, τ 0.02, dropout 0.1"),
    "the original article, as its loop ran, halfway": ("faulty schedule", "halfway", "the same, merged"),
    "the original article": ("original", "last", "its schedule corrected"),
    "the original article, halfway": ("original", "halfway", "corrected and merged"),
    "ours: fine-tuned": ("default", "last", "batch 80, 5 epochs, τ 0.05, no dropout"),
    "ours: merged": ("default", "halfway", "the same, halfway to the base"),
}  # fmt: skip
WEIGHTS = {
    "base": ("base", "last"),
    "fine-tuned": ("default", "last"),
    "merged": ("default", "halfway"),
    "ten epochs, merged": ("10 epochs, rate 2e-4", "halfway"),
    "… and three runs averaged": ("10 epochs, rate 2e-4", "mean of runs, alpha 0.5"),
    "… and rewrites": ("rewrites", "halfway"),
    "… and both": ("rewrites", "mean of runs, alpha 0.5"),
}


def rows_of(study):
    """{(recipe, readout): row} of a study's summary."""
    return {(row["recipe"], row["readout"]): row for row in study["summary"]["rows"]}


def losses_by_batch(study):
    """What figures.loss_curves draws of the study's first fold: (curves, pairs in one step)."""
    curves, pairs_per_step = {}, {}
    for name, size in OWN_BATCH.items():
        entry = study["recipes"][name]
        cell = entry["cells"]["42-0"]
        curves[f"batch {size}"] = cell["losses"]
        seen = entry["settings"]["epochs"] * cell["train_pairs"]  # an epoch's last batch is shorter
        pairs_per_step[f"batch {size}"] = seen / len(cell["losses"])
    return curves, pairs_per_step


def weights_table(*studies):
    """MRR against the base and general retrieval of base, fine-tuned, merged, and the two costlier ideas."""
    table = {label: {} for label in WEIGHTS}
    for study in studies:
        rows, name = rows_of(study), "MBPP" if "sanitized" in study["data"] else "pocket data"
        for label, key in WEIGHTS.items():
            row = rows.get(key)  # None: not measured on this data
            gain = interval(row["mrr - base"], sign=True) if row else "not measured"
            gain = "" if label == "base" else gain
            score, general = (f"{row['mrr'][0]:.3f}", f"{row['general']:.3f}") if row else ("", "")
            table[label] |= {f"{name}: MRR": score, f"{name}: gain over base": gain}
            table[label][f"{name}: general nDCG@10"] = general
    return pd.DataFrame.from_dict(table, orient="index")


def study_table(study):
    """Whose recipe? One row each: what differs, MRR, the paired difference to the base, general retrieval."""
    rows, table = rows_of(study), {}
    for label, (recipe, readout, differs) in WHOSE.items():
        if row := rows.get((recipe, readout)):
            gain = "" if label == "base" else interval(row["mrr - base"], sign=True)
            table[label] = {"what differs": differs, "MRR": f"{row['mrr'][0]:.3f}", "MRR − base": gain}
            table[label]["general nDCG@10"] = f"{row['general']:.3f}"
    return pd.DataFrame.from_dict(table, orient="index")


def original_recipe(pairs):
    """{"original article": (code MRR, general nDCG@10)} with intervals, on the pocket data; else None.

    pairs: the name of the file that was trained on.
    """
    if pairs != "pocket_mbpp.json":
        return None
    point = read_json("benchmarks/results/predecessor.json")
    values = point["code_reciprocal_ranks"], point["general_ndcg_at_10_each"]
    return {"original article": tuple(bootstrap_interval(v) for v in values)}


def is_clear(change, p):
    """Whether a paired difference is more than chance: its interval leaves out 0, and p is below 0.05."""
    return p < 0.05 and not change[1] <= 0 <= change[2]


def differences(rows, name):
    """{"code" or "general": (queries,)}: a model's scores minus those of the first one, query by query."""
    first = next(iter(rows.values()))["each"]
    return {side: rows[name]["each"][side] - first[side] for side in first}


def verdict(rows, kind):
    """What can be said of "merged": "a gain on code, no clear change elsewhere". kind: "code"."""
    found = []
    for difference in differences(rows, "merged").values():
        clear = is_clear(bootstrap_interval(difference), sign_flip_test(difference))
        found.append("no clear change" if not clear else "a gain" if difference.mean() > 0 else "a loss")
    places = f"on {kind}", "elsewhere"
    if found[0] == found[1]:
        return f"{found[0]} {(' and ' if clear else ' or ').join(places)}"
    return ", ".join(f"{what} {place}" for what, place in zip(found, places, strict=True))


def bill(rows, path, task):
    """The models' scores on code and elsewhere, with the paired difference to the base; also written to path.

    rows: {model: {"code": interval, "general": interval, "each": {"code": (queries,), "general": …}}}, the
    base first.
    """
    base, table, plain = next(iter(rows)), {}, {}
    for name, row in rows.items():
        table[name], plain[name] = {}, {side: row[side] for side in row["each"]}
        change = {side: bootstrap_interval(each) for side, each in differences(rows, name).items()}
        for side, metric in (("code", "MRR"), ("general", "nDCG@10")):
            shown = "" if name == base else interval(change[side], sign=True)
            table[name] |= {f"{side} {metric}": interval(row[side]), f"{side} − base": shown}
            plain[name][f"{side} - base"] = change[side]
    write_json(path, {"task": task, "models": plain})
    return pd.DataFrame.from_dict(table, orient="index")


def below(tables, name):
    """Of a model's scores, how many lie below the first model's: "3 of 20 scores, by 0.012 at most"."""
    first = next(iter(tables.values()))
    own = tables[name]
    drops = [round(base, 3) - round(own[m][k], 3) for m, cuts in first.items() for k, base in cuts.items()]
    worst = f", by {max(drops):.3f} at most" if max(drops) > 0 else ""
    return f"{sum(drop > 0 for drop in drops)} of {len(drops)} scores{worst}"
