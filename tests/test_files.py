"""Complete or absent: what stays on disk when a write fails or a process dies; paths, hashes, free space."""

import ast
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import die, full_disk, little_space, make_folder, tree

from embedding_tutorial import assets, files, network
from embedding_tutorial.files import (
    ROOT,
    TutorialError,
    atomic_file,
    atomic_folder,
    data_files,
    file_problem,
    free_disk_gb,
    link_folder,
    move_aside,
    read_json,
    recover,
    relative,
    remove_leftovers,
    require_disk,
    sha256_of,
    text_key,
    write_json,
)

# ---------------------------------------------------------------- files


@pytest.mark.parametrize("mode, content", [("wb", b"new \xff"), ("w", "neu \u00fc \u2028")])
def test_atomic_file_writes_all_of_it(tmp_path, mode, content):
    path = tmp_path / "made" / "a.txt"
    with atomic_file(path, mode) as file:
        file.write(content)
        assert not path.exists()
    assert path.read_bytes() == (content if mode == "wb" else content.encode())
    assert tree(tmp_path / "made").keys() == {"a.txt"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), atomic_file(tmp_path / "a.txt", "w") as file:
        file.write("half of the n")
        file.flush()
        raise error
    assert tree(tmp_path) == {"a.txt": b"old"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_full_at_the_last_moment_leaves_the_old_file_alone(tmp_path, call, monkeypatch):
    (tmp_path / "a.json").write_text("[1]")
    monkeypatch.setattr(files.os, call, full_disk)
    with pytest.raises(TutorialError, match="a.json could not be written: the disk is full .*No space left"):
        write_json(tmp_path / "a.json", [2])
    assert tree(tmp_path) == {"a.json": b"[1]"}


def test_a_file_is_flushed_to_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Without that order, a power cut may leave an empty file under the final name."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            files.os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]
        )
    write_json(tmp_path / "a.json", {})
    assert calls == ["fsync", "replace"]


def test_json_round_trip_and_its_refusals(tmp_path):
    value = {"a": [1, 2.5, None], "查询": "é \u2028"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_bytes())
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == value
    assert tree(tmp_path).keys() == {"a.json"}


# ---------------------------------------------------------------- folders


def test_atomic_folder_replaces_the_whole_folder(tmp_path):
    make_folder(tmp_path / "model", "one")
    (tmp_path / "model" / "stale").write_text("of the old version")
    make_folder(tmp_path / "model", "two")
    assert tree(tmp_path) == {"model": None, "model/sub": None, "model/sub/file": b"two"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_filling_leaves_the_old_folder_alone(tmp_path, error):
    make_folder(tmp_path / "model", "old")
    before = tree(tmp_path)
    with pytest.raises(error), atomic_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("x")
        raise error
    assert tree(tmp_path) == before


def test_a_disk_full_at_the_flush_leaves_the_old_folder_alone(tmp_path, monkeypatch):
    make_folder(tmp_path / "model", "old")
    before = tree(tmp_path)
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(TutorialError, match="model could not be written: the disk is full .*No space left"):
        make_folder(tmp_path / "model", "new")
    assert tree(tmp_path) == before


MAKE = (
    "def make(path, text):\n"
    "    with files.atomic_folder(path) as f:\n"
    "        (f / 'sub').mkdir(); (f / 'sub' / 'file').write_text(text)\n"
    "        if text == 'die': die()\n"
)


@pytest.mark.parametrize(
    "moment, survivor",
    [
        ("make(Path(sys.argv[1]), 'die')", b"old"),  # while filling
        ("files.os.rename = die; make(Path(sys.argv[1]), 'new')", b"old"),  # before the swap
        (
            "real = os.rename\n"
            "def second(a, b):\n    die() if Path(b).name == 'model' else real(a, b)\n"
            "files.os.rename = second; make(Path(sys.argv[1]), 'new')",
            b"old",
        ),  # within the swap
        (
            "real = files.shutil.rmtree\n"
            "def rmtree(p, **k):\n    die() if p.name.endswith('.old') and p.exists() else real(p, **k)\n"
            "files.shutil.rmtree = rmtree; make(Path(sys.argv[1]), 'new')",
            b"new",
        ),  # after it
    ],
)
def test_a_kill_in_a_folder_swap_leaves_one_complete_version(tmp_path, moment, survivor):
    make_folder(tmp_path / "model", "old")
    die(MAKE + moment, tmp_path / "model")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"model": None, "model/sub": None, "model/sub/file": survivor}
    make_folder(tmp_path / "model", "newer")  # and the next write works
    assert tree(tmp_path)["model/sub/file"] == b"newer"


def test_recover(tmp_path):
    (tmp_path / ".model.old").mkdir()
    assert recover(tmp_path / "model") == tmp_path / "model"
    assert (tmp_path / "model").is_dir() and not (tmp_path / ".model.old").exists()
    (tmp_path / ".model.old").mkdir()
    (tmp_path / "model" / "new").touch()
    recover(tmp_path / "model")  # the swap was complete: nothing to undo
    assert (tmp_path / "model" / "new").exists()


def test_remove_leftovers_touches_nothing_else(tmp_path):
    (tmp_path / ".resume.pt.123.tmp").touch()
    (tmp_path / ".fine-tuned.tmp" / "sub").mkdir(parents=True)
    (tmp_path / ".keep").touch()
    (tmp_path / "notes.tmp").touch()
    (tmp_path / "old.old").touch()
    remove_leftovers(tmp_path)
    assert tree(tmp_path).keys() == {".keep", "notes.tmp", "old.old"}


def test_what_a_living_process_is_writing_is_not_deleted(tmp_path):
    """Two processes and one folder: cleaning up in one must not take the other's half-written model."""
    code = "with files.atomic_folder(Path(sys.argv[1])) as f:\n    (f / 'w').touch(); print(); input()"
    with other_process(code, tmp_path / "model") as other:
        remove_leftovers(tmp_path)
        (written,) = tmp_path.rglob("w")
        make_folder(tmp_path / "model", "mine")
        other.communicate("\n")
        assert other.returncode == 0 and written.parent.name.startswith(f".model.{other.pid}-")
    assert tree(tmp_path) == {"model": None, "model/w": b""}  # the last one, whole


@pytest.mark.parametrize("signal", ["kill", "in the swap"])
def test_what_a_dead_process_was_writing_is_cleaned_up(tmp_path, signal):
    make_folder(tmp_path / "model", "old")
    code = "with files.atomic_folder(Path(sys.argv[1])) as f:\n    (f / 'w').touch(); print(); input()"
    if signal == "in the swap":  # killed between its two renames
        real = "real = os.rename\nfiles.os.rename = lambda a, b: real(a, b) if '.old' in str(b) else die()\n"
        die(real + "with files.atomic_folder(Path(sys.argv[1])) as f: pass", tmp_path / "model")
        assert not (tmp_path / "model").exists()
    else:
        with other_process(code, tmp_path / "model"):
            pass  # killed at the end of the block
        assert len([*tmp_path.iterdir()]) == 2
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"model": None, "model/sub": None, "model/sub/file": b"old"}


# ---------------------------------------------------------------- locks

HOLD = "with files.only_process(sys.argv[1]):\n    print(flush=True); input()"


@contextlib.contextmanager
def other_process(code, *args):
    """A process that runs `code` up to the first line that it prints; killed at the end of the block."""
    program = "import os, sys\nfrom pathlib import Path\nfrom embedding_tutorial import files\n" + code
    command = [sys.executable, "-u", "-c", program, *map(str, args)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == "\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_told_of_the_first_and_a_killed_one_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT_S", 0.2)
    with other_process(HOLD, tmp_path / "run") as other:
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "run")
        for name in (tmp_path / "run", link):
            with pytest.raises(TutorialError) as error, files.only_process(name):
                raise AssertionError("entered")
            told = str(error.value)
            assert "run" in told and f"number {other.pid} on {socket.gethostname()}, started 20" in told
            assert "Wait until it has ended, or stop it" in told
        remove_leftovers(tmp_path)  # a lock is no leftover
        with pytest.raises(TutorialError), files.only_process(tmp_path / "run"):
            pass
        link.unlink()
    assert tree(tmp_path).keys() == {".run.lock", ".run.owner"}
    with files.only_process(tmp_path / "run"), files.only_process(tmp_path / "other"):
        assert str(os.getpid()) in (tmp_path / ".run.owner").read_text()
    assert tree(tmp_path) == {}


def test_whoever_waits_a_moment_comes_next(tmp_path):
    with other_process(HOLD, tmp_path / "run") as other:
        threading.Timer(0.3, other.kill).start()
        with files.only_process(tmp_path / "run"):
            assert other.wait() != 0
    assert tree(tmp_path) == {}


def test_an_error_or_a_stop_lets_go_of_the_lock(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), files.only_process(tmp_path / "run"):
            raise error
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("number, said", [(28, "the disk is full"), (13, "the system refuses it"), (5, None)])
def test_an_error_of_the_disk_within_the_lock_gets_a_name(tmp_path, number, said):
    with pytest.raises(TutorialError if said else OSError, match=said and f"run could not be.*{said}"):
        with files.only_process(tmp_path / "run"):
            raise OSError(number, os.strerror(number))
    with pytest.raises(TutorialError, match="model.safetensors could not be written: the disk is full"):
        with atomic_file(tmp_path / "model.safetensors"):  # in the words of a library
            raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_a_full_disk_says_how_much_is_missing(tmp_path, monkeypatch):
    (tmp_path / "state.pt").write_bytes(b"x" * 5_000_000)
    little_space(monkeypatch, free=1_000_000)
    with pytest.raises(TutorialError, match=r"1.0 MB are free, 2.0 MB are missing\)"):
        with atomic_file(tmp_path / "state.pt") as file:
            file.write(b"x" * 2_000_000)
            file.flush()
            full_disk()
    assert (tmp_path / "state.pt").stat().st_size == 5_000_000


def test_move_aside(tmp_path):
    make_folder(tmp_path / "run", "new")
    make_folder(tmp_path / "run.previous", "older")
    move_aside(tmp_path / "run", tmp_path / "run.previous")
    assert tree(tmp_path) == {"run.previous": None, "run.previous/sub": None, "run.previous/sub/file": b"new"}


def test_link_folder_copies_without_the_space_and_survives_its_source(tmp_path):
    make_folder(tmp_path / "checkpoint", "weights")
    make_folder(tmp_path / "best", "an older best")
    link_folder(tmp_path / "checkpoint", tmp_path / "best")
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

    monkeypatch.setattr(files.os, "link", no_link)
    link_folder(tmp_path / "checkpoint", tmp_path / "best")
    assert (tmp_path / "best" / "sub" / "file").read_text() == "weights"


# ---------------------------------------------------------------- hashes, paths, space


def test_text_key_depends_on_texts_order_and_boundaries():
    keys = [text_key(t) for t in (["a", "b"], ["b", "a"], ["ab"], ["ab", ""], ["a", "b", ""], [])]
    assert len(set(keys)) == 6 and text_key(iter(["a", "b"])) == keys[0]


def test_sha256_of_crosses_blocks(tmp_path):
    data = bytes(range(256)) * 9000  # 2.3 MB
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_relative_is_what_a_reader_types_in_the_repository(monkeypatch, tmp_path):
    for where in (ROOT, tmp_path):  # wherever the process stands
        monkeypatch.chdir(where)
        assert relative(ROOT / "models" / "run") == "models/run"
    assert relative(tmp_path / "run") == str(tmp_path / "run")  # outside: the whole path, always
    assert relative("run") == str(tmp_path / "run")
    monkeypatch.chdir(ROOT)
    assert relative("models/run") == "models/run" and relative(ROOT) == "."
    assert relative(f"{ROOT}-other/run") == f"{ROOT}-other/run"  # the same beginning is not the same folder


def test_data_files_are_the_tables_of_the_parts_in_order(tmp_path):
    names = [
        "corpus/dev-00001-of-00002.parquet",
        "corpus/dev-00000-of-00002.parquet",
        "corpus/README.md",
        "queries/deep/down/queries.jsonl.gz",
        "queries/queries.jsonl",
        "qrels/dev.tsv",
        "other/x.parquet",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = data_files(tmp_path, "queries", "corpus", "qrels", "absent")
    assert [str(file.relative_to(tmp_path)) for file in found] == [names[3], names[4], names[1], names[0]]
    assert data_files(str(tmp_path), "corpus") == found[2:] and data_files(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("absent", None, "is missing"),
        ("empty.json", b"", "is empty"),
        (
            "any.txt",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "is a Git LFS pointer, not the file itself",
        ),
        ("cut.parquet", b"PAR1 half", "is cut short at 9 bytes"),
        ("whole.parquet", b"PAR1 all of it PAR1", None),
        ("cut.bin", b"PK\x03\x04 half", "is cut short at 9 bytes"),
        ("old.bin", b"\x80\x02 a pickle of before", None),
        ("other.json", b"{", None),  # its reader tells
        ("cut.safetensors", (40).to_bytes(8, "little") + b"{", "is cut short at 9 bytes"),
        ("no.safetensors", (2).to_bytes(8, "little") + b"{]", "has no safetensors header"),
    ],
)
def test_file_problem(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert file_problem(tmp_path / name, "the file") == (problem and f"the file {problem}")


def test_free_disk_of_a_folder_that_does_not_exist_yet(monkeypatch, tmp_path):
    assert free_disk_gb(tmp_path / "a" / "b") == pytest.approx(
        shutil.disk_usage(tmp_path).free / 1e9, rel=0.01
    )
    little_space(monkeypatch, free=1.5e9)
    assert free_disk_gb(tmp_path / "a" / "b") == 1.5


def test_require_disk(monkeypatch, tmp_path):
    little_space(monkeypatch, free=1.5e9)
    require_disk(tmp_path, 1.5, "a checkpoint")
    with pytest.raises(TutorialError) as error:
        require_disk(tmp_path / "run", 4, "a checkpoint")
    for part in (str(tmp_path / "run"), "a checkpoint needs 4.0 GB", "there are 1.5 GB", "Free 2.5 GB"):
        assert part in str(error.value)


@pytest.mark.parametrize("module", [files, network, assets])
def test_the_lowest_modules_are_plain(module):
    """They import nothing heavy until a function needs it, and of the package only what lies below."""
    tree = ast.parse(Path(module.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    outside = {name.name for node in imports if isinstance(node, ast.Import) for name in node.names}
    outside |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
    assert {name.split(".")[0] for name in outside} <= set(sys.stdlib_module_names)
    near = [node for node in imports if isinstance(node, ast.ImportFrom) and node.level]
    inside = {node.module for node in near if node.module}
    inside |= {name.name for node in near if not node.module for name in node.names}
    assert inside <= {files: set(), network: {"files"}, assets: {"files", "network"}}[module]
