"""A million rows through the data commands of recipes/: seconds and memory of each.

    python benchmarks/recipes_data.py                  # 1,000,000 rows
    python benchmarks/recipes_data.py --rows 100000 --out found.json --page ""

Each command runs in a process of its own. The rows are made up, and so are the vectors: unit vectors of 384
dimensions around 20,000 centres, each query's near its passage's. What is measured is reading, drawing,
searching, writing and checking. Embedding costs what the model costs and is not in it: the seconds in which
the vectors are made up are taken off. Writes benchmarks/results/recipes_data.json and a table of
recipes/README.md.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial.files import ROOT, read_json, write_json  # noqa: E402
from embedding_tutorial.pairs import write_pairs  # noqa: E402
from recipes import data, models, run_all  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "recipes_data.json"
DIMS, TOPICS, WORDS = 384, 20_000, 30  # a passage has about 30 words
SPENT = []  # seconds of making vectors up
COMMANDS = ("random --count 10", "hard --count 7", "check, of hard's file")


def made_up(rows):
    """Pairs of a query and a passage of made-up words, one by one."""
    words = np.array([f"word{n}" for n in range(20_000)])
    generator = np.random.default_rng(0)
    for number in range(rows):
        chosen = words[generator.integers(len(words), size=WORDS)]
        query, passage = f"query {number} {' '.join(chosen[:6])}", f"passage {number} {' '.join(chosen)}"
        yield {"query": query, "pos_doc": passage}


def made_up_vectors(encoder, texts):
    """Unit vectors around the topic that a row's number says, a query's near its passage's."""
    begin = time.perf_counter()
    numbers = np.array([int(text.split(" ", 2)[1]) for text in texts])
    centres = np.random.default_rng(1).standard_normal((TOPICS, DIMS), dtype=np.float32)
    found = np.empty((len(texts), DIMS), np.float16 if len(texts) > data.EXACT else np.float32)
    for start in range(0, len(texts), data.BLOCK):
        part = numbers[start : start + data.BLOCK]
        noise = np.stack([np.random.default_rng(n).standard_normal(DIMS, dtype=np.float32) for n in part])
        other = np.random.default_rng(start).standard_normal((len(part), DIMS), dtype=np.float32)
        vectors = centres[part % TOPICS] + 0.7 * noise + 0.3 * other
        found[start : start + data.BLOCK] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    SPENT.append(time.perf_counter() - begin)
    return found


def command(name, pairs, folder):
    """Run one command; {"name", "seconds", "gigabytes": the peak of this process, "found"}."""
    data.vectors, models.load = made_up_vectors, lambda *args: None
    begin = time.perf_counter()
    if name.startswith("check"):
        found = data.check_file(folder / "hard" / "train.jsonl", group=2)
    else:
        kind, _, count = name.split()
        made = data.make(kind, folder / kind, count=int(count), data=pairs)
        found = {"megabytes": round(made.stat().st_size / 1e6)} | read_json(made.parent / "done.json")
    seconds = time.perf_counter() - begin - sum(SPENT)
    return {"name": name, "seconds": seconds, "gigabytes": common.peak_memory_gb(), "found": found}


def measure(rows):
    """The results of all commands."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_pairs(folder / "pairs.jsonl", made_up(rows))
        found = []
        for name in COMMANDS:
            with context.Pool(1) as pool:  # a process of its own: what it holds at most is this command's
                found.append(pool.apply(command, (name, folder / "pairs.jsonl", folder)))
            print(f"{name}: {found[-1]['seconds']:.0f} s, {found[-1]['gigabytes']:.1f} GB", flush=True)
    return {"rows": rows, "cores": os.cpu_count(), "dims": DIMS, "commands": found}


def table(results):
    rows = [
        (f"`data.py {one['name']}`", f"{one['seconds'] / 60:.1f}", f"{one['gigabytes']:.1f}")
        for one in results["commands"]
    ]
    title = (
        f"{results['rows']:,} rows, vectors of {results['dims']} dimensions, {results['cores']} CPU cores:"
    )
    return f"{title}\n\n{common.markdown_table(('command', 'minutes', 'GB'), rows)}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--page", default=str(run_all.README), help="the page whose table is filled; '' for none"
    )
    args = parser.parse_args()
    write_json(args.out, measure(args.rows))
    if args.page:
        run_all.write_part("million", table(read_json(args.out)), Path(args.page))


if __name__ == "__main__":
    main()
