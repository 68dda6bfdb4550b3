"""Kills, full disks, closed folders, a clock that goes backwards, two processes at once, damaged files.

    make faults                                    # at most ten minutes on two CPU cores
    python benchmarks/faults.py --only kills two   # a part of it; --share 0.1: a tenth of each

A small model goes through the stages of both notebooks, each in a process of its own that starts from what
the stage before has left. Whatever strikes, the same call afterwards has to end with the same bits as one
that nothing struck, and whoever can't go on has to say so in a TutorialError. A full disk is a Python file
that takes ten bytes; a closed folder is the system's own (root gives up its rights first, which know no
closed folder), and on Windows such a Python file.
"""

import argparse
import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT / "tests"))

import kill_worker  # noqa: E402
import poisoned  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

from embedding_tutorial import encoder, files, reports, retrieval  # noqa: E402
from embedding_tutorial.files import TutorialError, write_json  # noqa: E402
from embedding_tutorial.finetune import evaluate  # noqa: E402
from embedding_tutorial.pocket_task import PocketT2  # noqa: E402
from embedding_tutorial.runs import load_state  # noqa: E402

LENGTH, ONE_EPOCH = 96, kill_worker.dataclasses.replace(kill_worker.CONFIG, epochs=1, save_every=0)
PROCESSES = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


# ---------------------------------------------------------------- the stages of both notebooks


def training(place):
    kill_worker.train(place / "base", place / "run")


def averaging(place):
    reports.averaged_model(place / "base", *kill_worker.run_pairs(), ONE_EPOCH, place / "run", "cpu", runs=2)


def saving(place):
    encoder.save_model(
        retrieval.mixed(place / "base", place / "run" / "averaged", 0.5, LENGTH), place / "merged"
    )


def stored(place):
    made = retrieval.stored_encoder(place / "merged", place / "store", LENGTH, shard_characters=20_000)
    made.tokens_from = 0  # so that the writing of token ids is struck as well
    return made


def encoding(place):
    task = PocketT2()
    task.load_data()
    stored(place)(retrieval.titled(task.dataset["en"]["dev"]["corpus"]))


def scoring(place):
    identity = retrieval.vector_identity(place / "merged", LENGTH, "fp32")
    retrieval.evaluate_retrieval("merged", PocketT2(), identity, stored(place), place / "store")


def export(place):
    from nbdev.export import nb_export

    for notebook in sorted(common.ROOT.glob("0*.ipynb")):
        nb_export(notebook, lib_path=place / "export")


STAGES = {stage.__name__: stage for stage in (training, averaging, saving, encoding, scoring, export)}


def left(place):
    """{name: content} of everything that the stages left, for a comparison to the last bit."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if not path.is_file() or ".previous" in name or path.suffix == ".corrupt" or "/." in f"/{name}":
            continue
        if path.name == "resume.pt":
            found[name] = load_state(path.parent)
        elif name.startswith("store/results"):  # mteb also files when it was, and how long it took
            if path.stem == PocketT2.metadata.name:
                found[name] = json.dumps(json.loads(path.read_bytes())["scores"])
        else:
            found[name] = path.read_bytes()
    return found


def differences(place, wanted):
    """Names of what is not as it should be, half-written files included."""
    try:
        found = left(place)
    except (TutorialError, ValueError) as error:
        return [str(error)]
    wrong = {
        name for name in found.keys() | wanted.keys()
        if not kill_worker.same_state(found.get(name), wanted.get(name))
    }  # fmt: skip
    return sorted(wrong | set(half_written(place)))


def half_written(place):
    """Names of temporary files and folders below a place in which a process may be working."""
    try:
        return [path.name for path in place.rglob(".*") if path.suffix in (".tmp", ".old")]
    except FileNotFoundError:  # one that vanished while we looked
        return []


# ---------------------------------------------------------------- a stage in a process, with a fault


class Limited(io.FileIO):
    """A file of a disk that takes `Limited.room` bytes more."""

    room, number = 0, errno.ENOSPC

    def write(self, data):
        if len(data) > Limited.room:
            raise OSError(Limited.number, os.strerror(Limited.number), self.name)
        Limited.room -= len(data)
        return super().write(data)


def bad_disk(place, writes, number=errno.ENOSPC):
    """From here on, the disk of `place` is full from the tenth byte of its `writes`-th file on."""
    real, count, rust = io.open, iter(range(1, 10**6)), safetensors.torch.save

    def opened(path, mode="r", *args, **kwargs):
        own = isinstance(path, str | os.PathLike) and Path(path).is_relative_to(place)
        if not own or not set(mode) & set("wxa") or Path(path).suffix == ".owner":
            return real(path, mode, *args, **kwargs)
        opened.count = next(count)
        Limited.room, Limited.number = 10 if opened.count >= writes else 10**12, number
        raw = io.BufferedWriter(Limited(path, mode.replace("b", "").replace("t", "")))
        return raw if "b" in mode else io.TextIOWrapper(raw, "utf-8", newline="\n")

    def save_file(weights, path, metadata=None):  # safetensors writes in Rust, with an error of its own
        try:
            with opened(path, "wb") as file:
                file.write(rust(weights, metadata))
        except OSError as error:
            raise safetensors.SafetensorError(
                f"I/O error: {error.strerror} (os error {error.errno})"
            ) from None

    opened.count = 0
    builtins.open = io.open = opened
    encoder.save_file, shutil._USE_CP_SENDFILE = save_file, False
    return lambda: opened.count


def closed_folders(place):
    """From here on, nothing below `place` can be written."""
    if os.name != "posix":
        return bad_disk(place, 1, errno.EACCES)
    for path in [place, *place.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.getuid() == 0:
        os.setuid(65534)


def backwards(place):
    """From here on, the clock goes back an hour whenever it is read."""
    clock = iter(range(int(time.time()), 0, -3600))
    time.time = lambda: float(next(clock))
    time.time_ns = lambda: next(clock) * 10**9


def impatient(place):
    files.WAIT_S = 0.05


def work(stages, place, fault, pipe, gate=None):
    """What a process does. Up goes ("done", files written), ("refused", message) or ("broken", error)."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)  # another number of threads may round otherwise
    count = fault[0](place, *fault[1:]) if fault else None
    pipe.send("begin")
    if gate:
        gate.wait()
    try:
        for stage in stages:
            STAGES[stage](place)
        pipe.send(("done", count() if count else 0))
    except TutorialError as error:
        pipe.send(("refused", str(error)))
    except BaseException as error:
        pipe.send(("broken", f"{type(error).__name__}: {error}"))
    os._exit(0)


def begin(stages, place, fault=None, gate=None):
    """(process, pipe) of stages that have begun."""
    pipe, other = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work, args=(stages, place, fault, other, gate))
    process.start()
    other.close()
    pipe.recv()
    return process, pipe


def ended(process, pipe):
    """What a process sent up, or ("killed", "")."""
    try:
        result = pipe.recv()
    except EOFError:
        result = ("killed", "")
    process.join()
    return result


def do(stages, place, fault=None):
    return ended(*begin(stages, place, fault))


class Workshop:
    """Copies of what each stage began with and of what it left; nothing struck these."""

    def __init__(self, folder):
        self.folder, self.before, self.after, self.seconds = folder, {}, {}, {}
        folder.chmod(0o755)
        place, self.number = folder / "whole", 0
        (place / "base").mkdir(parents=True)
        kill_worker.main("model", place / "base")
        for stage in STAGES:
            self.before[stage] = shutil.copytree(place, folder / f"before-{stage}")
            start = time.perf_counter()
            result = do([stage], place)
            if result[0] != "done":
                raise SystemExit(f"{stage} failed with nothing wrong: {result}")
            self.after[stage], self.seconds[stage] = left(place), time.perf_counter() - start
        self.finished = place

    @contextlib.contextmanager
    def copy(self, source):
        """A copy to be struck, deleted afterwards."""
        self.number += 1
        place = shutil.copytree(source, self.folder / f"place-{self.number}")
        yield place
        shutil.rmtree(place)


def verdict(shop, stage, place, result, allowed=("refused",)):
    """What is wrong after a strike: its result is none of these, or the same call does not mend it."""
    wrong = [] if result[0] in allowed else [f"{result[0]}: {result[1][:200]}"]
    again = do([stage], place)
    wrong += [] if again[0] == "done" else [f"again: {again[1][:200]}"]
    return wrong + differences(place, shop.after[stage])[:5]


# ---------------------------------------------------------------- what strikes: (where, what is wrong) each


def kills(shop, share, draw):
    """40 kills at random moments, every second one while a file is being written."""
    for n in range(max(2, round(40 * share))):
        stage = list(STAGES)[(n // 2) % len(STAGES)]
        moment, result = draw.random() * shop.seconds[stage], ("done", "")
        while result[0] != "killed":  # it had ended before: another try, a moment earlier
            with shop.copy(shop.before[stage]) as place:
                process, pipe = begin([stage], place)
                time.sleep(moment)
                while n % 2 and stage != "export" and process.is_alive() and not half_written(place):
                    pass  # nbdev writes in place what `make export` makes again
                process.kill()
                result, moment = ended(process, pipe), 0.7 * moment
                if result[0] == "killed":
                    within = " within a write" if half_written(place) else ""
                    yield stage + within, verdict(shop, stage, place, result, ("killed",))


def full(shop, share, draw):
    """A disk that is full from the first, second, third, ... file of a stage on that it writes."""
    for stage in list(STAGES)[:-1]:  # not the export: nbdev's own writing
        with shop.copy(shop.before[stage]) as place:
            writes = do([stage], place, (bad_disk, 10**9))[1]
        for n in range(1, writes + 1, max(1, round(1 / share))):
            with shop.copy(shop.before[stage]) as place:
                result = do([stage], place, (bad_disk, n))
                yield f"{stage}, file {n}", half_written(place) + verdict(shop, stage, place, result)


def closed(shop, share, draw):
    """Folders that can't be written."""
    for stage in list(STAGES)[: -1 if share > 0.1 else 1]:
        with shop.copy(shop.before[stage]) as place:
            result = do([stage], place, (closed_folders,))
            for path in [place, *place.rglob("*")]:
                path.chmod(0o755 if path.is_dir() else 0o644)
            yield stage, verdict(shop, stage, place, result)


def clock(shop, share, draw):
    """A clock that goes back an hour whenever it is read."""
    for stage in list(STAGES)[: max(1, round(len(STAGES) * share))]:
        with shop.copy(shop.before[stage]) as place:
            yield stage, verdict(shop, stage, place, do([stage], place, (backwards,)), ("done",))


def two(shop, share, draw):
    """Two processes started together: both end well, or one of them names the other."""
    stages = ["training", "averaging", "encoding", "scoring", "saving"] * 2
    for n, stage in enumerate(stages[: max(1, round(len(stages) * share))]):
        with shop.copy(shop.before[stage]) as place:
            gate, patience = PROCESSES.Barrier(2), (impatient,) if n < 5 else None
            both = [begin([stage], place, patience, gate) for _ in range(2)]
            results = [ended(*each) for each in both]
            told = [text for kind, text in results if kind == "refused"]
            numbers = [f"number {process.pid} " for process, _ in both] + ["it has just begun"]
            wrong = [text for text in told if not any(number in text for number in numbers)]
            wrong += [] if len(told) < 2 else ["neither went on"]
            kinds = [kind for kind, _ in results if kind not in ("done", "refused")]
            yield (
                f"{stage}: {len(told)} refused",
                wrong + kinds + verdict(shop, stage, place, ("done", ""), ("done",)),
            )


def damaged(shop, share, draw):
    """Every file of a finished and of an interrupted run cut, emptied, or filled with noise."""
    for name, stages in (("finished", list(STAGES)[:5]), ("interrupted", ["training"])):
        with shop.copy(shop.before["export" if name == "finished" else "training"]) as source:
            if name == "interrupted":
                process, pipe = begin(["training"], source)
                while not (source / "run" / "best_checkpoint").exists():
                    time.sleep(0.002)
                process.kill()
                ended(process, pipe)
                files.remove_leftovers(source / "run")
            paths = [p for p in sorted(source.rglob("*")) if p.is_file() and "export" not in p.parts]
            paths = [p for p in paths if p.relative_to(source).parts[0] != "base"]
            for path in draw.sample(paths, max(2, round(len(paths) * share))):
                whole = path.read_bytes()
                noise = draw.randbytes(len(whole))
                for damage in {"cut": whole[: len(whole) // 2], "emptied": b"", "noise": noise}.items():
                    with shop.copy(source) as place:
                        target = place / path.relative_to(source)
                        target.write_bytes(damage[1])
                        where = f"{name}: {path.relative_to(source)} {damage[0]}"
                        yield where, misled(shop, place, target, stages)


def misled(shop, place, target, stages):
    """What is wrong after a file was damaged: no error with its name or folder, and other figures."""
    kind, told = do(stages, place)
    folders = [folder for folder in target.parents if folder.is_relative_to(place) and folder != place]
    if kind == "refused" and any(str(path) in told for path in (target, *folders)):
        return []
    if kind != "done":
        return [f"{kind}: {told[:200]}"]
    name = target.relative_to(place)
    differ = differences(place, shop.after[stages[-1]])
    if name.as_posix() not in differ or not (target.parent / "config.json").exists():
        return [other for other in differ if other != name.as_posix()]  # made again, or nobody reads it
    good, told = opened_alike(target.parent, shop.finished / name.parent)  # a model that no stage opens
    return [] if good else [told]


def opened_alike(folder, whole):
    """(whether a damaged model folder is refused by name or gives the figures of the whole one, why not)."""
    try:
        found = [evaluate(encoder.Encoder(f, LENGTH), kill_worker.run_pairs()[1]) for f in (folder, whole)]
    except TutorialError as error:
        return folder.name in str(error), str(error)
    except Exception as error:
        return False, f"opened: {type(error).__name__}: {str(error)[:100]}"
    return found[0]["mrr"] == found[1]["mrr"], "gives other figures"


def inputs(shop, share, draw):
    """Poisoned files given to the readers of pairs: a TutorialError with the file's name, or the rows."""
    for reader, name, case, content, wanted in poisoned.POISONED:
        with tempfile.TemporaryDirectory() as folder:
            found, broken = poisoned.outcome(Path(folder), reader, name, content)
        good = poisoned.as_wanted(found, wanted, name)
        yield f"{reader}: {case}", [] if good else [broken or str(found)]


KINDS = {kind.__name__: kind for kind in (kills, full, closed, clock, two, damaged, inputs)}


def campaign(folder, kinds, share, seed):
    """{kind: {"what", "tried", "good", "wrong": {what was tried: what was wrong}, "seconds"}}."""
    shop, found = Workshop(Path(folder)), {}
    for kind in kinds:
        start, tried = time.perf_counter(), []
        for what, wrong in KINDS[kind](shop, share, random.Random(seed)):
            tried.append((what, wrong))
            if wrong:
                print(f"{kind}, {what}: {wrong}", flush=True)
        found[kind] = {
            "what": KINDS[kind].__doc__,
            "tried": len(tried),
            "good": sum(not wrong for _, wrong in tried),
            "within_a_write": sum("within a write" in what for what, _ in tried),
            "wrong": {what: wrong for what, wrong in tried if wrong},
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(f"{kind}: {found[kind]['good']} of {len(tried)} in {found[kind]['seconds']} s", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--share", type=float, default=1, help="of each kind's tries")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and samples")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "faults.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(folder, args.only, args.share, args.seed)
    machine = common.machine(("torch", "transformers", "safetensors", "mteb", "filelock"))
    result = {"machine": machine, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "kinds": found}
    write_json(args.out, result)
    if args.share == 1 and args.only == list(KINDS):
        rows = [
            (kind, f["what"].rstrip("."), f"{f['good']} of {f['tried']}", f"{f['seconds']:.0f}")
            for kind, f in found.items()
        ]
        table = common.markdown_table(("kind", "what strikes", "as it should be", "seconds"), rows)
        told = f"`make faults`, {result['date']}. {machine['summary']}."
        common.put_into_readme("faults", f"## Faults\n\n{told}\n\n{table}")
    return any(f["wrong"] for f in found.values())


if __name__ == "__main__":
    sys.exit(main())
