"""Search and scoring at T2Retrieval's full size: mteb's own search and this project's, on the same vectors.

    python benchmarks/search.py                 # 118,605 passages, 22,812 queries, 1024 dimensions
    python benchmarks/search.py --scale 0.25    # a quarter of the passages and of the queries

The vectors are made up: queries lie near their positives, so that nDCG@10 comes out between 0.7 and 0.8.
Texts have T2Retrieval's lengths and lie in an Arrow file, as `datasets` keeps them. Nobody encodes: mteb's
contender is handed its vectors without reading the texts, ours joins titles and texts first. Both run through
`mteb.evaluate`, each in a fresh process. Scores are compared exactly, every metric, every digit.
"""

import argparse
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import common
import numpy as np

from embedding_tutorial.files import read_json, write_json

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when `datasets` is imported, below
PASSAGES, QUERIES, JUDGEMENTS, DIMS = 118_605, 22_812, 118_932, 1024
MEAN_CHARACTERS, MAX_CHARACTERS = 874, 42_956
CLOSENESS = 0.41  # of passages and queries to their topic: makes nDCG@10 0.7 to 0.8 at full size
OUT = common.RESULTS / "search.json"
NAMES = {"mteb": "mteb's exact search", "ours": "ours"}
TARGET = {"seconds": 90, "memory_gb": 6}


# ---------------------------------------------------------------- the data


def write_data(folder, scale, seed=0):
    """Vectors as `.npy`, texts as an Arrow file, judgements as JSON."""
    from datasets import Dataset

    draw = np.random.default_rng(seed)
    passages, queries = round(PASSAGES * scale), round(QUERIES * scale)
    # Every query has one positive at least, each passage belongs to one query; a few belong to two.
    extra = round(JUDGEMENTS * scale) - queries
    counts = 1 + np.bincount(draw.integers(0, queries, extra), minlength=queries)
    owner = np.repeat(np.arange(queries), counts)
    judged = np.concatenate(
        [draw.permutation(passages), draw.integers(0, passages, max(0, len(owner) - passages))]
    )[: len(owner)]
    topics = unit(draw.standard_normal((queries, DIMS), dtype=np.float32))
    vectors = unit(draw.standard_normal((passages, DIMS), dtype=np.float32))
    vectors[judged[::-1]] += CLOSENESS * topics[owner[::-1]]  # of two owners the first one counts
    np.save(folder / "passages.npy", unit(vectors))
    noise = unit(draw.standard_normal((queries, DIMS), dtype=np.float32))
    np.save(folder / "queries.npy", unit(noise + CLOSENESS * topics))

    lengths = np.exp(draw.standard_normal(passages))
    lengths = np.clip(lengths * MEAN_CHARACTERS / lengths.mean(), 10, MAX_CHARACTERS).astype(int)
    letters = "".join(map(chr, draw.integers(0x4E00, 0x9FA5, MAX_CHARACTERS)))
    texts = [letters[:length] for length in lengths]
    Dataset.from_dict(
        {"id": [f"p{i}" for i in range(passages)], "title": [""] * passages, "text": texts}
    ).save_to_disk(folder / "corpus")
    Dataset.from_dict(
        {"id": [f"q{i}" for i in range(queries)], "text": [letters[i : i + 11] for i in range(queries)]}
    ).save_to_disk(folder / "queries")
    relevant = {}
    for query, passage in zip(owner.tolist(), judged.tolist(), strict=True):
        relevant.setdefault(f"q{query}", {})[f"p{passage}"] = 1
    write_json(folder / "relevant.json", relevant)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_task(folder):
    """The data as an mteb task that is T2Retrieval but for its name."""
    from datasets import load_from_disk
    from mteb.tasks import T2Retrieval

    class SyntheticT2(T2Retrieval):
        metadata = T2Retrieval.metadata.model_copy(update={"name": "SyntheticT2Retrieval"})

        def load_data(self, num_proc=None, **kwargs):
            data = {name: load_from_disk(str(folder / name)) for name in ("corpus", "queries")}
            relevant = read_json(folder / "relevant.json")
            self.dataset = {"default": {"dev": {**data, "relevant_docs": relevant, "top_ranked": None}}}
            self.data_loaded = True

    return SyntheticT2()


# ---------------------------------------------------------------- the contenders


def mteb_model(vectors, meta):
    """An mteb encoder that hands out the vectors; mteb wraps it in its SearchEncoderWrapper."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.similarity_functions import dot_score

    class Handed(AbsEncoder):
        mteb_model_meta = meta
        done = 0

        def __init__(self):
            pass

        def encode(self, inputs, *, prompt_type, **kwargs):
            if prompt_type.value == "query":
                return vectors["queries"]
            start, self.done = self.done, self.done + len(inputs.dataset)  # one chunk of the passages
            return vectors["passages"][start : self.done]

        def similarity(self, a, b):
            return dot_score(a, b)  # the vectors have length 1: the cosine, without normalising again

    return Handed()


def our_model(vectors, meta):
    from embedding_tutorial.retrieval import EmbedSearch

    def encoder(texts, label):
        found = vectors.pop(label.split()[0])  # whoever asked for them may drop them
        if len(texts) != len(found):
            raise ValueError(f"{len(texts)} texts but {len(found)} vectors")
        return found

    return EmbedSearch(encoder, meta)


def worker(args):
    """Evaluate one contender; returns seconds by phase, peak memory and all scores."""
    import mteb
    import torch
    from mteb.models import ModelMeta

    torch.zeros(8) @ torch.zeros(8)
    task = make_task(args.folder)
    task.load_data()
    baseline = common.peak_memory_gb()
    vectors = {name: np.load(args.folder / f"{name}.npy", mmap_mode="c") for name in ("passages", "queries")}
    for array in vectors.values():
        array.sum()  # read from the disk before the clock starts
    meta = ModelMeta.create_empty(
        overwrites={"name": f"local/{args.worker}", "revision": "1", "modalities": ["text"]}
    )
    model = {"mteb": mteb_model, "ours": our_model}[args.worker](vectors, meta)
    begin, cpu = time.perf_counter(), time.process_time()
    result = mteb.evaluate(
        model,
        task,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
        encode_kwargs={"show_progress_bar": False},
    )[0]
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    scoring = sum(p["end"] - p["start"] for p in result.evaluation_phases if p["name"] == "Scoring")
    return {
        "seconds": seconds,
        "scoring_seconds": scoring,
        "search_seconds": seconds - scoring,
        "cpu_seconds": cpu,
        "memory_gb": common.peak_memory_gb(),
        "memory_before_gb": baseline,
        "scores": result.scores["dev"][0],
    }


# ---------------------------------------------------------------- all of it


def measure(args):
    runs = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.scale)
        for turn in range(args.repeats):
            for contender in NAMES:
                words = ["--worker", contender, "--folder", folder]
                runs[contender].append(common.run_worker(__file__, words))
                row = runs[contender][-1]
                print(
                    f"{turn + 1}. {NAMES[contender]:>20}: {row['seconds']:.1f} s "
                    f"(search {row['search_seconds']:.1f}, scoring {row['scoring_seconds']:.1f}; "
                    f"{row['cpu_seconds']:.0f} s of CPU), {row['memory_gb']:.2f} GB, "
                    f"nDCG@10 {row['scores']['ndcg_at_10']:.5f}",
                    flush=True,
                )
    scores = {name: rows[0]["scores"] for name, rows in runs.items()}
    different = [m for m in scores["mteb"] if not same(scores["mteb"][m], scores["ours"][m])]
    return {
        "machine": common.machine(("torch", "mteb", "numpy", "pytrec-eval-terrier", "datasets")),
        "command": command_of(args),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "scale": args.scale,
        "passages": round(PASSAGES * args.scale),
        "queries": round(QUERIES * args.scale),
        "judgements": round(JUDGEMENTS * args.scale),
        "dimensions": DIMS,
        "contenders": [row_of(name, rows) for name, rows in runs.items()],
        "metrics": len(scores["mteb"]),
        "identical": not different and scores["mteb"].keys() == scores["ours"].keys(),
        "different": {m: [scores["mteb"][m], scores["ours"][m]] for m in different},
        "target": TARGET,
    }


def same(a, b):
    return a == b or (a != a and b != b)  # NaN: a metric that is undefined for both


def row_of(name, rows):
    figures = ("seconds", "search_seconds", "scoring_seconds", "cpu_seconds", "memory_gb", "memory_before_gb")
    return {
        "name": NAMES[name],
        "ours": name == "ours",
        **{figure: round(median(row[figure] for row in rows), 2) for figure in figures},
        "ndcg_at_10": rows[0]["scores"]["ndcg_at_10"],
        "repeats": [round(row["seconds"], 2) for row in rows],
    }


def command_of(args):
    scale = "" if args.scale == 1 else f" --scale {args.scale:g}"
    return f"python benchmarks/search.py{scale}" + ("" if args.repeats == 1 else f" --repeats {args.repeats}")


def readme_text(result):
    rows = [
        [
            row["name"],
            f"{row['seconds']:.0f}",
            f"{row['search_seconds']:.0f}",
            f"{row['scoring_seconds']:.0f}",
            f"{row['memory_gb']:.1f}",
            f"{row['ndcg_at_10']:.5f}",
        ]
        for row in result["contenders"]
    ]
    count, different = result["metrics"], result["different"]
    agreement = f"All {count} metrics of the two are identical, to the last digit."
    if not result["identical"]:
        agreement = f"{len(different)} of {count} metrics DIFFER: {', '.join(different)}."
    size = "T2Retrieval's size" if result["scale"] == 1 else f"T2Retrieval's size x {result['scale']:g}"
    before = result["contenders"][1]["memory_before_gb"]
    table = common.markdown_table(
        ["", "seconds", "of it search", "of it scoring", "peak memory, GB", "nDCG@10"], rows
    )
    return f"""## Search and scoring

{result["passages"]:,} passages, {result["queries"]:,} queries, {result["judgements"]:,} judgements,
{result["dimensions"]} dimensions ({size}), top 1000, on synthetic vectors.
`{result["command"]}`, {result["date"]}.
{result["machine"]["summary"]}.

{table}

{agreement} Both run through `mteb.evaluate`: metrics, tie-breaks and nAUC are mteb's own code. Ours differs
in the search alone: no Python heaps, a block of queries against all passages, best passage first, which is an
order that mteb's sorting is quick on. Peak memory includes the libraries and the task ({before:.1f} GB before
either of them starts).
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of passages and of queries")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--no-readme", action="store_true")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        # NaN included, which write_json refuses: some of mteb's metrics are.
        args.out.write_text(json.dumps(worker(args)), encoding="utf-8")
        return
    result = measure(args)
    write_json(args.out, result)
    if not args.no_readme:
        common.put_into_readme("search", readme_text(result))
    print("identical scores" if result["identical"] else f"DIFFERENT: {result['different']}")


if __name__ == "__main__":
    main()
