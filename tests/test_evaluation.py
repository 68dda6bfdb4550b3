"""Retrieval evaluation: the same vectors and scores as the libraries', and never another model's."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
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

from embedding_tutorial import assets, checkpoints, evaluation, finetune, pocket_task
from embedding_tutorial.assets import AssetError
from embedding_tutorial.evaluation import (
    EmbedSearch,
    StoredEncoder,
    best_passages,
    code_ranks,
    cut_into_shards,
    evaluate_retrieval,
    interpolate,
    load_for_encoding,
    metric_table,
    release,
    retrieval_task,
    stored_encoder,
    subset_task,
    vector_identity,
)
from embedding_tutorial.pocket_task import PocketT2

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ("127.0.0.1", "localhost", "::1", b"localhost")
QUIET = {"co2_tracker": False, "show_progress_bar": False, "encode_kwargs": {"show_progress_bar": False}}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every connection and look-up beyond this machine is an error."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def local_connect(self, address):
        assert not isinstance(address, tuple) or address[0] in LOCAL, f"a test called {address}"
        return connect(self, address)

    def local_look_up(host, *args, **kwargs):
        assert host in LOCAL, f"a test looked up {host}"
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    monkeypatch.setattr(socket, "getaddrinfo", local_look_up)


@pytest.fixture(scope="session")
def passages():
    """The passages of the pocket test, both languages, in the order of the files."""
    return [
        row["text"]
        for language in pocket_task.LANGUAGES
        for row in pocket_task.read_language(pocket_task.DATA / language)[0]
    ]


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


# ---------------------------------------------------------------- shards


def test_shards_hold_every_text_once_shortest_first():
    draw = random.Random(0)
    for _ in range(50):
        texts = ["x" * draw.randrange(0, 120) for _ in range(draw.randrange(1, 60))]
        limit = draw.randrange(1, 400)
        shards = cut_into_shards(texts, limit)
        order = [i for shard in shards for i in shard]
        assert sorted(order) == list(range(len(texts)))
        assert [len(texts[i]) for i in order] == sorted(map(len, texts))
        for shard in shards:
            assert shard and (len(shard) == 1 or sum(len(texts[i]) for i in shard) <= limit)


def test_shards_of_nothing():
    assert cut_into_shards([], 10) == []


def test_the_cut_does_not_depend_on_the_texts_order_where_lengths_differ():
    texts = ["x" * n for n in (5, 1, 9, 3, 7)]
    parts = [[texts[i] for i in shard] for shard in cut_into_shards(texts, 10)]
    turned = texts[::-1]
    assert parts == [[turned[i] for i in shard] for shard in cut_into_shards(turned, 10)]


# ---------------------------------------------------------------- vectors


@pytest.fixture(scope="module")
def minilm_reference(minilm, passages):
    """Texts of all lengths, one beyond 512 tokens, and sentence-transformers' fp32 vectors of them."""
    texts = [*passages[:280:20], *passages[290:560:60], "x", "word " * 700, *passages[1:8]]
    model = SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = 512
    return texts, model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-3), ("bf16", 5e-3)])
def test_vectors_are_those_of_sentence_transformers(minilm, minilm_reference, tmp_path, precision, tolerance):
    texts, expected = minilm_reference
    found = stored_encoder(minilm, tmp_path, 512, precision, shard_characters=3_000)(texts)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_m3"])
def test_vectors_of_a_tiny_model_and_their_order(request, passages, tmp_path, model):
    folder = request.getfixturevalue(model)
    texts = passages[::5]
    reference = SentenceTransformer(str(folder), device="cpu")
    reference.max_seq_length = 128
    expected = reference.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    encoder = stored_encoder(folder, tmp_path, 128, shard_characters=1_000)
    assert np.abs(encoder(texts) - expected).max() < 1e-5
    turned = encoder(texts[::-1])  # other shards where lengths are equal, other places
    assert np.abs(turned[::-1] - expected).max() < 1e-5
    again = stored_encoder(folder, tmp_path, 128, shard_characters=1_000)
    assert np.array_equal(again(texts), encoder(texts))


def test_stored_vectors_need_no_model(tiny_bert, passages, tmp_path, capsys):
    texts = passages[:30]
    first = stored_encoder(tiny_bert, tmp_path, 64, shard_characters=2_000)(texts)
    identity = vector_identity(tiny_bert, 64, "fp32")
    again = StoredEncoder(no_model, identity, tmp_path, shard_characters=2_000)(texts)
    assert np.array_equal(first, again)
    assert "were encoded earlier and are read from disk" in capsys.readouterr().out
    other = StoredEncoder(no_model, {**identity, "max_length": 65}, tmp_path, shard_characters=2_000)
    with pytest.raises(AssertionError, match="the model was loaded"):
        other(texts)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes", "no checksum"])
def test_a_damaged_shard_alone_is_encoded_again(tiny_bert, passages, tmp_path, capsys, monkeypatch, damage):
    texts = passages[:60]
    expected = stored_encoder(tiny_bert, tmp_path, 64, shard_characters=1_500)(texts)
    shards = sorted(tmp_path.glob("vectors/*/*.npy"))
    assert len(shards) > 3
    victim = shards[1]
    data = victim.read_bytes()
    if damage == "no checksum":
        victim.with_suffix(".sha256").unlink()
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        half = data[: len(data) // 2]
        victim.write_bytes({"truncated": half, "empty": b"", "other bytes": flipped}[damage])
    encoded = []
    embed = evaluation.embed
    monkeypatch.setattr(
        evaluation, "embed", lambda model, rows, *rest: encoded.append(len(rows)) or embed(model, rows, *rest)
    )
    capsys.readouterr()
    assert np.array_equal(stored_encoder(tiny_bert, tmp_path, 64, shard_characters=1_500)(texts), expected)
    said = capsys.readouterr().out
    assert len(encoded) == 1
    assert f"Shard {victim.name} is damaged" in said and "encoding it again" in said
    assert victim.read_bytes() == data


def test_release_drops_the_model(tiny_bert, passages, tmp_path):
    encoder = stored_encoder(tiny_bert, tmp_path, 64)
    encoder(passages[:3])
    assert encoder.encoder is not None
    release(encoder)
    assert encoder.encoder is None
    assert "GB" in evaluation.memory_in_use()


# ---------------------------------------------------------------- kill -9


def test_kill_9_costs_at_most_one_shard(tiny_bert, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the worker does
    try:
        expected = encode_worker.evaluate(tiny_bert, tmp_path / "whole")
        shards = encode_worker.complete_shards(tmp_path / "whole")
        draw, store, done = random.Random(time.time_ns()), tmp_path / "killed", 0
        for _ in range(2):  # the second one continues what the first one left, and is killed as well
            begun = kill_after(tiny_bert, store, draw.randrange(1, len(shards) // 2 - 2))
            left = {name: data for name, data in encode_worker.complete_shards(store).items()}
            assert begun - 1 <= len(left) - done <= begun
            assert all(shards[name] == data for name, data in left.items())
            done = len(left)
        counted = []
        embed = evaluation.embed
        evaluation.embed = lambda *args: counted.append(1) or embed(*args)
        try:
            scores = encode_worker.evaluate(tiny_bert, store)
        finally:
            evaluation.embed = embed
    finally:
        torch.set_num_threads(threads)
    assert len(counted) == len(shards) - done
    assert encode_worker.complete_shards(store) == shards
    assert same_scores(scores, expected)
    assert not list(store.rglob(".*.tmp"))


def kill_after(model, store, shards):
    """Start the worker, kill it some moment after it began `shards` shards; returns how many it began."""
    command = [sys.executable, str(ROOT / "tests" / "encode_worker.py"), str(model), str(store)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    begun = 0
    while begun < shards:
        line = process.stdout.readline()
        assert line, "the worker ended before it was killed"
        begun += line.startswith("begin")
    time.sleep(random.random() * 0.02)
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    return begun + rest.count("begin")


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("top_k", [1, 10, 300, 1000])
def test_best_passages_against_numpy(block, top_k):
    draw = np.random.default_rng(block + top_k)
    q, p = (draw.standard_normal((n, 24)).astype(np.float32) for n in (20, 300))
    scores = q @ p.T
    order = np.argsort(-scores, axis=1)[:, :top_k]
    found = list(best_passages(q, p, top_k, block=block))
    assert np.array_equal([index for _, index in found], order)
    np.testing.assert_allclose(
        [values for values, _ in found], np.take_along_axis(scores, order, axis=1), atol=1e-5
    )


def test_best_passages_reads_memory_maps(tmp_path):
    draw = np.random.default_rng(0)
    for name, rows in (("q", 5), ("p", 30)):
        np.save(tmp_path / f"{name}.npy", draw.standard_normal((rows, 8), dtype=np.float32))
    q, p = (np.load(tmp_path / f"{name}.npy", mmap_mode="c") for name in "qp")
    assert [index[0] for _, index in best_passages(q, p, 3)] == (q @ p.T).argmax(axis=1).tolist()


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
def test_scores_are_mtebs_to_the_last_digit(request, tmp_path, model):
    folder = request.getfixturevalue(model)
    encoder = stored_encoder(folder, tmp_path, 128)
    searches = EmbedSearch(encoder, Handed(encoder).mteb_model_meta), Handed(encoder)
    ours, theirs = (mteb.evaluate(search, PocketT2(), cache=None, **QUIET)[0] for search in searches)
    assert len(by_subset(ours)["en"]) > 100
    assert same_scores(by_subset(ours), by_subset(theirs))
    assert same_scores(evaluate(folder, tmp_path, PocketT2(), max_length=128), filed(theirs))
    if model == "minilm":  # and those of sentence-transformers in fp32, encoding for itself
        reference = SentenceTransformer(str(folder), device="cpu")
        reference.max_seq_length = 128
        plain = by_subset(mteb.evaluate(reference, PocketT2(), cache=None, **QUIET)[0])
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
    tuned = finetune.Encoder(tiny_bert, 64)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.3 * weight.std(correction=0) * torch.randn_like(weight)
    finetune.save_model(tuned, tmp_path / "tuned")
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
    monkeypatch.setattr(
        evaluation, "t2retrieval_source", lambda: assets.t2retrieval_source(tmp_path / "data")
    )
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
    assert len(results) == 2 and revisions == {evaluation.folder_fingerprint(t2_folder)}

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
    monkeypatch.setattr(
        evaluation, "t2retrieval_source", lambda: assets.t2retrieval_source(tmp_path / "data")
    )
    start = time.monotonic()
    with pytest.raises(AssetError, match="hf download mteb/T2Retrieval --repo-type dataset --revision cf77"):
        retrieval_task("T2Retrieval")
    assert time.monotonic() - start < 5


def test_t2_folder_cut_short_is_refused(t2_folder):
    corpus = t2_folder / "corpus" / "dev-00000-of-00001.parquet"
    corpus.write_bytes(corpus.read_bytes()[:500])
    with pytest.raises(AssetError, match="is cut short at 500 bytes(.|\n)*hf download mteb/T2Retrieval"):
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


# ---------------------------------------------------------------- mixing weights


@pytest.fixture(scope="module")
def ends(tiny_m3, tmp_path_factory):
    tuned = retrained(tiny_m3, tmp_path_factory.mktemp("ends") / "tuned")
    return load_for_encoding(tiny_m3, 64, "fp32", "cpu"), load_for_encoding(tuned, 64, "fp32", "cpu")


def test_interpolation_ends_are_the_two_models(ends):
    for alpha, end in zip((0.0, 1.0), ends, strict=True):
        mixed = interpolate(*ends, alpha)
        assert all(torch.equal(w, end.state_dict()[name]) for name, w in mixed.state_dict().items())
        assert not mixed.training and mixed.max_length == 64 and mixed.folder == ends[0].folder


def test_interpolation_half_way_is_the_mean(ends):
    before = [{name: w.clone() for name, w in end.state_dict().items()} for end in ends]
    for name, w in interpolate(*ends, 0.5).state_dict().items():
        torch.testing.assert_close(w, (before[0][name] + before[1][name]) / 2)
    for end, kept in zip(ends, before, strict=True):  # nobody touched the ends
        assert all(torch.equal(w, kept[name]) for name, w in end.state_dict().items())


def test_interpolation_of_buffers(monkeypatch):
    """Floating-point buffers are mixed as weights are; integer ones are the base's."""

    class Toy(torch.nn.Module):
        folder, max_length, device = "toy", 8, "cpu"

        def __init__(self, value=0.0):
            super().__init__()
            self.register_buffer("mean", torch.full((3,), value))
            self.register_buffer("small", torch.full((3,), value, dtype=torch.float16))
            self.register_buffer("steps", torch.tensor(int(value)))

    monkeypatch.setattr(finetune, "Encoder", lambda folder, max_length: Toy())
    mixed = interpolate(Toy(1.0), Toy(3.0), 0.25)
    assert mixed.mean.tolist() == mixed.small.tolist() == [1.5] * 3 and mixed.steps == 1


def test_interpolation_of_different_models_is_refused(ends, tiny_bert):
    deeper = load_for_encoding(tiny_bert, 64, "fp32", "cpu")
    deeper.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="not have the same weights"):
        interpolate(ends[0], deeper, 0.5)


def test_the_mixture_as_a_model_of_its_own(ends, tiny_m3, passages, tmp_path):
    mixed = interpolate(*ends, 0.4)
    finetune.save_model(mixed, tmp_path / "merged")
    assert finetune.read_pooling(tmp_path / "merged") == "cls"
    for name in ("1_Pooling/config.json", "modules.json", "tokenizer.json", *checkpoints.HEAD_FILES):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_m3 / name).read_bytes()
    texts = [text[:20] for text in passages[:4]]  # well under 64 tokens, where mixed cuts and the rest do not
    expected = finetune.embed(mixed, texts).detach().numpy()
    libraries = finetune.vectors_elsewhere(tmp_path / "merged", texts)
    assert "BGEM3FlagModel" in libraries
    for library, theirs in libraries.items():
        np.testing.assert_allclose(theirs, expected, atol=1e-5, err_msg=library)
    reopened = load_for_encoding(tmp_path / "merged", 64, "fp32", "cpu")
    np.testing.assert_allclose(finetune.embed(reopened, texts).detach().numpy(), expected, atol=1e-6)


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
        for label, key in evaluation.METRICS.items():
            assert table[label] == {k: scores[f"{key}_at_{k}"] for k in (1, 3, 5, 10)}
        assert metric_table(result, language, (20,))["MRR"] == {20: scores["mrr_at_20"]}
    with pytest.raises(StopIteration):
        metric_table(result, "fr")
