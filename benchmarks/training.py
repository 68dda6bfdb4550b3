"""Training: this project's and its peers' time and memory on the same batches. Behind notebook 01's figure.

    python benchmarks/training.py                      # everything; goes on where an interrupted run stopped
    python benchmarks/training.py --data FILE          # sanitized MBPP, to training_mbpp.json
    python benchmarks/training.py --equality           # only: are the gradients the ones of the plain loop?
    python benchmarks/training.py --cuda               # BGE-M3's architecture with random weights on a GPU

Every contender runs in a process of its own, so that its peak memory is its own, and the contenders take
turns, so that a slow minute of the machine hits all of them. Each does one update to warm up and then the
updates of one epoch (`--steps` of them). What is timed is the whole update: tokenising (but for ours, which
tokenises once before training), forward, loss, backward, clipping, AdamW. Medians over `--repeats` rounds.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that might ask the hub something

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from embedding_tutorial import checkpoints  # noqa: E402
from embedding_tutorial import finetune as ft  # noqa: E402
from embedding_tutorial.assets import AssetError, pocket_model_path  # noqa: E402
from embedding_tutorial.profiles import PROFILES, relative, training_precision  # noqa: E402

POCKET_PAIRS = ROOT / "data" / "pocket_mbpp.json"
PACKAGES = ("torch", "transformers", "sentence-transformers", "FlagEmbedding", "accelerate")
RECIPE = ft.TrainConfig()  # the tutorial's own: temperature, lengths, learning rate, seed
DEFAULTS = {"steps": 5, "repeats": 3, "batch_size": RECIPE.batch_size, "token_budget": 4096}
SCRIPT = Path(__file__).resolve()
QUIET = 1.25  # largest ratio of a contender's rounds that still counts as one and the same measurement
OUT, OUT_MBPP, CUDA_OUT = (
    common.RESULTS / name for name in ("training.json", "training_mbpp.json", "training_cuda.json")
)


# ---------------------------------------------------------------- what is measured


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to measure in a fresh process. options: keyword arguments of the function in RUNNERS."""

    id: str
    name: str
    runner: str
    dropout: str = "0.1"
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def ours(self):
        return self.runner == "ours"


# The settings of CachedMultipleNegativesRankingLoss; the first round tells which one the others keep.
CACHED = [
    Job("st-cached-1024", "mini_batch_num_tokens=1024", "sentence_transformers", options={"tokens": 1024}),
    Job("st-cached-2048", "mini_batch_num_tokens=2048", "sentence_transformers", options={"tokens": 2048}),
    Job("st-cached-16", "mini_batch_size=16", "sentence_transformers", options={"texts": 16}),
]
CONTENDERS = [
    Job("predecessor", "predecessor's loop", "padded_loop", options={"dropout": None}),
    Job("predecessor-dropout-0", "predecessor's loop, no dropout", "padded_loop", "0", {"dropout": 0.0}),
    Job("flagembedding", "FlagEmbedding", "flagembedding"),
    Job(
        "flagembedding-small",
        "FlagEmbedding, sub-batches of 8, checkpointing",
        "flagembedding",
        options={"extra": ["--sub_batch_size", "8", "--gradient_checkpointing"]},
    ),
    Job("st", "sentence-transformers", "sentence_transformers"),
    *CACHED,
    Job("ours", "ours", "ours", "0"),
    Job("ours-dropout", "ours, the model's own dropout", "ours", "0.1", {"dropout": None}),
    Job("ours-gradcache", "ours, GradCache", "ours", "0", {"backward": "gradcache"}),
    Job("ours-bf16", "ours, bf16", "ours", "0", {"precision": "bf16"}),
    Job(
        "ours-gradcache-bf16",
        "ours, GradCache, bf16",
        "ours",
        "0",
        {"precision": "bf16", "backward": "gradcache"},
    ),
]
# Ways to more negatives, all ours. `batch_size: None` stands for all pairs at once.
METHODS = [
    Job("method-accumulation", "accumulation, 2 × 40", "ours", options={"micro_batch": 40}),
    Job("method-whole", "whole batch", "ours"),
    Job("method-gradcache", "GradCache", "ours", options={"backward": "gradcache"}),
    Job("method-queue", "whole batch + queue of 160", "ours", options={"queue": 160}),
    Job("method-all", "GradCache, all pairs", "ours", options={"backward": "gradcache", "batch_size": None}),
]
METHOD_UPDATES = 3  # full batches only: a rest of 21 pairs says nothing about the method


class Recorder:
    """Collects seconds, losses and tokens of each update while a contender trains."""

    def __init__(self):
        self.seconds, self.cpu, self.losses, self.pairs = [], [], [], []
        self.padded, self.real = [0], [0]

    def count_tokens(self, transformer):
        """Count what goes into the transformer, padding included, once per text: GradCache's first pass
        keeps no graph and is left out, gradient checkpointing's second one happens further inside."""

        forward = transformer.forward  # wrapped, because sentence-transformers goes round hooks

        @functools.wraps(forward)
        def counting(*positional, **named):
            if torch.is_grad_enabled():
                ids, mask = named.get("input_ids"), named.get("attention_mask")
                tokens = named["inputs_embeds"].shape[:2].numel() if ids is None else ids.numel()
                self.padded[-1] += tokens
                self.real[-1] += tokens if mask is None else int(mask.sum())
            return forward(*positional, **named)

        transformer.forward = counting

    def start(self):
        self.clock, self.cpu_clock = time.perf_counter(), time.process_time()

    def update_done(self, loss, pairs):
        self.seconds.append(time.perf_counter() - self.clock)
        self.cpu.append(time.process_time() - self.cpu_clock)
        self.losses.append(loss)
        self.pairs.append(pairs)
        self.padded.append(0)
        self.real.append(0)
        self.start()

    def result(self, warmup):
        """Figures of the updates after the first `warmup` ones."""
        return {
            "warmup_seconds": self.seconds[:warmup],
            "seconds": self.seconds[warmup:],
            "cpu_seconds": self.cpu[warmup:],
            "pairs": self.pairs[warmup:],
            "losses": self.losses,
            "padded_tokens": sum(self.padded[warmup:]),
            "real_tokens": sum(self.real[warmup:]),
            "peak_gb": common.peak_memory_gb(),
        }


@dataclasses.dataclass
class Work:
    """What every contender is given: the model, and the updates as row numbers of the training pairs."""

    model: Path
    pairs: list
    batch_size: int
    updates: list  # the first `warmup` of them warm up
    warmup: int = 1

    def texts(self, update):
        rows = [self.pairs[i] for i in update]
        return [row["query"] for row in rows], [row["pos_doc"] for row in rows]


def train_pairs(path):
    """The training part of the data, split as notebook 01 splits it."""
    return ft.split_pairs(ft.read_mbpp(path), RECIPE.seed)[0]


def open_work(args, job):
    """The updates of a job: one to warm up, then epoch 0's first ones, as the tutorial's run has them."""
    pairs = train_pairs(args.data)
    batch_size = min(job.options.get("batch_size", args.batch_size) or len(pairs), len(pairs))
    config = dataclasses.replace(RECIPE, batch_size=batch_size)
    updates = [ft.batch_of(u, len(pairs), config) for u in range(ft.updates_per_epoch(len(pairs), config))]
    warmup = 1
    if job.id.startswith("method-"):
        updates = [update for update in updates if len(update) == batch_size][:METHOD_UPDATES]
        warmup = 1 + -(-job.options.get("queue", 0) // batch_size)  # until the queue is full
    updates = updates[: args.steps]
    return Work(args.model, pairs, batch_size, updates[:1] * warmup + updates, warmup)


# ---------------------------------------------------------------- the contenders


def padded_loss(transformer, pooling, queries, passages, temperature=RECIPE.temperature):
    """The loss as the predecessor computes it: queries and passages each padded to their longest."""

    def vectors(rows):
        longest, device = max(map(len, rows)), transformer.device
        padding = transformer.config.pad_token_id
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=device)
        mask = (torch.arange(longest)[None] < torch.tensor([len(row) for row in rows])[:, None]).to(device)
        hidden = transformer(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        pooled = hidden[:, 0] if pooling == "cls" else (hidden * weight).sum(1) / weight.sum(1)
        return F.normalize(pooled, dim=-1)

    S = vectors(queries) @ vectors(passages).T / temperature
    return F.cross_entropy(S, torch.arange(len(S), device=S.device))


def plain_transformer(model, dropout=None):
    from transformers import AutoModel

    options = (
        {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    )
    return AutoModel.from_pretrained(model, dtype=torch.float32, **options).train()


def update_weights(parameters, optimizer):
    torch.nn.utils.clip_grad_norm_(parameters, RECIPE.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def padded_loop(work, recorder, dropout):
    """The predecessor's loop: tokenise and pad every batch, one forward each, AdamW, fp32."""
    from transformers import AutoTokenizer

    tokenizer, transformer = AutoTokenizer.from_pretrained(work.model), plain_transformer(work.model, dropout)
    pooling, parameters = ft.read_pooling(work.model), list(transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay)
    recorder.count_tokens(transformer)
    recorder.start()
    for update in work.updates:
        queries, passages = (ft.tokenize(tokenizer, texts, RECIPE.max_length) for texts in work.texts(update))
        loss = padded_loss(transformer, pooling, queries, passages)
        loss.backward()
        update_weights(parameters, optimizer)
        recorder.update_done(loss.item(), len(update))


def sentence_transformers(work, recorder, tokens=None, texts=None):
    """MultipleNegativesRankingLoss, or with `tokens` or `texts` per mini-batch its cached form.

    A plain loop around the library's loss: its trainer does the same and more, so this flatters it a little.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(str(work.model), device="cpu")
    model.max_seq_length = RECIPE.max_length
    scale = 1 / RECIPE.temperature
    if tokens or texts:
        budget = {"mini_batch_num_tokens": tokens} if tokens else {"mini_batch_size": texts}
        loss_of = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, **budget)
    else:
        loss_of = losses.MultipleNegativesRankingLoss(model, scale=scale)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay, fused=True
    )
    recorder.count_tokens(model.transformers_model)
    model.train()
    recorder.start()
    for update in work.updates:
        loss = loss_of([model.preprocess(side) for side in work.texts(update)], labels=None)
        loss.backward()
        update_weights(parameters, optimizer)
        recorder.update_done(loss.item(), len(update))


def flagembedding(work, recorder, extra=()):
    """FlagEmbedding's dense trainer: its own runner, model, collator and Trainer, fed our batches."""
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            recorder.start()

        def on_step_end(self, args, state, control, **_):
            recorder.update_done(losses.pop(), len(work.updates[state.global_step - 1]))

    losses = []
    # In the order of our updates, read sequentially: its batches are then ours. Only the last update may be
    # short of the batch size.
    rows = [work.pairs[i] for update in work.updates for i in update]
    options = f"""
        --query_max_len {RECIPE.max_length} --passage_max_len {RECIPE.max_length}
        --normalize_embeddings True --temperature {RECIPE.temperature}
        --learning_rate {RECIPE.learning_rate} --weight_decay {RECIPE.weight_decay}
        --max_grad_norm {RECIPE.clip} --per_device_train_batch_size {work.batch_size}
        --num_train_epochs 1 --train_sampling_strategy sequential""".split()
    with tempfile.TemporaryDirectory() as folder:
        pooling = ft.read_pooling(work.model)
        runner = common.flagembedding_runner(work.model, pooling, rows, folder, [*options, *extra])
        runner.trainer.add_callback(Laps())
        runner.model.register_forward_hook(lambda module, _, output: losses.append(output.loss.item()))
        recorder.count_tokens(runner.model.model)
        runner.trainer.train()


def ours(work, recorder, batch_size=None, **options):
    """The tutorial's own update, as `train` runs it."""
    config = dataclasses.replace(RECIPE, batch_size=work.batch_size, **options)
    run = ft.start_run(work.model, lambda encoder: ft.tokenize_pairs(encoder, work.pairs), config, "cpu")
    run.encoder.train()
    recorder.count_tokens(run.encoder.backbone)
    updates = range(ft.updates_per_epoch(len(work.pairs), config))
    number = {tuple(ft.batch_of(u, len(work.pairs), config)): u for u in updates}
    recorder.start()
    for update in work.updates:
        run.update = number[tuple(update)]  # the warm-up goes back to the first one
        ft.one_update(run)
        recorder.update_done(run.history["step_losses"][-1], len(update))


RUNNERS = {f.__name__: f for f in (padded_loop, sentence_transformers, flagembedding, ours)}


# ---------------------------------------------------------------- equality


WAYS = {"whole batch": "whole", "GradCache": "gradcache"}  # the names of TrainConfig.backward


def gradient_of(module):
    """All gradients as one float64 vector, in the order of the parameters' names."""
    named = sorted((name, w.grad) for name, w in module.named_parameters() if w.grad is not None)
    return torch.cat([gradient.flatten().double() for _, gradient in named])


def plain_gradient(model, data, parts, dtype):
    """(loss, gradient) of the padded loop without dropout over `parts`, weighted by their pairs."""
    transformer, total, losses = plain_transformer(model, dropout=0.0).to(dtype), sum(map(len, parts)), []
    for part in parts:
        queries, passages = ([data[side][i] for i in part] for side in ("query", "passage"))
        loss = padded_loss(transformer, ft.read_pooling(model), queries, passages) * len(part) / total
        loss.backward()
        losses.append(loss.item())
    return sum(losses), gradient_of(transformer)


def our_gradient(model, pairs, kind, **options):
    """(loss, gradient) that `compute_gradients` leaves, all pairs in one batch."""
    config = dataclasses.replace(RECIPE, batch_size=len(pairs), mask_duplicates=False, **options)
    run = ft.start_run(model, lambda encoder: ft.tokenize_pairs(encoder, pairs), config, "cpu")
    run.encoder.to(kind).train()
    torch.manual_seed(0)
    loss, _, _ = ft.compute_gradients(run, list(range(len(pairs))))
    return loss, gradient_of(run.encoder.backbone)


def difference(found, reference):
    (loss, gradient), (loss0, gradient0) = found, reference
    return {
        "loss": abs(loss - loss0) / abs(loss0),
        "gradient": float((gradient - gradient0).norm() / gradient0.norm()),
    }


def equality(model, pairs, pairs_in_batch):
    """Relative differences of loss and gradient (2-norm): ours against the plain padded loop in float64.

    float64 on a small random model shows that the method is the same to the last digits; fp32 on the real
    model shows what rounding adds, to ours and to the padded loop alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny"
        tiny_bert(tiny, model)
        few, many = pairs[:16], pairs[:pairs_in_batch]
        small, real = differences(tiny, few, torch.float64), differences(model, many, torch.float32)
        batch = list(range(len(many)))
        data = ft.tokenize_pairs(ft.Encoder(model), many)
        exact, rounded = (
            plain_gradient(model, data, [batch], kind) for kind in (torch.float64, torch.float32)
        )
        real["the padded loop itself"] = difference(rounded, exact)
        # With dropout there is no padded loop to compare with, because it draws in another order. But
        # GradCache's second pass has to repeat the first one's draws: then it equals the whole batch.
        options = {"dropout": 0.1, "token_budget": 256}
        whole, cached = (our_gradient(tiny, few, torch.float64, backward=b, **options) for b in WAYS.values())
        small["GradCache with dropout 0.1, against the whole batch"] = difference(cached, whole)
    return {
        "small random model, float64": {"pairs": len(few), "ways": small},
        "the model, fp32": {"pairs": len(many), "ways": real},
    }


def differences(model, pairs, kind):
    """{way: difference} of ours, computed in `kind`, from the padded loop in float64 over the same pairs."""
    batch, half = list(range(len(pairs))), len(pairs) // 2
    data = ft.tokenize_pairs(ft.Encoder(model), pairs)
    one = plain_gradient(model, data, [batch], torch.float64)
    two = plain_gradient(model, data, [batch[:half], batch[half:]], torch.float64)
    found = {name: difference(our_gradient(model, pairs, kind, backward=b), one) for name, b in WAYS.items()}
    found["accumulated halves"] = difference(our_gradient(model, pairs, kind, micro_batch=half), two)
    return found


def tiny_bert(folder, like, hidden=32, layers=2):
    """A sentence-transformers folder: a small random BERT without dropout, with the tokenizer of `like`."""
    from transformers import BertConfig, BertModel

    folder = Path(folder)
    folder.mkdir(parents=True)
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    for name in (*tokenizer, "modules.json", "sentence_bert_config.json"):
        shutil.copy(Path(like) / name, folder / name)
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}
    checkpoints.write_json(folder / "1_Pooling" / "config.json", pooling)
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 4}
    BertModel(BertConfig(num_hidden_layers=layers, **sizes, **no_dropout)).save_pretrained(folder)


# ---------------------------------------------------------------- the driver


def jobs_of_round(number, runs):
    """All jobs in the first round; then only the best setting of sentence-transformers' cached loss."""
    losers = {job.id for job in CACHED if job != best_cached(runs)} if number else set()
    return [job for job in [*CONTENDERS, *METHODS] if job.id not in losers]


def best_cached(runs):
    """The setting with the smallest first measurement: later rounds do not change the choice."""
    measured = [job for job in CACHED if runs.get(job.id)]
    return min(measured, key=lambda job: seconds_of(runs[job.id][0], 1), default=CACHED[0])


def seconds_of(result, pairs, clock="seconds"):
    """Seconds for `pairs` pairs, from the updates measured: exact for a whole epoch, else scaled by pairs."""
    return sum(result[clock]) * pairs / sum(result["pairs"])


def summarise(runs, settings):
    """contenders, methods and ratios from the raw results."""
    contenders = []
    for job in CONTENDERS:
        if job not in CACHED:
            contenders.append(row_of(job, runs, settings["pairs"]))
        elif job == CACHED[0]:  # one row for all its settings, with the best one's figures
            best = best_cached(runs)
            row = row_of(best, runs, settings["pairs"]) | {"name": "sentence-transformers, cached loss"}
            first = {other.name: runs[other.id][0] for other in CACHED if runs.get(other.id)}
            row["tried"] = {name: round(seconds_of(run, settings["pairs"]), 3) for name, run in first.items()}
            contenders.append(row | {"setting": best.name})
    methods = [method_row(job, runs.get(job.id, []), settings) for job in METHODS]
    return {"contenders": contenders, "methods": methods, "ratios": ratios(contenders)}


def method_row(job, results, settings):
    size = job.options.get("batch_size", settings["batch_size"]) or settings["pairs"]
    return {
        "method": job.name,
        "pairs per update": size,
        "negatives per query": min(job.options.get("micro_batch", size), size)
        - 1
        + job.options.get("queue", 0),
        "seconds per update": middle([median(result["seconds"]) for result in results]),
        "peak memory GB": middle([result["peak_gb"] for result in results]),
    }


def middle(values):
    return round(median(values), 3) if values else None


def row_of(job, runs, pairs):
    results = runs.get(job.id, [])
    repeats = [seconds_of(result, pairs) for result in results]
    return {
        "id": job.id,
        "name": job.name,
        "seconds": middle(repeats),
        "memory_gb": middle([result["peak_gb"] for result in results]),
        "ours": job.ours,
        # Of all threads, waiting ones included: where it is far from threads × seconds, the machine was busy.
        "cpu_seconds": middle([seconds_of(result, pairs, "cpu_seconds") for result in results]),
        "dropout": job.dropout,
        "padded_tokens": results[0]["padded_tokens"] if results else None,
        "real_tokens": results[0]["real_tokens"] if results else None,
        "repeats": [round(value, 3) for value in repeats],
    }


DEFAULT = "default"  # stands for the row of ours with the precision that the recipe takes on this machine
COMPARISONS = {  # whose fastest row, over which row of ours
    "predecessor's loop": (["predecessor"], DEFAULT),
    "FlagEmbedding, its faster setting": (["flagembedding", "flagembedding-small"], DEFAULT),
    "sentence-transformers, its best setting": (["st", *(job.id for job in CACHED)], DEFAULT),
    "predecessor's loop, ours in fp32": (["predecessor"], "ours"),
    "FlagEmbedding, ours in fp32": (["flagembedding", "flagembedding-small"], "ours"),
    "sentence-transformers, ours in fp32": (["st", *(job.id for job in CACHED)], "ours"),
    "predecessor's loop, neither with dropout, both fp32": (["predecessor-dropout-0"], "ours"),
    "predecessor's loop, both with dropout, both fp32": (["predecessor"], "ours-dropout"),
    "ours, GradCache, fp32": (["ours-gradcache"], "ours"),
}
TO_REACH = dict(zip(COMPARISONS, (7, 7, 4), strict=False))  # issue 4


def default_row():
    """The id of our row with the pocket profile's precision on this machine."""
    return {"fp32": "ours", "bf16": "ours-bf16"}[training_precision(PROFILES["pocket"], "cpu")]


def ratios(contenders):
    """How many times the time of ours the others take, and the memory, beside what issue 4 asks for.

    By the clock and in CPU seconds: on a busy machine the clock also measures which minutes each one got.
    "spread" is the largest slowest round over fastest round of one contender: near 1 on a quiet machine.
    """
    by_id = {row["id"]: row for row in contenders}

    def times_ours(key):
        table = {}
        for name, (others, mine) in COMPARISONS.items():
            found = [by_id[job][key] for job in others if job in by_id and by_id[job][key]]
            own = by_id[default_row() if mine == DEFAULT else mine][key]
            table[name] = round(min(found) / own, 2) if found and own else None
        return table

    def memory(*ids):
        return {by_id[job]["name"]: by_id[job]["memory_gb"] for job in ids}

    spreads = [max(row["repeats"]) / min(row["repeats"]) for row in contenders if row["repeats"]]
    return {
        "our default": by_id[default_row()]["name"],
        "time, times ours": times_ours("seconds"),
        "cpu time, times ours": times_ours("cpu_seconds"),
        "time, to reach": TO_REACH,
        "spread": round(max(spreads), 2) if spreads else None,
        "memory GB": memory("predecessor", default_row(), "ours-gradcache"),
        "memory GB, at most": {"our default": 2.0, "ours, GradCache": 1.2},
    }


def settings_of(args):
    pairs = train_pairs(args.data)
    per_epoch = ft.updates_per_epoch(len(pairs), dataclasses.replace(RECIPE, batch_size=args.batch_size))
    whole = args.steps >= per_epoch
    code = SCRIPT.read_bytes() + (ROOT / "embedding_tutorial" / "finetune.py").read_bytes()
    return {
        "data": "the pocket pairs" if args.data == POCKET_PAIRS else args.data.name,
        "pairs": len(pairs),
        "model": "all-MiniLM-L6-v2" if args.model == pocket_model_path() else args.model.name,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "temperature": RECIPE.temperature,
        "max_length": RECIPE.max_length,
        "token_budget": RECIPE.token_budget,
        "precision": "fp32 unless the name says bf16",
        "updates measured": min(args.steps, per_epoch),
        "updates per epoch": per_epoch,
        "seconds": "sum over the epoch's updates" if whole else "of the measured updates, scaled by pairs",
        "tokens": "of the measured updates, each text once",
        "memory": "peak resident memory of a fresh process, GB of 1e9 bytes",
        "code": hashlib.sha256(code).hexdigest()[:12],
    }


def command_of(args):
    """The command without this machine's paths."""
    words = ["python", "benchmarks/training.py"]
    if args.data != POCKET_PAIRS:
        words += ["--data", relative(args.data)]
    for name, default in DEFAULTS.items():
        if getattr(args, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += [f"--{name.replace('_', '-')}" for name in ("cuda", "cuda_smoke") if getattr(args, name)]
    return " ".join([*words, *(["--only", *args.only] if args.only else [])])


def run_job(args, job_id, **options):
    """What a fresh process measures for a job."""
    options = {"data": args.data, "model": args.model, "steps": args.steps, **options}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return common.run_worker(SCRIPT, ["--worker", job_id, *flags])


def measure(args):
    """Run what is missing, writing after every process; returns the finished result."""
    partial = args.out.with_name(args.out.name + ".tmp")  # which git ignores
    state = {"settings": settings_of(args), "machine": common.machine(PACKAGES), "runs": {}}
    if partial.is_file() and not args.fresh:
        old = checkpoints.read_json(partial)
        if all(old[key] == state[key] for key in ("settings", "machine")):
            state = old
            print(f"Going on with {relative(partial)}: {sum(map(len, old['runs'].values()))} processes done.")
        else:
            print(f"{relative(partial)} has other settings, code or machine: starting afresh.")
    runs, pairs = state["runs"], state["settings"]["pairs"]
    if "equality" not in runs:
        print("equality of loss and gradient ...", flush=True)
        runs["equality"] = [run_job(args, "equality", batch_size=args.batch_size)]
        checkpoints.write_json(partial, state)
    for number in range(args.repeats):
        for job in jobs_of_round(number, runs):
            done = runs.setdefault(job.id, [])
            if len(done) > number or (args.only and job.id not in args.only):
                continue
            done.append(run_job(args, job.id, batch_size=args.batch_size))
            checkpoints.write_json(partial, state)
            seconds, memory = seconds_of(done[-1], pairs), done[-1]["peak_gb"]
            place = f"round {number + 1}/{args.repeats}"
            print(f"{place}  {job.name:<46} {seconds:7.2f} s per epoch {memory:6.2f} GB", flush=True)
    result = {
        "machine": state["machine"],
        "command": command_of(args),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "settings": {**state["settings"], "repeats": args.repeats},
        **summarise(runs, state["settings"]),
        "equality": runs["equality"][0],
    }
    checkpoints.write_json(args.out, result)
    partial.unlink()
    return result


def shown(value, digits=1):
    return "–" if value is None else f"{value:,.{digits}f}"


def cpu_times(result):
    figures = result["ratios"]["cpu time, times ours"]
    return ", ".join(f"{name} {shown(value, 2)}" for name, value in figures.items() if name in TO_REACH)


def readme_text(result):
    """The Markdown between README's markers."""
    settings, rows = result["settings"], []
    default = result["ratios"]["our default"]
    base = next(row["seconds"] for row in result["contenders"] if row["name"] == default)
    for row in result["contenders"]:
        name = f"**{row['name']}**" if row["ours"] else row["name"]
        if "setting" in row:
            name += f" (`{row['setting']}`)"
        times = shown(row["seconds"] / base if row["seconds"] and base else None, 2)
        tokens = [shown(row["padded_tokens"], 0), shown(row["real_tokens"], 0)]
        rows.append([name, row["dropout"], shown(row["seconds"]), times, shown(row["memory_gb"], 2), *tokens])
    spread, warning = result["ratios"]["spread"], ""
    if spread and spread > QUIET:
        warning = f"""
**Measured on a busy machine**: one contender's slowest round took {spread:.1f} times its fastest, so the
times are no comparison. In CPU seconds, times ours: {cpu_times(result)}.
"""
    time_header = f"s per epoch of {settings['pairs']} pairs"
    header = [
        "",
        "dropout",
        time_header,
        f"times {default}",
        "peak memory, GB",
        "tokens computed",
        "real tokens",
    ]
    methods = [
        [value if isinstance(value, (str, int)) else shown(value, 2) for value in row.values()]
        for row in result["methods"]
    ]
    equal = [
        [title, way, f"{by['loss']:.1e}", f"{by['gradient']:.1e}"]
        for title, block in result["equality"].items()
        for way, by in block["ways"].items()
    ]
    return f"""## Training, {settings["data"]}

`{result["command"]}` ({result["date"]}): {settings["model"]}, {settings["data"]},
batch {settings["batch_size"]}, {settings["precision"]}, {settings["threads"]} threads.
Seconds: {settings["seconds"]}; medians of {settings["repeats"]} interleaved rounds.
Every figure comes from a fresh process, whose peak memory includes Python and the libraries.
Machine: {result["machine"]["summary"]}.
{warning}
{common.markdown_table(header, rows)}

Ways to more negatives, all ours:

{common.markdown_table(list(result["methods"][0]), methods)}

Relative differences from the padded loop in float64 (accumulated halves: from the same halves):

{common.markdown_table(["model", "way", "loss", "gradient"], equal)}
"""


# ---------------------------------------------------------------- CUDA: BGE-M3's architecture


CUDA_WAYS = {"padded": {}, "whole": {}, "gradcache": {"backward": "gradcache"}}
BGE_M3_SHAPE = {
    "vocab_size": 250002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 8194,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
SMOKE_SHAPE = {
    **BGE_M3_SHAPE,
    "vocab_size": 500,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 514,
}


def random_xlm_roberta(folder, shape):
    """A model folder of this shape with random weights. Its tokenizer is a stand-in that nobody asks."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(0)
    XLMRobertaModel(XLMRobertaConfig(**shape), add_pooling_layer=False).save_pretrained(folder)
    stand_in = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=stand_in, unk_token="<unk>").save_pretrained(folder)
    checkpoints.write_json(Path(folder) / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})


def random_rows(path, vocabulary, longest=512):
    """Random token ids with the lengths of real pairs, stretched until the longest text has `longest`.

    A text's length is its count of words and signs, which needs no tokenizer of a hub.
    """
    pairs, draw = train_pairs(path), random.Random(0)
    texts = [pair[side] for side in ("query", "pos_doc") for pair in pairs]
    counts = [len(re.findall(r"\w+|[^\w\s]", text)) + 2 for text in texts]
    stretched = [max(3, round(count * longest / max(counts))) for count in counts]
    rows = [[draw.randrange(5, vocabulary) for _ in range(count)] for count in stretched]
    n = len(pairs)
    ids = {"query_id": list(range(n)), "passage_id": list(range(n, 2 * n))}
    none = dict.fromkeys(("neg", "neg_id", "other_query", "other_passage", "other_passage_id"), [[]] * n)
    return {"query": rows[:n], "passage": rows[n:], **ids, **none}


def model_flop(shape, lengths):
    """FLOP of forward and backward on real tokens: 6 per matrix weight and token, and the attention itself.

    Padding and GradCache's second forward are work, but no work of the model: they lower the utilisation.
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    weights = layers * (4 * hidden**2 + 2 * hidden * shape["intermediate_size"])
    return 6 * weights * sum(lengths) + 12 * layers * hidden * sum(n * n for n in lengths)


def matmul_ceiling(device, dtype, size, repeats=20):
    """FLOP per second of a large square matrix product: what this device can reach at this precision."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    return best


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def padded_update(run, batch):
    """The predecessor's update with the run's weights: padded, otherwise `one_update`'s steps."""
    config, backbone = run.config, run.encoder.backbone
    queries, passages = ([run.data[side][i] for i in batch] for side in ("query", "passage"))
    run.optimizer.zero_grad(set_to_none=True)
    with ft.autocast(run.encoder, config.precision):
        loss = padded_loss(backbone, run.encoder.pooling, queries, passages, config.temperature)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.encoder.parameters(), config.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()


def cuda_updates(args, way, device, data, config):
    """Run the updates of one way: (run, seconds of each, row lengths of each), the warm-up left out."""
    n = len(data["query"])
    run = ft.start_run(args.model, lambda encoder: data, config, device)
    run.encoder.train()
    if way == "padded":  # same weights, precision, optimizer and no dropout: only the padding differs
        run.encoder.backbone.set_attn_implementation("sdpa")
    full = [u for u in range(config.epochs) if len(ft.batch_of(u, n, config)) == config.batch_size]
    seconds, lengths = [], []
    for u in [full[0], *full[: args.steps]]:
        run.update, batch = u, ft.batch_of(u, n, config)
        synchronize(device)
        start = time.perf_counter()
        padded_update(run, batch) if way == "padded" else ft.one_update(run)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        lengths.append([len(row) for row in ft.batch_rows(data, batch)])
    return run, seconds[1:], lengths[1:]


def cuda_worker(args):
    """Measure `cuda-WAY-PRECISION-PAIRS` (or `smoke-…`); the row says where it does not fit."""
    prefix, way, precision, size = args.worker.split("-")
    device, shape = ("cuda", BGE_M3_SHAPE) if prefix == "cuda" else ("cpu", SMOKE_SHAPE)
    data = random_rows(args.data, shape["vocab_size"])
    size = min(int(size), len(data["query"]))
    recipe = {"batch_size": size, "precision": precision, "token_budget": args.token_budget}
    config = dataclasses.replace(RECIPE, learning_rate=2e-5, **recipe, **CUDA_WAYS[way])
    row = {"way": way, "precision": precision, "pairs per update": size, "limit GB": args.limit_gb or None}
    if args.limit_gb and device == "cuda":  # imitates a smaller card
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.limit_gb * 1e9 / total))
    try:
        run, seconds, lengths = cuda_updates(args, way, device, data, config)
    except (torch.OutOfMemoryError, AssetError) as error:
        if isinstance(error, AssetError) and not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return {**row, "out of memory": True}
    real = sum(map(sum, lengths))
    padded = sum(size * (max(update[:size]) + max(update[size:])) for update in lengths)
    rate = sum(model_flop(shape, update) for update in lengths) / sum(seconds)
    row |= {"out of memory": False, "seconds": seconds, "seconds per update": median(seconds)}
    row |= {"peak resident GB": common.peak_memory_gb()}
    if device == "cuda":  # before the ceiling's own matrices
        row |= {"allocated GB": torch.cuda.max_memory_allocated() / 1e9}
        row |= {"reserved GB": torch.cuda.max_memory_reserved() / 1e9}
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ceiling = matmul_ceiling(device, kind, 8192 if device == "cuda" else 128)
    return row | {
        "tokens computed": padded if way == "padded" else real,
        "real tokens": real,
        "token budget at the end": run.token_budget,
        "model TFLOP/s": rate / 1e12,
        "ceiling TFLOP/s": ceiling / 1e12,
        "utilisation": rate / ceiling,
    }


def measure_cuda(args):
    """BGE-M3's size on the GPU (or a tiny one on the CPU as a smoke test); writes and returns the result."""
    if args.cuda and not torch.cuda.is_available():
        raise SystemExit("--cuda needs a CUDA GPU, and torch.cuda.is_available() is False here.")
    shape, gpu, prefix = SMOKE_SHAPE, "none (smoke test on the CPU)", "smoke"
    precisions, sizes = ["bf16"], (8, 16)  # fp16 autocast is CUDA's
    if args.cuda:
        shape, gpu, prefix = BGE_M3_SHAPE, torch.cuda.get_device_name(), "cuda"
        precisions, sizes = ["bf16", "fp16"], (80, 341)
    jobs = [(way, kind, size, 0) for size in sizes for kind in precisions for way in CUDA_WAYS]
    jobs.append(("gradcache", precisions[-1], sizes[-1], 16))
    machine = common.machine(PACKAGES)
    machine |= {"gpu": gpu, "cuda": torch.version.cuda, "summary": f"{gpu}; {machine['summary']}"}
    lengths = f"lengths of {args.data.name}, stretched to at most 512 tokens"
    settings = {"shape": shape, "weights": "random", "tokens": lengths, "dropout": 0, "steps": args.steps}
    result = {
        "machine": machine,
        "command": command_of(args),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "settings": {**settings, "token_budget": args.token_budget},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        random_xlm_roberta(folder, shape)
        for way, kind, size, limit in jobs:
            options = {"model": folder, "token_budget": args.token_budget, "limit_gb": limit}
            row = run_job(args, f"{prefix}-{way}-{kind}-{size}", **options)
            result["rows"].append(row)
            result["ratios"] = cuda_ratios(result["rows"])
            checkpoints.write_json(args.out, result)
            print(json.dumps(row), flush=True)
    return result


def cuda_ratios(rows):
    """{"batch 80, bf16": {way: seconds of the padded loop over the way's}}, where both fit."""
    table, times = {}, {}
    for row in rows:
        if not (row["out of memory"] or row["limit GB"]):
            place = f"batch {row['pairs per update']}, {row['precision']}"
            times.setdefault(place, {})[row["way"]] = row["seconds per update"]
    for place, seconds in times.items():
        if "padded" in seconds:
            table[place] = {way: seconds["padded"] / s for way, s in seconds.items() if way != "padded"}
    return table


def cuda_readme_text(result):
    columns = ["seconds per update", "allocated GB", "reserved GB", "utilisation"]
    rows = []
    for row in result["rows"]:
        way = row["way"] + (f", on at most {row['limit GB']:.0f} GB" if row["limit GB"] else "")
        figures = [shown(row.get(name), 2) for name in columns]
        rows.append([way, row["precision"], row["pairs per update"], row["out of memory"], *figures])
    header = ["way", "precision", "pairs per update", "out of memory", *columns]
    return f"""## Training at BGE-M3's size on a GPU

`{result["command"]}` ({result["date"]}): random weights, no dropout, {result["settings"]["tokens"]}.
Machine: {result["machine"]["summary"]}.
Utilisation: the model's FLOP on real tokens over a measured matrix product of 8192 at the same precision.

{common.markdown_table(header, rows)}
"""


# ---------------------------------------------------------------- command line


def worker(args):
    """One measurement in this process; the result goes to --out."""
    if args.worker == "equality":
        result = equality(args.model, train_pairs(args.data), args.batch_size)
    elif args.worker.startswith(("cuda-", "smoke-")):
        result = cuda_worker(args)
    else:
        job = next(job for job in [*CONTENDERS, *METHODS] if job.id == args.worker)
        work, recorder = open_work(args, job), Recorder()
        RUNNERS[job.runner](work, recorder, **job.options)
        result = recorder.result(work.warmup)
    checkpoints.write_json(args.out, result)


def arguments():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--data", type=Path, default=POCKET_PAIRS, help="pairs in MBPP's format")
    add("--model", type=Path, default=None, help="folder of the model; default: the pocket model")
    add("--steps", type=int, default=DEFAULTS["steps"], help="updates measured, of the first epoch")
    add("--repeats", type=int, default=DEFAULTS["repeats"], help="rounds over all contenders")
    add("--batch-size", type=int, default=DEFAULTS["batch_size"])
    add("--out", type=Path, default=None, help="where the JSON goes")
    add("--only", nargs="+", metavar="ID", help="measure only these jobs")
    add("--fresh", action="store_true", help="forget what an interrupted run has measured")
    add("--no-readme", action="store_true", help="leave benchmarks/README.md as it is")
    add("--equality", action="store_true", help="only compare gradients and print the differences")
    add("--cuda", action="store_true", help="measure BGE-M3's size on the GPU")
    add("--cuda-smoke", action="store_true", help="the same code with a tiny model on the CPU")
    add("--token-budget", type=int, default=DEFAULTS["token_budget"], help="tokens per group, with --cuda")
    add("--limit-gb", type=float, default=0, help="(worker) use at most this much of the GPU")
    add("--worker", metavar="ID", help="(worker) one measurement in this process")
    args = parser.parse_args()
    cuda = args.cuda or args.cuda_smoke
    args.out = args.out or (CUDA_OUT if cuda else OUT if args.data == POCKET_PAIRS else OUT_MBPP)
    args.data, args.model = args.data.resolve(), args.model or pocket_model_path()
    return args


def main():
    args = arguments()
    if args.worker:
        worker(args)
    elif args.cuda or args.cuda_smoke:
        result = measure_cuda(args)
        if args.cuda and not args.no_readme:
            common.put_into_readme("training-cuda", cuda_readme_text(result))
    elif args.equality:
        print(json.dumps(run_job(args, "equality", batch_size=args.batch_size), indent=1))
    else:
        text = readme_text(measure(args))
        if not args.no_readme:
            common.put_into_readme("training" if args.data == POCKET_PAIRS else "training-mbpp", text)
        print(text)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # what is measured is on disk
        main()
