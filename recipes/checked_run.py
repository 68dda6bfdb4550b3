"""What each process of `torchrun` runs: FlagEmbedding's own runner, mended where it is wrong, and a report.

    torchrun --nproc_per_node 2 recipes/checked_run.py base|m3 REPORTS [FlagEmbedding's arguments]

`engine.py` starts it. What is mended: vectors that are gathered carry their gradient (`Gathered`), scores are
computed in fp32 (`in_fp32`), a checkpoint can be gone on from (`go_on`).

With more than one CPU process and no `--use_cpu`, FlagEmbedding ends with status 0 although every
process trained alone. A checksum of the parameters does not show it: processes that train alone on the
*same* rows from the same seed agree. torch.distributed does not show it either: it may know a group that
the trainer does not use. So each process writes `REPORTS/rank-N.json` with the size of the group that it
trained in, a checksum of its first batch and one of its parameters, and `engine.check_ranks` compares
them. A process that finds itself alone stops before the first step.
"""

import hashlib
import importlib
import os
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import HfArgumentParser, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial.encoder import HEAD_FILES  # noqa: E402
from embedding_tutorial.files import write_json  # noqa: E402

PREFIX = {"base": "EncoderOnlyEmbedder", "m3": "EncoderOnlyEmbedderM3"}
PROGRESS, WHOLE = "progress:", "whole"  # the start of a line of progress; the mark of a complete checkpoint


def part_of(engine, kind):
    """FlagEmbedding's class of an engine, such as "Runner" or "TrainingArguments"."""
    package = importlib.import_module(f"FlagEmbedding.finetune.embedder.encoder_only.{engine}")
    return getattr(package, PREFIX[engine] + kind)


def arguments_of(engine, words):
    """(model, data, training arguments), read by FlagEmbedding's own parser."""
    kinds = ("ModelArguments", "DataArguments", "TrainingArguments")
    return HfArgumentParser([part_of(engine, kind) for kind in kinds]).parse_args_into_dataclasses(words)


# ---------------------------------------------------------------- what is mended


class Gathered(torch.autograd.Function):
    """Vectors (n, d) → those of all processes; each process gets the gradient that all have for its own.

    FlagEmbedding gathers without a gradient: each process computes the loss of all and the gradient of its
    own share, then DDP averages, so that the gradient is divided by the number of processes. In unified
    training this is so for one of the terms only, and no learning rate mends it.
    """

    @staticmethod
    def forward(ctx, own):
        ctx.rows = len(own)
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient.split(ctx.rows)[torch.distributed.get_rank()]


def in_fp32(score):
    """A score function without autocast: bf16 has 8 bits, and a cosine's rounding is divided by tau."""

    def exact(q, p, *args, **kwargs):
        with torch.autocast(q.device.type, enabled=False):
            return score(q.float(), p.float(), *args, **kwargs)

    return exact


def mend(model):
    """Mend the gathering and the scores of one of FlagEmbedding's models, in place."""
    model._dist_gather_tensor = Gathered.apply
    names = ("compute_dense_score", "compute_sparse_score", "compute_colbert_score")
    for name in names if hasattr(model, names[0]) else ("compute_score",):
        setattr(model, name, in_fp32(getattr(model, name)))


def go_on(runner):
    """Let the trainer load the weights of a checkpoint: its own way finds no name it knows, and is silent."""

    def load(folder, model=None):
        folder, model = Path(folder), runner.model
        model.model.load_state_dict(load_file(folder / "model.safetensors"))
        for name in HEAD_FILES:
            if (folder / name).exists():
                head = getattr(model, Path(name).stem)
                head.load_state_dict(torch.load(folder / name, map_location="cpu", weights_only=True))

    runner.trainer._load_from_checkpoint = load


class Along(TrainerCallback):
    """Prints the progress, marks complete checkpoints, and counts on what the trainer does not know."""

    def __init__(self, runner, rank):
        self.runner, self.rank = runner, rank

    def on_train_begin(self, args, state, control, **kwargs):
        batches = state.global_step * args.gradient_accumulation_steps
        if hasattr(self.runner.model, "step"):  # from which self-distillation begins
            self.runner.model.step = batches
        data = self.runner.train_dataset
        if hasattr(data, "refresh_epoch"):  # batches from one file each: the data set itself counts them
            epochs, step = divmod(batches, len(data.batch_datas))
            for _ in range(epochs):
                data.refresh_epoch()
            data.step = step

    def on_save(self, args, state, control, **kwargs):
        if self.rank == 0:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and self.rank == 0:
            print(PROGRESS, state.global_step, state.max_steps, f"{float(logs['loss']):.4f}", flush=True)


# ---------------------------------------------------------------- what is reported


def checksum(model):
    """sha256 of all parameters of the model, names included."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def group_size(trainer):
    """Processes that train together: the fewest that torch.distributed, the Trainer or accelerate knows."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    known = torch.distributed.get_world_size() if started else 1
    return min(known, trainer.args.world_size, trainer.accelerator.num_processes)


class FirstBatch:
    """A forward hook that keeps a checksum of the queries of the first batch, and counts its passages."""

    def __init__(self, model):
        self.checksum, self.passages = None, 0
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model, args, inputs):
        queries, passages = (
            x if isinstance(x, list) else [x] for x in (inputs["queries"], inputs["passages"])
        )
        self.passages = sum(len(part["input_ids"]) for part in passages)
        digest = hashlib.sha256()
        for part in queries:
            digest.update(part["input_ids"].cpu().contiguous().numpy())
        self.checksum = digest.hexdigest()
        self.handle.remove()


def main():
    engine, reports, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    rank, started = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model, data, training = arguments_of(engine, words)
    runner = part_of(engine, "Runner")(model_args=model, data_args=data, training_args=training)
    report = {
        "rank": rank,
        "started": started,
        "group_size": group_size(runner.trainer),
        "before": checksum(runner.model),
    }
    if report["group_size"] == started:
        mend(runner.model)
        go_on(runner)
        batch = FirstBatch(runner.model)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        runner.trainer.add_callback(Along(runner, rank))
        runner.run()
        weights, state = dict(runner.model.named_parameters()), runner.trainer.state
        report |= {
            "after": checksum(runner.model),
            "first_batch": batch.checksum,
            "passages": batch.passages,
            "not_finite": [name for name, weight in weights.items() if not torch.isfinite(weight).all()],
            "steps": state.global_step,
            "losses": [float(log["loss"]) for log in state.log_history if "loss" in log],
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu_begin,
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }
    write_json(reports / f"rank-{rank}.json", report)


if __name__ == "__main__":
    main()
