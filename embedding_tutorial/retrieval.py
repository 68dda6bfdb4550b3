"""Retrieval tests through mteb: stored vectors that are never another model's, exact search, cached scores.

mteb keeps the scoring, the metrics and the files; `evaluate_retrieval` gives it an identity that is computed
from the weights, so that a score can't belong to another model.
"""

import contextlib
import gc
import hashlib
import json
import sys
import time
import warnings
from pathlib import Path

import mteb
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from mteb.models import ModelMeta
from mteb.results import TaskResult
from tqdm import tqdm

from . import profiles
from .assets import t2retrieval_source
from .encoder import LENGTH_FILE, Encoder, companions, fingerprint
from .evaluation import best_passages
from .files import TutorialError, data_files, only_process, relative, sha256_of, sha256_once
from .finetune import rank_of_positive
from .pairs import answers_of, best_answers
from .pocket_task import PocketT2
from .store import StoredEncoder

# ---------------------------------------------------------------- the test


def retrieval_task(name):
    """The mteb task "T2Retrieval" (hub, mirror, or `data/T2Retrieval`) or "PocketT2Retrieval".

    Raises TutorialError at once when T2Retrieval is neither on disk nor reachable.
    """
    if name == "PocketT2Retrieval":
        return PocketT2()
    source = t2retrieval_source()
    if not source["local"]:
        return mteb.get_task(name)
    dataset = {"path": source["path"], "revision": folder_fingerprint(source["path"])}

    def load_data(self, num_proc=None, **kwargs):
        if not self.data_loaded:
            self.dataset, self.data_loaded = {"default": {"dev": read_local_retrieval(source["path"])}}, True

    task = type(mteb.get_task(name))
    metadata = task.metadata.model_copy(update={"dataset": dataset})
    # A class of its own: mteb resets an instance to its class's metadata when it unloads the data.
    return type(name, (task,), {"metadata": metadata, "load_data": load_data})()


def folder_fingerprint(folder):
    """16 hex digits of the names and contents of all data files in a folder."""
    files = data_files(folder, "corpus", "queries", "data", "qrels")
    return hashlib.sha256(
        "".join(f"{f.relative_to(folder)} {sha256_of(f)}\n" for f in files).encode()
    ).hexdigest()[:16]


def read_local_retrieval(folder):
    """The split of a downloaded mteb retrieval set (corpus, queries, and data or qrels), as mteb wants it.

    Read here and not by `datasets`, whose cache was seen to return the old rows after the files had changed.
    """

    def table(ids, *parts):
        frames = [
            pd.read_parquet(f) if f.suffix == ".parquet" else pd.read_json(f, lines=True, dtype=False)
            for f in data_files(folder, *parts)
        ]
        return pd.concat(frames, ignore_index=True).astype(dict.fromkeys(ids, str))

    corpus, queries = (table(["_id"], part).rename(columns={"_id": "id"}) for part in ("corpus", "queries"))
    relevant = {}
    for row in table(["query-id", "corpus-id"], "data", "qrels").to_dict("records"):
        relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    judged = queries[queries["id"].isin(relevant)]
    return {
        "corpus": Dataset.from_pandas(corpus, preserve_index=False),
        "relevant_docs": relevant,
        "top_ranked": None,
        "queries": Dataset.from_pandas(judged, preserve_index=False),
    }


def subset_task(task, queries, distractors):
    """A deterministic part of a loaded task: `queries` queries, their judged passages, `distractors` more.

    Returns a new task named "<task>-subset-<queries>q-<distractors>d", so table, cache and figure all say it.
    """

    def first(ids, count):
        return set(sorted(ids, key=lambda name: hashlib.sha256(str(name).encode()).hexdigest())[:count])

    name = f"{task.metadata.name}-subset-{queries}q-{distractors}d"
    metadata = task.metadata.model_copy(update={"name": name})
    # Reloading would bring the whole data set back under the subset's name, so it is never unloaded.
    small = type("Subset", (type(task),), {"metadata": metadata, "unload_data": lambda self: None})()
    small.dataset = {}
    for subset, splits in task.dataset.items():
        split = splits["dev"]
        keep = first(split["relevant_docs"], queries)
        judged = {passage for query in keep for passage in split["relevant_docs"][query]}
        others = first(set(split["corpus"]["id"]) - judged, distractors)
        rows = [i for i, name in enumerate(split["corpus"]["id"]) if name in judged | others]
        small.dataset[subset] = {
            "dev": {
                "corpus": split["corpus"].select(rows),
                "top_ranked": None,
                "queries": split["queries"].select(
                    [i for i, name in enumerate(split["queries"]["id"]) if name in keep]
                ),
                "relevant_docs": {
                    query: dict(split["relevant_docs"][query])
                    for query in split["relevant_docs"]
                    if query in keep
                },
            }
        }
    small.data_loaded = True
    return small


def split_of(task, subset):
    """(queries, passages, passage ids, judgements) of a loaded task's subset, aligned lists.

    Passages are title and text, joined as mteb joins them; judgements[i] is {passage id: grade} of query i.
    """
    split = task.dataset[subset]["dev"]
    judgements = [dict(split["relevant_docs"][query]) for query in split["queries"]["id"]]
    return list(split["queries"]["text"]), titled(split["corpus"]), list(split["corpus"]["id"]), judgements


def titled(corpus):
    """The passages of an mteb corpus as they are embedded: title and text in one."""
    titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
    return [f"{title} {text}".strip() for title, text in zip(titles, corpus["text"], strict=True)]


# ---------------------------------------------------------------- models


def vector_identity(folder, max_length, precision):
    """Everything that changes the vectors of a model folder."""
    return {"model": fingerprint(folder), "max_length": max_length, "precision": precision}


def token_identity(folder, max_length):
    """Everything that changes the token ids of a model folder: the same for a model and its fine-tuned one.

    All files beside the weights, whether they say anything about tokens or not: training copies them all.
    (LENGTH_FILE it may change; `max_length` stands in its place.)
    """
    files = {name: sha256_once(Path(folder) / name) for name in companions(folder) if name != LENGTH_FILE}
    return {"files": files, "max_length": max_length}


def in_precision(encoder, precision, device):
    """An Encoder ready to encode: for "fp16" and "bf16" its weights are in half precision (not autocast)."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    return encoder.to(device=device, dtype=dtype).eval()


def load_for_encoding(folder, max_length, precision, device):
    return in_precision(Encoder(folder, max_length), precision, device)


def stored_encoder(folder, store, max_length=512, precision="fp32", device="cpu", **sizes):
    """The StoredEncoder of a model folder."""
    return StoredEncoder(
        lambda: load_for_encoding(folder, max_length, precision, device),
        vector_identity(folder, max_length, precision),
        store,
        tokens=token_identity(folder, max_length),
        **sizes,
    )


def mixed(base, tuned, alpha, max_length):
    """The Encoder (1 − alpha) · base + alpha · tuned of two model folders, on the CPU in fp32.

    Computed as `finetune.mix` does, but in place, so that there are two models in memory and not three.
    Raises TutorialError where the two do not have the same weights.
    """
    model, other = Encoder(base, max_length), Encoder(tuned, max_length)
    weights, others = model.state_dict(), other.state_dict()
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in others.items()}:
        raise TutorialError(
            f"{relative(base)} and {relative(tuned)} do not have the same weights, so nothing lies "
            "between them. Take the model that the other one was trained from."
        )
    for name, w in weights.items():
        if w.is_floating_point():
            w.mul_(1 - alpha).add_(others[name].mul_(alpha))
    return model


def stored_mixture(base, tuned, alpha, store, max_length=512, precision="fp32", device="cpu", **sizes):
    """The StoredEncoder of (1 − alpha) · base + alpha · tuned, of two model folders."""
    ends = [vector_identity(folder, max_length, precision) for folder in (base, tuned)]
    return StoredEncoder(
        lambda: in_precision(mixed(base, tuned, alpha, max_length), precision, device),
        {"alpha": alpha, "between": ends},
        store,
        tokens=token_identity(base, max_length),
        **sizes,
    )


def release(*encoders):
    """Drop the loaded models of StoredEncoders and give cached GPU memory back."""
    for encoder in encoders:
        encoder.encoder = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- search and scores


class EmbedSearch:
    """mteb's SearchProtocol on a StoredEncoder. Scoring, caching and metrics stay mteb's."""

    def __init__(self, encoder, meta, device="cpu"):
        self.encoder, self.mteb_model_meta, self.device = encoder, meta, device

    def index(self, corpus, *, hf_subset, **kwargs):
        """Encode the passages (title and text joined as mteb joins them)."""
        self.ids = np.array(corpus["id"], dtype=object)
        self.passages = self.encoder(titled(corpus), f"passages ({hf_subset})")

    def search(self, queries, *, hf_subset, top_k, **kwargs):
        """{query id: {passage id: score}} with the `top_k` best passages of each query."""
        q = self.encoder(list(queries["text"]), f"queries ({hf_subset})")
        best = best_passages(q, self.passages, top_k, device=self.device)
        found = tqdm(best, total=len(q), desc="search", file=sys.stdout, delay=2)
        results = {
            query: dict(zip(self.ids[index], values.tolist(), strict=True))
            for query, (values, index) in zip(queries["id"], found, strict=True)
        }
        self.passages = self.ids = None  # scoring, which comes next, needs the memory and not the vectors
        return results


def score_identity(identity, task):
    """The revision under which mteb files the scores: the vectors' identity and the data's, hashed."""
    everything = {**identity, "task": task.metadata.name, "data": dict(task.metadata.dataset)}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def move_corrupt_aside(path):
    """Rename a result file that is no valid JSON to `*.corrupt`: mteb would stop without its name."""
    if path.exists():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            path.replace(path.with_suffix(".corrupt"))
            aside = f"{path.stem}.corrupt"
            print(f"{relative(path)} was no valid JSON ({error}): moved to {aside}, evaluating again.")


def evaluate_retrieval(name, task, identity, encoder, store, device="cpu"):
    """Run `task` through mteb.evaluate; returns its TaskResult. A cached score does not even load the model.

    name: shown and filed as local/<name>. identity: `vector_identity` of the model. encoder: StoredEncoder.
    """
    revision = score_identity(identity, task)
    path = Path(store) / "results" / f"local__{name}" / revision / f"{task.metadata.name}.json"
    move_corrupt_aside(path)
    cached, start = path.exists(), time.perf_counter()
    meta = ModelMeta.create_empty(
        overwrites={"name": f"local/{name}", "revision": revision, "modalities": ["text"]}
    )
    meta = meta.model_copy(update={"loader": lambda *args, **kwargs: EmbedSearch(encoder, meta, device)})
    # Where the score is known, nothing is written: then the folder may be read-only, or another process's.
    with contextlib.nullcontext() if cached else only_process(path.parent):
        # An absolute path: mteb resolves the cache folder against a working directory of its own.
        mteb.evaluate(
            meta,
            task,
            cache=mteb.ResultCache(Path(store).absolute()),
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"show_progress_bar": False},
        )
    how = "read from the cache" if cached else "evaluated"
    print(f"{name}: {task.metadata.name} {how} in {time.perf_counter() - start:.1f} s")
    return TaskResult.from_disk(path)  # as filed, rounded: the same now and from the cache


METRICS = {"nDCG": "ndcg", "MAP": "map", "Recall": "recall", "Precision": "precision", "MRR": "mrr"}


def metric_table(result, subset, cutoffs=(1, 3, 5, 10)):
    """{metric: {cut-off: score}} of one language subset of a TaskResult."""
    scores = next(s for s in result.scores["dev"] if s["hf_subset"] == subset)
    return {label: {k: scores[f"{key}_at_{k}"] for k in cutoffs} for label, key in METRICS.items()}


def code_ranks(encoder, pairs, passages):
    """Ranks (n,) of each pair's best code among `passages`, with any callable texts → vectors."""
    place = {text: i for i, text in enumerate(passages)}
    similarity = encoder([pair["query"] for pair in pairs], "queries (code)") @ encoder(passages, "codes").T
    right = [[place[text] for text in answers_of(pair)] for pair in pairs]
    return rank_of_positive(*best_answers(similarity, right))


# ---------------------------------------------------------------- what notebook 02 calls


# What a CPU can do of the full test, and characters between two saves there: minutes of work for BGE-M3.
CPU_SUBSET, CPU_SHARD = (50, 200), 50_000


def default_subset(profile, device):
    """(queries, further passages) for `subset_task`: the full profile on a CPU. None is the whole test."""
    return CPU_SUBSET if profile.name == "full" and device == "cpu" else None


def settings_of(profile, device, store):
    """The settings of `stored_encoder` that profile and device decide."""
    largest = CPU_SHARD if device == "cpu" else profile.shard_characters
    return {
        "store": store,
        "max_length": profile.retrieval_length,
        "precision": profiles.encoding_precision(profile, device),
        "device": device,
        "token_budget": profile.encode_budget,
        "shard_characters": min(profile.shard_characters, largest),
    }


def require_models(folders):
    """Raise TutorialError where notebook 01 has not left a model. folders: {name: path}."""
    for name, folder in folders.items():
        if not Path(folder).is_dir():
            raise TutorialError(
                f"{relative(folder)} is missing, the {name} model. "
                "Run 01-train_embedding_with_validation.ipynb first (or `make run`)."
            )


def evaluate_model(name, folder, task, profile, device, store):
    """Run `task` through mteb for a model folder, and drop the model again; returns its TaskResult."""
    settings = settings_of(profile, device, store)
    identity = vector_identity(folder, settings["max_length"], settings["precision"])
    encoder = stored_encoder(folder, **settings)
    try:
        return evaluate_retrieval(f"{profile.label}-{name}", task, identity, encoder, store, device)
    finally:
        release(encoder)


def name_given_by_mteb(folder):
    """(name, revision) under which mteb itself files the scores of a model from a local folder."""
    from sentence_transformers import SentenceTransformer

    # As mteb.evaluate(model, …) does: given the path alone, the wrapper would take the path for the name.
    model = SentenceTransformer(str(folder), device="cpu")
    with warnings.catch_warnings():  # mteb 2.26 calls an older name of a method of sentence-transformers 6
        warnings.simplefilter("ignore")
        meta = mteb.SentenceTransformerEncoderWrapper(model).mteb_model_meta
    return meta.name, meta.revision


def mixtures(base, tuned, alphas, settings, known=None):
    """Yield (alpha, StoredEncoder) of (1 − alpha) · base + alpha · tuned; both arguments are model folders.

    known: {alpha: folder} of mixtures that are a model folder already. Their vectors are that model's, as at
    0 and 1 they are the ends'. Any other mixture is only computed where vectors of it are missing. One model
    is in memory at a time: it is dropped when the next one is asked for.
    """
    folders = {0: base, 1: tuned, **(known or {})}
    for alpha in alphas:
        if alpha in folders:
            encoder = stored_encoder(folders[alpha], **settings)
        else:
            encoder = stored_mixture(base, tuned, alpha, **settings)
        try:
            yield alpha, encoder
        finally:
            release(encoder)
