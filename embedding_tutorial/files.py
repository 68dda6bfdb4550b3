"""Files that are either complete or absent, locks, paths as a reader types them, hashes, and free disk space.

Every write goes to a temporary neighbour first, is flushed to the disk and then renamed. A rename
within one folder is atomic on POSIX and on NTFS, so a killed process or a full disk leaves the
previous version readable and at most a `.tmp` leftover, which `remove_leftovers` deletes. The neighbour's
name holds the process that writes it: no two share one, and nobody deletes what a living one is writing.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 5  # for another process to leave a folder, before it is named
TOKEN = secrets.token_hex(4)  # two machines that share a folder may both have a process of one number
LEFTOVER = re.compile(r"\.(.+?)(?:\.(\d+)(?:-[0-9a-f]{8})?)?\.(tmp|old)")  # name, process, ending
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, 112}  # the last one is Windows' own number
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


class TutorialError(RuntimeError):
    """Something that a reader can put right: a file, a setting, a download. The message says how."""


def relative(path):
    """A path as a reader types it in the repository's folder: relative inside it, else whole."""
    path = Path(path)
    whole = path.absolute()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)


def disk_trouble(error):
    """(whether the disk is full, the system's error) where an error comes from a disk that takes no more
    or lets nobody write, else None. Also one that a library hides: torch and safetensors do."""
    while error is not None:
        numbers = re.findall(r"(?:Errno|os error|WinError) (\d+)", str(error))
        codes = {getattr(error, "errno", None), *map(int, numbers)}
        if codes & (FULL | CLOSED):
            return bool(codes & FULL), error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def disk_errors_named(path, temporary=None):
    """Turn a full or closed disk, met while `path` is written, into a TutorialError with the remedy.

    temporary: where the new version grows; with the size of the old one it tells how much space is missing.
    """
    try:
        yield
    except TutorialError:
        raise
    except Exception as error:
        if (trouble := disk_trouble(error)) is None:
            raise
        full, cause = trouble
        reason = temporary and getattr(cause, "strerror", None) or cause  # without the temporary name
        if not full:
            raise TutorialError(
                f"{relative(path)} could not be written: the system refuses it ({reason}). Make the folder "
                "writable, or close the program that has it open; then run this again."
            ) from error
        free, written = free_disk_gb(path), _size_gb(temporary) if temporary else 0
        missing = _size_gb(path) - written - free if temporary else 0
        space = f"{1000 * free:,.1f} MB are free"
        space += f", {1000 * missing:,.1f} MB are missing" if missing > 0 else ""
        raise TutorialError(
            f"{relative(path)} could not be written: the disk is full ({reason}; {space}). Free some space, "
            "or move the folder to a larger disk and leave a link; then run this again. What was complete "
            "before is still there."
        ) from error


def _size_gb(path):
    """GB (1e9 bytes) of a file, or of all files in a folder; 0 where it is absent."""
    path = Path(path)
    return path.stat().st_size / 1e9 if path.is_file() else folders_gb(path)


@contextmanager
def only_process(path):
    """Keep every other process out of a folder (or away from a file) while the block runs.

    Raises TutorialError, after WAIT_S, that names the other one as it described itself beside the lock.
    The lock is the operating system's: a killed process holds nothing.
    """
    import filelock

    path = Path(os.path.realpath(path))  # two names of one folder are one lock
    lock_file, owner = path.with_name(f".{path.name}.lock"), path.with_name(f".{path.name}.owner")
    with disk_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(lock_file, timeout=WAIT_S)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise TutorialError(
                f"Another process is working on {relative(path)}: {_other_process(owner)}. "
                "Wait until it has ended, or stop it; then run this again."
            ) from None
        try:
            owner.write_text(_this_process(), encoding="utf-8")
            yield
        finally:
            owner.unlink(missing_ok=True)
            if os.name != "nt":  # where no open file can be deleted: the empty one stays
                lock_file.unlink(missing_ok=True)  # while it is held: who waits for it makes a new one
            lock.release()


def _this_process():
    import psutil

    command = " ".join(sys.argv)[:200]
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process().create_time()))
    return f"number {os.getpid()} on {socket.gethostname()}, started {started}: {command}"


def _other_process(owner):
    """What the holder of a lock wrote about itself; nothing known in the moment before it has."""
    try:
        return owner.read_text(encoding="utf-8") or "it has just begun"
    except OSError:
        return "it has just begun"


@contextmanager
def atomic_file(path, mode="wb"):
    """Yield an open temporary file that becomes `path` when the block ends without an error.

    Raises TutorialError where the disk is full or can't be written.
    """
    path = Path(path)
    temporary = temporary_name(path, "tmp")
    try:
        with disk_errors_named(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, path.name)
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        _remove(temporary)


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

    A folder cannot be swapped in one step, so the old one is first renamed to `.NAME.PROCESS.old`; `recover`
    puts it back if the process dies between the two renames. Raises TutorialError as `atomic_file` does.
    """
    path = Path(path)
    temporary, old = temporary_name(path, "tmp"), temporary_name(path, "old")
    try:
        with disk_errors_named(path, temporary):
            remove_leftovers(path.parent, path.name)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb+") as handle:
                        os.fsync(handle.fileno())
            _swap(temporary, path, old)
    finally:
        _remove(temporary)


def _swap(new, path, old):
    """Put the folder `new` in the place of `path`, if there is one; another process may do so as well."""
    try:
        while new.exists():
            with contextlib.suppress(FileNotFoundError):  # nothing to replace
                os.rename(path, old)
            try:
                os.rename(new, path)
            except OSError:
                if not path.exists():
                    raise
                _remove(old)  # another process was quicker: now replace its version
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        _remove(old)


def recover(path):
    """Undo a folder swap that a kill interrupted: put the old version back where `path` is missing."""
    path = Path(path)
    for entry, name, ending in _leftovers(path.parent):
        if ending == "old" and name == path.name and not path.exists():
            os.rename(entry, path)
    return path


def remove_leftovers(folder, only=None):
    """Delete temporary files and folders that dead processes left in `folder`; recover swapped folders.

    only: the name of one file or folder whose leftovers are meant; None: all.
    """
    with disk_errors_named(folder):
        for entry, name, ending in _leftovers(folder):
            if only not in (None, name):
                continue
            if ending == "old":
                recover(entry.with_name(name))
            _remove(entry)


def _leftovers(folder):
    """[(path, the name that it would have got, "tmp" or "old")] of what no living process is writing."""
    found = [(entry, LEFTOVER.fullmatch(entry.name)) for entry in sorted(Path(folder).glob(".*"))]
    return [(entry, m[1], m[3]) for entry, m in found if m and not (m[2] and _works_elsewhere(int(m[2])))]


def _works_elsewhere(process):
    """Whether this number is another process that lives. What this one left, it left: it writes in order."""
    import psutil

    try:
        return process != os.getpid() and psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _remove(path):
    """Delete a file or a whole folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def move_aside(folder, target):
    """Rename a folder to `target`, replacing what an earlier call left there."""
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)


def temporary_name(path, ending):
    """This process's own hidden neighbour of a path: `.NAME.PROCESS-TOKEN.tmp`, or `.old`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{TOKEN}.{ending}")


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


def markdown_table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


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
