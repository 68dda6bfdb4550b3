"""A training run on disk: the state to go on from, the checkpoints that are kept, the space that it needs."""

import os
import re
import shutil
from pathlib import Path

import torch

from .files import TutorialError, atomic_file, folders_gb, require_disk, temporary_name


def save_state(run_dir, state):
    """Write everything a run needs to go on (tensors, numbers, lists, strings) to `resume.pt`."""
    with atomic_file(Path(run_dir) / "resume.pt") as file:
        torch.save(state, file)


def load_state(run_dir):
    """The last complete state of a run, or None. Raises TutorialError when the file is damaged."""
    path = Path(run_dir) / "resume.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file; all mean the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TutorialError(f"{path} is damaged ({reason}). Delete it to train from the start.") from error


def is_complete(run_dir, identity):
    """Whether a run with this identity has ended there. Raises TutorialError where its state is damaged."""
    state = load_state(run_dir)
    return bool(state) and "fine-tuned" in state and state["identity"] == identity


def checkpoint_epochs(run_dir):
    """Epoch numbers of the `checkpoint-epoch-N` folders of a run, ascending."""
    folders = Path(run_dir).glob("checkpoint-epoch-*")
    return sorted(int(m[1]) for m in (re.fullmatch(r"checkpoint-epoch-(\d+)", f.name) for f in folders) if m)


def prune(run_dir, keep):
    """Delete all but the `keep` newest checkpoints; returns the deleted epochs.

    Each is renamed first, so that an interrupted deletion never looks like a checkpoint.
    """
    gone = checkpoint_epochs(run_dir)[:-keep] if keep else checkpoint_epochs(run_dir)
    for epoch in gone:
        folder = Path(run_dir) / f"checkpoint-epoch-{epoch}"
        doomed = temporary_name(folder, "tmp")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    return gone


def keep_weights_only(run_dir):
    """Delete a finished run's checkpoints; `fine-tuned`, its history and its identity stay."""
    prune(run_dir, 0)
    shutil.rmtree(Path(run_dir) / "best_checkpoint", ignore_errors=True)


def run_size_gb(model_bytes, state_bytes, keep):
    """Gigabytes that a training run may hold at once.

    Checkpoints: the `keep` newest, the one being written, the best one (the last epoch's model is the newest,
    by another name). States: the old one goes when the new one is written.
    """
    return ((max(keep, 1) + 2) * model_bytes + 2 * state_bytes) / 1e9


def require_run_space(run_dir, model_bytes, state_bytes, keep, goes_on=False):
    """Raise TutorialError before training when the disk cannot hold what the run will write.

    goes_on: the run continues what lies in its folder, so that this much is there already.
    """
    size = run_size_gb(model_bytes, state_bytes, keep) - (folders_gb(run_dir) if goes_on else 0)
    require_disk(run_dir, size, "checkpoints, the last epoch's model and the resume state")
