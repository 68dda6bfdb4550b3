"""Vectors on disk: whose they are, and what damage, a full disk or a kill leaves of them."""

import hashlib
import io
import json
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch
from helpers import Command, Spy, die, largest_file, tree
from sentence_transformers import SentenceTransformer

from embedding_tutorial import files
from embedding_tutorial import store as stored
from embedding_tutorial.encoder import LENGTH_FILE, Encoder, companions, fingerprint, save_model
from embedding_tutorial.files import TutorialError
from embedding_tutorial.profiles import PROFILES
from embedding_tutorial.retrieval import load_for_encoding, stored_encoder, token_identity, vector_identity
from embedding_tutorial.store import DIGEST, StoredEncoder, TokenStore, VectorStore, cut_into_shards

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
    left = [name for name in tree(store.folder) if name.endswith(".tmp")]
    assert len(left) == 2  # the next writer of a file removes what the one before it left
    again = VectorStore(tmp_path / "vectors", {"model": "a", "max_length": 512})
    assert not [name for name in tree(again.folder) if name.endswith(".tmp")]
    assert again.load("b", 50) is None
    assert np.array_equal(again.load("a", 50), vectors())
    assert capsys.readouterr().out == ""


def test_a_disk_full_while_a_shard_is_saved_leaves_the_old_one(store):
    store.save("a", vectors())
    full = "a.npy could not be written: the disk is full"
    with pytest.raises(TutorialError, match=full), largest_file(300):
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


# ---------------------------------------------------------------- token ids on disk


@pytest.fixture
def tokenised(monkeypatch):
    """What Encoder.tokenize was asked for, with token ids kept of every shard."""
    spy = Spy(Encoder.tokenize)
    monkeypatch.setattr(Encoder, "tokenize", lambda self, texts: spy(self, texts))
    monkeypatch.setattr(StoredEncoder, "tokens_from", 0)
    return spy.calls


@pytest.fixture(scope="module")
def tuned_bert(tiny_bert, tmp_path_factory):
    """tiny_bert with other weights, saved as training saves it."""
    model = Encoder(tiny_bert, 64)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.5
    save_model(model, folder := tmp_path_factory.mktemp("tuned") / "model")
    return folder


def without_tokens(folder, store, length=64):
    """The StoredEncoder as it would be if nobody kept token ids."""
    identity = vector_identity(folder, length, "fp32")
    return StoredEncoder(
        lambda: load_for_encoding(folder, length, "fp32", "cpu"), identity, store, shard_characters=1_500
    )


def test_the_second_model_tokenises_nothing(tiny_bert, tuned_bert, passages, tmp_path, tokenised):
    texts, store = passages[:60], tmp_path / "store"
    expected = [without_tokens(folder, tmp_path / "plain")(texts) for folder in (tiny_bert, tuned_bert)]
    tokenised.clear()
    found, calls = [], []
    for folder in (tiny_bert, tuned_bert):
        found.append(stored_encoder(folder, store, 64, shard_characters=1_500)(texts))
        calls.append(len(tokenised))
    shards = len(list(store.glob("tokens/*/*.npy")))
    assert calls == [shards, shards] and shards > 3
    assert [np.array_equal(*pair) for pair in zip(found, expected, strict=True)] == [True, True]
    assert not np.array_equal(*found)
    vectors = {path.name for path in store.glob("vectors/*/*.npy")}
    assert vectors == {path.name for path in store.glob("tokens/*/*.npy")}  # by the texts alone


@pytest.mark.parametrize("change", ["max_length", "tokenizer_config.json", "vocab.txt", "config.json"])
def test_another_tokenizer_has_token_ids_of_its_own(tiny_bert, passages, tmp_path, tokenised, change):
    texts, store, folder, length = passages[:20], tmp_path / "store", tiny_bert, 64
    stored_encoder(tiny_bert, store, 64)(texts)
    first = len(tokenised)
    if change == "max_length":
        length = 12
    else:
        folder = shutil.copytree(tiny_bert, tmp_path / "model")
        with open(folder / change, "a") as file:
            file.write("\n")
    found = stored_encoder(folder, store, length)(texts)
    assert len(tokenised) == 2 * first and len(list(store.glob("tokens/*"))) == 2
    assert np.array_equal(found, without_tokens(folder, tmp_path / "plain", length)(texts))


def test_identity_of_a_tokenizer(tiny_m3, tiny_bert, tuned_bert):
    assert token_identity(tiny_bert, 64) == token_identity(tuned_bert, 64)
    assert fingerprint(tiny_bert) != fingerprint(tuned_bert)
    identity = token_identity(tiny_m3, 64)
    others = set(companions(tiny_m3)) - {LENGTH_FILE}  # it only tells sentence-transformers the length
    assert identity["files"].keys() == others and identity["max_length"] == 64
    assert {"tokenizer.json", "sentencepiece.bpe.model", "config.json"} <= identity["files"].keys()


def test_token_ids_come_back_as_they_were(tmp_path):
    draw, store = random.Random(0), TokenStore(tmp_path, {})
    for n in range(20):
        rows = [[draw.randrange(250_002) for _ in range(draw.randrange(9))] for _ in range(n % 5 + 1)]
        store.save(f"{n}", rows)
        assert store.load(f"{n}", len(rows)) == rows
    assert store.load("absent", 3) is None


def with_checksum(array):
    np.save(buffer := io.BytesIO(), np.asarray(array))
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


@pytest.mark.parametrize(
    "damage",
    ["truncated", "empty", "one bit", "fewer ids", "fewer texts", "negative", "floats", "one number"],
)
def test_damaged_token_ids_are_reported_and_made_again(
    tiny_bert, tuned_bert, passages, tmp_path, tokenised, capsys, damage
):
    texts, store = passages[:60], tmp_path / "store"
    expected = without_tokens(tuned_bert, tmp_path / "plain")(texts)
    stored_encoder(tiny_bert, store, 64, shard_characters=1_500)(texts)
    victim = sorted(store.glob("tokens/*/*.npy"))[1]
    whole, flat = victim.read_bytes(), np.load(victim)
    broken = {
        "truncated": whole[:-100],
        "empty": b"",
        "one bit": whole[:300] + bytes([whole[300] ^ 1]) + whole[301:],
        "fewer ids": with_checksum(flat[:-1]),
        "fewer texts": with_checksum(flat[:1]),
        "negative": with_checksum([flat[0] - 999, flat[1] + 999, *flat[2:]]),
        "floats": with_checksum(flat.astype(np.float32)),
        "one number": with_checksum(flat[0]),
    }
    victim.write_bytes(broken[damage])
    tokenised.clear()
    capsys.readouterr()
    assert np.array_equal(stored_encoder(tuned_bert, store, 64, shard_characters=1_500)(texts), expected)
    said = capsys.readouterr().out
    assert f"Shard {victim.name} is damaged (" in said and "): tokenising it again." in said
    assert len(tokenised) == 1 and victim.read_bytes() == whole


def test_small_shards_leave_no_token_ids(tiny_bert, passages, tmp_path):
    pocket, full = (PROFILES[name].shard_characters for name in ("pocket", "full"))
    assert pocket < StoredEncoder.tokens_from < full
    stored_encoder(tiny_bert, tmp_path, 64, shard_characters=pocket)(passages[:250])
    assert [path.name for path in tmp_path.iterdir()] == ["vectors"]


# ---------------------------------------------------------------- fingerprints


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were hashed, in order."""
    spy = Spy(files.sha256_of)
    monkeypatch.setattr(files, "sha256_of", spy)
    return spy.calls


@pytest.fixture
def old_model(tiny_m3, tmp_path):
    """A model folder that nobody has touched for ten seconds."""
    folder = shutil.copytree(tiny_m3, tmp_path / "model")
    for path in folder.rglob("*"):
        age(path)
    return folder


def age(path, seconds=10):
    os.utime(path, ns=(time.time_ns(), time.time_ns() - seconds * 1_000_000_000))


def test_an_unchanged_model_is_read_once_per_process(old_model, hashed, monkeypatch):
    first = fingerprint(old_model)
    assert len(hashed) == len(companions(old_model)) + 1  # and the weights
    monkeypatch.chdir(old_model.parent)
    for folder in (old_model, str(old_model), "model"):
        assert vector_identity(folder, 64, "fp32")["model"] == fingerprint(folder) == first
    token_identity(old_model, 64)
    assert len(hashed) == len(companions(old_model)) + 1


def other_size(path, content):
    path.write_bytes(content + b" ")
    age(path, 10)


def other_time(path, content):
    path.write_bytes(flipped(content))
    age(path, 5)


def swapped_by_a_rename(path, content):
    """As `atomic_file` does, with size and time of the old one."""
    state = path.stat()
    (new := path.with_name("new.tmp")).write_bytes(flipped(content))
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(new, path)


def written_in_place_and_dated_back(path, content):
    state = path.stat()
    path.write_bytes(flipped(content))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "change", [other_size, other_time, swapped_by_a_rename, written_in_place_and_dated_back]
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "tokenizer.json"])
def test_a_changed_file_alone_is_read_again(old_model, hashed, name, change):
    before = fingerprint(old_model)
    hashed.clear()
    change(old_model / name, (old_model / name).read_bytes())
    after = fingerprint(old_model)
    assert after != before and [str(path) for (path,) in hashed] == [str(old_model / name)]
    assert fingerprint(old_model) == after and len(hashed) == 1
    shutil.copytree(old_model, old_model.parent / "fresh")
    assert fingerprint(old_model.parent / "fresh") == after


def test_two_changes_within_one_tick_are_both_seen(old_model, hashed):
    """A clock of the file system stands still between two ticks: state and size are then the same."""
    path = old_model / "tokenizer_config.json"
    content = path.read_bytes()
    stamp = time.time_ns()
    found = set()
    for text in (content, flipped(content)):
        path.write_bytes(text)
        os.utime(path, ns=(stamp, stamp))
        found |= {fingerprint(old_model), fingerprint(old_model)}
    assert len(found) == 2 and sum(str(call[0]) == str(path) for call in hashed) == 4


def test_a_new_file_is_part_of_the_fingerprint_at_once(old_model, hashed):
    before = fingerprint(old_model)
    hashed.clear()
    (old_model / "vocab.txt").write_text("one more file")
    assert fingerprint(old_model) != before and len(hashed) == 1
    (old_model / "vocab.txt").unlink()
    assert fingerprint(old_model) == before and len(hashed) == 1
