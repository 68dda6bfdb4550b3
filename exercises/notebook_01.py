"""Solutions of notebook 01's exercises: `python exercises/notebook_01.py` runs them all, the tests too.

Each function's first line is the exercise. Nothing here trains; all of it takes a second.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embedding_tutorial.finetune import (  # noqa: E402
    duplicate_mask,
    info_nce,
    mix,
    mrr,
    recall_at_1,
)


def exercise_1():
    """Four queries have the ranks 1, 1, 4 and 2. Recall@1 and MRR?"""
    ranks = [1, 1, 4, 2]
    assert recall_at_1(ranks) == 0.5
    assert mrr(ranks) == (1 + 1 + 1 / 4 + 1 / 2) / 4 == 0.6875
    print("1. Recall@1 0.5, MRR 0.6875")


def exercise_2():
    """Predict, then change one value: with tau 0.5 instead of 0.1, what is the share of the first passage?"""
    scores = torch.tensor([0.9, 0.8, 0.5, 0.2])
    share = F.softmax(scores / 0.5, dim=0)[0].item()
    by_hand = math.exp(1.8) / (math.exp(1.8) + math.exp(1.6) + math.exp(1.0) + math.exp(0.4))
    assert abs(share - by_hand) < 1e-6
    assert share < 0.721  # a higher temperature makes the shares more alike
    print(f"2. {share:.3f}: the higher the temperature, the less the best one takes")


def exercise_3():
    """A run with batches of 8 has loss 0.30, one with batches of 80 has 0.60. Which model is better?"""
    chance_8, chance_80 = math.log(8), math.log(80)
    assert chance_8 < chance_80
    print(
        f"3. That can't be said: the questions differ (chance is {chance_8:.2f} and {chance_80:.2f}). "
        "Only the same held-out queries against the same candidates compare two models."
    )


def symmetric_info_nce(q, p, tau):
    """InfoNCE in both directions: which passage belongs to a query, and which query to a passage."""
    return (info_nce(q, p, tau) + info_nce(p, q, tau)) / 2


def exercise_4():
    """Write the symmetric loss: the mean of both directions, query to passage and passage to query."""
    torch.manual_seed(0)
    q, p = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    S, right = q @ p.T / 0.05, torch.arange(5)
    expected = (F.cross_entropy(S, right) + F.cross_entropy(S.T, right)) / 2
    assert torch.isclose(symmetric_info_nce(q, p, 0.05), expected)
    print("4. symmetric_info_nce: two calls, the arguments swapped")


def exercise_5():
    """Mask false negatives: pairs 1 and 3 have the same code. Which cells are no negatives?"""
    query_ids, passage_ids = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 1])
    mask = duplicate_mask(query_ids, passage_ids, owner_ids=query_ids)
    assert mask.nonzero().tolist() == [[1, 3], [3, 1]]
    torch.manual_seed(0)
    q = F.normalize(torch.randn(4, 8), dim=1)
    p = F.normalize(torch.randn(4, 8), dim=1)[passage_ids]  # equal texts have equal vectors
    assert info_nce(q, p, 0.05, mask) < info_nce(q, p, 0.05)
    print("5. cells (1, 3) and (3, 1); the masked loss is lower, because no right answer is pushed away")


def exercise_6():
    """The differences of two models' reciprocal ranks spread by 0.3. How many queries show a gain of 0.03?"""
    queries = (2 * 0.3 / 0.03) ** 2
    assert round(queries) == 400
    tries = np.random.default_rng(0).normal(0.03, 0.3, (2_000, 400)).mean(axis=1)
    clear = (tries > 2 * 0.3 / 400**0.5).mean()
    assert 0.45 < clear < 0.55  # luck decides: the gain is clear in half of such tests
    print("6. (2 · 0.3 / 0.03)² = 400 queries, and twice as many to see it in four tests of five")


def exercise_7():
    """BGE-M3, 80 pairs of 100 tokens a text, half precision: how much memory, and with GradCache?"""
    fixed = 4 * 4 * 312e6 / 1e9  # parameters, gradient, two running means; of the word table what occurs
    whole = fixed + 2 * 80 * 100 * 1e6 / 1e9  # about 1 MB of activations a token
    cached = fixed + 1_000 * 1e6 / 1e9  # one group of 1,000 tokens at a time
    assert round(whole) == 21 and round(cached) == 6
    print(f"7. about {whole:.0f} GB at once, about {cached:.0f} GB with GradCache in groups of 1,000 tokens")


def exercise_8():
    """Mix base and fine-tuned at alpha 0.25 with `mix`. Where on the line does the result lie?"""
    base, tuned = {"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([4.0, 0.0])}
    quarter = mix([base, tuned], [0.75, 0.25])["w"]
    assert torch.equal(quarter, base["w"] + 0.25 * (tuned["w"] - base["w"]))
    print(f"8. a quarter of the way from the base: {quarter.tolist()}")


EXERCISES = [value for name, value in sorted(globals().items()) if name.startswith("exercise_")]

if __name__ == "__main__":
    for exercise in EXERCISES:
        exercise()
