"""From the cells of benchmarks/study.py to its summary, its figures and its section of the README.

One long table holds recipe, readout, seed, fold, query and rank; pandas groups it. A place is a recipe's
weights: "plain" (its last epoch's) or "plain / halfway". Intervals are 95 % bootstrap intervals over queries;
of the difference, paired by query, where two places are compared.
"""

import math
from collections import Counter, namedtuple

import common
import pandas as pd

from embedding_tutorial import figures
from embedding_tutorial import finetune as ft
from embedding_tutorial.figures.style import number
from embedding_tutorial.files import ROOT, read_json, relative, write_json
from embedding_tutorial.reports import interval as shown

FILES, FOLDS, SEEDS = ("study.json", "study_pocket.json"), 5, (42, 43, 44)
ALPHAS = (0.5, 0.6, 0.7, 0.8)  # of the way from the base to the mean of runs
SOUPS = ("mean of runs", *(f"mean of runs, alpha {alpha}" for alpha in ALPHAS))
READOUTS = {  # as the cells name the weights, and as readers do
    "last": "fine-tuned",
    "halfway": "merged",
    "average": "mean of the last three epochs",
    "average, halfway": "mean of the last three epochs, merged",
    **dict(zip(SOUPS, ("averaged", *(f"averaged, merged {alpha}" for alpha in ALPHAS)), strict=True)),
}
METRICS = ["recall@1", "mrr"]
SIZES, ALL = (20, 40, 80, 160), 341  # of a fold's training pairs; all of them are the default
TEN_EPOCHS = "10 epochs, rate 2e-4"
EPOCHS = {2: "2 epochs, rate 2e-4", 3: "3 epochs, rate 2e-4", 5: "default", 10: TEN_EPOCHS}
# Pairs that a language model wrote in MBPP's manner: not ahead, gone from data/ since. To repeat:
# git checkout 2c7f8b7, then benchmarks/study.py --only "400 synthetic" "800 synthetic" "1500 synthetic" …
SYNTHETIC = {
    **{f"{n} synthetic pairs more, as many updates": f"{n} synthetic / halfway" for n in (400, 800, 1500)},
    "400 more, as many epochs": "400 synthetic, 5 epochs / halfway",
}
# What each row of the summary is compared with, under keys as "mrr - base" and "p base".
AGAINST = ["base", "original", "plain", "default", "rewrites", "original / halfway", "plain / halfway",
           "default / halfway", f"{TEN_EPOCHS} / halfway", "rewrites / halfway",
           "rewrites / mean of runs, alpha 0.6"]  # fmt: skip

# One figure, images/study_<figure>.png. rows: {label: place}; the first is the reference of the others.
Question = namedtuple("Question", "title, figure, rows")

# fmt: off
RUNS = Question("What do three runs and rewrites add to ten epochs, all merged?", "runs", {
    "one run": f"{TEN_EPOCHS} / halfway", "three runs": f"{TEN_EPOCHS} / mean of runs, alpha 0.5",
    "one run, rewrites": "rewrites / halfway", "three runs, rewrites": "rewrites / mean of runs, alpha 0.5"})
QUESTIONS = [
    Question("How many negatives?", "batch_size",
             {"80": "plain", "8": "batch 8", "16": "batch 16", "all 341": "batch 341"}),
    Question("80 in one graph, or 5 × 16 accumulated?", "accumulation",
             {"whole batch of 80": "plain", "accumulated from 16": "accumulation"}),
    Question("Which temperature?", "temperature",
             {"0.05": "plain", "0.01": "tau 0.01", "0.02": "tau 0.02", "0.2": "tau 0.2"}),
    Question("Dropout?", "dropout", {"0": "plain", "0.1": "dropout 0.1"}),
    Question("Which learning rate, how long?", "learning_rate",
             {"5e-5, 5 epochs": "plain", "2e-5": "lr 2e-5", "2e-4": "default", "10 epochs": "10 epochs"}),
    Question("Symmetric loss, queue, duplicates?", "loss",
             {"the plain recipe": "plain", "symmetric": "symmetric", "queue of 160": "queue 160",
              "duplicates kept as negatives": "duplicates kept"}),
    Question("More signal?", "signal", {
        "the plain recipe": "plain", "2 hard negatives each": "hard negatives",
        "2 of those with at most 0.95 of the right code's score": "hard negatives, margin",
        "427 pocket pairs more": "pocket pairs", "codes with renamed functions too": "renamed codes",
        "rate 2e-4, 10 epochs": TEN_EPOCHS, "2e-4, 10 epochs, rewritten queries": "rewritten queries",
        "2e-4, 10 epochs, rewritten codes": "rewritten codes", "2e-4, 10 epochs, both": "rewrites"}),
    Question("Which weights of the run?", "weights", {
        "plain: fine-tuned": "plain", "plain: mean of the last three epochs": "plain / average",
        "plain: a quarter of the way from the base": "plain / alpha 0.25",
        "plain: merged (halfway)": "plain / halfway", "plain: three quarters": "plain / alpha 0.75",
        "default: fine-tuned": "default", "default: merged": "default / halfway",
        "10 epochs: fine-tuned": TEN_EPOCHS, "rewrites: fine-tuned": "rewrites",
        **{f"{label}: {READOUTS[readout]}": f"{name} / {readout}"
           for label, name in {"10 epochs": TEN_EPOCHS, "rewrites": "rewrites"}.items()
           for readout in ("halfway", *SOUPS)}}),
    RUNS,
    Question("Whose recipe?", "recipes", {  # the libraries' defaults are those of their TrainingArguments
        "base": "base",
        "sentence-transformers' defaults (batch 8, 3 epochs, rate 5e-5, τ 0.05)": "sentence-transformers",
        "FlagEmbedding's defaults (batch 8, 3 epochs, rate 5e-5, τ 0.02)": "FlagEmbedding",
        "sentence-transformers, our batch and rate, 10 epochs": "sentence-transformers, our settings",
        "the original recipe": "original", "the original recipe, halfway back": "original / halfway",
        "the original recipe, as its loop ran, halfway back": "faulty schedule / halfway",
        "ours: fine-tuned": "default", "ours: merged": "default / halfway"}),
]
# fmt: on


def verdict(difference):
    return "better" if difference[1] > 0 else "worse" if difference[2] < 0 else "no difference"


def long_table(study):
    """One row per judged query: recipe, readout, weights (the readout as readers call it), place, seed, fold,
    query, rank (from 1), recall@1, mrr; of its cell general (nDCG@10) and seconds (NaN: no clean training).

    Only what is reported: seeds with all FOLDS, and readouts with as many seeds as the recipe's last weights.
    What belongs to no seed, the base and means of runs, has seed 0.
    """
    rows = [
        {
            "recipe": recipe, "readout": readout, "seed": int(key[:-2]), "fold": int(key[-1]),
            "query": cell["queries"].split(), "rank": ranks.split(),
            "seconds": cell["seconds"] or None, "general": cell.get("general", {}).get(readout),
        }
        for recipe, entry in study["recipes"].items()
        for key, cell in entry["cells"].items()
        for readout, ranks in cell["ranks"].items()
    ]  # fmt: skip
    kinds = {"query": int, "rank": int, "seconds": float, "general": float}
    table = pd.DataFrame(rows).explode(["query", "rank"], ignore_index=True).astype(kinds)
    base, readout = table["recipe"] == "base", table["readout"]
    table["seed"] = table["seed"].mask(base | readout.isin(SOUPS), 0)
    table["weights"] = readout.replace(READOUTS).mask(base, "base")
    table["place"] = table["recipe"] + (" / " + readout).mask(readout == "last", "")
    table = table[table.groupby(["place", "seed"])["fold"].transform("nunique") == FOLDS]
    seeds = table.groupby("place")["seed"].nunique()
    whole = table["place"].map(seeds) == table["recipe"].map(seeds)  # a recipe's own name: its last weights
    table = table[whole | table["readout"].isin(SOUPS)]
    return table.assign(**{"recall@1": (table["rank"] == 1).astype(float), "mrr": 1 / table["rank"]})


class Results:
    """A study's long table; scores: (place, seed) × (metric, query); mrr of each place, means over seeds."""

    def __init__(self, study):
        self.data, self.table = study["data"], long_table(study)
        self.scores = self.table.pivot(index=["place", "seed"], columns="query", values=METRICS)
        self.mrr = self.table.groupby("place")["mrr"].mean()
        last = self.table[self.table["readout"] == "last"]
        seconds = last.groupby(["recipe", "seed", "fold"])["seconds"].first()  # of each cell
        self.seconds = seconds.groupby("recipe").median()

    def difference(self, one, two, metric="mrr", seeds=None):
        """Place one's score minus place two's, of each query (queries,): means over the first `seeds` seeds.

        Of the seeds that both have: a seed can lie 0.01 MRR above the next one. What belongs to no seed is
        compared with all of the other's.
        """
        own, other = (self.scores[metric].loc[place].iloc[:seeds] for place in (one, two))
        shared = own.index.intersection(other.index)
        if len(shared):
            own, other = own.loc[shared], other.loc[shared]
        return (own.mean() - other.mean()).to_numpy()

    def interval(self, one, two, **options):
        return ft.bootstrap_interval(self.difference(one, two, **options))

    def row(self, place, against=()):
        """One row of the summary. against: places to compare with."""
        own, cells = self.scores.loc[place], self.table[self.table["place"] == place]
        row = cells[["recipe", "readout", "weights"]].iloc[0].to_dict()
        trainings = len(SEEDS) if row["readout"] in SOUPS else 1
        row |= {"seeds": max(trainings, len(own)), "queries": own["mrr"].shape[1]}
        row |= {metric: ft.bootstrap_interval(own[metric].mean()) for metric in METRICS}
        general, seconds = cells["general"].mean(), self.seconds[row["recipe"]]
        row["mrr of seeds"] = own["mrr"].mean(axis=1).tolist()
        row["minutes"] = None if pd.isna(seconds) else round(float(seconds) * trainings / 60, 2)
        row["general"] = None if pd.isna(general) else round(float(general), 4)
        for other in against:
            row |= {f"{metric} - {other}": self.interval(place, other, metric=metric) for metric in METRICS}
            row[f"p {other}"] = ft.sign_flip_test(self.difference(place, other))
        return row


def picked(table, among, within=()):
    """The rows of table whose value in column `among` has the best MRR of all, chosen anew for each fold.

    {"on the same queries": rows, "on the other folds": rows}: best on the fold itself, which flatters, or on
    the others, where no figure of the fold takes part in its choice. (Models of the other folds have seen the
    fold's pairs in training.) within: columns each of whose values chooses for itself.
    """
    keys, found = [*within, "fold", among], {}
    inside = table.assign(n=1).groupby(keys)[["mrr", "n"]].sum()
    outside = inside.groupby([*within, among]).transform("sum") - inside
    for way, sums in (("on the same queries", inside), ("on the other folds", outside)):
        best = (sums["mrr"] / sums["n"]).groupby(keys[:-1]).idxmax()
        found[way] = table.set_index(keys).sort_index().loc[list(best)].reset_index()
    return found


def seed_noise(means):
    """How far runs of one recipe differ. means: the MRR of each (recipe, seed), a series.

    "sd": the standard deviation within a recipe, pooled over recipes; "standard error": of the difference
    between two recipes' means over SEEDS, if nothing but the seeds differed.
    """
    groups = means.groupby("recipe")
    sd = float((((means - groups.transform("mean")) ** 2).sum() / (groups.count() - 1).sum()) ** 0.5)
    widest = (groups.max() - groups.min()).idxmax()
    found = {"recipes": groups.ngroups, "sd": sd, "standard error": sd * (2 / len(SEEDS)) ** 0.5}
    return found | {"widest": [widest, float(means[widest].min()), float(means[widest].max())]}


def across_recipes(results, settings):
    """A choice of recipe that does not see what it reports, the luck of seeds, and of the best epoch."""
    summary, table = {}, results.table
    libraries = [name for name, of_recipe in settings.items() if "library" in of_recipe]
    own = table[table["readout"].isin(list(READOUTS)) & ~table["recipe"].isin(libraries)]
    if own["place"].nunique() > 1:
        means = own.groupby(["recipe", "weights", "place", "fold", "query"])[METRICS].mean().reset_index()
        chosen = picked(means, "place")["on the other folds"].sort_values("query")
        choices = (chosen["recipe"] + " / " + chosen["weights"]).groupby(chosen["fold"]).first()
        found = {metric: ft.bootstrap_interval(chosen[metric]) for metric in METRICS}
        summary["chosen on the other folds"] = found | {"choices": choices.tolist()}
    means = table[table["readout"] == "last"].groupby(["recipe", "seed"])["mrr"].mean()
    means = means[means.groupby("recipe").transform("count") > 1]
    several = list(means.index.unique("recipe"))
    # Where all pairs are one batch (10**6), the seed draws nothing.
    if drawn := [name for name in several if settings[name].get("batch_size") != 10**6]:
        summary["seeds"] = seed_noise(means[drawn]) | {"otherwise with one": {}}
        for name in several if "plain" in results.mrr else []:
            one, all_seeds = (results.interval(name, "plain", seeds=seeds) for seeds in (1, None))
            if verdict(one) != verdict(all_seeds):
                summary["seeds"]["otherwise with one"][name] = one
    for name in table[table["readout"] == "epoch 1"]["recipe"].unique():
        own = table[table["recipe"] == name]
        ways = picked(own[own["readout"].str.startswith("epoch ")], "readout", within=["seed"])
        ways["last epoch"] = own[own["readout"] == "last"]
        ways = {way: cells[METRICS].mean().to_dict() for way, cells in ways.items()}
        summary.setdefault("best epoch", {})[name] = ways
    return summary


def default_rule(studies, margin=0.01):
    """Whether a costlier row of RUNS stays: ahead of one plain run by the margin in MRR, with an interval
    above 0, on both data sets. studies: a Results of each. "stays": None where one has not measured it."""
    (_, first), *others = RUNS.rows.items()
    rows = {}
    for label, place in others:
        both = [results for results in studies if {place, first} <= set(results.mrr.index)]
        ahead = {results.data: results.interval(place, first) for results in both}
        stays = all(value >= margin and low > 0 for value, low, _ in ahead.values())
        everywhere = True if len(ahead) == len(FILES) else None
        rows[label] = {"mrr - one run": ahead, "stays": stays and everywhere}
    return rows


def answer(results, question, path):
    """Draw a question's differences from its first row, which the texts argue from; returns its finding."""
    places = {label: place for label, place in question.rows.items() if place in results.mrr}
    first, *others = places
    found = {label: results.interval(places[label], places[first]) for label in others}
    scores = {label: results.mrr[place] for label, place in places.items()}
    queries = results.table["query"].nunique()
    parts, clear = [], []
    for way, more in (("better", ""), ("worse", ""), ("no difference", f" that {queries} queries can show")):
        if labels := [label for label in others if verdict(found[label]) == way]:
            parts.append(f"{way}{more}: {', '.join(f'{x} {shown(found[x], True)}' for x in labels)}")
            short = ", ".join(labels) if len(labels) < 4 else f"{len(labels)} of {len(others)}"
            clear += [] if more else [f"{way if clear else way.title()} than “{first}”: {short}"]
    figures.intervals(
        [dict(zip(("label", "value", "lo", "hi"), (label, *found[label]), strict=True)) for label in others],
        f"{question.title} {'; '.join(clear) or f'No row differs clearly from “{first}”'}",
        path,
        xlabel=f"MRR − MRR of “{first}”, paired over {queries} held-out queries",
        reference=0,
        reference_label=f"{first}: MRR {scores[first]:.3f}",
        source=f"benchmarks/study.py: {results.data}, {FOLDS}-fold, MiniLM",
    )
    best, reference = max(scores, key=scores.get), f"“{first}” ({scores[first]:.3f})"
    return f"Highest MRR: {best}, {scores[best]:.3f}. Against {reference} {'; '.join(parts)}."


def lines_of(results, ways):
    """{label: [(x, (MRR, low, high))]} of what is measured. ways: {label: {x: place}}."""
    there = {label: {x: p for x, p in way.items() if p in results.mrr} for label, way in ways.items()}
    return {
        label: [(x, results.row(place)["mrr"]) for x, place in way.items()]
        for label, way in there.items()
        if way
    }


def how_much_data(results, path):
    """Draw MRR against the number of training pairs; returns the finding, None where it is not measured."""
    rewritten = {n: f"{n} pairs, rewrites / halfway" for n in SIZES} | {ALL: "all pairs, rewrites / halfway"}
    own = {n: f"{n} pairs / halfway" for n in SIZES} | {ALL: "default / halfway"}
    last = {n: place.removesuffix(" / halfway") for n, place in own.items()}
    ways = {"merged": own, "the last epoch": last, "merged, with rewrites": rewritten}
    lines = lines_of(results, ways)
    if not {own[n] for n in (*SIZES, ALL)} <= set(results.mrr.index):
        return None
    clear = next((n for n in SIZES if results.interval(own[n], "base")[1] > 0), SIZES[-1])
    doublings = math.log2(ALL / clear)
    per_doubling = [x / doublings for x in results.interval(own[ALL], own[clear])]
    figures.curve(
        lines,
        f"Against the base the gain is clear from {clear} pairs on",
        path,
        xlabel="training pairs",
        ylabel="MRR",
        reference=("base", results.mrr["base"]),
        source=f"benchmarks/study.py: {results.data}, {FOLDS}-fold, MiniLM, {len(SEEDS)} seeds",
    )
    parts = [f"From {clear} to {ALL} pairs each doubling gives {shown(per_doubling, True)} MRR, merged."]
    against = [(f"{n} pairs against none", own[n], "base") for n in (*SIZES, ALL)]
    against += [(f"the last epoch of {n}", last[n], "base") for n in (*SIZES, ALL)]
    against += [(f"rewrites of {n}", rewritten[n], own[n]) for n in (*SIZES, ALL)]
    against += [(label, place, own[ALL]) for label, place in SYNTHETIC.items()]
    found = [(label, one, two) for label, one, two in against if {one, two} <= set(results.mrr.index)]
    parts += [f"{label}: {shown(results.interval(one, two), True)}" for label, one, two in found]
    return parts[0] + " " + "; ".join(parts[1:]) + "."


def quality_for_minutes(results, path):
    """Draw MRR against the minutes of a training, which benchmarks/training.py measured side by side.

    Returns the finding, None where it is not measured.
    """
    measured = common.RESULTS / "training_mbpp.json"
    if not measured.is_file() or not set(EPOCHS.values()) <= set(results.mrr.index):
        return None
    rows = read_json(measured)["contenders"]
    own, original = (rows[name]["seconds"] / 60 for name in ("ours", "predecessor"))
    minutes = {round(n * own, 2): place for n, place in EPOCHS.items()}
    last = round(common.ORIGINAL["epochs"] * original, 2)
    lines = {
        "merged": {x: f"{place} / halfway" for x, place in minutes.items()},
        "fine-tuned": minutes,
        "the original recipe": {last: "original"},
    }
    *fewer, whole = EPOCHS
    differences = {n: results.interval(*(f"{EPOCHS[m]} / halfway" for m in (n, whole))) for n in fewer}
    few = fewer[-1]
    figures.curve(
        lines_of(results, lines),
        f"{few} epochs halfway back: {number(differences[few][0], signed=True)} MRR against {whole}, in half "
        "the minutes",
        path,
        xlabel="minutes of one training on 2 cores, in fp32",
        ylabel="MRR",
        reference=("base", results.mrr["base"]),
        source=f"benchmarks/study.py: {results.data}; minutes: benchmarks/training.py",
    )
    parts = (f"{n} epochs ({n * own:.1f} min) {shown(d, True)}" for n, d in differences.items())
    return f"All merged, against {whole} epochs ({whole * own:.1f} min): {'; '.join(parts)}."


def text_across_recipes(summary):
    words = {True: "stays", False: "does not stay", None: "not measured on both"}
    rule = []
    for label, row in summary["default rule"].items():
        ahead = ", ".join(f"{shown(found, True)} on {data}" for data, found in row["mrr - one run"].items())
        rule.append(f"“{label}”: {words[row['stays']]} ({ahead or 'nowhere yet'})")
    lines = [f"""**How the default was chosen**: batch, temperature, rate, epochs and the way back to the base
on the queries of sanitized MBPP alone. Runs and rewrites cost more, so they are judged on both data sets: a
costlier row stays only if it is ahead of one merged run on the plain pairs by at least 0.01 MRR, with an
interval above 0, on both. {"; ".join(rule)}."""]  # fmt: skip
    if chosen := summary.get("chosen on the other folds"):
        counts = ", ".join(f"{choice} ({n} folds)" for choice, n in Counter(chosen["choices"]).items())
        lines.append(f"""**The recipe chosen for each fold on the other four**: Recall@1
{shown(chosen["recall@1"])}, MRR {shown(chosen["mrr"])}; chosen: {counts}.""")
    if noise := summary.get("seeds"):
        widest, low, high = noise["widest"]
        lines.append(f"""**How far seeds differ**: the MRR of a recipe's last weights has a standard deviation
of {noise["sd"]:.3f} over seeds, pooled over {noise["recipes"]} recipes; widest: {widest}, {low:.3f} to
{high:.3f}. The intervals cover the choice of queries, not of seeds: two recipes that differ in nothing else
differ by {noise["standard error"]:.3f} (one standard error) in the means of {len(SEEDS)} seeds each.""")
        if others := ", ".join(f"{n} {shown(d, True)}" for n, d in noise["otherwise with one"].items()):
            lines[-1] += f" With seed {SEEDS[0]} alone another verdict against “plain” would have: {others}."
    for name, ways in summary.get("best epoch", {}).items():
        parts = (f"{way} MRR {v['mrr']:.3f} (Recall@1 {v['recall@1']:.3f})" for way, v in ways.items())
        lines.append(f"**Choosing the epoch** ({name}): {', '.join(parts)}. The first one flatters.")
    return "\n\n".join(lines)


def report(study, out, figure_folder=ROOT / "images", readme=common.README):
    """Write the summary into study.json, the section into the README, and one figure per question."""
    results = Results(study)
    places = [f"{name} / {way}".removesuffix(" / last") for name in study["recipes"] for way in READOUTS]
    against = [place for place in AGAINST if place in results.mrr]
    rows = [results.row(place, against) for place in places if place in results.mrr]
    there = {q.title: [place in results.mrr for place in q.rows.values()] for q in QUESTIONS}
    asked = [q for q in QUESTIONS if there[q.title][0] and sum(there[q.title]) > 1]
    names = {question.title: f"{out.stem}_{question.figure}.png" for question in asked}
    others = (out.with_name(name) for name in FILES if name != out.name)
    studies = [results, *(Results(read_json(file)) for file in others if file.is_file())]
    study["summary"] = summary = {
        "rows": rows,
        "findings": {q.title: answer(results, q, figure_folder / names[q.title]) for q in asked},
        "default rule": default_rule(studies),
        **across_recipes(results, {name: entry["settings"] for name, entry in study["recipes"].items()}),
    }
    drawn = {
        "How much data?": (how_much_data, f"{out.stem}_data_size.png"),
        "How many minutes?": (quality_for_minutes, f"{out.stem}_minutes.png"),
    }
    for title, (draw, name) in drawn.items():
        if finding := draw(results, figure_folder / name):
            summary["findings"][title], names[title] = finding, name
    write_json(out, study)
    head = ["recipe", "weights", "seeds", "Recall@1", "MRR", "of each seed", "MRR − base",
            "MRR − original recipe", "general nDCG@10", "minutes"]  # fmt: skip
    table = [
        [
            row["recipe"], row["weights"], row["seeds"], shown(row["recall@1"]), shown(row["mrr"]),
            "" if len(row["mrr of seeds"]) < 2 else ", ".join(f"{x:.3f}" for x in row["mrr of seeds"]),
            *(shown(row[key], True) if (key := f"mrr - {x}") in row else "" for x in ("base", "original")),
            "" if row["general"] is None else f"{row['general']:.3f}", row["minutes"],
        ]
        for row in rows
    ]  # fmt: skip
    kinds = Counter(cell["precision"] for e in study["recipes"].values() for cell in e["cells"].values())
    options = f" --data data/{study['data']} --out {relative(out)} --only {' '.join(study['recipes'])}"
    text = f"""## Study: which recipe? ({study["data"]})

`python benchmarks/study.py{"" if out.name == FILES[0] else options}`: {FOLDS}-fold, all-MiniLM-L6-v2; each
query judged once by a model that did not see it, against all codes. Differences are paired by query, and by
seed where both rows have several. Weights: “fine-tuned” are the last epoch's, “merged” lie halfway between
them and the base, “averaged” are the mean of {len(SEEDS)} runs; a number is how far from the base to them.
Minutes: the trainings, on one thread. Measured on
{"; and on ".join(study["machines"])}.
Cells by the precision they were trained in: {", ".join(f"{n} {kind}" for kind, n in kinds.items())}.

{common.markdown_table(head, table)}

{"".join(f"**{t}** {x} ![{t}](../images/{names[t]}){chr(10) * 2}" for t, x in summary["findings"].items())}
{text_across_recipes(summary)}
"""
    common.put_into_readme(out.stem, text, readme)
    return study
