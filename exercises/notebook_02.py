"""Solutions of notebook 02's exercises: `python exercises/notebook_02.py` runs them all, the tests too."""

import math
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embedding_tutorial.evaluation import (  # noqa: E402
    average_precision,
    best_passages,
    dcg,
    ndcg,
    precision,
    recall,
    reciprocal_rank,
)
from embedding_tutorial.finetune import bootstrap_interval  # noqa: E402


def exercise_1():
    """By hand: the passages found have the grades 0, 3, 0, 1; the query's are 3 and 1. nDCG@10?"""
    by_hand = (3 / math.log2(3) + 1 / math.log2(5)) / (3 / math.log2(2) + 1 / math.log2(3))
    assert abs(ndcg([0, 3, 0, 1], [3, 1]) - by_hand) < 1e-12
    parts = 3 / math.log2(3), 1 / math.log2(5), 1 / math.log2(3)
    print("1. ({:.3f} + {:.3f}) / (3 + {:.3f})".format(*parts), f"= {by_hand:.3f}")


def exercise_2():
    """The same list: precision@4, recall@4, average precision and reciprocal rank?"""
    found, judged = [0, 3, 0, 1], [3, 1]
    assert precision(found, 4) == 0.5
    assert recall(found, judged, 4) == 1
    assert average_precision(found, judged, 4) == (1 / 2 + 2 / 4) / 2 == 0.5
    assert reciprocal_rank(found, 4) == 0.5
    print("2. 0.5, 1, 0.5, 0.5")


def exercise_3():
    """Predict, then change one value: the grade 3 becomes 1. Which of the five figures change?"""
    before, after, judged = [0, 3, 0, 1], [0, 1, 0, 1], [3, 1]
    assert precision(before, 4) == precision(after, 4)
    assert average_precision(before, judged, 4) == average_precision(after, [1, 1], 4)
    assert ndcg(before, judged) != ndcg(after, [1, 1])
    print("3. nDCG alone: the others know only relevant and not")


def exercise_4():
    """A query has two relevant passages. What is the best precision@10 that any model can reach?"""
    assert precision([3, 2] + [0] * 8, 10) == 0.2
    print("4. 0.2, and recall@10 is 1: precision@10 says little where few passages are relevant")


def exercise_5():
    """Where does a passage cost most: moved from rank 1 to 2, or from 9 to 10?"""
    top = dcg([1]) - dcg([0, 1])
    deep = dcg([0] * 8 + [1]) - dcg([0] * 9 + [1])
    assert top > 20 * deep
    print(f"5. {top:.3f} against {deep:.3f}: nDCG looks at the top of the list")


def exercise_6():
    """Two models score 0.80 and 0.81, each with an interval of ±0.03. Can the second be clearly better?"""
    one = np.random.default_rng(0).beta(4, 1, 300)
    other = np.minimum(one + 0.01, 1)  # a little better on nearly every query
    (low, high), (first, last) = (bootstrap_interval(x)[1:] for x in (one, other))
    assert first < high and low < last  # the two intervals overlap
    assert bootstrap_interval(other - one)[1] > 0  # the paired difference excludes 0
    print("6. yes: overlapping intervals say little, the paired difference decides")


def exercise_7():
    """Change one line of the tokenizer's configuration. Is the model still served from the cache?"""
    from embedding_tutorial.encoder import fingerprint

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(b"weights")
        settings = Path(folder) / "tokenizer_config.json"
        settings.write_text('{"do_lower_case": true}')
        before = fingerprint(folder)
        settings.write_text('{"do_lower_case": false}')
        assert fingerprint(folder) != before
    print("7. no: the fingerprint covers every file that changes a vector")


def exercise_8():
    """How long does your corpus take? 1 million passages of 200 tokens, BGE-M3, 100 TFLOP/s."""
    seconds = 1e6 * 200 * 2 * 303e6 / 100e12
    assert 1_200 < seconds < 1_220
    q, p = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    assert [int(found[0]) for _, found in best_passages(q, p, 5)] == [0, 1, 2]
    print(f"8. about {seconds / 60:.0f} minutes of pure arithmetic; measure, then trust")


EXERCISES = [value for name, value in sorted(globals().items()) if name.startswith("exercise_")]

if __name__ == "__main__":
    for exercise in EXERCISES:
        exercise()
