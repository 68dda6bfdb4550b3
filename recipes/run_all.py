"""All five recipes at pocket scale, one after the other: what `make recipes` runs.

    python recipes/run_all.py                   # under 10 minutes on 2 quiet CPU cores
    python recipes/run_all.py --train-notebook  # also notebook 01's own run, where it is not there yet

A finished step is skipped, so an interrupted run goes on where it stopped. Writes recipes/results.json,
the tables in recipes/README.md and images/recipes_comparison.png. Every finding is computed from them.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial import finetune, training  # noqa: E402
from embedding_tutorial.assets import pocket_model_path  # noqa: E402
from embedding_tutorial.files import ROOT, atomic_file, read_json, relative, text_key, write_json  # noqa: E402
from embedding_tutorial.profiles import PROFILES  # noqa: E402
from recipes import compare, data, dense, raw_bert, steps, unified  # noqa: E402

NOTEBOOK = ROOT / "models" / "MiniLM-finetuned" / "merged"
OWN_NOTEBOOK = steps.OUTPUT / "notebook" / "fine-tuned"
RESULTS, README = ROOT / "recipes" / "results.json", ROOT / "recipes" / "README.md"
FIGURE = ROOT / "images" / "recipes_comparison.png"
START, END = "<!-- results: written by run_all.py -->", "<!-- end of results -->"

HARD = "recipes/output/data/hard-7-dense/train.jsonl"
DENSE, DENSE_HARD = "recipes/output/dense/model", "recipes/output/dense-hard/model"
STEPS = [  # (recipe, its arguments), as they could be typed one by one
    (data, "random --count 10"),
    (data, "random --count 50"),
    (dense, ""),
    (data, f"hard --count 7 --model {DENSE}"),
    (dense, f"--hard --model {DENSE} --data {HARD} --epochs 1"),
    (unified, f"--data {HARD}"),
    (data, f"teacher --data {HARD} --model {DENSE_HARD}"),
    (unified, f"--teacher {DENSE_HARD} --data recipes/output/data/teacher/train.jsonl"),
    (raw_bert, "--start small --negatives 10"),
    (raw_bert, "--start small --negatives 50"),
]
MODELS = {  # name in the table: model
    "MiniLM, ready-made": "minilm",
    "dense": DENSE,
    "dense, then hard negatives": DENSE_HARD,
    "unified, before": "recipes/output/minilm-m3",
    "unified, self-distilled": "recipes/output/unified/model",
    "unified, taught": "recipes/output/unified-teacher/model",
    "small BERT, before": "recipes/output/small-bert",
    "small BERT, 10 negatives": "recipes/output/raw-bert-10/model",
    "small BERT, 50 negatives": "recipes/output/raw-bert-50/model",
}
TRAINED = ("dense", "dense-hard", "unified", "unified-teacher", "raw-bert-10", "raw-bert-50")
QUESTIONS = [  # (question, row before, row after); a row is (name, mode)
    (
        "FlagEmbedding (2 epochs) instead of notebook 01 (10 epochs, merged halfway)",
        ("notebook 01", "dense"),
        ("dense", "dense"),
    ),
    ("Training at all (dense)", ("MiniLM, ready-made", "dense"), ("dense", "dense")),
    ("A second stage with mined negatives", ("dense", "dense"), ("dense, then hard negatives", "dense")),
    *(
        (f"Unified training, {mode}", ("unified, before", mode), ("unified, self-distilled", mode))
        for mode in ("dense", "sparse", "ColBERT", "weighted sum")
    ),
    (
        "The weighted sum instead of dense alone",
        ("unified, self-distilled", "dense"),
        ("unified, self-distilled", "weighted sum"),
    ),
    (
        "A teacher instead of self-distillation, weighted sum",
        ("unified, self-distilled", "weighted sum"),
        ("unified, taught", "weighted sum"),
    ),
    (
        "Raw BERT: training with 10 random negatives",
        ("small BERT, before", "dense"),
        ("small BERT, 10 negatives", "dense"),
    ),
    (
        "Raw BERT: 50 random negatives instead of 10",
        ("small BERT, 10 negatives", "dense"),
        ("small BERT, 50 negatives", "dense"),
    ),
    (
        "Raw BERT with 50 negatives instead of the ready-made model",
        ("MiniLM, ready-made", "dense"),
        ("small BERT, 50 negatives", "dense"),
    ),
]


def notebook_model(train_it):
    """The folder of notebook 01's own result, or None with a message. train_it: where it is missing."""
    pairs = data.tutorial_pairs()
    key = text_key([json.dumps(pair, sort_keys=True) for part in pairs for pair in part])
    for folder in (NOTEBOOK, OWN_NOTEBOOK):
        if folder.exists():
            if read_json(folder.parent / "config.json")["data"] == key:
                return folder
            print(f"{relative(folder)} was trained on other pairs than these: not compared.")
    if train_it:
        print("$ notebook 01's own training (one run: the pocket profile's values)")
        config = finetune.TrainConfig(**PROFILES["pocket"].config("cpu"))
        training.train(pocket_model_path(), *pairs, config, OWN_NOTEBOOK.parent)
        return OWN_NOTEBOOK
    print(
        f"{relative(NOTEBOOK)} is not there, so the notebook's own result is no row. Run notebook 01 in the "
        "pocket profile, or add --train-notebook."
    )
    return None


def findings(rows):
    """One sentence for each question whose two rows exist, from the reciprocal ranks of the same queries."""
    ranks = {(row["name"], row["mode"]): np.asarray(row["ranks"]) for row in rows}
    found = []
    for question, before, after in QUESTIONS:
        if before in ranks and after in ranks:
            old, new = 1 / ranks[before], 1 / ranks[after]
            mean, low, high = finetune.bootstrap_interval(new - old)
            p = finetune.sign_flip_test(new - old)
            verdict = (
                ("better" if mean > 0 else "worse")
                if p < 0.05
                else "no difference that these queries can show"
            )
            found.append(
                f"{question}: MRR {old.mean():.3f} → {new.mean():.3f}, "
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], p = {p:.4f}: {verdict}."
            )
    return found


def report(results):
    """The part of recipes/README.md between its two markers."""
    runs = [
        "| run | precision | processes | updates | CPU s of one | whole step, s | GB of one | loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in results["runs"].items():
        runs.append(
            f"| {name} | {run['precision']} | {run['processes']} | {run['updates']} | "
            f"{run['cpu_seconds_of_one_process']:.0f} | {run['wall_seconds']:.0f} | "
            f"{run['peak_memory_gb_of_one_process']:.1f} | "
            f"{run['first_loss']:.2f} → {run['last_loss']:.2f} |"
        )
    return "\n".join(
        [
            START,
            f"{results['queries']} validation queries, each against {results['passages']} codes; 95 % "
            f"intervals; reference: {results['reference']}; p: paired sign-flip test of the MRRs.",
            "",
            compare.table(results),
            "",
            f"All steps together took {results['wall_seconds'] / 60:.1f} minutes on {results['cores']} CPU "
            "cores (loading Python not counted).",
            "",
            *runs,
            "",
            "What these numbers say, and no more:",
            "",
            *(f"- {line}" for line in results["findings"]),
            END,
        ]
    )


def write_readme(text, path):
    """Replace what stands between the two markers."""
    old = path.read_text(encoding="utf-8")
    before, rest = old.split(START)
    with atomic_file(path, "w") as file:
        file.write(before + text + rest.split(END)[1])


def main(words=None):
    parser = steps.parser(__doc__)
    parser.add_argument(
        "--train-notebook", action="store_true", help="train notebook 01's model where it is missing"
    )
    args = parser.parse_args(words)
    os.chdir(ROOT)  # the paths above start there
    for number, (recipe, options) in enumerate(STEPS, 1):
        name = Path(recipe.__file__).name
        print(f"\n[{number}/{len(STEPS) + 1}] $ python recipes/{name} {options}", flush=True)
        recipe.main(options.split())
    notebook = notebook_model(args.train_notebook)
    models = {**MODELS, **({"notebook 01": str(notebook)} if notebook else {})}
    print(
        f"\n[{len(STEPS) + 1}/{len(STEPS) + 1}] python recipes/compare.py with {len(models)} checkpoints",
        flush=True,
    )
    compare.main([word for name, model in models.items() for word in ("--checkpoint", f"{name}={model}")])
    collect()


def collect():
    """Gather what the steps left into results.json, the README and the figure."""
    done = {
        path.parent.relative_to(steps.OUTPUT).as_posix(): read_json(path)
        for path in steps.OUTPUT.rglob("done.json")
        if ".previous" not in str(path)
    }
    results = read_json(steps.OUTPUT / "comparison" / "results.json")
    results |= {
        "scale": "pocket",
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("FlagEmbedding", "transformers", "torch", "faiss-cpu")},
        "wall_seconds": round(sum(step["wall_seconds"] for step in done.values()), 1),
        "runs": {
            name: {key: value for key, value in done[name].items() if key != "losses"}
            | {"precision": read_json(steps.OUTPUT / name / "recipe.json")["precision"]}
            for name in TRAINED
        },
        "findings": findings(results["rows"]),
    }
    write_json(RESULTS, results)
    compare.figure(results, FIGURE)
    write_readme(report(results), README)
    print("\n".join(results["findings"]))
    print(
        f"Written: {relative(RESULTS)}, {relative(README)}, {relative(FIGURE)}"
        f" ({results['wall_seconds']:.0f} s in all)"
    )


if __name__ == "__main__":
    steps.run(main)
