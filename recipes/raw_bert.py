"""Recipe 4, from raw BERT: a BERT that is no embedding model, with none, few and many random negatives.

    python recipes/raw_bert.py --negatives 10
    python recipes/raw_bert.py --negatives 50
    python recipes/raw_bert.py --scale full --print     # the line for bert-base-uncased on 8 GPUs

The question: do more random negatives help? Every number of them gets as many updates and about as many
passages in each (204; at full scale what fits): more negatives per query are fewer queries. At pocket scale
bert-base-uncased's place is taken by a small BERT with random weights, made here: expect little of it.
The real one: hf download google-bert/bert-base-uncased --local-dir models/bert-base-uncased
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes import engine, models, steps  # noqa: E402

SMALL = steps.OUTPUT / "small-bert"
PRESETS = {  # (model, queries per update with no negatives, FlagEmbedding's arguments)
    "pocket": (str(SMALL), 204,
               "--max_steps 30 --learning_rate 1e-3 --query_max_len 48 --passage_max_len 64"),
    "full": ("bert-base-uncased", None, "--max_steps 2000 --learning_rate 2e-5 --query_max_len 128")}


def main(words=None):
    parser = steps.parser(__doc__)
    engine.add_options(parser)
    parser.add_argument("--negatives", type=int, default=10, help="random negatives per query")
    args, theirs = engine.parsed(parser, words)
    if args.scale == "pocket" and not (args.model or (SMALL / "model.safetensors").exists()):
        models.small_bert(SMALL)
    group, (model, passages, options) = args.negatives + 1, PRESETS[args.scale]
    presets = {args.scale: (model, passages and passages // group, options)}
    more = f"--train_group_size {group} --sentence_pooling_method mean"
    source = [("random", {"count": max(1, args.negatives)})]
    return engine.recipe(args, theirs, "base", f"raw-bert-{args.negatives}", presets, more, source)


if __name__ == "__main__":
    steps.run(main)
