"""Serving: a model folder in each place where people serve one, and what each costs.

    python recipes/serving.py                    # fills the tables of recipes/serving.md
    python recipes/serving.py --model FOLDER --threads 2

Held-out pocket queries search all pocket codes. Each way is compared with the vectors that the model was
evaluated with. Without notebook 01's merged model it takes the model before training. Writes
recipes/serving.json.
"""

import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial.encoder import Encoder, embed, read_pooling, weights_file  # noqa: E402
from embedding_tutorial.files import ROOT, TutorialError, atomic_file, read_json, relative, write_json  # noqa: E402
from embedding_tutorial.finetune import bootstrap_interval, mrr, rank_of_positive, split_pairs  # noqa: E402
from embedding_tutorial.onnx_export import FP32, INT8, OnnxEncoder, export_onnx  # noqa: E402
from embedding_tutorial.pairs import read_mbpp  # noqa: E402
from recipes import data, steps  # noqa: E402
from recipes.models import find_model  # noqa: E402

MERGED = ROOT / "models" / "MiniLM-finetuned" / "merged"
PAIRS = ROOT / "data" / "pocket_mbpp.json"
RESULTS, PAGE = ROOT / "recipes" / "serving.json", ROOT / "recipes" / "serving.md"
START, END = "<!-- figures: written by serving.py -->", "<!-- end of figures -->"
PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "FlagEmbedding",
    "onnxruntime",
    "faiss-cpu",
    "lancedb",
)
# What decides how fast int8 and fp32 are multiplied, in torch's names.
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "avx512_f", "avx2", "dotprod")
BATCH, LENGTH = 32, 512


# ---------------------------------------------------------------- the ways: a folder → texts → (n, dims)


def in_this_tutorial(folder):
    encoder = Encoder(folder, LENGTH).eval()

    def encode(texts):
        with torch.no_grad():
            return embed(encoder, texts).numpy()

    return encode


def in_sentence_transformers(folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = LENGTH
    return lambda texts: model.encode(
        texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
    )


def in_transformers(folder):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    pooling = read_pooling(folder)

    def batch(texts):
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()

    def encode(texts):
        with torch.no_grad():
            return np.concatenate([batch(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])

    return encode


def in_flagembedding(folder):
    from FlagEmbedding import FlagModel

    model = FlagModel(
        str(folder),
        pooling_method=read_pooling(folder),
        use_fp16=False,
        devices="cpu",
        batch_size=BATCH,
        query_max_length=LENGTH,
        passage_max_length=LENGTH,
    )
    return model.encode


WAYS = {  # name in the table: (file that it reads, encoder of a folder)
    "this tutorial": (None, in_this_tutorial),
    "sentence-transformers": (None, in_sentence_transformers),
    "transformers": (None, in_transformers),
    "FlagEmbedding": (None, in_flagembedding),
    "ONNX Runtime, fp32": (FP32, lambda folder: OnnxEncoder(folder, FP32, LENGTH, torch.get_num_threads())),
    "ONNX Runtime, int8": (INT8, lambda folder: OnnxEncoder(folder, INT8, LENGTH, torch.get_num_threads())),
}


def timed(function, times):
    """(what it returns, the shortest of so many calls in seconds: the one that others disturbed least)."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        result = function()
        found.append(time.perf_counter() - start)
    return result, min(found)


def measure_ways(model, onnx, queries, passages, positive, times):
    """A row for each way; the first one is what the others are compared with."""
    texts, rows = [*queries, *passages], []
    tokens = sum(map(len, Encoder(model, LENGTH).tokenize(texts)))
    for name, (file, load) in WAYS.items():
        encode = load(onnx if file else model)
        vectors, seconds = timed(lambda encode=encode: np.asarray(encode(texts), dtype=np.float32), times)
        q, p = vectors[: len(queries)], vectors[len(queries) :]
        ranks = rank_of_positive(q @ p.T, positive)
        if not rows:
            reference, first = vectors, ranks
        cosine = (vectors * reference).sum(axis=1)
        weights = [onnx / file, onnx / f"{file}.data"] if file else [weights_file(model)]
        rows.append(
            {
                "name": name,
                "cosine_lowest": float(cosine.min()),
                "cosine_mean": float(cosine.mean()),
                "mrr": mrr(ranks),
                "mrr_difference": bootstrap_interval(1 / ranks - 1 / first),
                "tokens_per_second": tokens / seconds,
                "megabytes": sum(path.stat().st_size for path in weights if path.exists()) / 1e6,
            }
        )
        print(f"{name}: {rows[-1]['tokens_per_second']:,.0f} tokens/s, lowest cosine {cosine.min():.4f}")
    return rows, reference, tokens


# ---------------------------------------------------------------- indexes: vectors → queries → places


def in_faiss_hnsw(vectors, folder):
    index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    faiss.write_index(index, str(folder / "hnsw.faiss"))
    return lambda q, k: index.search(q[None], k)[1][0]


def in_faiss_exact(vectors, folder):
    index = data.exact_index(vectors)
    faiss.write_index(index, str(folder / "exact.faiss"))
    return lambda q, k: index.search(q[None], k)[1][0]


def in_lancedb(vectors, folder):
    try:
        import lancedb
    except ImportError:
        raise TutorialError("lancedb is not installed: pip install -r recipes/requirements.txt") from None

    rows = [{"id": i, "vector": vector} for i, vector in enumerate(vectors)]
    table = lancedb.connect(folder / "lancedb").create_table("codes", rows, mode="overwrite")
    search = table.search

    def places(q, k):
        return np.array(
            [
                row["id"]
                for row in search(q).distance_type("dot").select(["id", "_distance"]).limit(k).to_list()
            ]
        )

    return places


INDEXES = {"faiss, exact": in_faiss_exact, "faiss, HNSW": in_faiss_hnsw, "LanceDB, exact": in_lancedb}


def measure_indexes(q, p, times, k=10):
    """A row for each index: the share of the true first k that it finds, and milliseconds per query."""
    rows, best = [], np.argsort(-(q @ p.T), axis=1, kind="stable")[:, :k]
    for name, build in INDEXES.items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            search = build(np.ascontiguousarray(p), Path(folder))
            found, seconds = timed(lambda search=search: [search(query, k) for query in q], times)
        recall = np.mean([len({*own} & {*true}) / k for own, true in zip(found, best, strict=True)])
        rows.append({"name": name, "recall": float(recall), "milliseconds": seconds / len(q) * 1e3})
    return rows


# ---------------------------------------------------------------- the page


def machine():
    """{"cpu", "instructions", "cores", "system", "versions"} of this machine; no host name."""
    can = torch.cpu.get_capabilities()
    return {
        "cpu": can.get("cpu_name") or platform.processor() or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if can.get(name)],
        "cores": os.cpu_count(),
        "system": platform.system(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def shown(number, digits):
    """A figure of the table; None, where a machine was too busy to time anything, as a dash."""
    return "–" if number is None else f"{number:,.{digits}f}"


def tables(results):
    """The part of recipes/serving.md between its two markers."""
    here = results["machine"]
    sets, versions = ", ".join(here["instructions"]), ", ".join(map(" ".join, here["versions"].items()))
    lines = [
        START,
        f"{results['model']}; {results['queries']} held-out queries against {results['passages']} codes, "
        f"{results['tokens']:,} tokens; threads: {results['threads']}, best of {results['times']} passes. "
        f"{here['cpu']} ({sets}), {here['cores']} cores, {here['system']}; {versions}.",
        "",
        "| way | cosine to the first row: lowest, mean | MRR | MRR − first row, 95 % | tokens/s | MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["ways"]:
        mean, low, high = row["mrr_difference"]
        gain = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" if row is not results["ways"][0] else "reference"
        lines.append(
            f"| {row['name']} | {row['cosine_lowest']:.4f}, {row['cosine_mean']:.4f} | {row['mrr']:.3f} | "
            f"{gain} | {shown(row['tokens_per_second'], 0)} | {row['megabytes']:.0f} |"
        )
    lines += ["", "| index | of the true first 10 it finds | ms per query |", "| --- | --- | --- |"]
    for row in results["indexes"]:
        lines.append(f"| {row['name']} | {row['recall']:.3f} | {shown(row['milliseconds'], 2)} |")
    return "\n".join([*lines, END])


def benchmark(model, label, pairs, times=3):
    """Measure everything for a model folder; returns the results."""
    held_out, passages = split_pairs(pairs)[1], list(dict.fromkeys(pair["pos_doc"] for pair in pairs))
    queries, place = [pair["query"] for pair in held_out], {text: i for i, text in enumerate(passages)}
    positive = [place[pair["pos_doc"]] for pair in held_out]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        onnx = export_onnx(model, Path(folder) / "onnx", int8=True)
        ways, vectors, tokens = measure_ways(model, onnx, queries, passages, positive, times)
    return {
        "model": label,
        "queries": len(queries),
        "passages": len(passages),
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "times": times,
        "machine": machine(),
        "ways": ways,
        "indexes": measure_indexes(vectors[: len(queries)], vectors[len(queries) :], times),
    }


def write_page(results, page):
    """Replace what stands between the two markers of the page."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    with atomic_file(page, "w") as file:
        file.write(before + tables(results) + rest.split(END)[1])


def main(words=None):
    parser = steps.parser(__doc__)
    parser.add_argument("--model", help="a model folder; notebook 01's merged model, else the pocket base")
    parser.add_argument(
        "--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
    )
    parser.add_argument("--times", type=int, default=3, help="passes, of which the fastest counts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file to write")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are filled")
    args = parser.parse_args(words)
    chosen = args.model or (str(MERGED) if MERGED.is_dir() else "minilm")
    model = find_model(chosen)
    label = "all-MiniLM-L6-v2, not fine-tuned" if chosen == "minilm" else relative(model).replace("\\", "/")
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    write_json(args.results, benchmark(model, label, read_mbpp(PAIRS), args.times))
    write_page(read_json(args.results), args.page)
    print(f"Written: {relative(args.results)}, {relative(args.page)}")


if __name__ == "__main__":
    steps.run(main)
