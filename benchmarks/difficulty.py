"""How hard are the data sets of this project before any training? Prints the table of data/README.md.

    python benchmarks/difficulty.py                 # one to two minutes on two CPU cores
    python benchmarks/difficulty.py --model DIR     # with another local sentence-transformers model

Two searchers: an embedding model as published (all-MiniLM-L6-v2 of the pocket profile unless told
otherwise) and BM25 of the bm25s library with its default parameters. Sanitized MBPP is measured as well
where a copy is present. Everything runs on the CPU and without a network.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import bm25s
import common
import mteb
import numpy as np
import pytrec_eval
from common import ROOT
from sentence_transformers import SentenceTransformer

from embedding_tutorial.assets import pocket_model_path
from embedding_tutorial.files import write_json
from embedding_tutorial.finetune import mrr, rank_of_positive, recall_at_1
from embedding_tutorial.pocket_task import LANGUAGES, SPLIT, PocketT2, read_language

MBPP_PLACES = (ROOT / "data" / "sanitized-mbpp.json", ROOT.parent / "shared" / "data" / "sanitized-mbpp.json")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=None, help="folder of a sentence-transformers model")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "difficulty.json")
    args = parser.parse_args()

    model = SentenceTransformer(str((args.model or pocket_model_path()).resolve()), device="cpu")
    families = json.loads((ROOT / "data" / "pocket_mbpp_families.json").read_text(encoding="utf-8"))
    code = {"pocket MBPP": measure_code(ROOT / "data" / "pocket_mbpp.json", model, families)}
    mbpp = next((path for path in MBPP_PLACES if path.is_file()), None)
    if mbpp is None:
        print("sanitized MBPP is not measured: no copy in data/ (see data/README.md)\n", file=sys.stderr)
    else:
        code["sanitized MBPP"] = measure_code(mbpp, model, families=None)

    task = PocketT2()
    retrieval = measure_retrieval(task, model)
    result = {
        "model": "all-MiniLM-L6-v2" if args.model is None else args.model.name,
        "data": {"pocket T2 revision": task.metadata.revision},
        "versions": {name: version(name) for name in ("sentence-transformers", "torch", "mteb", "bm25s")},
        "code": code,
        "retrieval": retrieval,
    }
    write_json(args.out, result)
    print(table(result))


def measure_code(path, model, families):
    """Recall@1 and MRR of prompt -> code, for the whole file and for the tutorial's validation split."""
    records = json.loads(path.read_text(encoding="utf-8"))
    prompts = [record["prompt"] for record in records]
    codes = [record["code"] for record in records]
    similarity = {
        "embedding": model.encode(prompts, normalize_embeddings=True)
        @ model.encode(codes, normalize_embeddings=True).T,
        "bm25": bm25_scores([code_words(text) for text in prompts], [code_words(text) for text in codes]),
    }
    train, val = split(len(records))
    everything = list(range(len(records)))
    selections = {
        "all queries, all codes": (everything, everything),
        "validation queries, validation codes": (val, val),
        "validation queries, all codes": (val, everything),
    }
    if families is not None:
        related = with_sibling(records, families, train)
        kin = [row for row in val if records[row]["task_id"] in related]
        alone = [row for row in val if records[row]["task_id"] not in related]
        selections |= {
            "validation queries with a sibling in training, all codes": (kin, everything),
            "validation queries without one, all codes": (alone, everything),
        }
    return {
        name: {
            "queries": len(queries),
            "codes": len(pool),
            **{searcher: recall_and_mrr(scores, queries, pool) for searcher, scores in similarity.items()},
        }
        for name, (queries, pool) in selections.items()
    }


def split(size, seed=42, share=0.8):
    """The tutorial's split, as row numbers of the file: shuffling rows or row numbers draws the same."""
    rows = list(range(size))
    random.Random(seed).shuffle(rows)
    cut = int(size * share)
    return rows[:cut], rows[cut:]


def with_sibling(records, families, train):
    """The task ids that share a family with a record of the training part."""
    trained = {records[row]["task_id"] for row in train}
    return {task for members in families.values() for task in members if trained & (set(members) - {task})}


def recall_and_mrr(scores, queries, pool):
    # A tie counts against the searcher: some codes of MBPP differ in space or case alone.
    ranks = rank_of_positive(scores[np.ix_(queries, pool)], [pool.index(row) for row in queries])
    return {"recall_at_1": recall_at_1(ranks), "mrr": mrr(ranks)}


def measure_retrieval(task, model):
    """nDCG@10 on Pocket T2: the embedding model through mteb, BM25 with the same pytrec_eval."""
    with tempfile.TemporaryDirectory() as folder:
        cache = mteb.ResultCache(folder)
        result = mteb.evaluate(model, task, co2_tracker=False, cache=cache, show_progress_bar=False)
    embedding = {row["hf_subset"]: row["ndcg_at_10"] for row in result[0].scores[SPLIT]}
    figures = {}
    for language in LANGUAGES:
        corpus, queries, judged = read_language(task.data_dir / language)
        split_text = character_bigrams if language == "zh" else words
        scores = bm25_scores(
            [split_text(query["text"]) for query in queries],
            [split_text(passage["text"]) for passage in corpus],
        )
        run = {
            query["id"]: {passage["id"]: float(value) for passage, value in zip(corpus, row, strict=True)}
            for query, row in zip(queries, scores, strict=True)
        }
        found = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(run)
        figures[language] = {
            "passages": len(corpus),
            "queries": len(queries),
            "embedding": {"ndcg_at_10": embedding[language]},
            "bm25": {"ndcg_at_10": float(np.mean([row["ndcg_cut_10"] for row in found.values()]))},
        }
    return figures


def bm25_scores(queries, documents):
    """Scores (queries x documents) of tokenised texts."""
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    return np.stack([index.get_scores(query) for query in queries])


def words(text):
    return re.findall(r"[a-z]+|\d+", text.lower())


def code_words(text):
    """Words of a prompt or a code; `countItems` and `count_items` both give `count`, `items`."""
    return words(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text))


def character_bigrams(text):
    """Pairs of neighbouring characters: the usual stand-in for a word segmenter in Chinese search."""
    runs = re.findall(r"\w+", text)
    return [run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))]


def table(result):
    lines = [
        f"| prompt → code | queries × codes | {result['model']} Recall@1 | MRR | BM25 Recall@1 | MRR |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for data, rows in result["code"].items():
        for name, row in rows.items():
            figures = [row[s][m] for s in ("embedding", "bm25") for m in ("recall_at_1", "mrr")]
            cells = " | ".join(f"{figure:.3f}" for figure in figures)
            lines.append(f"| {data}: {name} | {row['queries']} × {row['codes']} | {cells} |")
    lines += [
        "",
        f"| query → passage | queries × passages | {result['model']} nDCG@10 | BM25 nDCG@10 |",
        "| --- | --- | --- | --- |",
    ]
    for language, row in result["retrieval"].items():
        cells = f"{row['embedding']['ndcg_at_10']:.3f} | {row['bm25']['ndcg_at_10']:.3f}"
        lines.append(f"| pocket T2, {language} | {row['queries']} × {row['passages']} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
