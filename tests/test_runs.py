"""A training run on disk: its state, its checkpoints, and the space that it asks for."""

import os

import kill_worker
import pytest
import torch
from helpers import Command, die, full_disk, largest_file, little_space, make_folder, tree

from embedding_tutorial import files, finetune, training
from embedding_tutorial.files import TutorialError, remove_leftovers
from embedding_tutorial.runs import (
    checkpoint_epochs,
    load_state,
    prune,
    require_run_space,
    run_size_gb,
    save_state,
)

STATE = {
    "update": 3,
    "weights": {"w": torch.arange(100_000.0)},
    "random": (torch.get_rng_state(), None),
    "history": {"step_losses": [0.5, None]},
}


# ---------------------------------------------------------------- the state of a run


def test_state_round_trip(tmp_path):
    assert load_state(tmp_path) is None
    save_state(tmp_path, STATE)
    assert kill_worker.same_state(load_state(tmp_path), STATE)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes", "code inside"])
def test_a_damaged_state_is_one_error_with_file_and_remedy(tmp_path, damage):
    save_state(tmp_path, STATE)
    path = tmp_path / "resume.pt"
    if damage == "code inside":  # a pickle that would run a command when loaded without weights_only
        torch.save({"x": Command(tmp_path / "ran")}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[:-1000], "empty": b"", "other bytes": b"\0" * 1000}[damage])
    with pytest.raises(TutorialError, match="(?s)resume.pt is damaged .*Delete it to train from the start"):
        load_state(tmp_path)
    assert path.exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 1000, 200_000])
def test_a_disk_that_fills_up_within_the_state_keeps_the_last_one(tmp_path, size):
    save_state(tmp_path, STATE)
    full = "resume.pt could not be written: the disk is full"
    with pytest.raises(TutorialError, match=full), largest_file(size):
        save_state(tmp_path, {**STATE, "update": 4})
    assert tree(tmp_path).keys() == {"resume.pt"}
    assert kill_worker.same_state(load_state(tmp_path), STATE)


def test_a_kill_within_the_state_keeps_the_last_one(tmp_path):
    save_state(tmp_path, STATE)
    code = "files.os.fsync = die\nruns.save_state(sys.argv[1], {'update': 4})"
    die(f"from embedding_tutorial import runs\n{code}", tmp_path)
    assert len(tree(tmp_path)) == 2  # the half-written neighbour
    assert load_state(tmp_path)["update"] == 3
    remove_leftovers(tmp_path)
    assert tree(tmp_path).keys() == {"resume.pt"}


def test_prune_keeps_the_newest_by_number(tmp_path):
    for n in (1, 2, 9, 10, 11):
        (tmp_path / f"checkpoint-epoch-{n}").mkdir()
    (tmp_path / "checkpoint-epoch-x").mkdir()
    (tmp_path / "fine-tuned").mkdir()
    assert checkpoint_epochs(tmp_path) == [1, 2, 9, 10, 11]
    assert prune(tmp_path, 2) == [1, 2, 9]
    assert checkpoint_epochs(tmp_path) == [10, 11]
    assert prune(tmp_path, 5) == []
    assert prune(tmp_path, 0) == [10, 11]
    assert tree(tmp_path).keys() == {"checkpoint-epoch-x", "fine-tuned"}


def test_an_interrupted_prune_never_looks_like_a_checkpoint(tmp_path, monkeypatch):
    make_folder(tmp_path / "checkpoint-epoch-1", "w")
    monkeypatch.setattr(files.shutil, "rmtree", full_disk)
    with pytest.raises(OSError):
        prune(tmp_path, 0)
    monkeypatch.undo()
    assert checkpoint_epochs(tmp_path) == []
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {}


def test_the_space_asked_for_covers_what_a_run_really_holds(tiny_bert, pairs, tmp_path, monkeypatch):
    """The largest sum of file sizes at any rename of a run, hard links counted once."""
    highest, states = 0, []

    def watch(name):
        real = getattr(os, name)

        def rename(*args):
            nonlocal highest
            sizes = {s.st_ino: s.st_size for s in (p.lstat() for p in (tmp_path / "run").rglob("*"))}
            highest = max(highest, sum(sizes.values()))
            states.extend(p.stat().st_size for p in (tmp_path / "run").glob("resume.pt"))
            return real(*args)

        monkeypatch.setattr(files.os, name, rename)

    watch("rename"), watch("replace")
    config = finetune.TrainConfig(epochs=4, batch_size=8, keep_checkpoints=2, max_length=64)
    training.train(tiny_bert, pairs[:16], pairs[28:], config, tmp_path / "run", progress=False)
    weights = (tiny_bert / "model.safetensors").stat().st_size
    companions = sum(p.stat().st_size for p in tiny_bert.rglob("*") if p.is_file()) - weights
    # tokenizers are small beside real weights, not beside these: five folders may hold a copy of them
    state = max(states)
    assert highest < run_size_gb(weights, state, 2) * 1e9 + 6 * companions
    assert highest > 4 * weights + state  # or the watch saw nothing
    whole = sum(w.numel() * 4 for w in training.Encoder(tiny_bert).parameters())
    assert state < 3 * whole  # the rows of other words are not in it


def test_require_run_space(tmp_path, monkeypatch):
    little_space(monkeypatch, free=11 * 10**9)
    require_run_space(tmp_path, 10**9, 35 * 10**8, keep=2)  # 4 models, 2 states of 3.5 GB: just fits
    with pytest.raises(
        TutorialError, match="needs 12.0 GB of free disk here, there are 11.0 GB. Free 1.0 GB"
    ):
        require_run_space(tmp_path / "not" / "there", 10**9, 35 * 10**8, keep=3)
    assert tree(tmp_path) == {}
