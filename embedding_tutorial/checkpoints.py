"""Files that are either complete or absent: atomic writes, checkpoints, resume, vectors on disk.

Every write goes to a temporary neighbour first, is flushed to the disk and then renamed. A rename
within one folder is atomic on POSIX and on NTFS, so a killed process or a full disk leaves the
previous version readable and at most a `.tmp` leftover, which `remove_leftovers` deletes.
"""

import hashlib
import io
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from .assets import AssetError, require_disk, sha256_of

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD_FILES = ("colbert_linear.pt", "sparse_linear.pt")
# Files of a model folder that change the vectors it gives, besides the weights.
IDENTITY_FILES = ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json",
                  "sentence_bert_config.json", "config_sentence_transformers.json", "sentencepiece.bpe.model",
                  *HEAD_FILES)


# ---------------------------------------------------------------- files

@contextmanager
def atomic_file(path, mode="wb"):
    """Yield an open temporary file that becomes `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented UTF-8 JSON, atomically. NaN is refused: it is not JSON."""
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path):
    """Read a JSON file. Raises AssetError that names the file when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssetError(f"{path} does not exist. Run the cell (or notebook) that writes it first.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AssetError(f"{path} is not readable as JSON ({error}). Delete it and run again.") from error


@contextmanager
def atomic_folder(path):
    """Yield a temporary folder that becomes `path`, replacing an older one, when the block succeeds.

    A folder cannot be swapped in one step, so the old one is first renamed to `.NAME.old`; `recover`
    puts it back if the process dies between the two renames.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _sibling(path, "tmp"), _sibling(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover(path):
    """Undo a folder swap that a kill interrupted: put `.NAME.old` back where `path` is missing."""
    path = Path(path)
    old = _sibling(path, "old")
    if old.exists() and not path.exists():
        os.rename(old, path)
    return path


def remove_leftovers(folder):
    """Delete temporary files and folders that killed runs left in `folder`; recover swapped folders."""
    for entry in Path(folder).glob(".*.old"):
        recover(entry.with_name(entry.name[1:-len(".old")]))
    for entry in [*Path(folder).glob(".*.tmp"), *Path(folder).glob(".*.old")]:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def move_aside(folder, target):
    """Rename a folder to `target`, replacing what an earlier call left there."""
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)


def _sibling(path, ending):
    return path.with_name(f".{path.name}.{ending}")


# ---------------------------------------------------------------- models

def weights_file(folder):
    """The weights of a model folder. Raises AssetError when there are none."""
    for name in WEIGHT_FILES:
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise AssetError(f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}: it is no complete model. "
                     "Delete the folder and run the cell that makes it again.")


def fingerprint(folder):
    """16 hex digits that change whenever anything that shapes the model's vectors changes."""
    digest = hashlib.sha256(sha256_of(weights_file(folder)).encode())
    for name in IDENTITY_FILES:
        if (Path(folder) / name).exists():
            digest.update(f"{name} {sha256_of(Path(folder) / name)}".encode())
    return digest.hexdigest()[:16]


def copy_companions(base, target):
    """Copy what a model folder needs besides the weights: configuration, tokenizer, pooling, M3 heads."""
    base, target = Path(base), Path(target)
    for file in sorted(base.rglob("*")):
        relative = file.relative_to(base)
        hidden = any(part.startswith(".") for part in relative.parts)
        wanted = file.suffix in {".json", ".txt", ".model"} or file.name in HEAD_FILES
        if file.is_file() and wanted and not hidden and relative.parts[0] not in {"onnx", "imgs"}:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / relative)


def link_folder(source, target):
    """Make `target` a copy of `source` with hard links: a second name, no second gigabyte."""
    with atomic_folder(target) as folder:
        def link(src, dst):
            try:
                os.link(src, dst)
            except OSError:  # a file system without hard links
                shutil.copyfile(src, dst)
        shutil.copytree(source, folder, copy_function=link, dirs_exist_ok=True)


# ---------------------------------------------------------------- a training run on disk

def save_state(run_dir, state):
    """Write everything a run needs to go on (tensors, numbers, lists, strings) to `resume.pt`."""
    with atomic_file(Path(run_dir) / "resume.pt") as file:
        torch.save(state, file)


def load_state(run_dir):
    """The last complete state of a run, or None. Raises AssetError when the file is damaged."""
    path = Path(run_dir) / "resume.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file; all mean the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AssetError(f"{path} is damaged ({reason}). Delete it to train from the start.") from error


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
        doomed = _sibling(folder, "tmp")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    return gone


def run_size_gb(model_bytes, keep):
    """Gigabytes a training run may hold at once: checkpoints, final model, two states of three copies.

    `best_checkpoint` is hard links and may outlive its epoch's folder, hence one more copy. AdamW keeps
    two moments per weight, so a state is three times the model; the new one is written before the old
    one goes.
    """
    return (keep + 3 + 2 * 3) * model_bytes / 1e9


def require_run_space(run_dir, model_bytes, keep):
    """Raise AssetError before training when the disk cannot hold what the run will write."""
    require_disk(run_dir, run_size_gb(model_bytes, keep), "checkpoints, the final model and the resume state")


# ---------------------------------------------------------------- vectors on disk

class VectorStore:
    """Shards of embeddings, each its own atomic `.npy` file, under a folder named by `identity`.

    identity: a dict of everything that changes a vector (model fingerprint, prompt, maximum length,
    precision, ...). Two identities never share a folder, so one model cannot read another's vectors;
    mteb's CachedEmbeddingWrapper keys by task and text alone.
    """

    def __init__(self, root, identity):
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        self.folder = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (self.folder / "identity.json").exists():
            write_json(self.folder / "identity.json", identity)
        remove_leftovers(self.folder)

    def load(self, key, rows):
        """The shard `key` as a float32 array of `rows` rows, or None if absent or damaged.

        A damaged shard (truncated, wrong shape, wrong checksum) is deleted and reported: it is encoded
        again, and only it.
        """
        path, check = self.folder / f"{key}.npy", self.folder / f"{key}.sha256"
        if not path.exists():
            return None
        try:
            if check.read_text() != sha256_of(path):
                raise ValueError("its checksum differs")
            vectors = np.load(path, allow_pickle=False)
            if vectors.ndim != 2 or len(vectors) != rows:
                raise ValueError(f"it holds {vectors.shape} instead of {rows} rows")
            return vectors
        except (OSError, ValueError, EOFError) as error:
            print(f"Shard {path.name} is damaged ({error}): encoding it again.")
            with suppress(FileNotFoundError):
                path.unlink()
            return None

    def save(self, key, vectors):
        """Write a shard atomically, its checksum first: a shard without one counts as damaged."""
        path = self.folder / f"{key}.npy"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.save(buffer := io.BytesIO(), vectors)  # np.save to a file misses a full disk
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            with atomic_file(self.folder / f"{key}.sha256", "w") as file:
                file.write(sha256_of(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def text_key(texts):
    """16 hex digits for a list of texts, in order (separator included, so boundaries count)."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    return digest.hexdigest()[:16]
