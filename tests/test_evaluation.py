"""Notebook 02's search and metrics, against NumPy, scikit-learn, mteb, or worked out by hand."""

import math

import numpy as np
import pytest
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores
from sklearn.metrics import average_precision_score, ndcg_score

from embedding_tutorial import evaluation
from embedding_tutorial.evaluation import best_passages, grades_found

CUTOFFS = (1, 3, 5, 10, 100)

# ---------------------------------------------------------------- search


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("top_k", [1, 10, 300, 1000])
def test_best_passages_against_numpy(block, top_k):
    draw = np.random.default_rng(block + top_k)
    q, p = (draw.standard_normal((n, 24)).astype(np.float32) for n in (20, 300))
    scores = q @ p.T
    order = np.argsort(-scores, axis=1)[:, :top_k]
    found = list(best_passages(q, p, top_k, block=block))
    assert np.array_equal([index for _, index in found], order)
    np.testing.assert_allclose(
        [values for values, _ in found], np.take_along_axis(scores, order, axis=1), atol=1e-5
    )


def test_best_passages_reads_memory_maps(tmp_path):
    draw = np.random.default_rng(0)
    for name, rows in (("q", 5), ("p", 30)):
        np.save(tmp_path / f"{name}.npy", draw.standard_normal((rows, 8), dtype=np.float32))
    q, p = (np.load(tmp_path / f"{name}.npy", mmap_mode="c") for name in "qp")
    assert [index[0] for _, index in best_passages(q, p, 3)] == (q @ p.T).argmax(axis=1).tolist()


def test_grades_found_by_hand():
    q = np.array([[1, 0], [0, 1]], dtype=np.float32)
    p = np.array([[0.5, 0.1], [0.9, 0.2], [0.1, 0.8]], dtype=np.float32)
    judgements = [{"a": 2, "c": 1}, {"c": 3, "not in the corpus": 1}]
    assert grades_found(q, p, ["a", "b", "c"], judgements) == [[0, 2, 1], [3, 0, 0]]  # not judged counts as 0
    assert grades_found(q, p, ["a", "b", "c"], judgements, k=2) == [[0, 2], [3, 0]]
    with pytest.raises(ValueError):
        grades_found(q, p, ["a", "b", "c"], judgements[:1])


# ---------------------------------------------------------------- metrics


@pytest.fixture(scope="module")
def searched():
    """40 queries with grades 0 to 3 of some of 60 passages, as lists and as mteb has them; no ties."""
    draw = np.random.default_rng(0)
    q, p = (draw.standard_normal((n, 16)).astype(np.float32) for n in (40, 60))
    scores, ids = q @ p.T, [f"p{i}" for i in range(60)]
    assert all(len(np.unique(row)) == 60 for row in scores)
    judgements = []
    for _ in q:
        judged = draw.choice(60, draw.integers(2, 15), replace=False)
        grades = [1 + draw.integers(0, 3), *draw.integers(0, 4, len(judged) - 1)]  # one of them is relevant
        judgements.append({ids[i]: int(grade) for i, grade in zip(judged, grades, strict=True)})
    results = {f"q{n}": dict(zip(ids, row.tolist(), strict=True)) for n, row in enumerate(scores)}
    qrels = {f"q{n}": judged for n, judged in enumerate(judgements)}
    found = grades_found(q, p, ids, judgements, k=100)
    return found, [list(judged.values()) for judged in judgements], results, qrels


def test_every_metric_is_mtebs(searched):
    found, judged, results, qrels = searched
    theirs = calculate_retrieval_scores(results, qrels, CUTOFFS)
    both = list(zip(found, judged, strict=True))
    for k in CUTOFFS:
        ours = {
            "ndcg": {f"NDCG@{k}": np.mean([evaluation.ndcg(f, j, k) for f, j in both])},
            "map": {f"MAP@{k}": np.mean([evaluation.average_precision(f, j, k) for f, j in both])},
            "recall": {f"Recall@{k}": np.mean([evaluation.recall(f, j, k) for f, j in both])},
            "precision": {f"P@{k}": np.mean([evaluation.precision(f, k) for f in found])},
            "mrr": {f"MRR@{k}": np.mean([evaluation.reciprocal_rank(f, k) for f in found])},
        }
        for metric, values in ours.items():
            for name, value in values.items():
                assert 0 < value <= 1
                assert getattr(theirs, metric)[name] == pytest.approx(value, abs=1e-5), name  # rounded there


def test_every_metric_is_that_of_pytrec_eval_query_by_query(searched):
    found, judged, results, qrels = searched
    theirs = calculate_retrieval_scores(results, qrels, CUTOFFS).all_scores
    for n, (f, j) in enumerate(zip(found, judged, strict=True)):
        for k in CUTOFFS:
            assert evaluation.ndcg(f, j, k) == pytest.approx(theirs[f"q{n}"][f"ndcg_cut_{k}"])
            assert evaluation.average_precision(f, j, k) == pytest.approx(theirs[f"q{n}"][f"map_cut_{k}"])
            assert evaluation.recall(f, j, k) == pytest.approx(theirs[f"q{n}"][f"recall_{k}"])
            assert evaluation.precision(f, k) == pytest.approx(theirs[f"q{n}"][f"P_{k}"])


def test_ndcg_and_average_precision_are_scikit_learns(searched):
    found, judged, results, qrels = searched
    for n, (f, j) in enumerate(zip(found, judged, strict=True)):
        ids = list(results[f"q{n}"])
        grades = np.array([qrels[f"q{n}"].get(name, 0) for name in ids])
        scores = np.array([results[f"q{n}"][name] for name in ids])
        for k in (1, 5, 10, 60):
            assert evaluation.ndcg(f, j, k) == pytest.approx(ndcg_score([grades], [scores], k=k))
        assert evaluation.average_precision(f, j, 60) == pytest.approx(
            average_precision_score(grades > 0, scores)
        )


def test_metrics_by_hand():
    found, judged = [0, 3, 0, 1], [3, 1, 2]  # the passage of grade 2 was not found
    assert evaluation.dcg([3, 2, 1]) == pytest.approx(3 + 2 / math.log2(3) + 1 / 2)
    assert evaluation.dcg([]) == 0
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert evaluation.ndcg(found, judged) == pytest.approx((3 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert evaluation.ndcg(found, judged, k=2) == pytest.approx(3 / math.log2(3) / (3 + 2 / math.log2(3)))
    assert evaluation.ndcg([3, 2, 1, 0], judged) == 1 and evaluation.ndcg(found, judged, k=1) == 0
    assert [evaluation.precision(found, k) for k in (1, 2, 4)] == [0, 1 / 2, 2 / 4]
    assert evaluation.precision(found, 10) == 2 / 10  # fewer found than asked for
    assert [evaluation.recall(found, judged, k) for k in (1, 2, 4)] == [0, 1 / 3, 2 / 3]
    assert evaluation.average_precision(found, judged, 4) == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert evaluation.average_precision(found, judged, 3) == pytest.approx((1 / 2) / 3)
    assert [evaluation.reciprocal_rank(found, k) for k in (1, 2, 4)] == [0, 1 / 2, 1 / 2]
    assert evaluation.reciprocal_rank([0, 0], 2) == 0
