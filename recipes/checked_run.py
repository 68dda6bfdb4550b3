"""What each process of `torchrun` runs: FlagEmbedding's own runner, and a report that can be checked.

    torchrun --nproc_per_node 2 -m recipes.checked_run base|m3 REPORTS [FlagEmbedding's arguments]

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
from transformers import HfArgumentParser, TrainerCallback

from embedding_tutorial.files import write_json

PREFIX = {"base": "EncoderOnlyEmbedder", "m3": "EncoderOnlyEmbedderM3"}
PROGRESS = "progress:"


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
    """A forward hook that keeps a checksum of the queries of the first batch."""

    def __init__(self, model):
        self.checksum = None
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model, args, inputs):
        parts = inputs["queries"] if isinstance(inputs["queries"], list) else [inputs["queries"]]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part["input_ids"].cpu().contiguous().numpy())
        self.checksum = digest.hexdigest()
        self.handle.remove()


class Progress(TrainerCallback):
    """Collects the losses, and prints one line per logged step in the first process."""

    def __init__(self, rank):
        self.rank, self.losses = rank, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            if self.rank == 0:
                print(PROGRESS, state.global_step, state.max_steps, f"{self.losses[-1]:.4f}", flush=True)


def main():
    engine, reports, arguments = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    rank, started = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    package = importlib.import_module(f"FlagEmbedding.finetune.embedder.encoder_only.{engine}")
    part = {
        kind: getattr(package, PREFIX[engine] + kind)
        for kind in ("ModelArguments", "DataArguments", "TrainingArguments", "Runner")
    }
    parser = HfArgumentParser([part["ModelArguments"], part["DataArguments"], part["TrainingArguments"]])
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments)
    runner = part["Runner"](model_args=model_args, data_args=data_args, training_args=training_args)

    report = {
        "rank": rank,
        "started": started,
        "group_size": group_size(runner.trainer),
        "before": checksum(runner.model),
    }
    if report["group_size"] == started:
        progress, batch, begin = Progress(rank), FirstBatch(runner.model), time.perf_counter()
        cpu_begin = time.process_time()
        runner.trainer.add_callback(progress)
        runner.run()
        weights = dict(runner.model.named_parameters())
        report |= {
            "after": checksum(runner.model),
            "first_batch": batch.checksum,
            "not_finite": [name for name, weight in weights.items() if not torch.isfinite(weight).all()],
            "steps": runner.trainer.state.global_step,
            "losses": progress.losses,
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu_begin,
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }
    write_json(reports / f"rank-{rank}.json", report)


if __name__ == "__main__":
    main()
