"""Does an evaluation survive `kill -9` while it encodes? Kills it at random moments, starts it again.

    python benchmarks/kill_encoding.py              # 10 kills, two to three minutes on two CPU cores
    python benchmarks/kill_encoding.py --kills 50

Each kill has a store of its own: a new process evaluates the pocket task with a tiny random model in about 60
shards, SIGKILL ends it, a second process does it again and has to encode only what was not yet safe. The
moments are spread over the encoding; every second one falls while a shard is being written. Compared with an
evaluation that nobody killed: every shard's bytes, and every score, exactly.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import common

from embedding_tutorial.files import write_json

PROGRAM = common.ROOT / "tests" / "encode_worker.py"  # the program that the tests kill as well


def start(model, store):
    command = [sys.executable, str(PROGRAM), str(model), str(store)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def to_the_end(model, store):
    """Run the worker to its end; returns (shards encoded, seconds, scores)."""
    process = start(model, store)
    lines = process.communicate()[0].splitlines()
    if process.returncode:
        raise SystemExit(f"the worker ended with status {process.returncode}")
    result = json.loads(next(line for line in lines if line.startswith("done")).removeprefix("done"))
    return sum(line.startswith("begin") for line in lines), result["seconds"], result["scores"]


def safe_shards(store):
    """{file name: bytes} of the shards that lie under a store."""
    return {path.name: path.read_bytes() for path in store.glob("vectors/*/*.npy")}


def killed(model, store, share, shards, within_a_write):
    """Kill the worker at about `share` of its shards; returns how many it had begun."""
    process = start(model, store)
    begun = 0
    while begun < 1 + share * (shards - 2):
        begun += process.stdout.readline().startswith("begin")
    deadline = time.perf_counter() + 1
    if within_a_write:
        while not list(store.glob("vectors/*/.*.tmp")) and time.perf_counter() < deadline:
            pass
    else:
        time.sleep(random.random() * 0.02)
    process.kill()
    rest, _ = process.communicate()
    if process.returncode != -9:
        raise SystemExit("the worker was done before it was killed")
    return begun + rest.count("begin")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "kill_encoding.json")
    args = parser.parse_args()

    draw, kills = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = common.random_m3(folder / "model", common.SMOKE_SHAPE)
        shards, seconds, scores = to_the_end(model, folder / "whole")
        expected = safe_shards(folder / "whole")
        print(f"nobody killed: {shards} shards in {seconds:.1f} s")
        for n in range(args.kills):
            store, share = folder / f"store-{n}", (n + draw.random()) / args.kills
            begun = killed(model, store, share, shards, within_a_write=n % 2 == 1)
            half_written = len(list(store.glob("vectors/*/.*.tmp")))
            safe = len(safe_shards(store))
            again, _, found = to_the_end(model, store)
            kills.append(
                {
                    "begun": begun,
                    "safe": safe,
                    "half_written_files": half_written,
                    "lost": begun - safe,
                    "encoded_again": again - (shards - begun),
                    "identical_vectors": safe_shards(store) == expected,
                    "identical_scores": json.dumps(found) == json.dumps(scores),
                    "leftovers": len(list(store.rglob(".*.tmp"))),
                }
            )
            row = kills[-1]
            print(
                f"{n + 1:3}: killed in shard {begun} of {shards}, {safe} safe, {row['lost']} lost; "
                f"the second run encoded {again}; vectors "
                f"{'identical' if row['identical_vectors'] else 'DIFFERENT'}, scores "
                f"{'identical' if row['identical_scores'] else 'DIFFERENT'}",
                flush=True,
            )
    result = {
        "machine": common.machine(("torch", "transformers", "mteb")),
        "command": f"python benchmarks/kill_encoding.py --kills {args.kills} --seed {args.seed}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "shards": shards,
        "kills": len(kills),
        "most_shards_lost": max(kill["lost"] for kill in kills),
        "most_encoded_again": max(kill["encoded_again"] for kill in kills),
        "within_a_write": sum(bool(kill["half_written_files"]) for kill in kills),
        "identical_vectors": sum(kill["identical_vectors"] for kill in kills),
        "identical_scores": sum(kill["identical_scores"] for kill in kills),
        "each": kills,
    }
    write_json(args.out, result)
    good = result["most_encoded_again"] <= 1 and len(kills) == result["identical_vectors"]
    return not (good and len(kills) == result["identical_scores"])


if __name__ == "__main__":
    sys.exit(main())
