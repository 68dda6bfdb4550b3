"""Recipe 3, BGE-M3 unified: dense, sparse and ColBERT vectors from one model, trained together.

    python recipes/unified.py                          # self-distillation, positions frozen, sub-batches
    python recipes/unified.py --teacher FOLDER         # knowledge distillation from an embedding model
    python recipes/unified.py --gpu-command            # the same for BGE-M3 on 2 to 8 GPUs

At pocket scale BGE-M3's place is taken by MiniLM with two fresh random heads in BGE-M3's layout: its
dense vectors are good from the start, its sparse and ColBERT vectors mean nothing before this training.
Self-distillation: from a given step on, the weighted sum of the three scores teaches each of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes import data, engine, models, steps  # noqa: E402
from recipes.engine import Training  # noqa: E402

BASE = steps.OUTPUT / "minilm-m3"
PRESETS = {
    "pocket": Training(
        engine="m3",
        model=str(BASE),
        batch=32,
        group=2,
        epochs=1,
        passage_length=96,
        query_length=64,
        freeze_positions=True,
        sub_batch=8,
        precision="auto",
    ),
    "full": Training(
        engine="m3",
        model="bge-m3",
        pooling="cls",
        batch=32,
        group=2,
        epochs=2,
        learning_rate=1e-5,
        temperature=0.02,
        query_length=512,
        passage_length=512,
        precision="bf16",
        checkpointing=True,
        freeze_positions=True,
        sub_batch=8,
    ),
}


def main(words=None):
    parser = steps.parser(__doc__)
    engine.add_options(parser, PRESETS)
    parser.add_argument("--teacher", metavar="MODEL", help="distil from this embedding model (m3_kd_loss)")
    parser.add_argument(
        "--self-distill-from",
        type=int,
        default=5,
        metavar="STEP",
        help="the step after which the weighted sum teaches its parts; -1: from the first",
    )
    args = parser.parse_args(words)
    if args.scale == "pocket" and not args.gpu_command and not args.model:
        pocket_base()
    hard = {"kind": "hard", "count": 7}
    if args.teacher:
        source, changes = {"kind": "teacher", "model": args.teacher}, {"teacher": True}
        if not args.data and not args.gpu_command:
            source["data"] = data.make(**hard)
    else:
        source, changes = hard, {"self_distill_from": args.self_distill_from}
    engine.recipe(
        args,
        PRESETS,
        "unified.py --teacher MODEL" if args.teacher else "unified.py",
        source,
        args.output or steps.OUTPUT / ("unified-teacher" if args.teacher else "unified"),
        **changes,
    )


def pocket_base():
    """The pocket stand-in for BGE-M3, made once."""
    if not (BASE / "colbert_linear.pt").exists():
        pairs = [pair for part in data.tutorial_pairs() for pair in part]
        models.pocket_m3(BASE, [pair[name] for pair in pairs for name in ("query", "pos_doc")])
        print("BGE-M3's place is taken by MiniLM with two fresh random heads (sparse, ColBERT).")


if __name__ == "__main__":
    steps.run(main)
