"""Recipe 4, from raw BERT: a BERT that is no embedding model, with few and with many random negatives.

    python recipes/raw_bert.py --negatives 10
    python recipes/raw_bert.py --negatives 50
    python recipes/raw_bert.py --gpu-command     # bert-base-uncased on 2 to 8 GPUs

The question: do more random negatives help, and does a tuned BERT reach a ready-made embedding model?
--start auto takes bert-base-uncased where a GPU and a model hub are at hand, and otherwise a small BERT
with random weights that is made here: it has not even learned language, so expect little of it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial import network  # noqa: E402
from recipes import engine, models, steps  # noqa: E402
from recipes.engine import Training  # noqa: E402

SMALL = steps.OUTPUT / "small-bert"
PRESETS = {
    "pocket": Training(
        model=str(SMALL), batch=32, epochs=2, learning_rate=1e-3, passage_length=64, query_length=48
    ),
    "full": Training(
        model="bert-base-uncased",
        batch=32,
        epochs=3,
        learning_rate=2e-5,
        query_length=128,
        passage_length=512,
        precision="bf16",
        checkpointing=True,
    ),
}


def start_model(choice, cpu):
    """ "small" or "bert-base-uncased", with the reason printed."""
    if choice != "auto":
        return choice
    if cpu:
        print(
            "No GPU: starting from a small BERT with random weights. "
            "--start bert-base-uncased takes the real one."
        )
        return "small"
    reachable, why = network.can_reach_hub()
    print(f"{why}: starting from {'bert-base-uncased' if reachable else 'a small BERT with random weights'}.")
    return "bert-base-uncased" if reachable else "small"


def main(words=None):
    parser = steps.parser(__doc__)
    engine.add_options(parser, PRESETS)
    parser.add_argument(
        "--negatives", type=int, default=10, help="random negatives per query, all used in each epoch"
    )
    parser.add_argument(
        "--start", choices=("auto", "small", "bert-base-uncased"), default="auto", help="the raw BERT"
    )
    args = parser.parse_args(words)
    if not (args.gpu_command or args.model or args.scale == "full"):
        start = start_model(args.start, args.cpu)
        if start == "small" and not (SMALL / "model.safetensors").exists():
            models.small_bert(SMALL)
        args.model = str(SMALL) if start == "small" else start
    name = f"raw-bert-{args.negatives}"
    engine.recipe(
        args,
        PRESETS,
        f"raw_bert.py --negatives {args.negatives}",
        {"kind": "random", "count": args.negatives},
        args.output or steps.OUTPUT / name,
        group=args.negatives + 1,
    )


if __name__ == "__main__":
    steps.run(main)
