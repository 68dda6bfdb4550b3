"""Recipe 5, compare: one table and one figure for any list of checkpoints, judged as notebook 01 judges.

    python recipes/compare.py --checkpoint "MiniLM=minilm" --checkpoint "dense=recipes/output/dense/model"

Every validation query searches its code among all codes, training codes included, through a faiss index
with exact inner products. A tie counts against the model. A checkpoint with BGE-M3's heads appears four
times: dense, sparse, ColBERT, and their weighted sum (1, 0.3, 1: FlagEmbedding's weights). The first
checkpoint is the reference of the differences. Writes results.json, table.md and comparison.png.
"""

import sys
from pathlib import Path

import numpy as np
import scipy.sparse
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial import figures  # noqa: E402
from embedding_tutorial.encoder import HEAD_FILES, Encoder, embed, fingerprint, read_pooling  # noqa: E402
from embedding_tutorial.files import TutorialError, atomic_file, relative, sha256_of, write_json  # noqa: E402
from embedding_tutorial.finetune import bootstrap_interval, rank_of_positive, sign_flip_test  # noqa: E402
from recipes import data, steps  # noqa: E402
from recipes.models import find_model  # noqa: E402

METRICS = {
    "recall@1": lambda ranks: ranks <= 1,
    "recall@5": lambda ranks: ranks <= 5,
    "recall@10": lambda ranks: ranks <= 10,
    "mrr": lambda ranks: 1 / ranks,
    "ndcg@10": lambda ranks: np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0),  # one right answer per query
}
WEIGHTS = {"dense": 1.0, "sparse": 0.3, "ColBERT": 1.0}


# ---------------------------------------------------------------- scores: (queries, passages)


def faiss_scores(q, p):
    """Inner products (n, m) of q (n, dims) with every row of p (m, dims), found by an exact faiss index."""
    values, places = data.exact_index(p).search(np.ascontiguousarray(q, dtype=np.float32), len(p))
    scores = np.empty_like(values)
    np.put_along_axis(scores, places, values, axis=1)
    return scores


def dense_scores(folder, queries, passages, max_length=512):
    """Scores of the dense vectors that the notebook's own `Encoder` makes."""
    encoder = Encoder(folder, max_length).eval()
    with torch.no_grad():
        q, p = (embed(encoder, texts, token_budget=2048).float().numpy() for texts in (queries, passages))
    return faiss_scores(q, p)


def sparse_matrix(weights, columns):
    """Token weights, [{token id: weight}], as a sparse matrix (texts, columns)."""
    cells = [(row, int(token), weight) for row, text in enumerate(weights) for token, weight in text.items()]
    rows, tokens, values = zip(*cells, strict=True) if cells else ((), (), ())
    return scipy.sparse.csr_matrix((values, (rows, tokens)), shape=(len(weights), columns), dtype=np.float32)


def colbert_scores(queries, passages):
    """Late interaction (n, m): for each query token its best passage token, averaged over the query's tokens.

    queries, passages: lists of (tokens, dims) arrays, one per text.
    """
    ends = np.cumsum([len(passage) for passage in passages])
    starts = np.concatenate([[0], ends[:-1]])
    every = np.concatenate(passages)
    return np.stack([np.maximum.reduceat(query @ every.T, starts, axis=1).mean(axis=0) for query in queries])


def m3_scores(folder, queries, passages, max_length=512):
    """{mode: scores (n, m)} of a checkpoint with BGE-M3's heads, by FlagEmbedding's own BGEM3FlagModel."""
    from FlagEmbedding import BGEM3FlagModel

    model = BGEM3FlagModel(
        str(folder),
        pooling_method=read_pooling(folder),
        use_fp16=False,
        devices="cuda:0" if torch.cuda.is_available() else "cpu",
    )
    q, p = (
        model.encode(
            texts,
            batch_size=16,
            max_length=max_length,
            return_dense=True,
            return_sparse=True,
            return_colbert_vecs=True,
        )
        for texts in (queries, passages)
    )
    columns = len(model.tokenizer)
    scores = {
        "dense": faiss_scores(q["dense_vecs"], p["dense_vecs"]),
        "sparse": (
            sparse_matrix(q["lexical_weights"], columns) @ sparse_matrix(p["lexical_weights"], columns).T
        ).toarray(),
        "ColBERT": colbert_scores(q["colbert_vecs"], p["colbert_vecs"]),
    }
    scores["weighted sum"] = sum(weight * scores[mode] for mode, weight in WEIGHTS.items())
    return scores


# ---------------------------------------------------------------- evaluation


def evaluate(folder, queries, passages, positive):
    """{mode: ranks (n,)} of one checkpoint; positive (n,): the place of each query's passage."""
    if all((Path(folder) / name).exists() for name in HEAD_FILES):
        scores = m3_scores(folder, queries, passages)
    else:
        scores = {"dense": dense_scores(folder, queries, passages)}
    return {mode: rank_of_positive(values, positive) for mode, values in scores.items()}


def row_of(name, mode, ranks, reference):
    """One row of the table: every metric with its interval, and the MRR against the reference's."""
    row = {"name": name, "mode": mode}
    for metric, score in METRICS.items():
        row[metric] = bootstrap_interval(score(ranks))
    gain = 1 / ranks - 1 / reference
    row["mrr_gain"], row["p"] = bootstrap_interval(gain), sign_flip_test(gain)
    return {**row, "ranks": ranks.tolist()}


def label(row):
    return row["name"] if row["mode"] == "dense" and not row["heads"] else f"{row['name']}, {row['mode']}"


def compare(listed, pairs, corpus):
    """Judge [(name, model)] on `pairs`, each searching among the codes of `corpus`. Returns the results.

    The first one is the reference of `mrr_gain` and `p`.
    """
    passages = list(dict.fromkeys(pair["pos_doc"] for pair in [*pairs, *corpus]))
    place = {text: i for i, text in enumerate(passages)}
    queries, positive = [pair["query"] for pair in pairs], [place[pair["pos_doc"]] for pair in pairs]
    rows, reference = [], None
    for number, (name, model) in enumerate(listed, 1):
        print(f"[{number}/{len(listed)}] {name}", flush=True)
        found = evaluate(find_model(model), queries, passages, positive)
        reference = found["dense"] if reference is None else reference
        for mode, ranks in found.items():
            rows.append({**row_of(name, mode, ranks, reference), "heads": len(found) > 1})
            mean, low, high = rows[-1]["mrr"]
            print(f"    {mode:>12}: MRR {mean:.3f} [{low:.3f}, {high:.3f}]")
    return {"queries": len(queries), "passages": len(passages), "reference": listed[0][0], "rows": rows}


def table(results):
    """The results as a Markdown table."""

    def cell(triple, sign=""):
        return "{0:{3}.3f} [{1:{3}.3f}, {2:{3}.3f}]".format(*triple, sign)

    lines = [
        "| checkpoint | Recall@1 | Recall@5 | Recall@10 | MRR | nDCG@10 | MRR − reference | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, row in enumerate(results["rows"]):
        cells = [cell(row[metric]) for metric in METRICS]
        gain = ["reference", ""] if number == 0 else [cell(row["mrr_gain"], "+"), f"{row['p']:.4f}"]
        lines.append(f"| {' | '.join([label(row), *cells, *gain])} |")
    return "\n".join(lines).replace("-0.", "−0.")


def figure(results, path):
    """MRR of every row with its interval, against the reference.

    A row whose whole interval lies below two thirds of the reference (a raw BERT, untrained sparse vectors)
    goes to a panel of its own, so that the others have an axis on which they can be told apart.
    """
    triples = [row["mrr"] for row in results["rows"]]
    mean, name = triples[0][0], label(results["rows"][0])
    rows = [
        {"label": label(row), "value": value, "lo": low, "hi": high}
        | ({"group": "far below, on an axis of their own"} if high < mean * 2 / 3 else {})
        for row, (value, low, high) in zip(results["rows"], triples, strict=True)
    ]
    rows.sort(key=lambda row: "group" in row)  # the reference's panel first
    best = max(rows, key=lambda row: row["value"])
    above, below = sum(low > mean for _, low, _ in triples), sum(high < mean for *_, high in triples)
    figures.intervals(
        rows,
        f"Highest MRR: {best['label']}, {best['value']:.3f}. Of {len(rows)} intervals, {above} lie above "
        f"the reference's {mean:.3f} and {below} below",
        path,
        xlabel="MRR",
        reference=mean,
        reference_label=f"{name}: {mean:.3f}",
        source=f"{results['queries']} queries against {results['passages']} codes; recipes/compare.py",
    )


def main(words=None):
    parser = steps.parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar="NAME=MODEL",
        help="a name for the table and minilm, bge-m3 or a model folder; may be repeated",
    )
    parser.add_argument(
        "--train", type=Path, default=data.TRAIN, help="training pairs: their codes are candidates too"
    )
    parser.add_argument(
        "--validation", type=Path, default=data.VALIDATION, help="the pairs whose queries are asked"
    )
    parser.add_argument("--output", type=Path, default=steps.OUTPUT / "comparison", help="folder")
    args = parser.parse_args(words)
    listed = [tuple(text.partition("=")[::2]) for text in args.checkpoint]
    if not all(name and model for name, model in listed):
        raise TutorialError(f"--checkpoint takes NAME=MODEL, not {args.checkpoint}.")
    train, validation = data.tutorial_pairs(args.train, args.validation)
    settings = {
        "data": [sha256_of(args.train), sha256_of(args.validation)],
        "checkpoints": [[name, fingerprint(find_model(model))] for name, model in listed],
    }
    if steps.open_step(args.output, settings) is None:
        results = compare(listed, validation, train)
        write_json(args.output / "results.json", results)
        with atomic_file(args.output / "table.md", "w") as file:
            file.write(table(results) + "\n")
        figure(results, args.output / "comparison.png")
        steps.close_step(args.output, {"rows": len(results["rows"])})
    print((args.output / "table.md").read_text(encoding="utf-8"))
    print(f"Figure: {relative(args.output / 'comparison.png')}")


if __name__ == "__main__":
    steps.run(main)
