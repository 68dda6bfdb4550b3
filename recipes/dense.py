"""Recipe 2, dense: one vector per text, trained by FlagEmbedding under torchrun.

    python recipes/dense.py                              # in-batch negatives only, on 2 processes
    python recipes/dense.py --hard                       # and a mined hard negative per query
    python recipes/dense.py --teacher MODEL              # and a teacher's scores of them (kl_div)
    python recipes/dense.py -- --use_mrl True --mrl_dims 64 128 384
    python recipes/dense.py --scale full --print         # the line for BGE-M3 on 8 GPUs

The passages of all processes are negatives of every query (--negatives_cross_device). All processes end
with equal parameters, or the recipe fails. Judge the result with recipes/compare.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes import engine, steps  # noqa: E402

PRESETS = {  # (model, queries per update, FlagEmbedding's arguments)
    "pocket": ("minilm", 80, "--num_train_epochs 1 --learning_rate 1e-4 --query_max_len 64 "
               "--passage_max_len 128 --sub_batch_size 8"),
    "full": ("bge-m3", None, "--num_train_epochs 5 --learning_rate 2e-5")}  # None: what fits
TAUGHT = "--train_group_size 4 --knowledge_distillation True --kd_loss_type kl_div"


def main(words=None):
    parser = steps.parser(__doc__)
    engine.add_options(parser)
    parser.add_argument("--hard", action="store_true", help="with a mined negative per query and epoch")
    parser.add_argument("--teacher", metavar="MODEL", help="distil from this embedding model")
    args, theirs = engine.parsed(parser, words)
    name, source, more = "dense", [("random", {"count": 10})], ""
    if args.hard or args.teacher:
        name, source, more = "dense-hard", [("hard", {"count": 7})], "--train_group_size 2"
    if args.teacher:
        name, more = f"dense-taught-by-{steps.label(args.teacher)}", TAUGHT
        source += [("teacher", {"model": args.teacher})]
    return engine.recipe(args, theirs, "base", name, PRESETS, more, source)


if __name__ == "__main__":
    steps.run(main)
