"""All five recipes at pocket scale, one after the other: what `make recipes` runs.

    python recipes/run_all.py    # the README says how many minutes it took

A finished step is skipped, so an interrupted run goes on where it stopped. Writes recipes/results.json,
the marked parts of recipes/README.md and images/recipes_comparison.png. Every number there comes from here.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial import batches, files, finetune, pairs  # noqa: E402
from embedding_tutorial.files import ROOT, atomic_file, markdown_table, read_json, relative, write_json  # noqa: E402
from embedding_tutorial.reports import interval, is_clear, shortened  # noqa: E402
from recipes import compare, data, dense, raw_bert, steps, unified  # noqa: E402

NOTEBOOK = ROOT / "models" / "MiniLM-finetuned" / "merged"
RESULTS, README = ROOT / "recipes" / "results.json", ROOT / "recipes" / "README.md"
FIGURE = ROOT / "images" / "recipes_comparison.png"
END = "<!-- end -->"

OUT, DATA = "recipes/output", "recipes/output/data"
RANDOM, HARD, TAUGHT = (f"{DATA}/{name}/train.jsonl" for name in ("random-10", "hard-7-dense", "taught"))
DENSE, DENSE_HARD = f"{OUT}/dense/model", f"{OUT}/dense-hard/model"
TEACHER, GROUP = f"--teacher {DENSE_HARD}", "--train_group_size 2"
RUNS = [  # (name in the table, folder, what it is compared with, recipe, its arguments, those behind "--")
    ("dense", "dense", "MiniLM, ready-made", dense, "", ""),
    ("dense, then hard negatives", "dense-hard", "dense", dense, f"--hard --model {DENSE} --data {HARD}", ""),
    ("dense, untaught", "dense-untaught", "MiniLM, ready-made", dense, f"--data {TAUGHT}", GROUP),
    ("dense, taught", "dense-taught", "dense, untaught", dense, f"{TEACHER} --data {TAUGHT}", GROUP),
    ("MRL", "dense-mrl", "dense", dense, "", "--use_mrl True --mrl_dims 64 128 384"),
    ("dense, in length groups", "dense-lengths", "dense", dense, f"--data {DATA}/lengths/groups", ""),
    ("unified, plain", "unified-plain", "unified, before", unified, f"--plain --data {HARD}", ""),
    ("unified, self-distilled", "unified", "unified, plain", unified, f"--data {HARD}", ""),
    ("unified, taught", "unified-taught", "unified, plain", unified, f"{TEACHER} --data {TAUGHT}", ""),
    ("small BERT, no negatives", "raw-bert-0", "small BERT, before", raw_bert, "--negatives 0", ""),
    ("small BERT, 10 negatives", "raw-bert-10", "small BERT, no negatives", raw_bert, "--negatives 10", ""),
    ("small BERT, 50 negatives", "raw-bert-50", "small BERT, 10 negatives", raw_bert, "--negatives 50", "")]
BEFORE = {  # what has to be there before a run: arguments of data.py
    "dense": "random --count 10",
    "dense-hard": f"hard --model {DENSE}",
    "dense-untaught": f"teacher --data {HARD} --model {DENSE_HARD} --output {DATA}/taught",
    "dense-lengths": f"lengths --data {RANDOM} --output {DATA}/lengths --bounds 48 96 256 --tokens 4096"}
MODELS = {  # name in the table: model
    "MiniLM, ready-made": "minilm",
    "unified, before": f"{OUT}/minilm-m3", "small BERT, before": f"{OUT}/small-bert",
    **{name: f"{OUT}/{folder}/model" for name, folder, *_ in RUNS},
    "dense, 64 of 384 dimensions": f"{DENSE}@64", "MRL, 64 of 384 dimensions": f"{OUT}/dense-mrl/model@64"}
PAIRS = [(before, name) for name, _, before, *_ in RUNS] + [  # (before, after): each mode that both have
    ("notebook 01", "dense"),
    ("dense, 64 of 384 dimensions", "MRL, 64 of 384 dimensions"),
    ("MiniLM, ready-made", "small BERT, no negatives")]


def commands():
    """(recipe, its arguments) of all steps, as they could be typed one by one."""
    for _, folder, _, recipe, ours, theirs in RUNS:
        if folder in BEFORE:
            yield data, BEFORE[folder]
        yield recipe, f"{ours} --output {OUT}/{folder}{theirs and f' -- {theirs}'}"


def notebook_model():
    """The folder of notebook 01's own result, or None with a message."""
    parts = data.tutorial_pairs()
    key = files.text_key([json.dumps(pair, sort_keys=True) for part in parts for pair in part])
    if NOTEBOOK.exists() and read_json(NOTEBOOK.parent / "config.json")["data"] == key:
        return NOTEBOOK
    print(f"{relative(NOTEBOOK)}, trained on these pairs, is not there: run notebook 01 (pocket profile).")


def findings(rows):
    """A sentence for each of PAIRS and each mode where the queries show a difference, one for the others."""
    ranks, found, unclear = {(row["name"], row["mode"]): np.asarray(row["ranks"]) for row in rows}, [], []
    for before, after in PAIRS:
        for mode in ("dense", "sparse", "ColBERT", "weighted sum"):
            if (before, mode) in ranks and (after, mode) in ranks:
                old, new = 1 / ranks[before, mode], 1 / ranks[after, mode]
                change, p = finetune.bootstrap_interval(new - old), finetune.sign_flip_test(new - old)
                what, shown = f"{before} → {after} ({mode})", interval(change, sign=True)
                if is_clear(change, p):
                    score = f"MRR {old.mean():.3f} → {new.mean():.3f}, {shown}, p = {p:.4f}"
                    found.append(f"{what}: {score}: {'better' if change[0] > 0 else 'worse'}.")
                else:
                    unclear.append(f"{what} {shown}")
    return found + [f"No difference that these queries can show: {'; '.join(unclear)}."] * bool(unclear)


def one_line(text, width=90):
    return shortened(" ".join(text.split()), width).replace("|", "\\|").replace("`", "'")


def example(results):
    """The first training row, as FlagEmbedding reads it."""
    row = results["row"]
    cells = [(name, text) for name, most in (("pos", None), ("neg", 3)) for text in row[name][:most]]
    cells.insert(0, ("query", row["query"]))
    table = markdown_table(("field", "text"), [(name, f"`{one_line(text)}`") for name, text in cells])
    return f"{table}\n\nand {len(row['neg']) - 3} negatives more."


def negatives(results):
    """What each query is compared with, and what came of it, at equal passages per update."""
    rows, cells = {row["name"]: "{:.3f} [{:.3f}, {:.3f}]".format(*row["mrr"]) for row in results["rows"]}, []
    for count in (0, 10, 50):
        run = results["runs"][f"raw-bert-{count}"]
        passages, seconds = run["passages_per_update"], f"{run['cpu_seconds_of_one_process']:.0f}"
        different, misled, _ = results["batches"][str(count)]
        numbers = (count, passages // (count + 1), passages, passages - 1, round(different), f"{misled:.1f}")
        cells.append((*numbers, run["updates"], seconds, rows[f"small BERT, {count or 'no'} negatives"]))
    cells += [(name, *[""] * 7, rows[name]) for name in ("small BERT, before", "MiniLM, ready-made")]
    header = "negatives in the row|queries an update|passages an update|each query is compared with"
    header += "|different passages|queries whose right answer also stands among the wrong ones"
    return markdown_table([*header.split("|"), "updates", "CPU s", "MRR"], cells)


def batch_of(count):
    """`batches.drawn_batches` of raw_bert.py's own file and batch."""
    rows, group = data.read_rows(data.place("random", count=max(1, count))), count + 1
    return batches.drawn_batches([row for _, row in rows], raw_bert.PRESETS["pocket"][1] // group, group)


def search(results):
    """The query that gained most, and its first five before and after."""
    found, cells = results["search"], []
    for rank, both in enumerate(zip(found["before"], found["after"], strict=True), 1):
        marks = ["**right** " if text == found["right"] else "" for _, text in both]
        shown = [f"{s:.3f} {mark}`{one_line(text, 60)}`" for mark, (s, text) in zip(marks, both, strict=True)]
        cells.append((rank, *shown))
    table = markdown_table(("", "ready-made", "after dense training"), cells)
    return f"“{one_line(found['query'], 200)}”\n\n{table}"


def report(results):
    """The long table, the runs and the findings."""
    header = "run|precision|processes|updates|CPU s of one|whole step, s|GB of one|loss".split("|")
    runs = [
        [name, *(run[key] for key in ("precision", "processes", "updates")),
         f"{run['cpu_seconds_of_one_process']:.0f}", f"{run['wall_seconds']:.0f}",
         f"{run['peak_memory_gb_of_one_process']:.1f}", f"{run['first_loss']:.2f} → {run['last_loss']:.2f}"]
        for name, run in results["runs"].items()]
    return "\n\n".join([
        f"{results['queries']} validation queries, each against {results['passages']} codes; 95 % intervals; "
        f"reference: {results['reference']}; p: paired sign-flip test of the MRRs.",
        compare.table(results),
        f"All steps together took {results['wall_seconds'] / 60:.1f} minutes on {results['cores']} CPU cores "
        "(loading Python not counted).",
        markdown_table(header, runs),
        "What these numbers say, and no more:",
        "\n".join(f"- {line}" for line in results["findings"])])


PARTS = {"row": example, "negatives": negatives, "search": search, "results": report}


def write_part(name, text, path):
    """Replace what stands in a file between a marker and the next END."""
    before, rest = path.read_text(encoding="utf-8").split(start := f"<!-- {name}: generated -->")
    with atomic_file(path, "w") as file:
        file.write(f"{before}{start}\n{text}\n{END}{rest.split(END, 1)[1]}")


def main(words=None):
    steps.parser(__doc__).parse_args(words)
    os.chdir(ROOT)  # the paths above start there
    every = list(commands())
    for number, (recipe, options) in enumerate(every, 1):
        name = Path(recipe.__file__).name
        print(f"\n[{number}/{len(every) + 1}] $ python recipes/{name} {options}", flush=True)
        recipe.main(options.split())
    notebook = notebook_model()
    listed = {**MODELS, **({"notebook 01": str(notebook)} if notebook else {})}
    print(f"\n[{len(every) + 1}/{len(every) + 1}] compare.py with {len(listed)} checkpoints", flush=True)
    compare.main([word for name, model in listed.items() for word in ("--checkpoint", f"{name}={model}")])
    collect()


def searched(rows):
    """The query that dense training moved up most, with its first five before and after."""
    ranks = {row["name"]: 1 / np.array(row["ranks"]) for row in rows if row["mode"] == "dense"}
    train, asked = data.tutorial_pairs()
    pair = asked[int((ranks["dense"] - ranks["MiniLM, ready-made"]).argmax())]
    passages = pairs.passages_of([*asked, *train])
    sides = (("before", "minilm"), ("after", DENSE))
    found = {side: compare.top(model, pair["query"], passages) for side, model in sides}
    return {"query": pair["query"], "right": pair["pos_doc"], **found}


def collect():
    """Gather what the steps left into results.json, the README and the figure."""
    marks = [path for path in steps.OUTPUT.rglob("done.json") if ".previous" not in str(path)]
    done = {path.parent.relative_to(steps.OUTPUT).as_posix(): read_json(path) for path in marks}
    for _, name, *_ in RUNS:
        losses = done[name].pop("losses")
        done[name] |= {"first_loss": losses[0], "last_loss": losses[-1]}
    results = read_json(steps.OUTPUT / "comparison" / "results.json")
    results |= {
        "scale": "pocket", "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("FlagEmbedding", "transformers", "torch", "faiss-cpu")},
        "wall_seconds": round(sum(step["wall_seconds"] for step in done.values()), 1),
        "runs": {name: done[name] for _, name, *_ in RUNS},
        "findings": findings(results["rows"]), "search": searched(results["rows"]),
        "batches": {str(count): batch_of(count) for count in (0, 10, 50)},
        "row": json.loads((ROOT / RANDOM).open(encoding="utf-8").readline())}
    write_json(RESULTS, results)
    compare.figure(results, FIGURE)
    for name, part in PARTS.items():
        write_part(name, part(results), README)
    print("\n".join(results["findings"]))
    written = ", ".join(relative(path) for path in (RESULTS, README, FIGURE))
    print(f"Written: {written} ({results['wall_seconds']:.0f} s in all)")


if __name__ == "__main__":
    steps.run(main)
