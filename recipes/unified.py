"""Recipe 3, BGE-M3 unified: dense, sparse and ColBERT vectors from one model, trained together.

    python recipes/unified.py                          # with self-distillation
    python recipes/unified.py --plain                  # without it: what does it give?
    python recipes/unified.py --teacher FOLDER         # knowledge distillation from an embedding model
    python recipes/unified.py --scale full --print     # the line for BGE-M3 on 8 GPUs

At pocket scale BGE-M3's place is taken by MiniLM with two fresh random heads in BGE-M3's layout: its
dense vectors are good from the start, its sparse and ColBERT vectors mean nothing before this training.
Its vocabulary is cut to what the pocket texts use; with other texts in --data it stays whole.
Self-distillation: from a given step on, the weighted sum of the three scores teaches each of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes import data, engine, models, steps  # noqa: E402

BASE = steps.OUTPUT / "minilm-m3"
COMMON = "--unified_finetuning True --fix_position_embedding True --train_group_size 2"
PRESETS = {  # (model, queries per update, FlagEmbedding's arguments)
    "pocket": (str(BASE), 32, "--max_steps 8 --query_max_len 48 --passage_max_len 64 "
               "--self_distill_start_step 2"),
    "full": ("bge-m3", None, "--num_train_epochs 2 --learning_rate 1e-5 --temperature 0.02 "
             "--self_distill_start_step 5")}


def main(words=None):
    parser = steps.parser(__doc__)
    engine.add_options(parser)
    parser.add_argument("--teacher", metavar="MODEL", help="distil from this embedding model (m3_kd_loss)")
    parser.add_argument("--plain", action="store_true", help="no distillation of any kind")
    args, theirs = engine.parsed(parser, words)
    presets = dict(PRESETS)
    if args.scale == "pocket" and not args.model:
        presets["pocket"] = (str(pocket_base(args.data)), *PRESETS["pocket"][1:])
    name, source = "unified", [("hard", {"count": 7})]
    more = "--use_self_distill True"
    if args.teacher:
        name, more = f"unified-taught-by-{steps.label(args.teacher)}", "--knowledge_distillation True"
        source, more = [*source, ("teacher", {"model": args.teacher})], f"{more} --kd_loss_type m3_kd_loss"
    elif args.plain:
        name, more = "unified-plain", ""
    return engine.recipe(args, theirs, "m3", name, presets, f"{COMMON} {more}", source)


def pocket_base(given=None):
    """The folder of the pocket stand-in for BGE-M3, made once; whole: for a file with texts of one's own."""
    pairs = [pair for part in data.tutorial_pairs() for pair in part]
    texts = {pair[name] for pair in pairs for name in ("query", "pos_doc")}
    files = engine.data_files({"train_data": [given]}) if given else ()
    own = (row for file in files for _, row in data.read_rows(file))
    whole = any(data.row_problem(row) or not texts >= {row["query"], *row["pos"], *row["neg"]} for row in own)
    folder = BASE.with_name(BASE.name + "-whole") if whole else BASE
    if not (folder / "colbert_linear.pt").exists():
        models.pocket_m3(folder, None if whole else texts)
        print("BGE-M3's place is taken by MiniLM with two fresh random heads (sparse, ColBERT).")
    return folder


if __name__ == "__main__":
    steps.run(main)
