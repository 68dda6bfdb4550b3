"""The original recipe on this project's pocket data: what it gains on code and what it costs elsewhere.

Learning rate 2e-4, temperature 0.02, 10 epochs, 10 % warm-up, weight decay 0.01, batches of 80 with
accumulation over 2, the model's own dropout; run through this project's loop, so the faults of the original
loop (architecture of the schedule, padding) are not part of the difference. Notebook 02 draws the result.

    python benchmarks/predecessor.py            about 5 minutes on 2 cores
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402

from embedding_tutorial import checkpoints, evaluation, finetune, profiles  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=common.ORIGINAL["epochs"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/predecessor.json")
    arguments = parser.parse_args()
    base = profiles.model_path(profiles.PROFILES["pocket"])
    pairs = finetune.read_mbpp(ROOT / "data/pocket_mbpp.json")
    train_pairs, val_pairs = finetune.split_pairs(pairs)
    config = finetune.TrainConfig(**common.ORIGINAL | {"epochs": arguments.epochs})
    work = Path(tempfile.mkdtemp(prefix="predecessor-"))
    try:
        tuned, history = finetune.train(base, train_pairs, val_pairs, config, work / "run")
        after = finetune.evaluate(tuned, val_pairs, candidates=pairs)
        before = finetune.evaluate(finetune.Encoder(base).eval(), val_pairs, candidates=pairs)
        identity = evaluation.vector_identity(work / "run/final_model", 512, "fp32")
        encoder = evaluation.stored_encoder(work / "run/final_model", work / "store")
        scores = evaluation.evaluate_retrieval(
            "Predecessor", evaluation.retrieval_task("PocketT2Retrieval"), identity, encoder, work / "store"
        )
        result = {
            "command": "python benchmarks/predecessor.py",
            "epochs": arguments.epochs,
            "code_mrr_before": before["mrr"],
            "code_mrr": after["mrr"],
            "code_recall_at_1": after["recall@1"],
            "general_ndcg_at_10": evaluation.metric_table(scores, "en")["nDCG"][10],
            "general_ndcg_at_10_zh": evaluation.metric_table(scores, "zh")["nDCG"][10],
            "epoch_loss": history["epoch_loss"],
        }
        checkpoints.write_json(arguments.out, result)
        print(result)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
