"""Vectors on disk: whose they are, and what damage, a full disk or a kill leaves of them."""

import hashlib
import io
import json
import random

import numpy as np
import pytest
from helpers import Command, die, largest_file, tree
from sentence_transformers import SentenceTransformer

from embedding_tutorial import store as stored
from embedding_tutorial.retrieval import stored_encoder, vector_identity
from embedding_tutorial.store import DIGEST, StoredEncoder, VectorStore, cut_into_shards

pytestmark = pytest.mark.usefixtures("no_network")


def no_model():
    raise AssertionError("the model was loaded")


# ---------------------------------------------------------------- vectors on disk


@pytest.fixture
def store(tmp_path):
    return VectorStore(tmp_path / "vectors", {"model": "a", "max_length": 512})


def vectors(seed=0):
    return np.random.default_rng(seed).normal(size=(50, 8)).astype(np.float32)


def test_vector_store_round_trip(store, tmp_path):
    assert store.load("corpus-0", 50) is None
    store.save("corpus-0", vectors())
    store.save("corpus-1", vectors(1))
    again = VectorStore(tmp_path / "vectors", {"max_length": 512, "model": "a"})  # the order does not matter
    assert (
        np.array_equal(again.load("corpus-0", 50), vectors())
        and again.load("corpus-0", 50).dtype == np.float32
    )
    assert np.array_equal(again.load("corpus-1", 50), vectors(1))
    assert json.loads((store.folder / "identity.json").read_text()) == {"model": "a", "max_length": 512}
    store.save("corpus-0", vectors(2))
    assert np.array_equal(store.load("corpus-0", 50), vectors(2))


@pytest.mark.parametrize(
    "other",
    [
        {"model": "b", "max_length": 512},
        {"model": "a", "max_length": 256},
        {"model": "a"},
        {"model": "a", "max_length": "512"},
    ],
)
def test_two_identities_never_share_vectors(store, tmp_path, other):
    store.save("corpus-0", vectors())
    assert VectorStore(tmp_path / "vectors", other).load("corpus-0", 50) is None


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "empty",
        "shorter than a checksum",
        "one bit",
        "checksum missing",
        "other checksum",
        "other rows",
        "as written before",
    ],
)
def test_a_damaged_shard_is_reported_and_encoded_again(store, damage, capsys):
    store.save("corpus-0", vectors())
    store.save("corpus-1", vectors(1))
    shard = store.folder / "corpus-0.npy"
    content = shard.read_bytes()
    data, checksum = content[:-DIGEST], content[-DIGEST:]
    broken = {
        "truncated": content[:-100],
        "empty": b"",
        "shorter than a checksum": content[:10],
        "one bit": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:] + checksum,
        "checksum missing": data,
        "other checksum": data + bytes([checksum[0] ^ 1]) + checksum[1:],
        "as written before": data,  # with its checksum in a file of its own
    }
    shard.write_bytes(broken.get(damage, content))
    if damage == "as written before":
        (store.folder / "corpus-0.sha256").write_text(hashlib.sha256(data).hexdigest())
    assert store.load("corpus-0", 49 if damage == "other rows" else 50) is None
    said = capsys.readouterr().out
    assert "Shard corpus-0.npy is damaged (" in said and "encoding it again" in said
    assert store.load("corpus-0", 50) is None and capsys.readouterr().out == ""  # it is gone
    assert np.array_equal(store.load("corpus-1", 50), vectors(1))  # and only it
    store.save("corpus-0", vectors())
    assert np.array_equal(store.load("corpus-0", 50), vectors())


def test_a_shard_is_one_file_that_numpy_reads(store):
    store.save("corpus-0", vectors())
    assert tree(store.folder).keys() == {"corpus-0.npy", "identity.json"}
    assert np.array_equal(np.load(store.folder / "corpus-0.npy"), vectors())
    content = (store.folder / "corpus-0.npy").read_bytes()
    assert content[-DIGEST:] == hashlib.sha256(content[:-DIGEST]).digest()


def test_a_shard_that_is_a_pickle_is_not_opened(store, tmp_path, capsys):
    """Whoever can write the file can write its checksum: a pickle is not unpacked even with the right one."""
    foreign = np.array([Command(tmp_path / "ran")], dtype=object)
    np.save(buffer := io.BytesIO(), foreign, allow_pickle=True)
    data = buffer.getvalue()
    for content in (data, data + hashlib.sha256(data).digest()):
        (store.folder / "evil.npy").write_bytes(content)
        assert store.load("evil", 1) is None and not (tmp_path / "ran").exists()
        assert "Shard evil.npy is damaged" in capsys.readouterr().out
        assert not (store.folder / "evil.npy").exists()


def test_a_kill_while_a_shard_is_saved_leaves_no_wrong_vectors(store, tmp_path, capsys):
    """Killed in turn at the flush and at the rename of a shard that is there and of one that is not."""
    store.save("a", vectors())
    code = (
        "import numpy as np\nfrom embedding_tutorial.store import VectorStore\n"
        "store = VectorStore(sys.argv[1], {'model': 'a', 'max_length': 512})\n"
        "for call in ('fsync', 'replace'):\n"
        "    for key in ('a', 'b'):\n"
        "        if (pid := os.fork()) == 0:\n"
        "            setattr(files.os, call, die)\n"
        "            store.save(key, np.ones((50, 8), np.float32))\n"
        "            os._exit(0)\n"
        "        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9\n"
        "die()"
    )
    die(code, tmp_path / "vectors")
    assert len([name for name in tree(store.folder) if name.endswith(".tmp")]) == 4
    again = VectorStore(tmp_path / "vectors", {"model": "a", "max_length": 512})
    assert not [name for name in tree(again.folder) if name.endswith(".tmp")]
    assert again.load("b", 50) is None
    assert np.array_equal(again.load("a", 50), vectors())
    assert capsys.readouterr().out == ""


def test_a_disk_full_while_a_shard_is_saved_leaves_the_old_one(store):
    store.save("a", vectors())
    with pytest.raises(OSError), largest_file(300):
        store.save("a", np.ones((50, 8), np.float32))
    assert np.array_equal(store.load("a", 50), vectors())
    assert tree(store.folder).keys() == {"a.npy", "identity.json"}


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
    texts = [*passages[:280:40], *passages[290:560:90], "x", "word " * 700, *passages[1:4]]
    model = SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = 512
    return texts, model.encode(texts, batch_size=4, normalize_embeddings=True, show_progress_bar=False)


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
    flipped = bytes([data[0] ^ 1]) + data[1:]
    half = data[: len(data) // 2]
    broken = {"truncated": half, "empty": b"", "other bytes": flipped, "no checksum": data[:-DIGEST]}
    victim.write_bytes(broken[damage])
    encoded, embed = [], stored.embed
    monkeypatch.setattr(
        stored, "embed", lambda model, rows, *rest: encoded.append(len(rows)) or embed(model, rows, *rest)
    )
    capsys.readouterr()
    assert np.array_equal(stored_encoder(tiny_bert, tmp_path, 64, shard_characters=1_500)(texts), expected)
    said = capsys.readouterr().out
    assert len(encoded) == 1
    assert f"Shard {victim.name} is damaged" in said and "encoding it again" in said
    assert victim.read_bytes() == data
