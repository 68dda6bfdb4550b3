"""A rehearsal at full size: BGE-M3's layout with random weights, through the code path of both notebooks.

    python benchmarks/full_size.py                             # on the CPU; --device cuda on a GPU
    python benchmarks/full_size.py --peers                     # and an update of two libraries, in fp32
    python benchmarks/full_size.py --folder F --only ladder    # one stage, of a run that was kept in F
    python benchmarks/full_size.py --smoke                     # the same code, tiny; nothing into the README

The weights are not needed for it: files of their size are built, with a tokenizer of its size, and the `full`
profile trains them on a few updates, stops as a kill would, goes on, saves, mixes and searches. Each stage
runs in a fresh process. Scores of random weights mean nothing and are left out. A number is "measured",
"scaled" from a measured one by tokens, "counted" (see memory_ladder.py), or "reported" by the original.
"""

import argparse
import contextlib
import multiprocessing
import shutil
import signal
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import common
import memory_ladder
import psutil
import torch

from embedding_tutorial import training as engine
from embedding_tutorial.batches import batch_rows
from embedding_tutorial.encoder import Encoder, embed, save_model, vectors_elsewhere
from embedding_tutorial.files import read_json, sha256_of, write_json
from embedding_tutorial.finetune import TrainConfig, batch_of, mix, split_pairs
from embedding_tutorial.pairs import read_mbpp
from embedding_tutorial.profiles import PROFILES

FULL = PROFILES["full"]
# Drawn wider than transformers does, so that the vectors of a random model differ from one another.
SHAPE = common.BGE_M3_SHAPE | {"initializer_range": 0.05}
MBPP = [folder / "data" / "sanitized-mbpp.json" for folder in (common.ROOT, common.ROOT.parent / "shared")]
SETTINGS = ("device", "batch_size", "updates", "limit_gb", "smoke")
PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers", "FlagEmbedding", "mteb", "peft")


# ---------------------------------------------------------------- the stages: args → what the row says


def pairs_of(args):
    """(training pairs of all updates, some held-out ones), as notebook 01 splits them."""
    train, held_out = split_pairs(read_mbpp(args.data), common.RECIPE.seed)
    return train[: args.updates * args.batch_size], held_out[:16]


def config_of(args, **changes):
    """The full profile's settings, for one epoch of `args.updates` updates, each of which is saved."""
    sizes = {"epochs": 1, "batch_size": args.batch_size, "save_every": 1, "save_minutes": 0.0}
    return TrainConfig(**FULL.config(args.device) | sizes | changes)


def train(args, name, stop_after=None, **changes):
    """`training.train` in the folder `name`; returns what the row says, each update's seconds and tokens."""
    updates, one_update, config = [], engine.one_update, config_of(args, **changes)

    def timed(run):
        rows = batch_rows(run.view, batch_of(run.update, len(run.data["query"]), run.config))
        begin = common.now(args.device)
        one_update(run)
        updates.append({"seconds": common.now(args.device) - begin, "tokens": sum(map(len, rows))})

    with patch.object(engine, "one_update", timed):
        data, options = pairs_of(args), {"progress": False, "stop_after": stop_after}
        history = engine.train(args.base, *data, config, args.folder / name, args.device, **options)[1]
    return {"precision": config.precision, "updates": updates, "losses": history["step_losses"]}


def build(args):
    common.published_m3(args.base, common.SMOKE_SHAPE if args.smoke else SHAPE)
    encoder, pairs = Encoder(args.base), read_mbpp(args.data)
    lengths = [sum(map(len, encoder.tokenize([pair["query"], pair["pos_doc"]]))) for pair in pairs]
    epoch = split_pairs(lengths, common.RECIPE.seed)[0]
    return {
        "parameters": sum(w.numel() for w in encoder.parameters()),
        "vocabulary": len(encoder.tokenizer),
        "tokens per pair": sum(lengths) / len(lengths),
        "epoch": {"pairs": len(epoch), "tokens": sum(epoch)},
    }


def uninterrupted(args):
    row = train(args, "reference")
    files = [args.folder / name / "fine-tuned" / "model.safetensors" for name in ("run", "reference")]
    row["same weights"] = len({sha256_of(file) for file in files}) == 1
    shutil.rmtree(args.folder / "reference")
    return row


def one_update(change=None, **options):
    """The stage of one update whose settings differ by `options`, and whose run by `change` (of a rung)."""

    def stage(args):
        open_run = engine.open_run

        def changed(*arguments):
            run = open_run(*arguments)
            if change:
                change(run)
            return run

        with patch.object(engine, "open_run", changed):
            row = train(args, "one", stop_after=1, save_every=0, **options)
        shutil.rmtree(args.folder / "one")
        return row

    return stage


def mixed(args):
    """As notebook 01 does it: base, fine-tuned and merged in memory at once."""
    tuned = args.folder / "run" / "fine-tuned"
    base, tuned, merged = (Encoder(folder).eval() for folder in (args.base, tuned, args.base))
    merged.load_state_dict(mix([base.state_dict(), tuned.state_dict()], [0.5, 0.5]))
    save_model(merged, args.folder / "run" / "merged")


def opened(args):
    """The largest difference of a number in a vector, from what each library computes from the folder."""
    texts = [pair[side] for pair in pairs_of(args)[1][:4] for side in ("query", "pos_doc")]
    folder = args.folder / "run" / "fine-tuned"
    with torch.no_grad():
        ours = embed(Encoder(folder).eval(), texts).numpy()
    found = vectors_elsewhere(folder, texts)
    return {"difference": {name: float(abs(theirs - ours).max()) for name, theirs in found.items()}}


def searched(args):
    """A part of Pocket T2 through mteb, as notebook 02 does it."""
    from embedding_tutorial import retrieval

    task = retrieval.retrieval_task("PocketT2Retrieval")
    task.load_data()
    task = retrieval.subset_task(task, queries=4, distractors=20)
    merged = args.folder / "run" / "merged"
    retrieval.evaluate_model("merged", merged, task, FULL, args.device, args.folder / "store")
    return {"task": task.metadata.name}


def ladder(args):
    """The memory of one update, idea by idea."""
    pairs = split_pairs(read_mbpp(args.data), common.RECIPE.seed)[0]
    return {"kind": "counted", "ladder": memory_ladder.ladder(args.base, pairs, args.device, args.batch_size)}


def peer(name, **options):
    """The stage of one update of a contender of training.py, in fp32, with the model's own dropout."""

    def stage(args):
        import training

        work = training.Work(args.base, pairs_of(args)[0], config_of(args, precision="fp32"), [0], 0)
        recorder = training.Recorder()
        training.RUNNERS[name](work, recorder, **options)
        return {"precision": "fp32", "updates": recorder.updates}

    return stage


STAGES = {
    "build": ("the model is built and written", build),
    "stopped": ("half of the updates", lambda args: train(args, "run", max(1, args.updates // 2))),
    "resumed": ("the rest, after a stop as by a kill", lambda args: train(args, "run")),
    "uninterrupted": ("the same without a stop", uninterrupted),
    "whole": ("one update, the graph of the whole batch", one_update(backward="whole")),
    "again": ("the same, each layer computed again", one_update(backward="whole", checkpointing=True)),
    "adafactor": ("GradCache and Adafactor", one_update(memory_ladder.with_adafactor)),
    "lora": ("GradCache and LoRA of rank 16", one_update(lora_rank=16)),
    "mixed": ("halfway to the base, saved", mixed),
    "opened": ("opened in other libraries", opened),
    "searched": ("Pocket T2, a part, through mteb", searched),
    "ladder": ("the memory ladder below", ladder),
}
SMALL = {"extra": ["--sub_batch_size", "8", "--gradient_checkpointing"]}
PEERS = {
    "ours": ("ours: GradCache, dropout 0.1", peer("ours", dropout=None)),
    "st": ("sentence-transformers: cached loss", peer("sentence_transformers", mini_batch_num_tokens=512)),
    "flag": ("FlagEmbedding", peer("flagembedding")),
    "flag-small": ("FlagEmbedding: sub-batches of 8, checkpointing", peer("flagembedding", **SMALL)),
}
ALL = STAGES | PEERS


def worker(args, name, path=None):
    """One stage in this process: its row, also written to `path`."""
    begin = time.perf_counter()
    row = {"name": ALL[name][0], "kind": "measured", **(ALL[name][1](args) or {})}
    if args.device != "cpu":
        row["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    row |= {"seconds": time.perf_counter() - begin, "peak_gb": common.peak_memory_gb()}
    if path:
        write_json(path, row)
    return row


def fresh_process(args, name):
    """(row of a stage, GB of disk at most). It is ended where it takes more RAM than --limit-gb, so that the
    machine lives on. Raises RuntimeError where it failed."""
    path, most, looked, held = args.folder / "row.json", 0.0, 0.0, 0.0
    process = multiprocessing.get_context("spawn").Process(target=worker, args=(args, name, path))
    process.start()
    while process.is_alive():
        with contextlib.suppress(psutil.NoSuchProcess):
            held = psutil.Process(process.pid).memory_info().rss / 1e9 or held  # 0: it has just ended
        if held > args.limit_gb:
            process.kill()
        if time.monotonic() - looked > 1:
            most, looked = max(most, common.disk_gb(args.folder)), time.monotonic()
        process.join(0.1)
    if process.exitcode == -signal.SIGKILL:  # by this program, or by a system that had no more
        return {"name": ALL[name][0], "kind": "ended: too much RAM", "peak_gb": held}, most
    if process.exitcode:
        raise RuntimeError(f"{name} ended with status {process.exitcode}; its message stands above.")
    return read_json(path), most


def measure(args):
    """Run the stages, writing after each; returns the result. With --only the other stages stay."""
    old = read_json(args.out) if args.only and args.out.is_file() else {}
    data = "the pocket pairs" if args.data == common.POCKET_PAIRS else args.data.stem
    result = {
        "machine": common.machine(PACKAGES, args.device),
        "command": f"python benchmarks/full_size.py{' --peers' if args.peers else ''}",
        "settings": {"data": data, **{name: getattr(args, name) for name in SETTINGS}},
        **{name: old.get(name, {}) for name in ("stages", "epoch", "ladder")},
    }
    for name in args.only or (ALL if args.peers else STAGES):
        row, most = fresh_process(args, name)
        after = common.disk_gb(args.folder)
        result["ladder"] = row.pop("ladder", result["ladder"])
        result["stages"][name] = row | {"disk_gb": after, "disk_peak_gb": max(most, after)}
        result["epoch"] = epoch_of(result["stages"])
        write_json(args.out, result)
        print(f"{name}: {row.get('seconds', 0):.1f} s, {row['peak_gb']:.2f} GB", flush=True)
    return result


def epoch_of(stages):
    """An epoch of all training pairs: its tokens, times the seconds per token of the quickest update.

    The quickest: what else runs on the machine can only add to it.
    """
    rows = [stages[name] for name in ("stopped", "resumed", "uninterrupted") if name in stages]
    updates, epoch = sum((row.get("updates", []) for row in rows), []), stages["build"]["epoch"]
    speeds = [update["seconds"] / update["tokens"] for update in updates]
    return epoch | ({"seconds": min(speeds) * epoch["tokens"], "kind": "scaled"} if speeds else {})


def readme_text(result, title):
    stages, epoch, settings, table = result["stages"], result["epoch"], result["settings"], []
    for row in stages.values():
        seconds = ", ".join(common.shown(update["seconds"]) for update in row.get("updates", []))
        sizes = [row.get(key) for key in ("peak_gb", "gpu_gb", "disk_gb", "disk_peak_gb")]
        numbers = [common.shown(row.get("seconds")), seconds, *(common.shown(size, 2) for size in sizes)]
        table.append([row["name"], row["kind"], *numbers])
    header = ["stage", "", "seconds", "of each update", "RAM, GB", "GPU, GB", "disk, GB", "at most, GB"]
    rungs = [[row["rung"], f"{row['gb']:.3g}", row["kind"]] for row in result["ladder"]]
    same = "the same weights, bit for bit," if stages["uninterrupted"]["same weights"] else "OTHER weights"
    built, found = stages["build"], stages["opened"]["difference"]
    return f"""## A rehearsal at full size

`{result["command"]}`: {built["parameters"]:,} random weights in BGE-M3's files, a tokenizer of
{built["vocabulary"]:,} entries ({built["tokens per pair"]:.0f} tokens in a pair), trained as `full` trains on
{settings["device"]}, in {stages["resumed"]["precision"]}: {settings["updates"]} updates of
{settings["batch_size"]} pairs of {settings["data"]}. Each stage is a process of its own, whose memory
includes Python and the libraries. Machine: {result["machine"]["summary"]}.

{common.markdown_table(header, table)}

The run that was stopped and went on has {same} as the one without a stop.
An epoch of {epoch["pairs"]} pairs, {epoch["tokens"]:,} tokens: {epoch["seconds"]:.0f} s, {epoch["kind"]}.
The fine-tuned model opens in {", ".join(found)}.
No number of a vector differs there from ours by more than {max(found.values()):.0e}.

![{title}](../images/memory_ladder.png)

{common.markdown_table(["one update; the ideas add up", "GB at the peak", ""], rungs)}

Where the update takes less than loading the model does, the peak is the loading's.
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, data = parser.add_argument, next((path for path in MBPP if path.is_file()), common.POCKET_PAIRS)
    add("--folder", type=Path, help="keep model (bge-m3/) and runs there; default: a temporary folder")
    add("--device", default="cpu", help="or cuda")
    add("--data", type=Path, default=data, help="pairs in MBPP's format")
    add("--updates", type=int, default=2, help="updates of a run")
    add("--batch-size", type=int, default=80, help="pairs in an update")
    add("--limit-gb", type=float, default=22, help="RAM: a stage that takes more is ended")
    add("--peers", action="store_true", help="also one update of two libraries")
    add("--only", nargs="+", choices=ALL, help="these stages; --folder holds what earlier ones left")
    add("--smoke", action="store_true", help="a tiny model; nothing goes into the README")
    add("--out", type=Path, default=common.RESULTS / "full_size.json", help="where the JSON goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = (args.folder or Path(temporary)).resolve()
        args.base = args.folder / "bge-m3"
        args.folder.mkdir(parents=True, exist_ok=True)
        result = measure(args)
    if not args.smoke and STAGES.keys() <= result["stages"].keys():
        common.put_into_readme("full-size", readme_text(result, memory_ladder.draw(result)))


if __name__ == "__main__":
    main()
