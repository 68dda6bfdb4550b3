"""Recipe 2, dense: one vector per text, trained by FlagEmbedding under torchrun.

    python recipes/dense.py                  # in-batch negatives only, on 2 processes
    python recipes/dense.py --hard           # and a mined hard negative per query
    python recipes/dense.py --gpu-command    # the same for BGE-M3 on 2 to 8 GPUs

The passages of all processes are negatives of every query (--negatives_cross_device). All processes end
with equal parameters, or the recipe fails. Judge the result with recipes/compare.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes import engine, steps  # noqa: E402
from recipes.engine import Training  # noqa: E402

PRESETS = {
    "pocket": Training(epochs=2, sub_batch=8, precision="auto"),  # otherwise the values of notebook 01
    "full": Training(
        model="bge-m3",
        pooling="cls",
        learning_rate=2e-5,
        query_length=512,
        passage_length=512,
        precision="bf16",
        checkpointing=True,
    ),
}


def main(words=None):
    parser = steps.parser(__doc__)
    engine.add_options(parser, PRESETS)
    parser.add_argument(
        "--hard", action="store_true", help="with mined hard negatives, one per query and epoch"
    )
    args = parser.parse_args(words)
    name = "dense-hard" if args.hard else "dense"
    source = {"kind": "hard", "count": 7} if args.hard else {"kind": "random", "count": 10}
    engine.recipe(
        args,
        PRESETS,
        "dense.py --hard" if args.hard else "dense.py",
        source,
        args.output or steps.OUTPUT / name,
        group=2 if args.hard else 1,
    )


if __name__ == "__main__":
    steps.run(main)
