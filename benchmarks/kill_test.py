"""Does a training run survive `kill -9`? Kills it at random moments, starts it again, compares every bit.

    python benchmarks/kill_test.py               # 20 kills, three to five minutes on two CPU cores
    python benchmarks/kill_test.py --kills 100

Each kill has a run of its own: a new process trains a tiny model with dropout, a queue and a resume point
after every update, SIGKILL ends it, a second process continues it to the end. The moments are spread over
the run's whole length; every second kill waits from its moment on for the next file being written, and
strikes within that write. What both leave is compared with an uninterrupted run: weights, checkpoints,
history, evaluations, configuration byte for byte, the resume state tensor by tensor.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

from embedding_tutorial.files import move_aside, read_json, write_json
from embedding_tutorial.runs import load_state

EPOCHS = 6
PROGRAM = common.ROOT / "tests" / "kill_worker.py"  # the program that the tests kill as well


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "kill_test.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker("model", folder / "base")
        seconds = float(worker("train", folder / "base", folder / "reference", EPOCHS).split()[-1])
        updates = load_state(folder / "reference")["update"]
        settings = read_json(folder / "reference" / "config.json")
        print(f"uninterrupted: {updates} updates in {seconds:.2f} s")
        draw, kills = random.Random(args.seed), []
        for n in range(args.kills):
            update = int((n + draw.random()) / args.kills * updates)
            pause = draw.random() * seconds / updates
            kills.append(one_kill(folder, n, update, pause, within_a_write=n % 2 == 1))
            print(f"{n + 1:3} of {args.kills}: {line(kills[-1], updates)}", flush=True)

    identical = sum(kill["differs"] == [] for kill in kills)
    within = sum(bool(kill["half_written"]) for kill in kills)
    print(
        f"{identical} of {len(kills)} ended bit-identical to the uninterrupted run; "
        f"{within} of the kills struck within a write"
    )
    result = {
        "command": f"python benchmarks/kill_test.py --kills {args.kills} --seed {args.seed}",
        "machine": common.machine(("torch", "transformers", "safetensors")),
        "run": {**settings, "updates": updates, "seconds": seconds},
        "kills": len(kills),
        "identical": identical,
        "within_a_write": within,
        "each": kills,
    }
    write_json(args.out, result)
    return identical != len(kills)


def one_kill(folder, n, update, pause, within_a_write):
    """Train in a new folder, kill `pause` seconds after an update, continue; returns what was found."""
    run = folder / f"run-{n}"
    while True:
        process = start("train", folder / "base", run, EPOCHS)
        for text in process.stdout:  # until it has computed that update, or ended
            if text.startswith("update ") and int(text.split()[1]) >= update:
                break
        time.sleep(pause)
        while within_a_write and process.poll() is None and not leftovers(run):
            pass
        process.kill()
        process.communicate()
        if process.returncode == -9:
            break
        update -= 1  # it had ended by then: another run, one update earlier
        move_aside(run, folder / "too-late")
    half_written = leftovers(run)
    state = load_state(run) if run.exists() else None
    worker("train", folder / "base", run, EPOCHS)
    return {
        "after_update": update,
        "seconds_later": round(pause, 4),
        "saved_update": state["update"] if state else 0,
        "half_written": half_written,
        "differs": json.loads(worker("compare", run, folder / "reference")),
    }


def leftovers(run):
    """Names of what is half written in a run, without the process numbers in them."""
    names = (path.name[1:].removesuffix(".tmp").removesuffix(".old") for path in run.glob(".*"))
    return sorted({re.sub(r"\.\d+$", "", name) for name in names})


def line(kill, updates):
    when = f"{kill['seconds_later']:.3f} s after update {kill['after_update']} of {updates}"
    where = f"while writing {', '.join(kill['half_written'])}" if kill["half_written"] else "between writes"
    end = "identical" if not kill["differs"] else f"DIFFERS in {', '.join(kill['differs'])}"
    return f"killed {when}, {where}: {end}"


def start(*args):
    """The program with `args` in a process of its own."""
    command = [sys.executable, str(PROGRAM), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def worker(*args):
    """Run the worker to its end; returns what it printed."""
    process = start(*args)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"kill_worker.py {args[0]} failed:\n{output}")
    return output


if __name__ == "__main__":
    sys.exit(main())
