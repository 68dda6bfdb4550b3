"""Files that are either complete or absent, paths as a reader types them, hashes, and free disk space.

Every write goes to a temporary neighbour first, is flushed to the disk and then renamed. A rename
within one folder is atomic on POSIX and on NTFS, so a killed process or a full disk leaves the
previous version readable and at most a `.tmp` leftover, which `remove_leftovers` deletes.
"""

import functools
import hashlib
import json
import os
import shutil
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class TutorialError(RuntimeError):
    """Something that a reader can put right: a file, a setting, a download. The message says how."""


def relative(path):
    """A path as a reader types it in the repository's folder: relative inside it, else whole."""
    path = Path(path)
    whole = path.absolute()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)


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
    """Read a JSON file. Raises TutorialError that names the file when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TutorialError(
            f"{path} does not exist. Run the cell (or notebook) that writes it first."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TutorialError(f"{path} is not readable as JSON ({error}). Delete it and run again.") from error


@contextmanager
def atomic_folder(path):
    """Yield a temporary folder that becomes `path`, replacing an older one, when the block succeeds.

    A folder cannot be swapped in one step, so the old one is first renamed to `.NAME.old`; `recover`
    puts it back if the process dies between the two renames.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = temporary_name(path, "tmp"), temporary_name(path, "old")
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
    old = temporary_name(path, "old")
    if old.exists() and not path.exists():
        os.rename(old, path)
    return path


def remove_leftovers(folder):
    """Delete temporary files and folders that killed runs left in `folder`; recover swapped folders."""
    for entry in Path(folder).glob(".*.old"):
        recover(entry.with_name(entry.name[1 : -len(".old")]))
    for entry in [*Path(folder).glob(".*.tmp"), *Path(folder).glob(".*.old")]:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def move_aside(folder, target):
    """Rename a folder to `target`, replacing what an earlier call left there."""
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)


def temporary_name(path, ending):
    """The hidden neighbour `.NAME.tmp` or `.NAME.old` of a path."""
    return path.with_name(f".{path.name}.{ending}")


def link_folder(source, target):
    """Make `target` a copy of `source` with hard links: a second name, no second gigabyte."""
    with atomic_folder(target) as folder:

        def link(src, dst):
            try:
                os.link(src, dst)
            except OSError:  # a file system without hard links
                shutil.copyfile(src, dst)

        shutil.copytree(source, folder, copy_function=link, dirs_exist_ok=True)


def sha256_of(path):
    """Return the sha256 of a file as 64 hex digits, read in blocks of 1 MB. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_once(path):
    """`sha256_of`, computed once per process for a file that stays as it is: same size, times and inode.

    A file written in the last two seconds is hashed each time. It could change again within one tick of the
    file system's clock, and would look the same.
    """
    state = os.stat(path)
    if time.time_ns() - state.st_mtime_ns < 2_000_000_000:
        return sha256_of(path)
    return _remembered_sha256(
        Path(path).absolute(), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino
    )


@functools.cache
def _remembered_sha256(path, *state):
    return sha256_of(path)


def text_key(texts):
    """16 hex digits for a list of texts, in order (separator included, so boundaries count)."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    return digest.hexdigest()[:16]


def data_files(folder, *parts):
    """The Parquet and JSON-lines files under the subfolders `parts` of a data set, sorted."""
    found = [file for part in parts for file in sorted((Path(folder) / part).rglob("*"))]
    return [file for file in found if file.suffix == ".parquet" or ".jsonl" in file.name]


def free_disk_gb(path):
    """Return the free space, in GB (1e9 bytes), of the disk that holds `path`, which need not exist yet."""
    path = Path(path).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def folders_gb(*folders):
    """GB (1e9 bytes) of all files below these folders, of which any may be absent; hard links count once."""
    found = [file.stat() for folder in folders for file in Path(folder).rglob("*") if file.is_file()]
    return sum({(file.st_dev, file.st_ino): file.st_size for file in found}.values()) / 1e9


def require_disk(path, gigabytes, what):
    """Raise `TutorialError` unless `gigabytes` GB are free where `path` is or will be, for `what`."""
    free = free_disk_gb(path)
    if free < gigabytes:
        raise TutorialError(
            f"{path}: {what} needs {gigabytes:.1f} GB of free disk here, there are {free:.1f} GB. "
            f"Free {gigabytes - free:.1f} GB, or move the folder to a larger disk and leave a link."
        )


def file_problem(path, name):
    """Return why a file cannot be whole (missing, empty, a Git LFS pointer, cut short), or None.

    Looks at both ends of the file only, so that it costs nothing on a 2.3 GB one.
    """
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(max(0, size - 4))
        tail = file.read()
    if not head:
        return f"{name} is empty"
    if head.startswith(b"version https://git-lfs"):
        return f"{name} is a Git LFS pointer, not the file itself"
    if path.suffix == ".safetensors":
        expected = _safetensors_bytes(path)
        if expected is None:
            return f"{name} has no safetensors header"
        cut = size < expected
    elif path.suffix == ".parquet":
        cut = tail != b"PAR1"
    else:  # torch.save writes a zip archive, whose directory comes last
        cut = path.suffix in (".bin", ".pt") and head.startswith(b"PK") and not zipfile.is_zipfile(path)
    return f"{name} is cut short at {size:,} bytes" if cut else None


def _safetensors_bytes(path):
    """Return the length a safetensors file must have by its own header (8 bytes of length, JSON, data).

    None where the header is no such thing.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = file.read(header_bytes) if header_bytes < path.stat().st_size else b""
    if not header:
        return 8 + header_bytes
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return 8 + header_bytes + max(ends, default=0)
