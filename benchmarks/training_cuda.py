"""Training at BGE-M3's size on a GPU: padded, packed and with GradCache, on random weights.

    python benchmarks/training_cuda.py             # batches of 80 and 341 pairs, bf16 and fp16
    python benchmarks/training_cuda.py --smoke     # the same code with a tiny model on the CPU

The texts are real pairs in the pocket model's tokenizer, cut at 512 tokens. Each row comes from a fresh
process: one update to warm up, then `--steps` of them. The last row may use 16 GB only, as on a smaller card.
"""

import argparse
import dataclasses
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import common
import torch
from training import start_ours

from embedding_tutorial import training as engine
from embedding_tutorial.encoder import autocast
from embedding_tutorial.files import TutorialError, write_json
from embedding_tutorial.finetune import batch_of, updates_per_epoch

WAYS = {"padded": {}, "whole": {}, "gradcache": {"backward": "gradcache"}}


def padded_gradients(run, batch):
    """What `compute_gradients` returns, by the predecessor's padded batch and not in packed groups."""
    run.optimizer.zero_grad(set_to_none=True)
    with autocast(run.encoder, run.config.precision):
        rows = ([run.data[side][i] for i in batch] for side in ("query", "passage"))
        loss = common.padded_loss(run.encoder, *rows)
    run.scaler.scale(loss).backward()
    return loss.item(), 0.0, None


def timed_updates(args, way, device, pairs, config):
    """Run the updates of one way: (run, seconds of each, row lengths of each), the warm-up left out."""
    run = start_ours(args.model, pairs, config, device, None if way == "padded" else ())
    if way == "padded":  # same weights, precision, optimizer and no dropout: only the padding differs
        run.encoder.backbone.set_attn_implementation("sdpa")
        engine.compute_gradients = padded_gradients
    updates = range(config.epochs * updates_per_epoch(len(pairs), config))
    full = [u for u in updates if len(batch_of(u, len(pairs), config)) == config.batch_size]
    seconds, lengths = [], []
    for run.update in [full[0], *full[: args.steps]]:
        batch = batch_of(run.update, len(pairs), config)
        begin = common.now(device)
        engine.one_update(run)
        seconds.append(common.now(device) - begin)
        lengths.append([len(row) for row in engine.batch_rows(run.data, batch)])
    return run, seconds[1:], lengths[1:]


def worker(args):
    """Measure `WAY-PRECISION-PAIRS`; the row says where it does not fit."""
    way, precision, size = args.worker.split("-")
    device, shape = ("cpu", common.SMOKE_SHAPE) if args.smoke else ("cuda", common.BGE_M3_SHAPE)
    pairs = common.train_pairs(args.data)
    size = min(int(size), len(pairs))
    recipe = {"batch_size": size, "precision": precision, "token_budget": 4096, **WAYS[way]}
    config = dataclasses.replace(common.RECIPE, learning_rate=2e-5, **recipe)
    row = {"way": way, "precision": precision, "pairs per update": size, "limit GB": args.limit_gb}
    if args.limit_gb and device == "cuda":  # imitates a smaller card
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.limit_gb * 1e9 / total))
    try:
        run, seconds, lengths = timed_updates(args, way, device, pairs, config)
    except (torch.OutOfMemoryError, TutorialError) as error:
        if isinstance(error, TutorialError) and not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return {**row, "out of memory": True}
    real = sum(map(sum, lengths))
    padded = sum(size * (max(update[:size]) + max(update[size:])) for update in lengths)
    rate = sum(common.model_flop(shape, update) for update in lengths) / sum(seconds)
    row |= {"out of memory": False, "seconds": seconds, "seconds per update": median(seconds)}
    if device == "cuda":  # before the ceiling's own matrices
        row |= {"allocated GB": torch.cuda.max_memory_allocated() / 1e9}
        row |= {"reserved GB": torch.cuda.max_memory_reserved() / 1e9}
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ceiling = common.matmul_ceiling(device, kind, 8192 if device == "cuda" else 128)
    return row | {
        "tokens computed": padded if way == "padded" else real,
        "real tokens": real,
        "utilisation": rate / ceiling,
    }


def measure(args):
    """All rows, written after each; returns the result."""
    shape, device, precisions, sizes = common.BGE_M3_SHAPE, "cuda", ["bf16", "fp16"], (80, 341)
    if args.smoke:  # fp16 autocast is CUDA's
        shape, device, precisions, sizes = common.SMOKE_SHAPE, "cpu", ["bf16"], (8, 16)
    jobs = [(way, kind, size, None) for size in sizes for kind in precisions for way in WAYS]
    jobs.append(("gradcache", precisions[-1], sizes[-1], 16))
    result = {
        "machine": common.machine(("torch", "transformers"), device),
        "command": f"python benchmarks/training_cuda.py{' --smoke' if args.smoke else ''}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "data": args.data.name,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        common.random_m3(folder, shape)
        for way, kind, size, limit in jobs:
            words = ["--worker", f"{way}-{kind}-{size}", "--model", folder, "--data", args.data]
            words += ["--steps", args.steps, *(["--smoke"] if args.smoke else [])]
            words += ["--limit-gb", limit] if limit else []
            result["rows"].append(common.run_worker(__file__, words))
            write_json(args.out, result)
            print(json.dumps(result["rows"][-1]), flush=True)
    return result


def readme_text(result):
    words = ["way", "precision", "pairs per update", "limit GB", "out of memory"]
    figures = ["seconds per update", "allocated GB", "reserved GB", "utilisation"]
    rows = [
        [*(row[name] or "" for name in words), *(common.shown(row.get(name), 2) for name in figures)]
        for row in result["rows"]
    ]
    return f"""## Training at BGE-M3's size on a GPU

`{result["command"]}` ({result["date"]}): random weights, no dropout, texts of {result["data"]}.
Machine: {result["machine"]["summary"]}.
Utilisation: the model's FLOP on real tokens over a measured matrix product of 8192 at the same precision.

{common.markdown_table([*words, *figures], rows)}
"""


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--smoke", action="store_true", help="a tiny model on the CPU; nothing goes into the README")
    add("--data", type=Path, default=common.POCKET_PAIRS, help="pairs in MBPP's format")
    add("--steps", type=int, default=5, help="updates measured")
    add("--out", type=Path, default=common.RESULTS / "training_cuda.json", help="where the JSON goes")
    add("--worker", help=argparse.SUPPRESS)
    add("--model", type=Path, help=argparse.SUPPRESS)
    add("--limit-gb", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        write_json(args.out, worker(args))
        return
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("torch.cuda.is_available() is False: this needs a GPU, or --smoke.")
    result = measure(args)
    if not args.smoke:
        common.put_into_readme("training-cuda", readme_text(result))


if __name__ == "__main__":
    main()
