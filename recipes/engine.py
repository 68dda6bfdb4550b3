"""One training run on FlagEmbedding's engine: its command, its launch, the check, the finished model.

FlagEmbedding 1.4.2 with transformers 5.23 differs from its published commands; what has to be known is
written where it is used: `flags` (the command line), `check_ranks` (the silent failure) and
`finish_model` (what its saved folder lacks).
"""

import dataclasses
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from embedding_tutorial.encoder import HEAD_FILES, WEIGHT_FILES, companions, fingerprint, weights_file
from embedding_tutorial.files import ROOT, TutorialError, atomic_folder, read_json, relative, sha256_of
from embedding_tutorial.profiles import PROFILES, training_precision
from embedding_tutorial.runs import require_run_space
from recipes import data, models
from recipes.checked_run import PROGRESS
from recipes.steps import close_step, open_step

DEEPSPEED = ROOT / "recipes" / "deepspeed_stage1.json"


@dataclass(frozen=True)
class Training:
    """The values of one run. `batch` counts the queries of one update over all processes together."""

    engine: str = "base"  # "base": dense; "m3": dense, sparse and ColBERT
    model: str = "minilm"  # a name that recipes.models knows, or a folder
    pooling: str = "mean"
    epochs: int = 5
    max_steps: int = -1  # ends the run earlier (tests)
    batch: int = 80
    group: int = 1  # passages per query: its positive and group - 1 of its negatives
    learning_rate: float = 5e-5
    temperature: float = 0.05
    query_length: int = 128
    passage_length: int = 256
    cross_device: bool = True  # the passages of all processes are negatives
    sub_batch: int = 0  # texts that go through the model at once; 0: all
    checkpointing: bool = False  # gradient checkpointing: recompute instead of remember
    precision: str = "fp32"  # "bf16" on GPUs; "auto": bf16 where this CPU is faster with it, as notebook 01
    self_distill_from: int | None = None  # m3: the step after which the ensemble teaches its three parts
    teacher: bool = False  # learn from pos_scores and neg_scores of the data (m3_kd_loss)
    freeze_positions: bool = False  # --fix_position_embedding
    seed: int = 42


def add_options(parser, presets):
    """The options that all training recipes share. presets: {"pocket": Training, "full": Training}."""
    parser.add_argument(
        "--scale",
        choices=list(presets),
        default="pocket",
        help="pocket: MiniLM on CPU processes or one small GPU; full: BGE-M3 on 2 to 8 GPUs",
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="processes of torchrun: one per GPU, or on the CPU"
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        default=not torch.cuda.is_available(),
        help="train on the CPU (without a GPU there is no choice)",
    )
    parser.add_argument(
        "--gpu-command", action="store_true", help="print the torchrun command for 2 to 8 GPUs and end"
    )
    parser.add_argument(
        "--deepspeed",
        nargs="?",
        const=str(DEEPSPEED),
        default=None,
        metavar="JSON",
        help="train with DeepSpeed (install it first) and this configuration",
    )
    parser.add_argument("--model", help="minilm, bge-m3, or the folder of a model; otherwise the scale's own")
    parser.add_argument(
        "--data", type=Path, help="training file in FlagEmbedding's form; otherwise made by recipes/data.py"
    )
    parser.add_argument("--output", type=Path, help="folder; one under recipes/output otherwise")
    for name, kind, text in (
        ("epochs", int, "passes over the data"),
        ("max-steps", int, "updates at most"),
        ("batch", int, "queries per update, all processes together"),
        ("group", int, "passages per query, the positive included"),
        ("learning-rate", float, "at its peak"),
        ("temperature", float, "of the softmax"),
        ("sub-batch", int, "texts that go through the model at once; 0: all"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"{text}; otherwise the scale's own value")


def chosen(args, preset, **changes):
    """`preset` with `changes`, and with what the command line says on top."""
    names = ("model", "epochs", "max_steps", "batch", "group", "learning_rate", "temperature", "sub_batch")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(preset, **{**changes, **given})


# ---------------------------------------------------------------- the command line


def flags(t, model, file, work, per_process, clip, cpu, deepspeed=None):
    """FlagEmbedding's arguments for a Training, as a list of strings.

    Gone since transformers 5: --overwrite_output_dir, --warmup_ratio (a share goes to --warmup_steps).
    --resume_from_checkpoint raises AttributeError, so no checkpoints are written on the way.
    """
    values = {
        "model_name_or_path": model,
        "train_data": file,
        "output_dir": work,
        "cache_path": f"{work}/cache",
        "train_group_size": t.group,
        "query_max_len": t.query_length,
        "passage_max_len": t.passage_length,
        "per_device_train_batch_size": per_process,
        "num_train_epochs": t.epochs,
        "learning_rate": t.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": clip,
        "temperature": t.temperature,
        "sentence_pooling_method": t.pooling,
        "normalize_embeddings": True,
        "seed": t.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if t.max_steps > 0:
        values["max_steps"] = t.max_steps
    if t.sub_batch:
        values["sub_batch_size"] = t.sub_batch
        if t.engine == "m3":  # sub-batches of different width cannot be joined for the ColBERT scores
            values["pad_to_multiple_of"] = t.passage_length
    if t.teacher:
        values |= {"knowledge_distillation": True, "kd_loss_type": "m3_kd_loss"}
    if t.engine == "m3":
        values["unified_finetuning"] = True
        if t.self_distill_from is not None:
            values |= {"use_self_distill": True, "self_distill_start_step": t.self_distill_from}
    if deepspeed:
        values["deepspeed"] = deepspeed
    switches = {
        "use_cpu": cpu,
        "negatives_cross_device": t.cross_device,
        "bf16": t.precision == "bf16",
        "gradient_checkpointing": t.checkpointing,
        "fix_position_embedding": t.freeze_positions,
    }
    line = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return line + [f"--{name}" for name, on in switches.items() if on]


def clip_at(t, processes):
    """The largest gradient norm. With negatives across devices each process computes the loss of all, but
    the gradient of its own share, and DDP averages: the gradient is 1/processes of the true one."""
    return 1 / processes if t.cross_device else 1.0


def gpu_command(t, words, file):
    """The same run with the full model on 2 to 8 GPUs, as a text. words: the recipe, as "dense.py --hard"."""
    values = [f"GPUS={n} BATCH={t.batch // n} CLIP={clip_at(t, n):g}" for n in (2, 4, 8) if t.batch % n == 0]
    out = f"recipes/output/{words.split('.')[0]}-full"
    line = flags(
        t, "models/bge-m3" if t.model == "bge-m3" else t.model, file, f"{out}/work", "$BATCH", "$CLIP", False
    )
    options, rows = " ".join(line).split(" --"), []
    for option in [options[0], *(f"--{option}" for option in options[1:])]:
        if rows and len(rows[-1]) + len(option) < 96:
            rows[-1] += f" {option}"
        else:
            rows.append(option)
    return "\n".join(
        [
            f"On 2 to 8 GPUs, with {t.model} (not run by this project: its tests have no GPU):",
            f"  {values[0]}    # or {', or '.join(values[1:])}",
            f"  torchrun --standalone --nproc_per_node $GPUS -m recipes.checked_run {t.engine} {out}/reports"
            " \\",
            " \\\n".join(f"    {row}" for row in rows),
            f"With DeepSpeed, where it is installed, add --deepspeed {relative(DEEPSPEED)}",
            f"Started, checked and finished at once: python recipes/{words} --scale full --processes 8",
        ]
    )


# ---------------------------------------------------------------- launch and check


def launch(t, file, line, reports, processes):
    """Run `checked_run` under torchrun, show its progress, and keep its output in `train.log`."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
        "recipes.checked_run",
        t.engine,
        str(reports),
        *line,
    ]
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    log = reports.parent / "train.log"
    print(f"torchrun, {processes} processes on {relative(file)}; log in {relative(log)}")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        start_new_session=True,
    )
    try:
        with open(log, "w", encoding="utf-8") as output, tqdm(unit="update", file=sys.stdout) as bar:
            output.write(shlex.join(command) + "\n")
            for text in process.stdout:
                output.write(text)
                if text.startswith(PROGRESS):
                    step, total, loss = text.split()[1:]
                    bar.total = int(total)
                    bar.update(int(step) - bar.n)
                    bar.set_postfix(loss=loss)
        status = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if status:
        lines = log.read_text(encoding="utf-8").splitlines()
        causes = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception)\b", line)]
        tail = "\n".join([*dict.fromkeys(causes), "...", *lines[-15:]])
        raise TutorialError(f"torchrun ended with status {status}. The end of {relative(log)}:\n{tail}")


def check_ranks(reports, processes):
    """Compare what the processes wrote; returns the first one's report.

    TutorialError unless all trained in one group on different rows, ended with the same finite
    parameters, and changed them.
    """
    missing = [n for n in range(processes) if not (Path(reports) / f"rank-{n}.json").exists()]
    if missing:
        raise TutorialError(
            f"Processes {missing} of {processes} left no report in {relative(reports)}: see train.log there."
        )
    found = [read_json(Path(reports) / f"rank-{n}.json") for n in range(processes)]
    sizes = [report["group_size"] for report in found]
    if set(sizes) != {processes}:
        raise TutorialError(
            f"{processes} processes were started, but their groups have the sizes {sizes}: each would "
            "train alone, and torchrun would still end with status 0. On the CPU, --use_cpu is missing."
        )
    if len({report["first_batch"] for report in found}) < processes:
        raise TutorialError(
            "Processes saw the same first batch: each trained alone on the same rows, and their parameters "
            "may well be equal. On the CPU, --use_cpu is missing."
        )
    if len({report["after"] for report in found}) > 1:
        raise TutorialError(
            "The processes ended with different parameters: gradients were not synchronised, the saved "
            "model knows only the data of the first process. On the CPU, --use_cpu is missing."
        )
    if found[0]["not_finite"]:
        raise TutorialError(
            f"Parameters are not finite after training: {found[0]['not_finite'][:5]}. "
            "Lower the learning rate, or train in bf16 rather than fp16."
        )
    if found[0]["after"] == found[0]["before"]:
        raise TutorialError("Training changed no parameter. Look at train.log.")
    return found[0]


# ---------------------------------------------------------------- the finished model


def finish_model(work, base, target, pooling):
    """Make a complete model folder of what FlagEmbedding saved.

    It saves weights, config.json and the M3 heads, but neither modules.json nor 1_Pooling/: without them
    SentenceTransformer falls back to mean pooling, wrong for a model trained with CLS. Tokenizer files
    come from the base, since the saved ones keep the truncation of the training run.
    """
    work, base, target = Path(work), Path(base), Path(target)
    config = read_json(work / "config.json")
    with atomic_folder(target) as folder:
        for name in companions(base):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / name, folder / name)
        for name in ("config.json", *WEIGHT_FILES, *HEAD_FILES):
            if (work / name).exists():
                shutil.copyfile(work / name, folder / name)
        weights_file(folder)
        models.describe_pooling(folder, config["hidden_size"], pooling)


def train(t, file, folder, processes=2, cpu=True, deepspeed=None):
    """One run from start to the finished, checked `folder/model`. Returns what `done.json` says.

    t: Training. file: JSON lines in FlagEmbedding's form. TutorialError for anything that would fail or
    mislead later, before torchrun starts where that can be known.
    """
    folder, file = Path(folder).resolve(), Path(file).resolve()
    if t.batch % processes:
        raise TutorialError(
            f"A batch of {t.batch} does not divide into {processes} processes. Choose another --batch."
        )
    if not cpu and processes > torch.cuda.device_count():
        raise TutorialError(
            f"{processes} processes, but {torch.cuda.device_count()} GPUs here. "
            "Lower --processes, or add --cpu."
        )
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise TutorialError(
            "DeepSpeed is not installed here. Remedy: pip install deepspeed, or run without --deepspeed."
        )
    if t.precision == "auto":
        t = dataclasses.replace(t, precision=training_precision(PROFILES["pocket"], "cpu" if cpu else "cuda"))
    if processes == 1:
        t = dataclasses.replace(t, cross_device=False)  # there is nothing to gather
    base = models.find_model(t.model)
    rows = data.check_file(file, group=t.group, scores=t.teacher)
    if len(rows) < t.batch:
        raise TutorialError(
            f"{relative(file)} has {len(rows)} rows, fewer than one batch of {t.batch}. Lower --batch."
        )
    size = weights_file(base).stat().st_size
    require_run_space(folder, size, 3 * size, keep=0)
    settings = {
        **dataclasses.asdict(t),
        "model": fingerprint(base),
        "data": sha256_of(file),
        "processes": processes,
        "cpu": cpu,
        "deepspeed": bool(deepspeed),
    }
    found = open_step(folder, settings)
    if found:
        return found
    work, reports = folder / "work", folder / "reports"
    reports.mkdir()
    line = flags(
        t, str(base), str(file), str(work), t.batch // processes, clip_at(t, processes), cpu, deepspeed
    )
    launch(t, file, line, reports, processes)
    report = check_ranks(reports, processes)
    print(
        f"All {processes} processes trained as one group and ended with the same parameters "
        f"({report['after'][:12]}): {report['steps']} updates, {report['seconds']:.0f} s."
    )
    finish_model(work, base, folder / "model", t.pooling)
    shutil.rmtree(work)
    losses = [loss for loss in report["losses"] if math.isfinite(loss)]
    return close_step(
        folder,
        {
            "processes": processes,
            "updates": report["steps"],
            "seconds": round(report["seconds"], 1),
            "cpu_seconds_of_one_process": round(report["cpu_seconds"], 1),
            "peak_memory_gb_of_one_process": round(report["peak_memory_gb"], 2),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "losses": losses,
            "checksum": report["after"],
        },
    )


def recipe(args, presets, words, source, output, **changes):
    """Train as the options of a recipe say, and print its GPU command; or, with --gpu-command, only that.

    words: the recipe as typed, such as "dense.py --hard". source: what `data.make` needs, for the case that
    --data names no file. changes: what this variant does otherwise than the presets. Returns done.json.
    """
    full = dataclasses.replace(presets["full"], **changes)
    if args.gpu_command or args.scale == "full":
        full = chosen(args, presets["full"], **changes)
    where = args.data or data.place(**{**source, "model": full.model}) / "train.jsonl"
    if args.gpu_command:
        print(gpu_command(full, words, relative(where)))
        return None
    t = chosen(args, presets[args.scale], **changes)
    found = train(
        t,
        args.data or data.make(**{"model": t.model, **source}),
        output,
        args.processes,
        args.cpu,
        args.deepspeed,
    )
    print(gpu_command(full, words, relative(where)))
    return found
