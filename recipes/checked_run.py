"""What each process of `torchrun` runs: FlagEmbedding's own runner, mended where it is wrong, and a report.

    torchrun --nproc_per_node 2 recipes/checked_run.py base|m3 REPORTS [FlagEmbedding's arguments]

`engine.py` starts it. With more than one CPU process and no `--use_cpu`, FlagEmbedding ends with status 0
although every process trained alone. A checksum of the parameters does not show it: processes that train
alone on the *same* rows from the same seed agree. torch.distributed does not show it either: it may know a
group that the trainer does not use. So each process writes `REPORTS/rank-N.json`: the size of its group, a
checksum of its first batch and of its parameters; `engine.check_ranks` compares. One that is alone stops.
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


class Gathered(torch.autograd.Function):
    """Vectors (n, d) → those of all processes; each process gets the gradient that all have for its own.

    FlagEmbedding gathers without a gradient: each process has that of its own share, DDP averages, and the
    gradient is divided by the number of processes. In unified training it is so for one of the terms only.
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


def checksum(model):
    """sha256 of all parameters of the model, names included."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def watch_first_batch(model, report):
    """Put a checksum of the queries of the first batch, and the number of its passages, into the report."""

    def look(model, args, inputs):
        sides = [inputs[name] for name in ("queries", "passages")]
        queries, passages = (side if isinstance(side, list) else [side] for side in sides)
        rows = [part["input_ids"].cpu().contiguous().numpy().tobytes() for part in queries]
        report["first_batch"] = hashlib.sha256(b"".join(rows)).hexdigest()
        report["passages"] = sum(len(part["input_ids"]) for part in passages)
        handle.remove()

    handle = model.register_forward_pre_hook(look, with_kwargs=True)


def main():
    engine, reports, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    rank, started = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model, data, training = arguments_of(engine, words)
    runner = part_of(engine, "Runner")(model_args=model, data_args=data, training_args=training)
    own, group = runner.trainer, torch.distributed
    known = group.get_world_size() if group.is_available() and group.is_initialized() else 1
    known = min(known, own.args.world_size, own.accelerator.num_processes)  # each may know another group
    report = {"rank": rank, "started": started, "group_size": known}
    runner.model.float()  # transformers loads a base in the type it was saved in; bf16 weights barely move
    if known == started:
        mend(runner.model)
        go_on(runner)
        watch_first_batch(runner.model, report)
        report["not_fp32"] = [n for n, w in runner.model.named_parameters() if w.dtype != torch.float32][:5]
        report["before"], begin, cpu = checksum(runner.model), time.perf_counter(), time.process_time()
        runner.trainer.add_callback(Along(runner, rank))
        runner.run()
        report |= {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
        weights, state = dict(runner.model.named_parameters()), runner.trainer.state
        report |= {"after": checksum(runner.model), "steps": state.global_step}
        report["not_finite"] = [name for name, w in weights.items() if not torch.isfinite(w).all()][:5]
        report["losses"] = [float(log["loss"]) for log in state.log_history if "loss" in log]
        report["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    write_json(reports / f"rank-{rank}.json", report)


if __name__ == "__main__":
    main()
