"""Training: this project's and its peers' time and memory on the same batches.

    python benchmarks/training.py                  # the pocket pairs; goes on where it was interrupted
    python benchmarks/training.py --data FILE      # sanitized MBPP, to training_mbpp.json

Every contender runs in a process of its own, so that its peak memory is its own, and the contenders take
turns, so that a slow minute of the machine hits all of them. Each does one update to warm up and then the
updates of one epoch (`--steps` of them). What is timed is the whole update: tokenising (but for ours, which
tokenises once before training), forward, loss, backward, clipping, AdamW. Medians over `--repeats` rounds.
The ways to more negatives differ by a few per cent, too little for that: they take turns within one process
until their order is settled. training_cuda.py measures BGE-M3's size on a GPU.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import common
import torch
from common import RECIPE, shown

from embedding_tutorial import figures
from embedding_tutorial import training as engine
from embedding_tutorial.assets import pocket_model_path
from embedding_tutorial.encoder import Encoder, read_pooling
from embedding_tutorial.files import ROOT, read_json, write_json
from embedding_tutorial.finetune import batch_of, updates_per_epoch
from embedding_tutorial.profiles import PROFILES, training_precision

PACKAGES = ("torch", "transformers", "sentence-transformers", "FlagEmbedding", "accelerate")


class Job(NamedTuple):
    """One thing to measure in a fresh process. options: keyword arguments of the function in RUNNERS."""

    id: str
    name: str
    runner: str
    dropout: str = "0.1"
    options: dict = {}


ST, SMALL_NAME = "sentence-transformers", "FlagEmbedding, sub-batches of 8, checkpointing"
SMALL = {"extra": ["--sub_batch_size", "8", "--gradient_checkpointing"]}
GRADCACHE, BF16 = {"backward": "gradcache"}, {"precision": "bf16"}
# The settings of CachedMultipleNegativesRankingLoss; the first round tells which one the others keep.
CACHED = [
    Job(f"st-cached-{n}", f"{ST}, cached loss, {name}={n}", "sentence_transformers", options={name: n})
    for name, n in (("mini_batch_num_tokens", 1024), ("mini_batch_num_tokens", 2048), ("mini_batch_size", 16))
]
CONTENDERS = [
    Job("predecessor", "predecessor's loop", "padded_loop", options={"dropout": None}),
    Job("predecessor-dropout-0", "predecessor's loop", "padded_loop", "0", {"dropout": 0.0}),
    Job("flagembedding", "FlagEmbedding", "flagembedding"),
    Job("flagembedding-small", SMALL_NAME, "flagembedding", options=SMALL),
    Job("st", ST, "sentence_transformers"),
    *CACHED,
    Job("ours", "ours", "ours", "0"),
    Job("ours-dropout", "ours", "ours", "0.1", {"dropout": None}),
    Job("ours-gradcache", "ours, GradCache", "ours", "0", GRADCACHE),
    Job("ours-bf16", "ours", "ours", "0", BF16),
    Job("ours-gradcache-bf16", "ours, GradCache", "ours", "0", GRADCACHE | BF16),
]
LIKE = {"0": "ours", "0.1": "ours-dropout"}  # by a peer's dropout: which of ours, in fp32 as all peers are
# Ways to more negatives, all ours. `batch_size: None` stands for all pairs at once.
METHODS = [
    Job("method-accumulation", "accumulation, 2 × 40", "ours", "0", {"micro_batch": 40}),
    Job("method-whole", "whole batch", "ours", "0"),
    Job("method-gradcache", "GradCache", "ours", "0", GRADCACHE),
    Job("method-queue", "whole batch + queue of 160", "ours", "0", {"queue": 160}),
    Job("method-all", "GradCache, all pairs", "ours", "0", GRADCACHE | {"batch_size": None}),
]
RANKED = [job.id for job in METHODS if "batch_size" not in job.options]  # as many pairs each: comparable
METHOD_UPDATES = 2  # in a round, full batches only: a rest of 21 pairs says nothing about the method
LEAST_ROUNDS, MOST_ROUNDS = 5, 12  # fewer have no quartiles to speak of
COST = "time per pair, times the whole batch"


class Recorder:
    """Collects seconds, losses and tokens of each update while a contender trains."""

    NAMES = ("seconds", "pairs", "padded_tokens", "real_tokens", "loss")

    def __init__(self):
        self.updates, self.padded, self.real = [], 0, 0

    def count_tokens(self, transformer):
        """Count what goes into the transformer, padding included, once per text: GradCache's first pass
        keeps no graph and is left out, gradient checkpointing's second one happens further inside."""
        forward = transformer.forward  # wrapped, because sentence-transformers goes round hooks

        @functools.wraps(forward)
        def counting(*positional, **named):
            if torch.is_grad_enabled():
                ids, mask = named.get("input_ids"), named.get("attention_mask")
                tokens = named["inputs_embeds"].shape[:2].numel() if ids is None else ids.numel()
                self.padded += tokens
                lengths = named["layout"].lengths if "layout" in named else [tokens]
                own = sum(length for length in lengths if length > 1)  # what fills a row has one token
                self.real += own if mask is None else int(mask.sum())
            return forward(*positional, **named)

        transformer.forward = counting

    def start(self):
        self.clock, self.padded, self.real = time.perf_counter(), 0, 0

    def update_done(self, loss, pairs):
        values = time.perf_counter() - self.clock, pairs, self.padded, self.real, loss
        self.updates.append(dict(zip(self.NAMES, values, strict=True)))
        self.start()

    def result(self, warmup):
        """All updates, and the sums of those after the first `warmup` ones."""
        sums = {name: sum(update[name] for update in self.updates[warmup:]) for name in self.NAMES[:-1]}
        return sums | {"warmup": warmup, "updates": self.updates, "peak_gb": common.peak_memory_gb()}


class Work(NamedTuple):
    """What every contender is given: the model, the pairs, and which updates of the recipe's first epoch."""

    model: Path
    pairs: list
    config: object  # TrainConfig: it says which pairs an update has
    updates: list  # the first `warmup` of them warm up
    warmup: int

    def rows(self, update):
        return [self.pairs[i] for i in batch_of(update, len(self.pairs), self.config)]


def open_work(args, job):
    """The updates of a job: one to warm up, then epoch 0's first ones, as the tutorial's run has them."""
    pairs, warmup = common.train_pairs(args.data), 1
    size = min(job.options.get("batch_size", args.batch_size) or len(pairs), len(pairs))
    config = dataclasses.replace(RECIPE, batch_size=size)
    updates = list(range(updates_per_epoch(len(pairs), config)))[: args.steps]
    if job in METHODS:
        updates = updates[: min(METHOD_UPDATES, len(pairs) // size)]
        warmup = 1 + -(-job.options.get("queue", 0) // size)  # until the queue is full
    return Work(args.model, pairs, config, [0] * warmup + updates, warmup)


# ---------------------------------------------------------------- the contenders


def padded_encoder(model, dropout=0.0):
    """The model with transformers' own attention, which reads padded batches; ours reads packed ones."""
    encoder = Encoder(model, RECIPE.max_length, dropout).train()
    encoder.backbone.set_attn_implementation("sdpa")
    return encoder


def plain_updates(work, recorder, module, loss_of, **options):
    """Train with loss_of: (queries, passages) → loss, as a plain loop does; options of AdamW."""
    rates = {"lr": RECIPE.learning_rate, "weight_decay": RECIPE.weight_decay}
    optimizer = torch.optim.AdamW(module.parameters(), **rates, **options)
    recorder.start()
    for update in work.updates:
        loss = loss_of(*([row[side] for row in work.rows(update)] for side in ("query", "pos_doc")))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), RECIPE.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.update_done(loss.item(), len(work.rows(update)))


def padded_loop(work, recorder, dropout):
    """The predecessor's loop: tokenise and pad every batch, one forward each, AdamW, fp32."""
    encoder = padded_encoder(work.model, dropout)
    recorder.count_tokens(encoder.backbone)
    loss_of = lambda *sides: common.padded_loss(encoder, *map(encoder.tokenize, sides))  # noqa: E731
    plain_updates(work, recorder, encoder, loss_of)


def sentence_transformers(work, recorder, **cached):
    """MultipleNegativesRankingLoss, or with the size of a mini-batch its cached form.

    A plain loop around the library's loss: its trainer does the same and more, so this flatters it a little.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(str(work.model), device="cpu").train()
    model.max_seq_length = RECIPE.max_length
    kind = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
    loss = kind(model, scale=1 / RECIPE.temperature, **cached)
    recorder.count_tokens(model.transformers_model)
    loss_of = lambda *sides: loss([model.preprocess(side) for side in sides], labels=None)  # noqa: E731
    plain_updates(work, recorder, model, loss_of, fused=True)


def flagembedding(work, recorder, extra=()):
    """FlagEmbedding's dense trainer: its own runner, model, collator and Trainer, fed our batches."""
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            recorder.start()

        def on_step_end(self, args, state, control, **_):
            recorder.update_done(losses.pop(), len(work.rows(work.updates[state.global_step - 1])))

    losses = []
    # In the order of our updates, read sequentially: its batches are then ours. Only the last update may be
    # short of the batch size.
    rows = [row for update in work.updates for row in work.rows(update)]
    options = f"""
        --query_max_len {RECIPE.max_length} --passage_max_len {RECIPE.max_length}
        --normalize_embeddings True --temperature {RECIPE.temperature}
        --learning_rate {RECIPE.learning_rate} --weight_decay {RECIPE.weight_decay}
        --max_grad_norm {RECIPE.clip} --per_device_train_batch_size {work.config.batch_size}
        --num_train_epochs 1 --train_sampling_strategy sequential""".split()
    with tempfile.TemporaryDirectory() as folder:
        pooling = read_pooling(work.model)
        runner = common.flagembedding_runner(work.model, pooling, rows, folder, [*options, *extra])
        runner.trainer.add_callback(Laps())
        runner.model.register_forward_hook(lambda module, _, output: losses.append(output.loss.item()))
        recorder.count_tokens(runner.model.model)
        runner.trainer.train()


def start_ours(model, pairs, config, device="cpu", read=()):
    """A run as `train` starts it. read=None: with the whole word table, to compare its gradient."""
    run = engine.start_run(model, lambda encoder: engine.tokenize_pairs(encoder, pairs), config, device, read)
    run.encoder.train()
    return run


def ours(work, recorder, batch_size=None, **options):
    """The tutorial's own update, as `train` runs it. Returns the run."""
    run = start_ours(work.model, work.pairs, dataclasses.replace(work.config, **options))
    recorder.count_tokens(run.encoder.backbone)
    recorder.start()
    for update in work.updates:
        run.update = update  # the warm-up goes back to the first one
        engine.one_update(run)
        recorder.update_done(run.history["step_losses"][-1], len(work.rows(update)))
    return run


RUNNERS = {f.__name__: f for f in (padded_loop, sentence_transformers, flagembedding, ours)}


def time_methods(args):
    """{"seconds": {method id: per update, one value per round}, "order": ids, the fastest median first,
    "settled": whether that order was the same in the last two rounds}.

    All methods in one process, and each round begins with another one: in processes of their own, the queue
    once came out faster than the batch without it.
    """
    runs = []
    for job in METHODS:
        work = open_work(args, job)
        runs.append((job.id, ours(work, Recorder(), **job.options), work.updates[work.warmup :]))
    seconds, orders = {job.id: [] for job in METHODS}, [None]
    while (done := len(orders) - 1) < MOST_ROUNDS and (done < LEAST_ROUNDS or orders[-1] != orders[-2]):
        first = done % len(runs)
        for name, run, updates in runs[first:] + runs[:first]:
            begin = time.perf_counter()
            for run.update in updates:
                engine.one_update(run)
            seconds[name].append((time.perf_counter() - begin) / len(updates))
        orders.append(sorted(RANKED, key=lambda name: median(seconds[name])))
    return {"seconds": seconds, "order": orders[-1], "settled": orders[-1] == orders[-2]}


def gradient_of(module):
    return torch.cat([w.grad.flatten().double() for w in module.parameters() if w.grad is not None])


def differences(model, pairs, kind):
    """{"pairs", "ways": {way: relative differences of loss and gradient (2-norm)}}: ours, computed in `kind`,
    from the padded loop without dropout in float64. An even number of pairs, all in one batch."""

    def plain(parts, kind):
        encoder, total, size = padded_encoder(model).to(kind), 0.0, len(pairs) // parts
        for part in (pairs[i * size : (i + 1) * size] for i in range(parts)):
            rows = (encoder.tokenize([pair[side] for pair in part]) for side in ("query", "pos_doc"))
            loss = common.padded_loss(encoder, *rows) / parts
            loss.backward()
            total += loss.item()
        return total, gradient_of(encoder)

    def mine(**options):
        config = dataclasses.replace(RECIPE, mask_duplicates=False, **options)
        run = start_ours(model, pairs, config, read=None)
        run.encoder.to(kind)
        torch.manual_seed(0)
        return engine.compute_gradients(run, list(range(len(pairs))))[0], gradient_of(run.encoder)

    exact, cached = plain(1, torch.float64), {"backward": "gradcache"}
    found = {"whole batch": (mine(), exact), "GradCache": (mine(**cached), exact)}
    found["accumulated halves"] = mine(micro_batch=len(pairs) // 2), plain(2, torch.float64)
    if kind == torch.float64:
        # With dropout there is no padded loop to compare with, because it draws in another order. But
        # GradCache's second pass has to repeat the first one's draws: then it equals the whole batch.
        both = {"dropout": 0.1, "token_budget": 256}
        found["GradCache with dropout 0.1, against the whole batch"] = mine(**cached, **both), mine(**both)
    else:
        found["the padded loop itself"] = plain(1, kind), exact
    ways = {
        way: {"loss": abs(loss / loss0 - 1), "gradient": float((grad - grad0).norm() / grad0.norm())}
        for way, ((loss, grad), (loss0, grad0)) in found.items()
    }
    return {"pairs": len(pairs), "ways": ways}


def equality(model, pairs, pairs_in_batch):
    """float64 on a small random model shows that the method is the same to the last digits; fp32 on the real
    model shows what rounding adds, to ours and to the padded loop alike."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = common.random_m3(folder, common.SMOKE_SHAPE)
        small = differences(tiny, pairs[:16], torch.float64)
    real = differences(model, pairs[: pairs_in_batch // 2 * 2], torch.float32)
    return {"small random model, float64": small, "the model, fp32": real}


JOBS = {job.id: job for job in [*CONTENDERS, *METHODS]}


def run_job(args, job_id):
    """What a fresh process measures for a job."""
    words = ["--worker", job_id, "--data", args.data, "--model", args.model]
    return common.run_worker(__file__, [*words, "--steps", args.steps, "--batch-size", args.batch_size])


def measure(args):
    """Run what is missing, writing after every process; returns the finished result."""
    pairs = len(common.train_pairs(args.data))
    per_epoch = updates_per_epoch(pairs, dataclasses.replace(RECIPE, batch_size=args.batch_size))
    settings = {
        "data": "the pocket pairs" if args.data == common.POCKET_PAIRS else args.data.name,
        "model": "all-MiniLM-L6-v2" if args.model == pocket_model_path() else args.model.name,
        "pairs": pairs,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "seconds": f"of {min(args.steps, per_epoch)} of an epoch's {per_epoch} updates, scaled by pairs",
        "repeats": args.repeats,
    }
    partial = args.out.with_name(args.out.name + ".tmp")  # which git ignores
    old = read_json(partial) if partial.is_file() else {}
    runs = old["runs"] if old.get("settings") == settings else {}

    def run(job_id, number=0):
        done = runs.setdefault(job_id, [])
        if len(done) == number:
            done.append(run_job(args, job_id))
            write_json(partial, {"settings": settings, "runs": runs})
            print(f"round {number + 1}  {job_id}", flush=True)
        return done[number]

    equal, jobs = run("equality"), CONTENDERS
    for number in range(args.repeats):
        for job in jobs:
            run(job.id, number)
        best = min(CACHED, key=lambda job: runs[job.id][0]["seconds"])
        jobs = [job for job in CONTENDERS if job not in CACHED or job == best]
    alone = [run(job.id) for job in METHODS]  # each in a process of its own for its memory, then their times
    timed = run("methods")
    words = [f"…/{Path(word).name}" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    result = {
        "machine": common.machine(PACKAGES),
        "command": " ".join(["python benchmarks/training.py", *words]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "settings": settings,
        "contenders": rows_of(jobs, runs, pairs),
        "methods": [
            method_row(job, timed["seconds"], one, settings) for job, one in zip(METHODS, alone, strict=True)
        ],
        "method rounds": timed,
        "equality": equal,
    }
    write_json(args.out, result)
    partial.unlink()
    return result


def rows_of(jobs, runs, pairs):
    """{id: row} of the contenders: medians over the rounds of an epoch's seconds and of the GB (1e9 bytes).

    A peer's "times ours" is its time over that of our row with its dropout and precision.
    """
    rows = {}
    for job in jobs:
        first, precision = runs[job.id][0], job.options.get("precision", "fp32")
        seconds = [round(one["seconds"] * pairs / one["pairs"], 3) for one in runs[job.id]]
        rows[job.id] = {
            "name": f"{job.name}, dropout {job.dropout}, {precision}",
            "contender": job.name,
            "dropout": job.dropout,
            "precision": precision,
            "ours": job.runner == "ours",
            "seconds": round(median(seconds), 3),
            "memory_gb": round(median(one["peak_gb"] for one in runs[job.id]), 3),
            "padded_tokens": first["padded_tokens"],
            "real_tokens": first["real_tokens"],
            "repeats": seconds,
        }
    for row in rows.values():
        if not row["ours"]:
            row["times ours"] = round(row["seconds"] / rows[LIKE[row["dropout"]]]["seconds"], 2)
    return rows


def method_row(job, timed, alone, settings):
    """timed: {method id: seconds per update of each round}; alone: of a fresh process, for the memory."""
    size = job.options.get("batch_size", settings["batch_size"]) or settings["pairs"]
    negatives = min(job.options.get("micro_batch", size), size) - 1 + job.options.get("queue", 0)
    row = {"method": job.name, "pairs per update": size, "negatives per query": negatives}
    own, whole = timed[job.id], timed["method-whole"]
    cost = [a / size / (b / settings["batch_size"]) for a, b in zip(own, whole, strict=True)]
    for name, values in (("seconds per update", own), (COST, cost)):
        low, middle, high = quantiles(values, n=4, method="inclusive")
        row |= {name: round(middle, 2), f"{name}, 25–75 %": f"{low:.2f}–{high:.2f}"}
    return row | {"peak memory GB": round(alone["peak_gb"], 2)}


def readme_text(result, title, figure):
    """The Markdown between README's markers, and in it the figure: its title and path."""
    settings, rows, timed = (result[key] for key in ("settings", "contenders", "method rounds"))
    first, second = (rows[name]["times ours"] for name in ("predecessor-dropout-0", "predecessor"))
    default = rows["ours-bf16" if training_precision(PROFILES["pocket"], "cpu") == "bf16" else "ours"]
    spread = max(max(row["repeats"]) / min(row["repeats"]) for row in rows.values())
    table = []
    for row in rows.values():
        name = f"**{row['contender']}**" if row["ours"] else row["contender"]
        times = "" if row["ours"] else shown(row["times ours"], 2)
        tokens = [shown(row[key], 0) for key in ("padded_tokens", "real_tokens")]
        cells = [shown(row["seconds"]), times, shown(row["memory_gb"], 2), *tokens]
        table.append([name, row["dropout"], row["precision"], *cells])
    time = f"s per epoch of {settings['pairs']} pairs"
    header = ["", "dropout", "precision", time, "times ours with the same two", "peak memory, GB"]
    cost = next(row for row in result["methods"] if row["method"] == "GradCache")
    equal = [[model, way, *(f"{by[key]:.1e}" for key in ("loss", "gradient"))]
             for model, block in result["equality"].items() for way, by in block["ways"].items()]  # fmt: skip
    return f"""## Training, {settings["data"]}

`{result["command"]}` ({result["date"]}): {settings["model"]}, {settings["data"]},
batch {settings["batch_size"]}, {settings["threads"]} threads. Seconds: {settings["seconds"]};
medians of {settings["repeats"]} interleaved rounds, whose slowest took at most {spread:.2f} times the fastest
of the same contender.
Every figure comes from a fresh process, whose peak memory includes Python and the libraries.
Machine: {result["machine"]["summary"]}.

{common.markdown_table([*header, "tokens computed", "real tokens"], table)}

**Like for like, in fp32**, the predecessor's loop takes {first:.1f} times our time, both without dropout,
and {second:.1f} times, both with dropout 0.1. What trains here by default is “{default["name"]}”,
{shown(default["seconds"])} s: beside a row of other dropout or precision, this measures a recipe and not only
code.

![{title}]({figure})

Ways to more negatives, all ours, without dropout, in fp32. {len(timed["seconds"]["method-whole"])} rounds
within one process, fastest median first: {" < ".join(JOBS[name].name for name in timed["order"])}.
In the last two rounds this order was {"the same" if timed["settled"] else "NOT the same"}; neighbours whose
25–75 % ranges overlap are not told apart. GradCache takes {cost[COST]:.2f} ({cost[f"{COST}, 25–75 %"]}) times
the whole batch's time.

{common.markdown_table(list(cost), [row.values() for row in result["methods"]])}

Relative differences from the padded loop in float64 (accumulated halves: from the same halves):

{common.markdown_table(["model", "way", "loss", "gradient"], equal)}
"""


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--data", type=Path, default=common.POCKET_PAIRS, help="pairs in MBPP's format")
    add("--model", type=Path, default=pocket_model_path(), help="its folder; default: the pocket model")
    add("--steps", type=int, default=5, help="updates measured, of the first epoch")
    add("--repeats", type=int, default=3, help="rounds over all contenders")
    add("--batch-size", type=int, default=RECIPE.batch_size, help="pairs in an update")
    add("--out", type=Path, help="where the JSON goes")
    add("--worker", metavar="ID", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        write_json(args.out, worker(args))
        return
    args.data = args.data.resolve()
    pocket = args.data == common.POCKET_PAIRS
    args.out = args.out or common.RESULTS / f"training{'' if pocket else '_mbpp'}.json"
    result = measure(args)
    rows, figure = result["contenders"], f"images/training_benchmark{'_pocket' if pocket else ''}.png"
    here, there = rows["ours"]["seconds"], rows["predecessor-dropout-0"]["seconds"]
    title = f"Without dropout, in fp32: {here:.1f} s an epoch here, {there:.1f} s in the original loop"
    text = readme_text(result, title, f"../{figure}")
    common.put_into_readme("training" if pocket else "training-mbpp", text)
    label = f"seconds per epoch of {result['settings']['pairs']} pairs"
    source = f"{result['command']}, {result['date']}; {result['machine']['cpu']}"
    figures.time_and_memory(list(rows.values()), title, ROOT / figure, label, source)


def worker(args):
    """One measurement in this process."""
    if args.worker == "equality":
        return equality(args.model, common.train_pairs(args.data), args.batch_size)
    if args.worker == "methods":
        return time_methods(args)
    job, recorder = JOBS[args.worker], Recorder()
    work = open_work(args, job)
    RUNNERS[job.runner](work, recorder, **job.options)
    return recorder.result(work.warmup)


if __name__ == "__main__":
    main()
