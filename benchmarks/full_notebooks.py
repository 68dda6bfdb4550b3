"""Both notebooks in the full profile, first cell to last, on a model folder in BGE-M3's layout.

    python benchmarks/full_notebooks.py --model DIR            # random weights: full_size.py
    python benchmarks/full_notebooks.py --model DIR --epochs 10
    python benchmarks/full_notebooks.py --model DIR --pairs FILE    # on fewer pairs, or a reader's own

In a copy of the repository, as a reader would run them: TUTORIAL_PROFILE=full, no network, the model where
BGE_M3_PATH says, T2Retrieval as a local folder in its published format with the Chinese passages of
data/pocket_t2. One thing is changed in the cells: the number of epochs. Prints minutes and peak memory of
each notebook, and the disk that the copy's models and vectors take.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import nbformat

from embedding_tutorial.files import folders_gb, write_json
from embedding_tutorial.pairs import read_pairs
from embedding_tutorial.run_notebooks import NAMES

SETTINGS = "TrainConfig(**profile.config(device))"


def copy_repository(target, mbpp, epochs):
    """A copy of what a fresh clone holds, with the data of the full profile and `epochs` in notebook 01."""
    left_out = (".git", ".venv", "*-finetuned*", "*bge-m3*", "mbpp_*.jsonl", "c_mteb_results", "T2Retrieval")
    shutil.copytree(common.ROOT, target, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
    (target / "c_mteb_results").mkdir()
    shutil.copyfile(mbpp, target / "data" / "sanitized-mbpp.json")
    source, t2 = common.ROOT / "data" / "pocket_t2" / "zh", target / "data" / "T2Retrieval"
    for part, name in (("corpus", "corpus"), ("queries", "queries"), ("data", "qrels")):
        (t2 / part).mkdir(parents=True)
        shutil.copyfile(source / f"{name}.jsonl", t2 / part / "dev.jsonl")
    (t2 / "README.md").write_text("T2Retrieval's format, with the passages of Pocket T2.\n")
    path = target / NAMES[0]
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if SETTINGS in cell.source]
    assert len(cells) == 1, f"{NAMES[0]} has {len(cells)} cells with {SETTINGS}"
    cells[0].source = cells[0].source.replace(SETTINGS, SETTINGS[:-1] + f", epochs={epochs})")
    nbformat.write(notebook, path)


def run(copy, model, device, log=None, pairs=None):
    """{notebook: {"minutes", "gb"}}; the peak is that of the notebook's kernel. Raises where a cell fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TUTORIAL_", "MTEB_"))}
    environment |= {"TUTORIAL_PROFILE": "full", "TUTORIAL_DEVICE": device, "BGE_M3_PATH": str(model)}
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(copy.parent / "home")}
    environment |= {"TUTORIAL_PAIRS": str(pairs)} if pairs else {}
    (copy.parent / "home").mkdir(exist_ok=True)
    found = {}
    for name in NAMES:
        start = time.perf_counter()
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", name]
        subprocess.run(command, cwd=copy, env=environment, check=True, stdout=log, stderr=log)
        found[name] = json.loads((copy / "measured.json").read_text())
        found[name]["minutes"] = round((time.perf_counter() - start) / 60, 2)
    return found


def measure(name):
    """Execute one notebook of this folder and leave its kernel's peak memory in measured.json."""
    subprocess.run([sys.executable, "-m", "embedding_tutorial.run_notebooks", name], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    write_json("measured.json", {"gb": round(peak, 2)})


def section(result):
    """What benchmarks/README.md says of a run."""
    rows = [[name, row["minutes"], row["gb"]] for name, row in result["notebooks"].items()]
    table = common.markdown_table(["notebook", "minutes", "peak of its kernel, GB"], rows)
    option, pairs = " --pairs FILE" if result["pairs"] else "", result["pairs"] or "the tutorial's"
    return f"""## Both notebooks at full size

`python benchmarks/full_notebooks.py --model DIR{option}`: every cell of
both, in the full profile, with random weights of BGE-M3's size (`full_size.py --folder F --only build`
makes them) and {pairs} pairs; epochs of the run: {result["epochs"]}. Scores of random weights mean nothing
and are left out. {result["machine"]["summary"]}.

{table}
"""


def main():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--model", type=Path, help="a folder in BGE-M3's layout")
    parser.add_argument("--data", type=Path, default=common.ROOT / "data" / "pocket_mbpp.json")
    parser.add_argument("--pairs", type=Path, help="TUTORIAL_PAIRS of the notebooks")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "full_notebooks.json")
    parser.add_argument("--measure", metavar="NOTEBOOK", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure)
    if not args.model:
        parser.error("--model is needed")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tutorial"
        copy_repository(copy, args.data, args.epochs)
        notebooks = run(copy, args.model.resolve(), args.device, pairs=args.pairs and args.pairs.resolve())
        disk = folders_gb(copy / "models", copy / "c_mteb_results")
        result = {"machine": common.machine(("torch", "transformers", "mteb")), "epochs": args.epochs}
        result["pairs"] = len(read_pairs(args.pairs)) if args.pairs else None
        result |= {"notebooks": notebooks, "disk_gb_at_the_end": round(disk, 2)}
    write_json(args.out, result)
    common.put_into_readme("full-notebooks", section(result))
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))


if __name__ == "__main__":
    main()
