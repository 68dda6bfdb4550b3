"""Recipe 5, compare: one table and one figure for any list of checkpoints, judged as notebook 01 judges.

    python recipes/compare.py --checkpoint "MiniLM=minilm" --checkpoint "dense=recipes/output/dense/model"
    python recipes/compare.py --checkpoint … --queries my_held_out.jsonl --corpus my_passages.jsonl

Every query searches its answers among all passages: those of the corpus and the answers of all queries.
Pairs, FlagEmbedding's lines and whatever else the tutorial reads are taken. Of several answers the best
counts for Recall and MRR, all for nDCG. A tie counts against the model. A checkpoint with BGE-M3's heads is
judged four times: dense, sparse, ColBERT, and their sum (weights 1, 0.3, 1: FlagEmbedding's). MODEL@64 takes
the first 64 dimensions. The first checkpoint is the reference of the differences.
"""

import sys
import time
from pathlib import Path

import numpy as np
import scipy.sparse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial import figures, files, finetune, pairs, profiles  # noqa: E402
from embedding_tutorial.encoder import HEAD_FILES, fingerprint, read_pooling  # noqa: E402
from embedding_tutorial.files import TutorialError, atomic_file, relative, sha256_of, write_json  # noqa: E402
from recipes import data, models, steps  # noqa: E402

WEIGHTS = {"dense": 1.0, "sparse": 0.3, "ColBERT": 1.0}
CUTOFFS = (1, 5, 10, 20, 100)
METRICS = (*(f"recall@{k}" for k in CUTOFFS), "mrr", "ndcg@10")
PASSAGES, CELLS = 5_000, 10_000_000  # passages encoded at once, and scores held at once


def metrics_of(ranks):
    """{metric: values (n,)}; ranks: for each query the ranks of its right answers, the best first."""
    best = np.array([own[0] for own in ranks])
    found = {f"recall@{k}": (best <= k).astype(float) for k in CUTOFFS} | {"mrr": 1 / best}
    gain = 1 / np.log2(1 + np.arange(1, 11))
    won = [sum(gain[rank - 1] for rank in own if rank <= 10) / gain[: len(own)].sum() for own in ranks]
    return found | {"ndcg@10": np.array(won)}


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


SCORES = {"dense": np.inner, "sparse": lambda q, p: (q @ p.T).toarray(), "ColBERT": colbert_scores}


def encoder_of(folder, dims=None, max_length=512):
    """A function: texts → {mode: what SCORES compares}. M3's three by FlagEmbedding's own BGEM3FlagModel."""
    if not all((Path(folder) / name).exists() for name in HEAD_FILES):
        encoder = models.load(folder, max_length)

        def dense(texts):
            v = data.vectors(encoder, texts).astype(np.float32)[:, :dims]
            return {"dense": v / np.linalg.norm(v, axis=1, keepdims=True) if dims else v}

        return dense
    from FlagEmbedding import BGEM3FlagModel

    device, pooling = profiles.device_of_this_machine(), read_pooling(folder)
    model = BGEM3FlagModel(str(folder), pooling_method=pooling, use_fp16=device != "cpu", devices=device)
    wanted = {f"return_{name}": True for name in ("dense", "sparse", "colbert_vecs")}

    def all_three(texts):
        found = model.encode(texts, batch_size=16, max_length=max_length, **wanted)
        sparse = sparse_matrix(found["lexical_weights"], len(model.tokenizer))
        several = [np.asarray(vectors, np.float32) for vectors in found["colbert_vecs"]]  # float16 on a GPU
        return {"dense": np.asarray(found["dense_vecs"], np.float32), "sparse": sparse, "ColBERT": several}

    return all_three


def all_scores(q, p):
    """{mode: scores}, with the weighted sum where there are three."""
    scores = {mode: SCORES[mode](q[mode], p[mode]) for mode in q}
    if len(scores) > 1:
        scores["weighted sum"] = sum(weight * scores[mode] for mode, weight in WEIGHTS.items())
    return scores


def evaluate(encode, asked, corpus=(), instruction=""):
    """({mode: ranks}, queries per second of all modes) of pairs, searched among all answers and a corpus.

    A block of passages is encoded, compared and forgotten. The answers come first: later blocks are counted.
    """
    answers = pairs.passages_of(asked)
    place = {text: i for i, text in enumerate(answers)}
    right = [[place[text] for text in dict.fromkeys(pairs.answers_of(pair))] for pair in asked]
    owner = np.repeat(np.arange(len(asked)), list(map(len, right)))
    column = np.concatenate(right)
    others = [text for text in pairs.passages_of(corpus) if text not in place]
    begin, own, before, ranks = time.perf_counter(), {}, {}, {}
    q = encode([instruction + pair["query"] for pair in asked])
    spent = time.perf_counter() - begin
    for number, block in enumerate([answers, *data.blocks(others, PASSAGES)]):
        p, size = encode(block), max(1, CELLS // len(block))
        for start in range(0, len(asked), size):
            mine = (owner >= start) & (owner < start + size)
            rows = owner[mine] - start
            begin = time.perf_counter()
            found = all_scores({mode: v[start : start + size] for mode, v in q.items()}, p)
            spent += time.perf_counter() - begin
            for mode, scores in found.items():
                if not np.isfinite(scores).all():
                    raise ValueError("scores contain NaN or infinity: the embeddings are broken")
                if number == 0:
                    own.setdefault(mode, np.empty(len(owner)))[mine] = scores[rows, column[mine]]
                    scores[rows, column[mine]] = -np.inf
                ahead = [(scores[row] >= one).sum() for row, one in zip(rows, own[mode][mine], strict=True)]
                before.setdefault(mode, np.zeros(len(owner), int))[mine] += ahead
    bounds = np.cumsum(list(map(len, right)))[:-1]
    for mode, counts in before.items():
        ranks[mode] = [np.sort(n) + 1 + np.arange(len(n)) for n in np.split(counts, bounds)]
    return ranks, len(asked) / spent


def top(model, query, passages, k=5):
    """[(score, passage)] of the k best for one query, by an exact faiss index."""
    encoder = models.load(models.find_model(model))
    scores, found = data.exact_index(data.vectors(encoder, passages)).search(
        data.vectors(encoder, [query]), k)
    return [(float(score), passages[i]) for score, i in zip(scores[0], found[0], strict=True)]


def row_of(name, mode, ranks, reference):
    """One row of the table: every metric with its interval, and the MRR against the reference's ranks."""
    row = {"name": name, "mode": mode}
    for metric, values in metrics_of(ranks).items():
        row[metric] = finetune.bootstrap_interval(values)
    gain = metrics_of(ranks)["mrr"] - metrics_of(reference)["mrr"]
    row["mrr_gain"], row["p"] = finetune.bootstrap_interval(gain), finetune.sign_flip_test(gain)
    return {**row, "ranks": [int(own[0]) for own in ranks]}


def label(row):
    return row["name"] if row["mode"] == "dense" and not row["heads"] else f"{row['name']}, {row['mode']}"


def model_of(text):
    """(folder, dimensions or None) of MODEL or MODEL@64."""
    model, _, dims = text.rpartition("@") if text.rpartition("@")[2].isdigit() else (text, "", "")
    return models.find_model(model), int(dims) if dims else None


def compare(listed, asked, corpus, instruction="", max_length=512):
    """Judge [(name, model)] on the pairs `asked`, searching also in `corpus` (texts or pairs)."""
    rows, reference = [], None
    for number, (name, model) in enumerate(listed, 1):
        print(f"[{number}/{len(listed)}] {name}", flush=True)
        found, speed = evaluate(encoder_of(*model_of(model), max_length), asked, corpus, instruction)
        reference = found["dense"] if reference is None else reference
        for mode, ranks in found.items():
            more = {"heads": len(found) > 1, "queries_per_second": round(speed, 1)}
            rows.append({**row_of(name, mode, ranks, reference), **more})
            mean, low, high = rows[-1]["mrr"]
            print(f"    {mode:>12}: MRR {mean:.3f} [{low:.3f}, {high:.3f}]")
    passages = len(pairs.passages_of([*asked, *corpus]))
    return {"queries": len(asked), "passages": passages, "reference": listed[0][0], "rows": rows}


def table(results):
    """The results as a Markdown table."""

    def cell(triple, sign=""):
        return "{0:{3}.3f} [{1:{3}.3f}, {2:{3}.3f}]".format(*triple, sign)

    names = [*(f"Recall@{k}" for k in CUTOFFS), "MRR", "nDCG@10", "MRR − reference", "p", "queries/s"]
    lines = []
    for number, row in enumerate(results["rows"]):
        cells = [cell(row[metric]) if metric == "mrr" else f"{row[metric][0]:.3f}" for metric in METRICS]
        cells += ["reference", ""] if number == 0 else [cell(row["mrr_gain"], "+"), f"{row['p']:.4f}"]
        lines.append([label(row), *cells, f"{row['queries_per_second']:.0f}"])
    return files.markdown_table(["checkpoint", *names], lines).replace("-0.", "−0.")


def figure(results, path):
    """MRR of every row with its interval, against the reference.

    A row whose whole interval lies below two thirds of the reference (a raw BERT, untrained sparse vectors)
    goes to a panel of its own, so that the others have an axis on which they can be told apart.
    """
    triples = [row["mrr"] for row in results["rows"]]
    mean, name = triples[0][0], label(results["rows"][0])
    rows, apart = [], {"group": "far below, on an axis of their own"}
    for row, (value, low, high) in zip(results["rows"], triples, strict=True):
        shown = {"label": label(row), "value": value, "lo": low, "hi": high}
        rows.append(shown | (apart if high < mean * 2 / 3 else {}))
    rows.sort(key=lambda row: "group" in row)  # the reference's panel first
    best = max(rows, key=lambda row: row["value"])
    above, below = sum(low > mean for _, low, _ in triples), sum(high < mean for *_, high in triples)
    title = (
        f"Highest MRR: {best['label']}, {best['value']:.3f}. Of {len(rows)} intervals, {above} lie above "
        f"the reference's {mean:.3f} and {below} below")
    source = f"{results['queries']} queries against {results['passages']} passages; recipes/compare.py"
    shown = {"reference": mean, "reference_label": f"{name}: {mean:.3f}", "source": source}
    figures.intervals(rows, title, path, xlabel="MRR", **shown)


def main(words=None):
    parser = steps.parser(__doc__)
    add, many = parser.add_argument, {"action": "append", "required": True, "metavar": "NAME=MODEL"}
    add("--checkpoint", help="a name and minilm, bge-m3 or a model folder; may be repeated", **many)
    add("--queries", type=Path, help="queries with answers; otherwise notebook 01's validation pairs")
    add("--corpus", type=Path, help="a file of further passages; beside the training codes of notebook 01")
    add("--instruction", default="", help="stands before every query")
    add("--max-length", type=int, default=512, help="tokens of a text that are read")
    add("--output", type=Path, default=steps.OUTPUT / "comparison", help="folder")
    args = parser.parse_args(words)
    listed = [tuple(text.partition("=")[::2]) for text in args.checkpoint]
    if not all(name and model for name, model in listed):
        raise TutorialError(f"--checkpoint takes NAME=MODEL, not {args.checkpoint}.")
    corpus, read = pairs.read_corpus(args.corpus), [args.queries, args.corpus, None]
    if args.queries:
        asked = pairs.one_per_query(pairs.read_pairs(args.queries))
    else:
        (train, asked), read = data.tutorial_pairs(), [data.VALIDATION, args.corpus, data.TRAIN]
        corpus = train + corpus
    settings = {"instruction": args.instruction, "max_length": args.max_length}
    settings["data"] = [path and sha256_of(path) for path in read]  # own queries: no file of the notebook
    settings["checkpoints"] = [[n, fingerprint(model_of(m)[0]), model_of(m)[1]] for n, m in listed]
    if steps.open_step(args.output, settings) is None:
        results = compare(listed, asked, corpus, args.instruction, args.max_length)
        write_json(args.output / "results.json", results)
        with atomic_file(args.output / "table.md", "w") as file:
            file.write(table(results) + "\n")
        figure(results, args.output / "comparison.png")
        steps.close_step(args.output, {"rows": len(results["rows"])})
    print((args.output / "table.md").read_text(encoding="utf-8"))
    print(f"Figure: {relative(args.output / 'comparison.png')}")


if __name__ == "__main__":
    steps.run(main)
