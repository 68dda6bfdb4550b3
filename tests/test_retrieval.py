"""Retrieval evaluation: the same vectors and scores as the libraries', and never another model's."""

import dataclasses
import gc
import json
import random
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import encode_worker
import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from encode_worker import same_scores
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.similarity_functions import dot_score
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from embedding_tutorial import assets, pocket_task, profiles, retrieval, store
from embedding_tutorial.encoder import Encoder, save_model
from embedding_tutorial.evaluation import grades_found, ndcg
from embedding_tutorial.files import TutorialError
from embedding_tutorial.finetune import mix
from embedding_tutorial.pocket_task import PocketT2
from embedding_tutorial.profiles import PROFILES
from embedding_tutorial.retrieval import (
    EmbedSearch,
    code_ranks,
    evaluate_retrieval,
    metric_table,
    release,
    retrieval_task,
    stored_encoder,
    subset_task,
    vector_identity,
)
from embedding_tutorial.store import StoredEncoder

pytestmark = pytest.mark.usefixtures("no_network")
# ---------------------------------------------------------------- vectors on disk


ROOT = Path(__file__).resolve().parents[1]


QUIET = {"co2_tracker": False, "show_progress_bar": False, "encode_kwargs": {"show_progress_bar": False}}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder like data/pocket_t2 with 15 queries of each language, their judged passages and some more."""
    return write_small_data(tmp_path_factory.mktemp("data") / "small")


def write_small_data(folder, queries=15, more=40):
    for language in pocket_task.LANGUAGES:
        rows = {
            name: [json.loads(line) for line in open(pocket_task.DATA / language / name, encoding="utf-8")]
            for name in pocket_task.FILES
        }
        rows["queries.jsonl"] = rows["queries.jsonl"][:queries]
        kept = {row["_id"] for row in rows["queries.jsonl"]}
        rows["qrels.jsonl"] = [row for row in rows["qrels.jsonl"] if row["query-id"] in kept]
        judged = {row["corpus-id"] for row in rows["qrels.jsonl"]}
        rest = [row["_id"] for row in rows["corpus.jsonl"] if row["_id"] not in judged][:more]
        rows["corpus.jsonl"] = [row for row in rows["corpus.jsonl"] if row["_id"] in judged | set(rest)]
        for name, lines in rows.items():
            write_lines(folder / language / name, lines)
    return folder


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def retrained(folder, target, seed=1, size=0.5):
    """A copy of a model folder with noise on its weights; `target` may be the folder itself."""
    if folder != target:
        shutil.copytree(folder, target)
    if not (target / "model.safetensors").exists():
        weights = torch.load(target / "pytorch_model.bin", weights_only=True)
        (target / "pytorch_model.bin").unlink()
    else:
        weights = load_file(target / "model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    noisy = {
        name: w + size * w.std(correction=0) * torch.randn(w.shape, generator=draw)
        if w.is_floating_point()
        else w
        for name, w in weights.items()
    }
    save_file(noisy, target / "model.safetensors", metadata={"format": "pt"})
    return target


def evaluate(folder, store, task, name="model", max_length=64, precision="fp32"):
    """{subset: {metric: score}} of a model folder, as filed: mteb rounds to 6 decimals when it writes."""
    encoder = stored_encoder(folder, store, max_length, precision)
    identity = vector_identity(folder, max_length, precision)
    return filed(evaluate_retrieval(name, task, identity, encoder, store))


def by_subset(result):
    return {scores["hf_subset"]: scores for scores in result.scores["dev"]}


def filed(result):
    return {
        subset: {m: round(x, 6) if isinstance(x, float) else x for m, x in scores.items()}
        for subset, scores in by_subset(result).items()
    }


def no_model():
    raise AssertionError("the model was loaded")


class Handed(AbsEncoder):
    """An mteb encoder that hands out the vectors of a StoredEncoder; search and scoring are mteb's own."""

    def __init__(self, encoder):
        self.encoder = encoder
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "local/handed", "revision": "1", "modalities": ["text"]}
        )

    def encode(self, inputs, **kwargs):
        return self.encoder([text for batch in inputs for text in batch["text"]])

    def similarity(self, a, b):
        return dot_score(a, b)  # of vectors of length 1


# ---------------------------------------------------------------- vectors


def test_release_drops_the_model(tiny_bert, passages, tmp_path):
    encoder = stored_encoder(tiny_bert, tmp_path, 64)
    encoder(passages[:3])
    assert encoder.encoder is not None
    release(encoder)
    assert encoder.encoder is None


# ---------------------------------------------------------------- kill -9


def test_kill_9_costs_at_most_one_shard(tiny_bert, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the worker does
    try:
        expected = encode_worker.evaluate(tiny_bert, tmp_path / "whole")
        shards = encode_worker.complete_shards(tmp_path / "whole")
        folder, done = tmp_path / "killed", 0
        # The second one continues what the first one left, and is killed as well: both among the English
        # passages, two thirds of all shards.
        kills = [str(random.SystemRandom().randrange(1, len(shards) // 3)) for _ in range(2)]
        command = [
            sys.executable,
            str(ROOT / "tests" / "encode_worker.py"),
            str(tiny_bert),
            str(folder),
            *kills,
        ]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split("killed ")[
            1:
        ]
        assert len(said) == 2
        for begun, left in (map(int, text.split()) for text in said):
            assert begun - 1 <= left - done <= begun
            done = left
        assert len(encode_worker.complete_shards(folder)) == done
        assert all(shards[name] == data for name, data in encode_worker.complete_shards(folder).items())
        counted, embed = [], store.embed
        monkeypatch.setattr(store, "embed", lambda *args: counted.append(1) or embed(*args))
        scores = encode_worker.evaluate(tiny_bert, folder)
    finally:
        torch.set_num_threads(threads)
    assert len(counted) == len(shards) - done
    assert encode_worker.complete_shards(folder) == shards
    assert same_scores(scores, expected)
    assert not list(folder.rglob(".*.tmp"))


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("top_k", [20, 1000])
def test_search_returns_what_mtebs_own_search_returns(tiny_bert, small_data, tmp_path, top_k):
    task = PocketT2(small_data)
    task.load_data()
    split = task.dataset["en"]["dev"]
    encoder = stored_encoder(tiny_bert, tmp_path, 64)
    where = {"task_metadata": task.metadata, "hf_split": "dev", "hf_subset": "en", "encode_kwargs": {}}
    found = []
    for search in (EmbedSearch(encoder, None), SearchEncoderWrapper(Handed(encoder), corpus_chunk_size=50)):
        search.index(split["corpus"], **where)
        found.append(search.search(split["queries"], top_k=top_k, **where))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for query in ours:
        assert ours[query].keys() == theirs[query].keys()
        assert len(ours[query]) == min(top_k, len(split["corpus"]))
        assert ours[query] == pytest.approx(theirs[query], abs=1e-6)
        assert list(ours[query].values()) == sorted(ours[query].values(), reverse=True)
        assert all(type(score) is float for score in ours[query].values())


def test_titles_are_joined_as_mteb_joins_them(tiny_bert, tmp_path):
    corpus = Dataset.from_list(
        [
            {"id": "a", "title": "A title", "text": "and a text"},
            {"id": "b", "title": "", "text": " no title "},
            {"id": "c", "title": " spaces ", "text": ""},
        ]
    )
    seen = []
    where = {"task_metadata": PocketT2().metadata, "hf_split": "dev", "hf_subset": "en"}
    ours = EmbedSearch(lambda texts, label: seen.append(texts) or np.zeros((len(texts), 2)), None)
    ours.index(corpus, **where)
    plain = EmbedSearch(lambda texts, label: seen.append(texts) or np.zeros((len(texts), 2)), None)
    plain.index(corpus.remove_columns("title"), **where)
    theirs = mteb_texts(corpus, where["task_metadata"])
    assert seen[0] == theirs
    assert seen[1] == mteb_texts(corpus.remove_columns("title"), where["task_metadata"])


def mteb_texts(corpus, metadata):
    from mteb._create_dataloaders import create_dataloader
    from mteb.types import PromptType

    loader = create_dataloader(corpus, task_metadata=metadata, prompt_type=PromptType.document, batch_size=2)
    return [text for batch in loader for text in batch["text"]]


@pytest.mark.parametrize("model", ["tiny_bert", "minilm"])
def test_scores_are_mtebs_to_the_last_digit(request, small_data, tmp_path, model):
    folder = request.getfixturevalue(model)
    data = {} if model == "tiny_bert" else {"data_dir": small_data}
    encoder = stored_encoder(folder, tmp_path, 128)
    searches = EmbedSearch(encoder, Handed(encoder).mteb_model_meta), Handed(encoder)
    ours, theirs = (mteb.evaluate(search, PocketT2(**data), cache=None, **QUIET)[0] for search in searches)
    assert len(by_subset(ours)["en"]) > 100
    assert same_scores(by_subset(ours), by_subset(theirs))
    assert same_scores(evaluate(folder, tmp_path, PocketT2(**data), max_length=128), filed(theirs))
    if model == "minilm":  # and those of sentence-transformers in fp32, encoding for itself
        reference = SentenceTransformer(str(folder), device="cpu")
        reference.max_seq_length = 128
        plain = by_subset(mteb.evaluate(reference, PocketT2(**data), cache=None, **QUIET)[0])
        for language, scores in by_subset(ours).items():
            assert abs(scores["ndcg_at_10"] - plain[language]["ndcg_at_10"]) <= 0.0005
        assert plain["en"]["ndcg_at_10"] > 0.5


# ---------------------------------------------------------------- whose scores are these?


def two_models(tiny_bert, small_data, folder):
    """Two folders of the same name, the second with other weights."""
    first = shutil.copytree(tiny_bert, folder / "a" / "model")
    return {"folder": first}, {"folder": retrained(tiny_bert, folder / "b" / "model")}


def retrained_in_place(tiny_bert, small_data, folder):
    first = shutil.copytree(tiny_bert, folder / "model")
    return {"folder": first}, {"folder": lambda: retrained(first, first)}


def other_pooling(tiny_bert, small_data, folder):
    first = shutil.copytree(tiny_bert, folder / "model")

    def change():
        path = first / "1_Pooling" / "config.json"
        modes = json.loads(path.read_text())
        modes |= {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        path.write_text(json.dumps(modes))
        return first

    return {"folder": first}, {"folder": change}


def other_length(tiny_bert, small_data, folder):
    return {"folder": tiny_bert}, {"folder": tiny_bert, "max_length": 12}


def other_precision(tiny_bert, small_data, folder):
    return {"folder": tiny_bert}, {"folder": tiny_bert, "precision": "bf16"}


def other_data(tiny_bert, small_data, folder):
    edited = shutil.copytree(small_data, folder / "edited")
    path = edited / "en" / "corpus.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows[::2]:
        row["text"] = row["text"][::-1]
    write_lines(path, rows)
    return {"folder": tiny_bert}, {"folder": tiny_bert, "task": PocketT2(edited)}


def data_edited_in_place(tiny_bert, small_data, folder):
    edited = shutil.copytree(small_data, folder / "edited")

    def change():
        path = edited / "en" / "qrels.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows[::2]:
            row["score"] = 3 - row["score"] or 1
        write_lines(path, rows)
        return PocketT2(edited)

    return {"folder": tiny_bert, "task": PocketT2(edited)}, {"folder": tiny_bert, "task": change}


def subset_of_the_data(tiny_bert, small_data, folder):
    task = PocketT2(small_data)
    task.load_data()
    return {"folder": tiny_bert}, {"folder": tiny_bert, "task": subset_task(task, 5, 10)}


CHANGES = [
    two_models,
    retrained_in_place,
    other_pooling,
    other_length,
    other_precision,
    other_data,
    data_edited_in_place,
    subset_of_the_data,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_scores_are_never_stale_or_crossed(tiny_bert, small_data, tmp_path, change):
    first, second = change(tiny_bert, small_data, tmp_path)
    store = tmp_path / "store"
    before = evaluate(**{"task": PocketT2(small_data), **first}, store=store)
    second = {name: value() if callable(value) else value for name, value in second.items()}
    second = {"task": PocketT2(small_data), **second}
    after = evaluate(**second, store=store)
    truth = evaluate(**second, store=tmp_path / "fresh")
    assert same_scores(after, truth)
    assert not same_scores(after, before)
    assert same_scores(evaluate(**second, store=store), truth)  # and from the cache once more


def test_base_and_fine_tuned_in_one_process(tiny_bert, small_data, tmp_path):
    """Both under one name, turn and turn about, the tuned one saved by this project's own code."""
    tuned = Encoder(tiny_bert, 64)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.3 * weight.std(correction=0) * torch.randn_like(weight)
    save_model(tuned, tmp_path / "tuned")
    folders, task = (tiny_bert, tmp_path / "tuned"), PocketT2(small_data)
    truth = [evaluate(folder, tmp_path / f"fresh-{n}", task) for n, folder in enumerate(folders)]
    assert not same_scores(*truth)
    for _ in range(2):
        for folder, expected in zip(folders, truth, strict=True):
            assert same_scores(evaluate(folder, tmp_path / "store", task), expected)


def test_plain_mteb_would_have_crossed_them(tiny_bert, small_data, tmp_path):
    """mteb names every local model alike: the second is handed the first one's scores."""
    second = retrained(tiny_bert, tmp_path / "other", size=3.0)
    cache = mteb.ResultCache(tmp_path / "mteb")
    found = []
    for folder in (tiny_bert, second):
        model = SentenceTransformer(str(folder), device="cpu")
        found.append(filed(mteb.evaluate(model, PocketT2(small_data), cache=cache, **QUIET)[0]))
    truth = filed(mteb.evaluate(model, PocketT2(small_data), cache=None, **QUIET)[0])
    assert [path.name for path in (tmp_path / "mteb" / "results").iterdir() if path.is_dir()] == [
        "no_model_name__available"
    ]
    assert same_scores(found[0], found[1]) and not same_scores(found[1], truth)
    ours = [
        evaluate(folder, tmp_path / "store", PocketT2(small_data), max_length=512)
        for folder in (tiny_bert, second)
    ]
    for scores, right in zip(ours, (found[0], truth), strict=True):
        assert scores["en"]["ndcg_at_10"] == pytest.approx(right["en"]["ndcg_at_10"], abs=0.0005)


def test_a_second_run_reads_the_cache_and_loads_nothing(tiny_bert, small_data, tmp_path, capsys):
    first = evaluate(tiny_bert, tmp_path, PocketT2(small_data))
    shutil.rmtree(tmp_path / "vectors")  # the scores alone are enough
    identity = vector_identity(tiny_bert, 64, "fp32")
    start = time.perf_counter()
    encoder = StoredEncoder(no_model, identity, tmp_path)
    again = filed(evaluate_retrieval("model", PocketT2(small_data), identity, encoder, tmp_path))
    assert time.perf_counter() - start < 2
    assert same_scores(again, first)
    assert "evaluated in" in (said := capsys.readouterr().out) and "read from the cache in" in said


def test_scores_are_the_same_at_once_and_from_the_cache(tiny_bert, small_data, tmp_path):
    """mteb returns all digits the first time and 6 decimals from the cache: ours must not differ."""
    identity = vector_identity(tiny_bert, 64, "fp32")
    results = [
        evaluate_retrieval("model", PocketT2(small_data), identity, encoder, tmp_path)
        for encoder in (stored_encoder(tiny_bert, tmp_path, 64), StoredEncoder(no_model, identity, tmp_path))
    ]
    assert same_scores(*map(by_subset, results))


@pytest.mark.parametrize("content", ["half of it", b"", b"\xff\xfe not JSON", b"[1, 2"])
def test_a_corrupt_score_file_is_named_moved_and_replaced(tiny_bert, small_data, tmp_path, capsys, content):
    first = evaluate(tiny_bert, tmp_path, PocketT2(small_data))
    (path,) = tmp_path.glob("results/*/*/PocketT2Retrieval.json")
    whole = path.read_bytes()
    broken = whole[: len(whole) // 2] if content == "half of it" else content
    path.write_bytes(broken)
    capsys.readouterr()
    assert same_scores(evaluate(tiny_bert, tmp_path, PocketT2(small_data)), first)
    said = capsys.readouterr().out
    assert f"{path.parent.name}/PocketT2Retrieval.json" in said and "PocketT2Retrieval.corrupt" in said
    assert path.with_suffix(".corrupt").read_bytes() == broken
    assert json.loads(path.read_bytes())["scores"] == json.loads(whole)["scores"]


@pytest.mark.parametrize("name", ["model_meta.json", "run_settings.jsonl"])
def test_other_corrupt_files_of_the_cache_do_no_harm(tiny_bert, small_data, tmp_path, name):
    first = evaluate(tiny_bert, tmp_path, PocketT2(small_data))
    (path,) = tmp_path.glob(f"results/*/*/{name}")
    path.write_bytes(path.read_bytes()[:20])
    assert same_scores(evaluate(tiny_bert, tmp_path, PocketT2(small_data)), first)
    (scores,) = tmp_path.glob("results/*/*/PocketT2Retrieval.json")
    scores.unlink()
    assert same_scores(evaluate(tiny_bert, tmp_path, PocketT2(small_data)), first)


def test_an_evaluation_with_one_language_missing_is_completed(tiny_bert, small_data, tmp_path):
    first = evaluate(tiny_bert, tmp_path, PocketT2(small_data))
    (path,) = tmp_path.glob("results/*/*/PocketT2Retrieval.json")
    result = json.loads(path.read_text())
    result["scores"]["dev"] = [scores for scores in result["scores"]["dev"] if scores["hf_subset"] == "en"]
    path.write_text(json.dumps(result))
    again = evaluate(tiny_bert, tmp_path, PocketT2(small_data))
    assert again["zh"]["ndcg_at_10"] == first["zh"]["ndcg_at_10"] and again.keys() == first.keys()


# ---------------------------------------------------------------- T2Retrieval


T2_README = """---
configs:
- config_name: corpus
  data_files:
  - split: dev
    path: corpus/dev-*
- config_name: default
  data_files:
  - split: dev
    path: data/dev-*
- config_name: queries
  data_files:
  - split: dev
    path: queries/dev-*
---
"""


@pytest.fixture
def t2_folder(tmp_path, monkeypatch):
    """A tiny T2Retrieval in the published layout, where retrieval_task finds it."""
    corpus, queries, relevant = pocket_task.read_language(pocket_task.DATA / "zh")
    folder = tmp_path / "data" / "T2Retrieval"
    write_t2(folder, corpus[:120], queries, relevant)
    monkeypatch.setattr(retrieval, "t2retrieval_source", lambda: assets.t2retrieval_source(tmp_path / "data"))
    return folder


def write_t2(folder, corpus, queries, relevant):
    ids = {row["id"] for row in corpus}
    judgements = [
        {"query-id": query, "corpus-id": passage, "score": grade}
        for query, judged in relevant.items()
        for passage, grade in judged.items()
        if passage in ids and grade > 0
    ]
    parts = {
        "corpus": [{"_id": r["id"], "title": r["title"], "text": r["text"]} for r in corpus],
        "queries": [{"_id": r["id"], "text": r["text"]} for r in queries],
        "data": judgements,
    }
    for name, rows in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(folder / name / "dev-00000-of-00001.parquet")
    (folder / "README.md").write_text(T2_README, encoding="utf-8")


def test_t2_from_a_local_folder(tiny_m3, t2_folder, tmp_path):
    """Base, then tuned, with one task that nobody has loaded; then other data in the same place."""
    tuned = retrained(tiny_m3, tmp_path / "tuned")
    task = retrieval_task("T2Retrieval")
    found = {}
    for name, folder in (("base", tiny_m3), ("tuned", tuned)):
        found[name] = evaluate(folder, tmp_path / "store", task, name)["default"]
        encoder = stored_encoder(folder, tmp_path / "store", 64)
        theirs = mteb.evaluate(Handed(encoder), retrieval_task("T2Retrieval"), cache=None, **QUIET)[0]
        assert same_scores({"default": found[name]}, filed(theirs))
    assert found["base"]["ndcg_at_10"] > 0 and not same_scores({"": found["base"]}, {"": found["tuned"]})
    assert mteb.get_task("T2Retrieval").metadata.dataset["path"] == "mteb/T2Retrieval"  # others' is as it was
    results = sorted(tmp_path.glob("store/results/*/*/T2Retrieval.json"))
    revisions = {json.loads(path.read_text())["dataset_revision"] for path in results}
    assert len(results) == 2 and revisions == {retrieval.folder_fingerprint(t2_folder)}

    corpus, queries, relevant = pocket_task.read_language(pocket_task.DATA / "zh")
    write_t2(t2_folder, corpus[:60], queries, relevant)
    changed = evaluate(tiny_m3, tmp_path / "store", retrieval_task("T2Retrieval"), "base")["default"]
    assert not same_scores({"": changed}, {"": found["base"]})


def test_t2_subset(tiny_m3, t2_folder, tmp_path):
    task = retrieval_task("T2Retrieval")
    task.load_data()
    small = subset_task(task, 8, 20)
    assert small.metadata.name == "T2Retrieval-subset-8q-20d"
    assert len(small.dataset["default"]["dev"]["queries"]) == 8
    scores = [evaluate(tiny_m3, tmp_path / "store", small)["default"] for _ in range(2)]
    assert same_scores({"": scores[0]}, {"": scores[1]})
    assert list(tmp_path.glob("store/results/*/*/T2Retrieval-subset-8q-20d.json"))


def test_t2_offline_and_absent_is_one_clear_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "t2retrieval_source", lambda: assets.t2retrieval_source(tmp_path / "data"))
    start = time.monotonic()
    with pytest.raises(
        TutorialError, match="hf download mteb/T2Retrieval --repo-type dataset --revision cf77"
    ):
        retrieval_task("T2Retrieval")
    assert time.monotonic() - start < 5


def test_t2_folder_cut_short_is_refused(t2_folder):
    corpus = t2_folder / "corpus" / "dev-00000-of-00001.parquet"
    corpus.write_bytes(corpus.read_bytes()[:500])
    with pytest.raises(TutorialError, match="is cut short at 500 bytes(.|\n)*hf download mteb/T2Retrieval"):
        retrieval_task("T2Retrieval")


# ---------------------------------------------------------------- a part of a task


def test_subset_is_deterministic_and_keeps_what_was_judged():
    task = PocketT2()
    task.load_data()
    small, again = subset_task(task, 10, 25), subset_task(task, 10, 25)
    assert small.metadata.name == again.metadata.name == "PocketT2Retrieval-subset-10q-25d"
    assert task.metadata.name == PocketT2.metadata.name == "PocketT2Retrieval"
    for language in ("en", "zh"):
        whole, part, twin = (t.dataset[language]["dev"] for t in (task, small, again))
        queries, passages = list(part["queries"]["id"]), list(part["corpus"]["id"])
        judged = {passage for query in queries for passage in whole["relevant_docs"][query]}
        assert len(queries) == 10 and set(part["relevant_docs"]) == set(queries)
        assert judged <= set(passages) and len(passages) == len(judged) + 25
        assert all(part["relevant_docs"][query] == whole["relevant_docs"][query] for query in queries)
        assert passages == list(twin["corpus"]["id"]) and queries == list(twin["queries"]["id"])
        more = subset_task(task, 20, 25).dataset[language]["dev"]
        assert set(queries) < set(more["queries"]["id"])  # a larger subset holds the smaller one's queries


def test_a_whole_task_as_subset_scores_the_same(tiny_bert, small_data, tmp_path):
    task = PocketT2(small_data)
    task.load_data()
    whole = evaluate(tiny_bert, tmp_path, task)
    everything = evaluate(tiny_bert, tmp_path, subset_task(task, 10_000, 10_000))
    assert same_scores(whole, everything)


def test_a_subset_stays_a_subset_for_the_next_model(tiny_bert, small_data, tmp_path):
    task = PocketT2(small_data)
    task.load_data()
    small = subset_task(task, 5, 10)
    other = retrained(tiny_bert, tmp_path / "other")
    evaluate(tiny_bert, tmp_path / "store", small)
    second = evaluate(other, tmp_path / "store", small)
    assert small.metadata.name == "PocketT2Retrieval-subset-5q-10d"
    assert same_scores(second, evaluate(other, tmp_path / "fresh", subset_task(task, 5, 10)))


# ---------------------------------------------------------------- tables


def test_code_ranks():
    vectors = {
        "q1": [1, 0, 0], "q2": [0, 1, 0], "q3": [0.6, 0.8, 0],
        "a": [1, 0, 0], "b": [0.6, 0.8, 0], "c": [0, 0, 1],
    }  # fmt: skip
    pairs = [{"query": q, "pos_doc": code} for q, code in (("q1", "a"), ("q2", "a"), ("q3", "c"))]
    seen = []

    def encoder(texts, label):
        seen.append(label)
        return np.array([vectors[text] for text in texts], dtype=np.float32)

    # q2: b first, then a and c with 0 each: a tie counts against the model.
    assert code_ranks(encoder, pairs, ["c", "b", "a"]).tolist() == [1, 3, 3]
    assert seen == ["queries (code)", "codes"]
    with pytest.raises(KeyError):
        code_ranks(encoder, pairs, ["b", "c"])


def test_metric_table_holds_mtebs_figures(tiny_bert, small_data, tmp_path):
    encoder = stored_encoder(tiny_bert, tmp_path, 64)
    identity = vector_identity(tiny_bert, 64, "fp32")
    result = evaluate_retrieval("model", PocketT2(small_data), identity, encoder, tmp_path)
    main = [metric_table(result, subset)["nDCG"][10] for subset in ("en", "zh")]
    assert result.get_score() == pytest.approx(np.mean(main))
    for language, scores in by_subset(result).items():
        table = metric_table(result, language)
        assert list(table) == ["nDCG", "MAP", "Recall", "Precision", "MRR"]
        for label, key in retrieval.METRICS.items():
            assert table[label] == {k: scores[f"{key}_at_{k}"] for k in (1, 3, 5, 10)}
        assert metric_table(result, language, (20,))["MRR"] == {20: scores["mrr_at_20"]}
    with pytest.raises(StopIteration):
        metric_table(result, "fr")


# ---------------------------------------------------------------- what notebook 02 calls


def settings(folder, **changes):
    """What a pocket profile with short texts decides."""
    profile = dataclasses.replace(PROFILES["pocket"], retrieval_length=64, **changes)
    return profile, retrieval.settings_of(profile, "cpu", folder)


def test_settings_are_what_the_profile_says(tmp_path):
    for profile in PROFILES.values():
        for device in ("cpu", "cuda"):
            found = retrieval.settings_of(profile, device, tmp_path)
            encoder = StoredEncoder(no_model, {}, tmp_path, found["token_budget"], found["shard_characters"])
            assert encoder.token_budget == profile.encode_budget
            assert found["max_length"] == profile.retrieval_length and found["device"] == device
            assert found["precision"] == profiles.encoding_precision(profile, device)
            if device == "cuda":
                assert encoder.shard_characters == profile.shard_characters
    for profile in PROFILES.values():  # a kill on a CPU costs minutes, not hours
        assert retrieval.settings_of(profile, "cpu", tmp_path)["shard_characters"] == 50_000


def test_the_precision_is_decided_with_the_device_and_filed(tiny_bert, small_data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(profiles, "encoding_precision", lambda *args: asked.append(args) or "bf16")
    profile, _ = settings(tmp_path, encode_precision="auto")
    retrieval.evaluate_model("base", tiny_bert, PocketT2(small_data), profile, "cpu", tmp_path)
    assert set(asked) == {(profile, "cpu")}
    identities = [json.loads(path.read_text()) for path in tmp_path.glob("vectors/*/identity.json")]
    assert identities == [vector_identity(tiny_bert, 64, "bf16")]
    assert evaluate(tiny_bert, tmp_path, PocketT2(small_data), precision="bf16")
    assert len(list(tmp_path.glob("vectors/*"))) == 1


def test_a_cpu_takes_a_part_of_the_full_test():
    full, pocket = PROFILES["full"], PROFILES["pocket"]
    assert retrieval.default_subset(full, "cpu") == (50, 200)
    assert retrieval.default_subset(full, "cuda") is None
    assert [retrieval.default_subset(pocket, device) for device in ("cpu", "cuda", "mps")] == [None] * 3


def test_our_own_metrics_on_our_own_search_are_mtebs(minilm, small_data, tmp_path):
    """What the notebook computes in the open, query by query, is the score that mteb files."""
    task = PocketT2(small_data)
    profile, how = settings(tmp_path)
    result = retrieval.evaluate_model("base", minilm, task, profile, "cpu", tmp_path)
    task.load_data()
    encoder = stored_encoder(minilm, **how)
    for language in ("en", "zh"):
        queries, passages, ids, judgements = retrieval.split_of(task, language)
        split = task.dataset[language]["dev"]
        assert ids == list(split["corpus"]["id"]) and len(passages) == len(ids) and passages[0]
        assert judgements == [split["relevant_docs"][query] for query in split["queries"]["id"]]
        found = grades_found(encoder(queries), encoder(passages), ids, judgements)
        ours = np.mean([ndcg(f, list(j.values())) for f, j in zip(found, judgements, strict=True)])
        assert ours == pytest.approx(metric_table(result, language)["nDCG"][10], abs=1e-5)
    assert list(tmp_path.glob(f"results/local__{profile.label}-base/*/PocketT2Retrieval.json"))


def test_a_missing_model_is_named_with_the_remedy(tmp_path):
    (tmp_path / "here").mkdir()
    retrieval.require_models({"base": tmp_path / "here"})
    with pytest.raises(TutorialError, match=r"run/merged is missing, the merged model. Run 01-train_emb"):
        retrieval.require_models({"base": tmp_path / "here", "merged": tmp_path / "run" / "merged"})


def test_mteb_names_two_local_models_alike(tiny_bert, tiny_m3):
    name, revision = retrieval.name_given_by_mteb(tiny_bert)
    assert retrieval.name_given_by_mteb(tiny_m3) == (name, revision)
    assert name == "no_model_name/available"  # as test_plain_mteb_would_have_crossed_them finds it on disk


def test_mixtures_are_encoded_once_and_end_in_the_models(tiny_m3, passages, tmp_path, monkeypatch):
    tuned, texts = retrained(tiny_m3, tmp_path / "tuned"), passages[:12]
    _, how = settings(tmp_path / "store")
    ends = [stored_encoder(folder, **how)(texts) for folder in (tiny_m3, tuned)]
    mixtures = retrieval.mixtures
    found = {alpha: encoder(texts) for alpha, encoder in mixtures(tiny_m3, tuned, (0, 0.25, 1), how)}
    assert np.array_equal(found[0], ends[0]) and np.array_equal(found[1], ends[1])
    model = Encoder(tiny_m3, 64)
    states = [Encoder(folder, 64).state_dict() for folder in (tiny_m3, tuned)]
    model.load_state_dict({name: torch.lerp(w, states[1][name], 0.25) for name, w in states[0].items()})
    save_model(model, tmp_path / "quarter")
    alone = stored_encoder(tmp_path / "quarter", **how)(texts)
    np.testing.assert_allclose(found[0.25], alone, atol=1e-5)
    assert np.abs(found[0.25] - ends[0]).max() > 0.01

    monkeypatch.setattr(retrieval, "Encoder", lambda *args: no_model())
    again = {alpha: encoder(texts) for alpha, encoder in mixtures(tiny_m3, tuned, (0.25, 0, 1), how)}
    assert all(np.array_equal(again[alpha], found[alpha]) for alpha in found)
    for alpha, start, end in ((0.5, tiny_m3, tuned), (0.25, tuned, tiny_m3)):  # another mixture is no other's
        with pytest.raises(AssertionError, match="the model was loaded"):
            next(iter(mixtures(start, end, [alpha], how)))[1](texts)


def test_a_mixture_is_computed_in_place_as_mix_does(tiny_m3, tmp_path):
    tuned = retrained(tiny_m3, tmp_path / "tuned")
    states = [Encoder(folder, 64).state_dict() for folder in (tiny_m3, tuned)]
    for alpha in (0.25, 0.5, 0.9):
        found = retrieval.mixed(tiny_m3, tuned, alpha, 64).state_dict()
        expected = mix(states, [1 - alpha, alpha])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], w) for name, w in expected.items())


def test_two_models_of_different_shapes_have_nothing_between_them(tiny_m3, tiny_bert):
    with pytest.raises(TutorialError, match="tiny-m3 and .*tiny-bert do not have the same weights"):
        retrieval.mixed(tiny_m3, tiny_bert, 0.5, 64)


# ---------------------------------------------------------------- one model at a time, each text once


@pytest.fixture
def alive(monkeypatch):
    """() → how many Encoders that retrieval has loaded are still in memory."""
    loaded = []

    def load(*args):
        encoder = Encoder(*args)
        loaded.append(weakref.ref(encoder))
        return encoder

    def count():
        gc.collect()
        return sum(ref() is not None for ref in loaded)

    monkeypatch.setattr(retrieval, "Encoder", load)
    return count


@pytest.fixture
def encoded(monkeypatch):
    """How many texts went through a model, call by call."""
    counts, embed = [], store.embed
    monkeypatch.setattr(
        store, "embed", lambda encoder, rows, *rest: counts.append(len(rows)) or embed(encoder, rows, *rest)
    )
    return counts


def test_notebook_02_encodes_each_text_once_for_each_model(
    tiny_m3, small_data, pairs, tmp_path, monkeypatch, alive, encoded
):
    """The calls of notebook 02 in its order; at full size it has the three models alone."""
    run, where = tmp_path / "run", tmp_path / "store"
    retrained(tiny_m3, run / "fine-tuned")
    save_model(retrieval.mixed(tiny_m3, run / "fine-tuned", 0.5, 64), run / "merged")
    folders = {"base": tiny_m3, "fine-tuned": run / "fine-tuned", "merged": run / "merged"}
    monkeypatch.setattr(StoredEncoder, "tokens_from", 0)
    tokenised, tokenize = [], Encoder.tokenize
    monkeypatch.setattr(
        Encoder, "tokenize", lambda self, texts: tokenised.append(len(texts)) or tokenize(self, texts)
    )
    task = PocketT2(small_data)
    profile, how = settings(where)
    task.load_data()
    queries, passages, ids, judgements = retrieval.split_of(task, "en")
    codes = sorted({pair["pos_doc"] for pair in pairs})

    def ndcg_of(encoder):
        lists = grades_found(encoder(queries, "queries"), encoder(passages, "passages"), ids, judgements)
        return np.mean([ndcg(f, list(j.values())) for f, j in zip(lists, judgements, strict=True)])

    def filed_ndcg(name):
        result = retrieval.evaluate_model(name, folders[name], task, profile, "cpu", where)
        assert alive() == 0
        return metric_table(result, "en")["nDCG"][10]

    base = stored_encoder(folders["base"], **how)
    found = {"base": ndcg_of(base)}
    assert alive() == 1
    release(base)
    scores = {"base": filed_ndcg("base")}
    scores["fine-tuned"] = filed_ndcg("fine-tuned")
    found["fine-tuned"] = ndcg_of(stored_encoder(folders["fine-tuned"], **how))
    assert alive() == 0  # read from disk
    line = {}
    known = {0.5: folders["merged"]}
    for alpha, mixture in retrieval.mixtures(tiny_m3, folders["fine-tuned"], (0, 0.5, 1), how, known):
        assert alive() == 0
        code_ranks(mixture, pairs, codes)
        line[alpha] = ndcg_of(mixture)
        assert alive() == 1
    assert alive() == 0
    before = sum(encoded)
    scores["merged"] = filed_ndcg("merged")

    task.load_data()
    texts = sum(len(split["dev"][part]) for split in task.dataset.values() for part in ("queries", "corpus"))
    other_language = texts - len(queries) - len(passages)
    code_texts = len(pairs) + len(codes)
    assert before == 3 * (texts + code_texts) - other_language  # mteb also asks for Chinese of merged
    assert sum(encoded) == 3 * (texts + code_texts)
    assert sum(tokenised) == texts + code_texts
    assert line[0] == found["base"] and line[1] == found["fine-tuned"]
    assert list(scores.values()) == pytest.approx([line[0], line[1], line[0.5]], abs=1e-5)


def test_a_mixture_that_nobody_saved_is_not_the_known_one(tiny_m3, passages, tmp_path, monkeypatch, encoded):
    tuned = retrained(tiny_m3, tmp_path / "tuned")
    save_model(retrieval.mixed(tiny_m3, tuned, 0.5, 64), tmp_path / "merged")
    _, how = settings(tmp_path / "store")
    known = {0.5: tmp_path / "merged"}
    monkeypatch.setattr(StoredEncoder, "tokens_from", 0)
    alphas, texts = (0.25, 0.5, 0.75), passages[:10]
    found = {a: e(texts) for a, e in retrieval.mixtures(tiny_m3, tuned, alphas, how, known)}
    assert len(encoded) == 3 and len(list(tmp_path.glob("store/tokens/*"))) == 1
    monkeypatch.setattr(Encoder, "tokenize", lambda *args: no_model())  # a mixture has the ends' tokenizer
    assert np.array_equal(found[0.5], stored_encoder(known[0.5], **how)(texts)) and len(encoded) == 3
    unknown = {a: e(texts) for a, e in retrieval.mixtures(tiny_m3, tuned, alphas, how)}
    assert len(encoded) == 4  # 0.5 alone, under an identity of its own
    assert all(np.array_equal(found[alpha], unknown[alpha]) for alpha in alphas)


def test_a_mixture_needs_two_models_in_memory_and_one_on_the_device(
    tiny_m3, passages, tmp_path, monkeypatch, alive
):
    tuned, seen = retrained(tiny_m3, tmp_path / "tuned"), {"load": [], "move": []}
    load, move = retrieval.Encoder, retrieval.in_precision
    monkeypatch.setattr(retrieval, "Encoder", lambda *args: seen["load"].append(alive()) or load(*args))
    monkeypatch.setattr(retrieval, "in_precision", lambda *args: seen["move"].append(alive()) or move(*args))
    _, how = settings(tmp_path / "store")
    for _, mixture in retrieval.mixtures(tiny_m3, tuned, (0, 0.25, 0.75, 1), how):
        mixture(passages[:5])
        assert alive() == 1
    assert seen["load"] == [0, 0, 1, 0, 1, 0]  # others in memory when a model is read
    assert seen["move"] == [1, 1, 1, 1] and alive() == 0


def test_a_loop_over_mixtures_that_ends_early_leaves_no_model(tiny_m3, passages, tmp_path, alive):
    _, how = settings(tmp_path)
    for _, mixture in retrieval.mixtures(tiny_m3, retrained(tiny_m3, tmp_path / "tuned"), (0, 0.5), how):
        mixture(passages[:5])
        break
    assert alive() == 0


def test_an_evaluation_that_fails_leaves_no_model(tiny_bert, small_data, tmp_path, monkeypatch, alive):
    profile, _ = settings(tmp_path)

    def out_of_memory(*args, **kwargs):
        assert alive() == 1
        raise torch.OutOfMemoryError("as a GPU would")

    monkeypatch.setattr(retrieval, "best_passages", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        retrieval.evaluate_model("base", tiny_bert, PocketT2(small_data), profile, "cpu", tmp_path)
    assert alive() == 0
