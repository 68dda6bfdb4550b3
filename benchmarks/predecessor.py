"""The original recipe on this project's pocket data: what it gains on code and what it costs elsewhere.

Learning rate 2e-4, temperature 0.02, 10 epochs, 10 % warm-up, weight decay 0.01, batches of 80 with
accumulation over 2, the model's own dropout; run through this project's loop, so the faults of the original
loop (architecture of the schedule, padding) are not part of the difference. Notebook 02 draws the result,
with an interval from the values of each query.

    python benchmarks/predecessor.py            about 5 minutes on 2 cores
"""

import argparse
import tempfile
from pathlib import Path

import common

from embedding_tutorial.assets import pocket_model_path
from embedding_tutorial.encoder import Encoder
from embedding_tutorial.evaluation import grades_found, ndcg
from embedding_tutorial.files import write_json
from embedding_tutorial.finetune import TrainConfig, evaluate, split_pairs
from embedding_tutorial.pairs import read_mbpp
from embedding_tutorial.retrieval import (
    evaluate_retrieval,
    metric_table,
    retrieval_task,
    split_of,
    stored_encoder,
    vector_identity,
)
from embedding_tutorial.training import train


def ndcg_of_each_query(encode, task, language):
    """nDCG@10 of each query of a language of the task, (n,) in the order of its queries."""
    queries, passages, passage_ids, judgements = split_of(task, language)
    found = grades_found(encode(queries), encode(passages), passage_ids, judgements)
    return [ndcg(grades, list(judged.values())) for grades, judged in zip(found, judgements, strict=True)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=common.ORIGINAL["epochs"])
    parser.add_argument("--out", type=Path, default=common.RESULTS / "predecessor.json")
    arguments = parser.parse_args()
    base, pairs = pocket_model_path(), read_mbpp(common.POCKET_PAIRS)
    train_pairs, val_pairs = split_pairs(pairs)
    config = TrainConfig(**common.ORIGINAL | {"epochs": arguments.epochs})
    with tempfile.TemporaryDirectory(prefix="predecessor-") as name:
        run, store = Path(name) / "run", Path(name) / "store"
        tuned, history = train(base, train_pairs, val_pairs, config, run)
        after = evaluate(tuned, val_pairs, candidates=pairs)
        before = evaluate(Encoder(base).eval(), val_pairs, candidates=pairs)
        identity = vector_identity(run / "fine-tuned", 512, "fp32")
        task, encoder = retrieval_task("PocketT2Retrieval"), stored_encoder(run / "fine-tuned", store)
        scores = evaluate_retrieval("original", task, identity, encoder, store)
        task.load_data()  # mteb unloads it
        each = ndcg_of_each_query(encoder, task, "en")
    result = {
        "command": "python benchmarks/predecessor.py",
        "epochs": arguments.epochs,
        "code_mrr_before": before["mrr"],
        "code_mrr": after["mrr"],
        "code_recall_at_1": after["recall@1"],
        "general_ndcg_at_10": metric_table(scores, "en")["nDCG"][10],
        "general_ndcg_at_10_zh": metric_table(scores, "zh")["nDCG"][10],
        "epoch_loss": history["epoch_loss"],
        "code_reciprocal_ranks": (1 / after["ranks"]).tolist(),  # of each validation query, against all codes
        "general_ndcg_at_10_each": each,  # of each English query
    }
    write_json(arguments.out, result)
    print({key: value for key, value in result.items() if not isinstance(value, list)})


if __name__ == "__main__":
    main()
