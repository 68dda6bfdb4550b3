"""An evaluation to be killed: a program of its own, so that `kill -9` is real.

python encode_worker.py MODEL STORE        evaluate the pocket task, vectors and scores under STORE; prints
                                           "begin N" before shard N is encoded, "saved N" when it is safe,
                                           and at the end "done", seconds and the scores as JSON
python encode_worker.py MODEL STORE N ...  the same in a forked process for each N, killed some moment after
                                           it began N shards; prints "killed BEGUN LEFT" of each: shards that
                                           it began, shards that lie under STORE
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from kill_worker import kill_child  # noqa: E402

from embedding_tutorial import retrieval  # noqa: E402
from embedding_tutorial.pocket_task import PocketT2  # noqa: E402
from embedding_tutorial.store import StoredEncoder  # noqa: E402

SETTINGS = {"max_length": 64, "token_budget": 512, "shard_characters": 2_000}  # about 60 shards
NAME = "killed"


class Announced(StoredEncoder):
    """A StoredEncoder that says when it begins a shard and when the shard is on disk."""

    tokens_from = 0  # so that a kill meets the writing of token ids as well

    def _encode(self, missing, shards, label):
        found = super()._encode(missing, shards, label)
        for count in range(len(missing)):
            print(f"begin {count}", flush=True)
            yield next(found)
            print(f"saved {count}", flush=True)  # control comes back when the shard has been saved


def evaluate(model, store):
    """Scores of the pocket task: {language: {metric: score}}."""
    identity = retrieval.vector_identity(model, SETTINGS["max_length"], "fp32")
    sizes = {name: SETTINGS[name] for name in ("token_budget", "shard_characters")}
    encoder = Announced(
        lambda: retrieval.load_for_encoding(model, SETTINGS["max_length"], "fp32", "cpu"),
        identity,
        store,
        tokens=retrieval.token_identity(model, SETTINGS["max_length"]),
        **sizes,
    )
    result = retrieval.evaluate_retrieval(NAME, PocketT2(), identity, encoder, store)
    return {scores["hf_subset"]: scores for scores in result.scores["dev"]}


def complete_shards(store):
    """{file name: bytes} of the shards that lie under a store, complete or damaged."""
    return {path.name: path.read_bytes() for path in sorted(Path(store).glob("vectors/*/*.npy"))}


def same_scores(a, b):
    """Whether two results are equal to the last digit; NaN, an undefined metric, equals NaN."""
    return a.keys() == b.keys() and all(
        a[subset].keys() == b[subset].keys()
        and all(x == b[subset][m] or (x != x and b[subset][m] != b[subset][m]) for m, x in a[subset].items())
        for subset in a
    )


def main(model, store, *kills):
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # another number of threads may round otherwise
    for shards in map(int, kills):
        pause = random.random() * 0.02
        status, last = kill_child(lambda: evaluate(model, store), "begin", shards - 1, pause)
        if status != -signal.SIGKILL:
            raise SystemExit(f"ended with {status} before it was killed")
        print("killed", last + 1, len(complete_shards(store)), flush=True)
    if kills:
        return
    begin = time.perf_counter()
    print("start", flush=True)
    scores = evaluate(model, store)
    print("done", json.dumps({"seconds": time.perf_counter() - begin, "scores": scores}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
