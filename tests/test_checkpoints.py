"""Complete or absent: what stays on disk when a write fails, a process dies or a file is damaged."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager

import kill_worker
import numpy as np
import pytest
import torch

from embedding_tutorial import assets, checkpoints
from embedding_tutorial.assets import AssetError
from embedding_tutorial.checkpoints import VectorStore

STATE = {
    "update": 3,
    "weights": {"w": torch.arange(100_000.0)},
    "random": (torch.get_rng_state(), None),
    "history": {"step_losses": [0.5, None]},
}


def tree(folder):
    """{relative path: bytes, or None for a folder} of everything below, hidden names included."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


@contextmanager
def largest_file(size):
    """The kernel refuses to let a file grow beyond `size` bytes, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def die(code, *args):
    """Run `code` in a process that kills itself in it (`die()`); its exit must be that kill."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom embedding_tutorial import checkpoints\n"
        "def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n" + code
    )
    environment = {**os.environ, "PYTHONPATH": str(assets.ROOT)}
    assert subprocess.run([sys.executable, "-c", program, *map(str, args)], env=environment).returncode == -9


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("mode, content", [("wb", b"new \xff"), ("w", "neu \u00fc \u2028")])
def test_atomic_file_writes_all_of_it(tmp_path, mode, content):
    path = tmp_path / "made" / "a.txt"
    with checkpoints.atomic_file(path, mode) as file:
        file.write(content)
        assert not path.exists()
    assert path.read_bytes() == (content if mode == "wb" else content.encode())
    assert tree(tmp_path / "made").keys() == {"a.txt"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), checkpoints.atomic_file(tmp_path / "a.txt", "w") as file:
        file.write("half of the n")
        file.flush()
        raise error
    assert tree(tmp_path) == {"a.txt": b"old"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_full_at_the_last_moment_leaves_the_old_file_alone(tmp_path, call, monkeypatch):
    (tmp_path / "a.json").write_text("[1]")
    monkeypatch.setattr(checkpoints.os, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_json(tmp_path / "a.json", [2])
    assert tree(tmp_path) == {"a.json": b"[1]"}


def test_a_file_is_flushed_to_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Without that order, a power cut may leave an empty file under the final name."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            checkpoints.os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]
        )
    checkpoints.write_json(tmp_path / "a.json", {})
    assert calls == ["fsync", "replace"]


def test_json_round_trip_and_its_refusals(tmp_path):
    value = {"a": [1, 2.5, None], "查询": "é \u2028"}
    checkpoints.write_json(tmp_path / "a.json", value)
    assert (
        checkpoints.read_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_bytes())
    )
    with pytest.raises(ValueError):
        checkpoints.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert checkpoints.read_json(tmp_path / "a.json") == value
    assert tree(tmp_path).keys() == {"a.json"}


# ---------------------------------------------------------------- folders


def make_folder(path, text):
    with checkpoints.atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)


def test_atomic_folder_replaces_the_whole_folder(tmp_path):
    make_folder(tmp_path / "model", "one")
    (tmp_path / "model" / "stale").write_text("of the old version")
    make_folder(tmp_path / "model", "two")
    assert tree(tmp_path) == {"model": None, "model/sub": None, "model/sub/file": b"two"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_filling_leaves_the_old_folder_alone(tmp_path, error):
    make_folder(tmp_path / "model", "old")
    before = tree(tmp_path)
    with pytest.raises(error), checkpoints.atomic_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("x")
        raise error
    assert tree(tmp_path) == before


def test_a_disk_full_at_the_flush_leaves_the_old_folder_alone(tmp_path, monkeypatch):
    make_folder(tmp_path / "model", "old")
    before = tree(tmp_path)
    monkeypatch.setattr(checkpoints.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_folder(tmp_path / "model", "new")
    assert tree(tmp_path) == before


MAKE = (
    "def make(path, text):\n"
    "    with checkpoints.atomic_folder(path) as f:\n"
    "        (f / 'sub').mkdir(); (f / 'sub' / 'file').write_text(text)\n"
    "        if text == 'die': die()\n"
)


@pytest.mark.parametrize(
    "moment, survivor",
    [
        ("make(Path(sys.argv[1]), 'die')", b"old"),  # while filling
        ("checkpoints.os.rename = die; make(Path(sys.argv[1]), 'new')", b"old"),  # before the swap
        (
            "real = os.rename\n"
            "def second(a, b):\n    die() if Path(b).name == 'model' else real(a, b)\n"
            "checkpoints.os.rename = second; make(Path(sys.argv[1]), 'new')",
            b"old",
        ),  # within the swap
        (
            "real = checkpoints.shutil.rmtree\n"
            "def rmtree(p, **k):\n    die() if p.name.endswith('.old') and p.exists() else real(p, **k)\n"
            "checkpoints.shutil.rmtree = rmtree; make(Path(sys.argv[1]), 'new')",
            b"new",
        ),  # after it
    ],
)
def test_a_kill_in_a_folder_swap_leaves_one_complete_version(tmp_path, moment, survivor):
    make_folder(tmp_path / "model", "old")
    die(MAKE + moment, tmp_path / "model")
    checkpoints.remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"model": None, "model/sub": None, "model/sub/file": survivor}
    make_folder(tmp_path / "model", "newer")  # and the next write works
    assert tree(tmp_path)["model/sub/file"] == b"newer"


def test_recover(tmp_path):
    (tmp_path / ".model.old").mkdir()
    assert checkpoints.recover(tmp_path / "model") == tmp_path / "model"
    assert (tmp_path / "model").is_dir() and not (tmp_path / ".model.old").exists()
    (tmp_path / ".model.old").mkdir()
    (tmp_path / "model" / "new").touch()
    checkpoints.recover(tmp_path / "model")  # the swap was complete: nothing to undo
    assert (tmp_path / "model" / "new").exists()


def test_remove_leftovers_touches_nothing_else(tmp_path):
    (tmp_path / ".resume.pt.123.tmp").touch()
    (tmp_path / ".final_model.tmp" / "sub").mkdir(parents=True)
    (tmp_path / ".keep").touch()
    (tmp_path / "notes.tmp").touch()
    (tmp_path / "old.old").touch()
    checkpoints.remove_leftovers(tmp_path)
    assert tree(tmp_path).keys() == {".keep", "notes.tmp", "old.old"}


def test_move_aside(tmp_path):
    make_folder(tmp_path / "run", "new")
    make_folder(tmp_path / "run.previous", "older")
    checkpoints.move_aside(tmp_path / "run", tmp_path / "run.previous")
    assert tree(tmp_path) == {"run.previous": None, "run.previous/sub": None, "run.previous/sub/file": b"new"}


def test_link_folder_copies_without_the_space_and_survives_its_source(tmp_path):
    make_folder(tmp_path / "checkpoint", "weights")
    make_folder(tmp_path / "best", "an older best")
    checkpoints.link_folder(tmp_path / "checkpoint", tmp_path / "best")
    a, b = tmp_path / "checkpoint" / "sub" / "file", tmp_path / "best" / "sub" / "file"
    assert a.stat().st_ino == b.stat().st_ino
    make_folder(
        tmp_path / "checkpoint", "the next run's weights"
    )  # replaces, never writes into the shared file
    assert b.read_text() == "weights"
    shutil.rmtree(tmp_path / "checkpoint")
    assert b.read_text() == "weights" and {p.name for p in tmp_path.iterdir()} == {"best"}


def test_link_folder_copies_where_there_are_no_hard_links(tmp_path, monkeypatch):
    make_folder(tmp_path / "checkpoint", "weights")

    def no_link(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoints.os, "link", no_link)
    checkpoints.link_folder(tmp_path / "checkpoint", tmp_path / "best")
    assert (tmp_path / "best" / "sub" / "file").read_text() == "weights"


# ---------------------------------------------------------------- models


def test_weights_file(tmp_path):
    with pytest.raises(AssetError, match="holds neither model.safetensors nor pytorch_model.bin"):
        checkpoints.weights_file(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert checkpoints.weights_file(tmp_path).name == "pytorch_model.bin"
    (tmp_path / "model.safetensors").touch()
    assert checkpoints.weights_file(tmp_path).name == "model.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "config.json",
        "tokenizer.json",
        "sentencepiece.bpe.model",
        "modules.json",
        "1_Pooling/config.json",
        "colbert_linear.pt",
        "sparse_linear.pt",
    ],
)
def test_the_fingerprint_changes_with_whatever_shapes_the_vectors(tiny_m3, tmp_path, name):
    model = shutil.copytree(tiny_m3, tmp_path / "model")
    before = checkpoints.fingerprint(model)
    assert before == checkpoints.fingerprint(tiny_m3) and len(before) == 16  # the place does not matter
    (model / "README.md").write_text("about the model")
    assert checkpoints.fingerprint(model) == before
    content = bytearray((model / name).read_bytes())
    content[len(content) // 2] ^= 1
    (model / name).write_bytes(content)
    changed = checkpoints.fingerprint(model)
    assert changed != before
    if name in ("colbert_linear.pt", "modules.json"):
        (model / name).unlink()
        assert checkpoints.fingerprint(model) not in (before, changed)


def test_copy_companions_takes_everything_but_weights(tiny_m3, tmp_path):
    base = shutil.copytree(tiny_m3, tmp_path / "base")
    for name in ("onnx/config.json", ".cache/x.json", "model.safetensors", "README.md", "imgs/a.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    checkpoints.copy_companions(base, tmp_path / "copy")
    expected = {name for name, content in tree(tiny_m3).items() if content is not None} - {
        "pytorch_model.bin"
    }
    copied = {name: content for name, content in tree(tmp_path / "copy").items() if content is not None}
    assert copied.keys() == expected
    assert all(content == (tiny_m3 / name).read_bytes() for name, content in copied.items())


# ---------------------------------------------------------------- the state of a run


def test_state_round_trip(tmp_path):
    assert checkpoints.load_state(tmp_path) is None
    checkpoints.save_state(tmp_path, STATE)
    assert kill_worker.same_state(checkpoints.load_state(tmp_path), STATE)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes", "code inside"])
def test_a_damaged_state_is_one_error_with_file_and_remedy(tmp_path, damage):
    checkpoints.save_state(tmp_path, STATE)
    path = tmp_path / "resume.pt"
    if damage == "code inside":  # a pickle that would run a command when loaded without weights_only
        torch.save({"x": _Command(tmp_path / "ran")}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[:-1000], "empty": b"", "other bytes": b"\0" * 1000}[damage])
    with pytest.raises(AssetError, match="(?s)resume.pt is damaged .*Delete it to train from the start"):
        checkpoints.load_state(tmp_path)
    assert path.exists() and not (tmp_path / "ran").exists()


class _Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("size", [0, 1000, 200_000])
def test_a_disk_that_fills_up_within_the_state_keeps_the_last_one(tmp_path, size):
    checkpoints.save_state(tmp_path, STATE)
    with pytest.raises((OSError, RuntimeError)), largest_file(size):
        checkpoints.save_state(tmp_path, {**STATE, "update": 4})
    assert tree(tmp_path).keys() == {"resume.pt"}
    assert kill_worker.same_state(checkpoints.load_state(tmp_path), STATE)


def test_a_kill_within_the_state_keeps_the_last_one(tmp_path):
    checkpoints.save_state(tmp_path, STATE)
    die("checkpoints.os.fsync = die\ncheckpoints.save_state(sys.argv[1], {'update': 4})", tmp_path)
    assert len(tree(tmp_path)) == 2  # the half-written neighbour
    assert checkpoints.load_state(tmp_path)["update"] == 3
    checkpoints.remove_leftovers(tmp_path)
    assert tree(tmp_path).keys() == {"resume.pt"}


def test_prune_keeps_the_newest_by_number(tmp_path):
    for n in (1, 2, 9, 10, 11):
        (tmp_path / f"checkpoint-epoch-{n}").mkdir()
    (tmp_path / "checkpoint-epoch-x").mkdir()
    (tmp_path / "final_model").mkdir()
    assert checkpoints.checkpoint_epochs(tmp_path) == [1, 2, 9, 10, 11]
    assert checkpoints.prune(tmp_path, 2) == [1, 2, 9]
    assert checkpoints.checkpoint_epochs(tmp_path) == [10, 11]
    assert checkpoints.prune(tmp_path, 5) == []
    assert checkpoints.prune(tmp_path, 0) == [10, 11]
    assert tree(tmp_path).keys() == {"checkpoint-epoch-x", "final_model"}


def test_an_interrupted_prune_never_looks_like_a_checkpoint(tmp_path, monkeypatch):
    make_folder(tmp_path / "checkpoint-epoch-1", "w")
    monkeypatch.setattr(checkpoints.shutil, "rmtree", full_disk)
    with pytest.raises(OSError):
        checkpoints.prune(tmp_path, 0)
    monkeypatch.undo()
    assert checkpoints.checkpoint_epochs(tmp_path) == []
    checkpoints.remove_leftovers(tmp_path)
    assert tree(tmp_path) == {}


def test_the_space_asked_for_covers_what_a_run_really_holds(tiny_bert, pairs, tmp_path, monkeypatch):
    """The largest sum of file sizes at any rename of a run, hard links counted once."""
    from embedding_tutorial import finetune

    highest = 0

    def watch(name):
        real = getattr(os, name)

        def rename(*args):
            nonlocal highest
            sizes = {s.st_ino: s.st_size for s in (p.lstat() for p in (tmp_path / "run").rglob("*"))}
            highest = max(highest, sum(sizes.values()))
            return real(*args)

        monkeypatch.setattr(checkpoints.os, name, rename)

    watch("rename"), watch("replace")
    config = finetune.TrainConfig(epochs=4, batch_size=8, keep_checkpoints=2, max_length=64)
    finetune.train(tiny_bert, pairs[:16], pairs[28:], config, tmp_path / "run", progress=False)
    weights = (tiny_bert / "model.safetensors").stat().st_size
    companions = sum(p.stat().st_size for p in tiny_bert.rglob("*") if p.is_file()) - weights
    # tokenizers are small beside real weights, not beside these: five folders may hold a copy of them
    assert highest < checkpoints.run_size_gb(weights, 2) * 1e9 + 6 * companions
    assert highest > 6 * weights  # or the watch saw nothing


def test_require_run_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: usage(10**12, 0, 11 * 10**9))
    checkpoints.require_run_space(tmp_path, 10**9, keep=2)  # 2 + 3 + 6 copies: just fits
    with pytest.raises(AssetError, match="needs 12.0 GB of free disk here, there are 11.0 GB. Free 1.0 GB"):
        checkpoints.require_run_space(tmp_path / "not" / "there", 10**9, keep=3)
    assert tree(tmp_path) == {}


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
    "damage", ["truncated", "empty", "one bit", "checksum missing", "other checksum", "other rows"]
)
def test_a_damaged_shard_is_reported_and_encoded_again(store, damage, capsys):
    store.save("corpus-0", vectors())
    store.save("corpus-1", vectors(1))
    shard, check = store.folder / "corpus-0.npy", store.folder / "corpus-0.sha256"
    content = shard.read_bytes()
    if damage in ("truncated", "empty", "one bit"):
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        shard.write_bytes({"truncated": content[:-100], "empty": b"", "one bit": flipped}[damage])
    elif damage == "checksum missing":
        check.unlink()
    elif damage == "other checksum":
        check.write_bytes(b"\xff\xfe")
    assert store.load("corpus-0", 49 if damage == "other rows" else 50) is None
    said = capsys.readouterr().out
    assert "Shard corpus-0.npy is damaged (" in said and "encoding it again" in said
    assert store.load("corpus-0", 50) is None and capsys.readouterr().out == ""  # it is gone
    assert np.array_equal(store.load("corpus-1", 50), vectors(1))  # and only it
    store.save("corpus-0", vectors())
    assert np.array_equal(store.load("corpus-0", 50), vectors())


def test_a_shard_that_is_a_pickle_is_not_opened(store, tmp_path):
    np.save(
        store.folder / "evil.npy", np.array([_Command(tmp_path / "ran")], dtype=object), allow_pickle=True
    )
    (store.folder / "evil.sha256").write_text(assets.sha256_of(store.folder / "evil.npy"))
    assert store.load("evil", 1) is None and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_while_a_shard_is_saved_leaves_no_wrong_vectors(store, tmp_path, call, capsys):
    store.save("a", vectors())
    code = (
        "import numpy as np\n"
        "store = checkpoints.VectorStore(sys.argv[1], {'model': 'a', 'max_length': 512})\n"
        f"checkpoints.os.{call} = die\nstore.save(sys.argv[2], np.ones((50, 8), np.float32))"
    )
    die(code, tmp_path / "vectors", "a")
    die(code, tmp_path / "vectors", "b")
    again = VectorStore(tmp_path / "vectors", {"model": "a", "max_length": 512})
    assert not [name for name in tree(again.folder) if name.endswith(".tmp")]
    assert again.load("b", 50) is None
    assert np.array_equal(again.load("a", 50), vectors())


def test_a_disk_full_while_a_shard_is_saved_leaves_the_old_one(store):
    store.save("a", vectors())
    with pytest.raises(OSError), largest_file(300):
        store.save("a", np.ones((50, 8), np.float32))
    assert np.array_equal(store.load("a", 50), vectors())
    assert tree(store.folder).keys() == {"a.npy", "a.sha256", "identity.json"}


def test_text_key_depends_on_texts_order_and_boundaries():
    keys = [checkpoints.text_key(t) for t in (["a", "b"], ["b", "a"], ["ab"], ["ab", ""], ["a", "b", ""], [])]
    assert len(set(keys)) == 6 and checkpoints.text_key(iter(["a", "b"])) == keys[0]
