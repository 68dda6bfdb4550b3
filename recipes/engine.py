"""One training run on FlagEmbedding's engine. The recipes print the line that runs, and this runs it:

    python recipes/engine.py base|m3 PROCESSES FOLDER --model_name_or_path … --train_data … …

base: dense vectors; m3: dense, sparse and ColBERT vectors. What follows FOLDER goes to FlagEmbedding 1.4.2
as it is. Before the run: data, disk and GPUs are looked at. After it: the processes are compared
(`check_ranks`), and FOLDER/model becomes a folder that other libraries open (`finish_model`). A run that was
cut off goes on from its last checkpoint.
"""

import importlib.util
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial import encoder, files, profiles  # noqa: E402
from embedding_tutorial.files import ROOT, TutorialError, read_json, relative  # noqa: E402
from embedding_tutorial.own_data import say_what_is_cut  # noqa: E402
from embedding_tutorial.pairs import read_rows  # noqa: E402
from embedding_tutorial.runs import require_run_space  # noqa: E402
from recipes import data, models, steps  # noqa: E402
from recipes.checked_run import PROGRESS, WHOLE  # noqa: E402

DEEPSPEED = ROOT / "recipes" / "deepspeed_stage1.json"
# What all recipes begin with, as typed. transformers 5 has no --warmup_ratio: --warmup_steps takes a share.
COMMON = """--lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0.01 --max_grad_norm 1 --seed 42
    --normalize_embeddings True --train_group_size 1 --logging_steps 1 --report_to none --disable_tqdm True
    --save_strategy steps --save_steps 200 --save_total_limit 2 --temperature 0.05"""
SCALES = {"pocket": "", "full": "--query_max_len 512 --passage_max_len 512 --dataloader_num_workers 2"}
OURS = {"model_name_or_path": "--model", "train_data": "--data", "output_dir": "--output"}
# Bytes that a layer keeps for its backward pass per token and hidden unit (bf16 autocast, counted by
# tests/test_recipes.py), and with gradient checkpointing; a weight with its gradient and AdamW's two moments.
KEPT, KEPT_CHECKPOINTING, PER_WEIGHT = 44, 4, 16


def options_of(words):
    """{name: values} of arguments as typed, "--seed 7", "--seed=7" or "--bf16"; the last one counts."""
    options, values = {}, None
    for word in shlex.split(words) if isinstance(words, str) else words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name.replace("-", "_")] = values = [value] if equals else []
        elif values is None:
            raise TutorialError(f"{word!r} follows no name. FlagEmbedding's arguments begin with --.")
        else:
            values.append(word)
    return options


def words_of(options):
    return [word for name, values in options.items() for word in (f"--{name}", *values)]


def is_on(options, name):
    return name in options and options[name][:1] not in (["False"], ["false"])


def number(options, name, default=None):
    try:
        return float(options[name][0]) if name in options else default
    except (ValueError, IndexError):
        raise TutorialError(f"--{name} takes a number, not {options[name]}.") from None


def fitting_batch(gigabytes, config, options):
    """Queries per GPU whose graph fits into 85 % of its memory if every text is as long as it may be.

    A count, not a measurement: weights, gradients and moments in fp32, and what the layers keep in bf16.
    """
    width, layers, words = (config[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    fixed = PER_WEIGHT * (words * width + 12 * layers * width**2)
    once = is_on(options, "gradient_checkpointing")
    token = width * (layers * KEPT_CHECKPOINTING + KEPT if once else layers * KEPT)
    if is_on(options, "unified_finetuning"):  # while sparse vectors are made: a row per token, and back
        token += 3 * 2 * words
    query, passage = number(options, "query_max_len"), number(options, "passage_max_len")
    row = query + number(options, "train_group_size") * passage
    return int((0.85e9 * gigabytes - fixed) / (token * row))


def add_options(parser):
    """Our own options, few on purpose: what stands after "--" goes to FlagEmbedding as it is."""
    add = parser.add_argument
    add("--scale", choices=("pocket", "full"), default="pocket", help="MiniLM, or BGE-M3 on GPUs")
    add("--model", help="minilm, bge-m3 or a model folder; otherwise the scale's own")
    add("--data", type=Path, help="FlagEmbedding's lines, or a folder of data.py lengths; otherwise made")
    add("--output", type=Path, help="folder; otherwise one whose name tells runs apart")
    add("--processes", type=int, help="one per GPU; otherwise as many as there are, 2 on the CPU, 8 to print")
    add("--gpu-gb", type=float, help="memory of a GPU, sets the full batch; otherwise this one's, or 80")
    add("--cpu", action="store_true", help="train on the CPU although there is a GPU")
    add("--deepspeed", action="store_true", help=f"with {DEEPSPEED.name} (install it first)")
    add("--print", action="store_true", help="print the line that would run, and end")
    parser.set_defaults(gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0)


def parsed(parser, words):
    """(our own options, FlagEmbedding's arguments as typed after "--")."""
    words = list(sys.argv[1:] if words is None else words)
    cut = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:cut]), words[cut + 1 :]


def plan(args, theirs, kind, name, presets, more, source):
    """(processes, folder, FlagEmbedding's options) of a run.

    presets: {scale: (model, queries per update, arguments as typed)}; more: arguments of this variant.
    source: what makes the data without --data, [(kind for `data.make`, options)], each from the last one's.
    """
    model, queries, words = presets[args.scale]
    model = args.model or model
    full = args.scale == "full"
    cpu = args.cpu or not (args.gpus or full)
    processes = args.processes or (2 if cpu else min(args.gpus, 8 if full else 2) or 8)
    told = options_of(theirs)
    for taken in OURS.keys() & told.keys():
        raise TutorialError(f"--{taken} is set by the recipe's own {OURS[taken]}: put it before the --.")
    folder, pooling, config = models.described(model, fetch=not args.print)
    file = args.data.resolve() if args.data else None
    for step, settings in () if file else source:
        make = data.place if args.print else data.make
        file = make(step, **{"model": str(folder), "data": file, **settings})
    precision = "bf16"  # of a line that is printed for other GPUs; V100 and T4: -- --bf16 False --fp16 True
    if args.gpus or not full:
        precision = profiles.training_precision(profiles.PROFILES["pocket"], "cpu" if cpu else "cuda")
    own = {"model_name_or_path": folder, "train_data": file, "sentence_pooling_method": pooling}
    own |= {"deepspeed": DEEPSPEED} if args.deepspeed else {}
    switches = {"use_cpu": cpu, "negatives_cross_device": processes > 1, precision: precision != "fp32"}
    switches["same_dataset_within_batch"] = file.is_dir()
    own |= {switch: True for switch, on in switches.items() if on}
    options = {name: [str(value)] for name, value in own.items() if value}
    options = options_of(f"{COMMON} {SCALES[args.scale]} {words} {more}") | options | told
    if "sentence_pooling_method" not in options:
        raise TutorialError(
            f"{relative(folder)} has no 1_Pooling/config.json, which says how its vectors are made. Copy it "
            "from the published model, or for a raw one: -- --sentence_pooling_method mean")
    if is_on(options, "same_dataset_within_batch"):  # otherwise FlagEmbedding puts "None" before every query
        options.setdefault("query_instruction_for_retrieval", [""])
    if full:
        here = torch.cuda.get_device_properties(0).total_memory / 1e9 if args.gpus else 80
        batch = fitting_batch(args.gpu_gb or here, config, options)
    else:
        batch = queries // processes
    options.setdefault("per_device_train_batch_size", [str(batch)])
    if number(options, "per_device_train_batch_size") < 1:
        raise TutorialError("Not one query fits. Fewer --processes, a larger --gpu-gb, or shorter texts.")
    names = [name, *([steps.label(folder)] if full or args.model else [])]
    names += [steps.label(file)] if args.data else []
    ours = (args.processes, args.cpu, args.deepspeed, args.gpu_gb)
    typed = [*theirs, *(str(value or "") for value in ours)]
    names += [files.text_key(typed)[:4]] if any(typed) else []
    return processes, (args.output or steps.OUTPUT / "-".join(names)).resolve(), options


def recipe(args, *settings):
    """Print the line of a run and, without --print, do what it does. The arguments are those of `plan`."""
    processes, folder, options = plan(args, *settings)
    if is_on(options, "same_dataset_within_batch"):
        print("The batch of each file is the batch_size in its rows.")
    else:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "train_group_size")
        own, repeats, group = (int(number(options, name, 1)) for name in names)
        seen = own * group * sharing(processes, options)
        queries = f"{own * processes * repeats} queries an update"
        print(f"{queries}, each against {seen} passages: {seen - 1} negatives.")
        if seen > own * group and is_on(options, "unified_finetuning"):
            print(f"So for the dense loss; sparse, ColBERT and sum see their own process: {own * group - 1}.")
    words = [settings[1], str(processes), str(folder), *words_of(options)]
    print(shlex.join([sys.executable, str(Path(__file__).resolve()), *words]), flush=True)
    return None if args.print else main(words)


def sharing(processes, options):
    """How many processes share their passages as negatives."""
    return processes if is_on(options, "negatives_cross_device") else 1


def data_files(options):
    """The files that FlagEmbedding will read."""
    paths = [Path(path) for path in options["train_data"]]
    inside = [sorted(path.glob("*.json*")) if path.is_dir() else [path] for path in paths]
    if not any(inside):
        raise TutorialError(f"{options['train_data']} holds no .jsonl file. Make it with recipes/data.py.")
    return sum(inside, [])


def say_lengths(base, options, rows_of):
    """Say what --query_max_len and --passage_max_len cut, in 1,000 rows of a file. rows_of: {file: rows}."""
    rows, tokenizer = [], AutoTokenizer.from_pretrained(base)
    for file, count in rows_of.items():
        rows += [row for _, row in itertools.islice(read_rows(file), 0, None, max(1, count // 1000))]
    used = ("pos", "neg") if number(options, "train_group_size", 8) > 1 else ("pos",)
    before = "".join(options.get("query_instruction_for_retrieval", []))
    passages = list({text: None for row in rows for name in used for text in row[name]})
    queries = [before + row["query"] for row in rows]
    say_what_is_cut(tokenizer, queries, int(number(options, "query_max_len", 32)), "queries looked at")
    say_what_is_cut(tokenizer, passages, int(number(options, "passage_max_len", 128)), "passages looked at")


def require(processes, options, folder, base):
    """{data file: its number of rows}; TutorialError for what would fail or mislead later."""
    gpus = torch.cuda.device_count()
    if not is_on(options, "use_cpu") and processes > gpus:
        raise TutorialError(f"{processes} processes, but {gpus} GPUs here. Lower --processes, or add --cpu.")
    if "deepspeed" in options and importlib.util.find_spec("deepspeed") is None:
        raise TutorialError("DeepSpeed is not installed here: pip install deepspeed, or no --deepspeed.")
    group, scores = int(number(options, "train_group_size", 8)), is_on(options, "knowledge_distillation")
    found = {file: data.check_file(file, group, scores) for file in data_files(options)}
    batch = int(number(options, "per_device_train_batch_size", 8))
    if is_on(options, "same_dataset_within_batch"):  # a batch from one file: a smaller file would vanish
        sets = {file: one | {"batch": one["batch_size"] or batch} for file, one in found.items()}
    else:
        every = {"few": sum((one["few"] for one in found.values()), []), "batch": batch}
        every |= {n: sum(one[n] for one in found.values()) for n in ("rows", "shared", "crossed", "clash")}
        sets = {options["train_data"][0]: every}
    lower = "Lower --per_device_train_batch_size, or the batch_size in the rows of a length group."
    for file, one in sets.items():
        if (rows := one["rows"]) < (least := one["batch"] * processes):
            raise TutorialError(f"{relative(file)} has {rows} rows, fewer than one batch of {least}. {lower}")
        for line in data.remarks(one, group, one["batch"] * sharing(processes, options)):
            print(f"{relative(file)}: {line}")
    size = encoder.weights_file(base).stat().st_size
    require_run_space(folder, size, 2 * size, keep=2)
    return {file: one["rows"] for file, one in found.items()}


def cut_off(folder, processes):
    """The newest whole checkpoint of a run that was cut off, or None; says what will be repeated."""
    marks = {int(path.parent.name.split("-")[1]): path for path in folder.glob(f"work/checkpoint-*/{WHOLE}")}
    states = {n: len([*path.parent.glob("rng_state*.pth")]) for n, path in marks.items()}
    last = max((n for n in marks if states[n] == processes), default=0)
    log = folder / "train.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    done = max((int(line.split()[1]) for line in lines if line.startswith(PROGRESS)), default=0)
    if done:
        again = f"{done - last} are repeated."
        print(f"It was cut off after update {done}. It goes on from update {last}: {again}")
    return marks[last].parent if last else None


def launch(kind, words, folder, processes):
    """Run `checked_run` under torchrun, show its progress, and keep its output in `train.log`."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {processes}"
    command = [sys.executable, *torchrun.split(), str(ROOT / "recipes" / "checked_run.py")]
    command += [kind, str(folder / "reports"), *words]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log = folder / "train.log"
    print(f"torchrun, {processes} processes; log in {relative(log)}", flush=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        with open(log, "a", encoding="utf-8") as output, tqdm(unit="update", file=sys.stdout) as bar:
            output.write(shlex.join(command) + "\n")
            for text in process.stdout:
                output.write(text)
                output.flush()
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
    places = [Path(reports) / f"rank-{n}.json" for n in range(processes)]
    missing = [n for n, place in enumerate(places) if not place.exists()]
    if missing:
        where = f"{relative(reports)}: see train.log there."
        raise TutorialError(f"Processes {missing} of {processes} left no report in {where}")
    found = [read_json(place) for place in places]
    first, sizes = found[0], [report["group_size"] for report in found]
    alone, hint = set(sizes) != {processes}, "On the CPU, --use_cpu is missing."
    for wrong, why in (
        (alone, f"{processes} processes were started, but their groups have the sizes {sizes}: each would "
         f"train alone, and torchrun would still end with status 0. {hint}"),
        (not alone and len({report["first_batch"] for report in found}) < processes,
         "Processes saw the same first batch: each trained alone on the same rows, and their parameters may "
         f"well be equal. {hint}"),
        (not alone and len({report["after"] for report in found}) > 1,
         "The processes ended with different parameters: gradients were not synchronised, the saved model "
         f"knows only the data of the first process. {hint}"),
        (first.get("not_fp32"), f"Not trained in fp32: {first.get('not_fp32')}. Save the base in fp32."),
        (first.get("not_finite"), f"Parameters are not finite after training: {first.get('not_finite')}. "
         "Lower the learning rate, or train in bf16 rather than fp16."),
        (first.get("after") == first.get("before"), "Training changed no parameter. Look at train.log.")):
        if wrong:
            raise TutorialError(why)
    return first


def finish_model(work, base, target, pooling):
    """Make a complete model folder of what FlagEmbedding saved.

    It saves weights, config.json and the M3 heads it trained, but neither modules.json nor 1_Pooling/:
    without them SentenceTransformer falls back to mean pooling, wrong for a model trained with CLS.
    Tokenizer files come from the base, since the saved ones keep the truncation of the training run.
    """
    work, base, target = Path(work), Path(base), Path(target)
    config = read_json(work / "config.json")
    with files.atomic_folder(target) as folder:
        encoder.copy_companions(base, folder, without=encoder.HEAD_FILES)  # those belong to the old weights
        for name in ("config.json", *encoder.WEIGHT_FILES, *encoder.HEAD_FILES):
            if (work / name).exists():
                shutil.copyfile(work / name, folder / name)
        encoder.weights_file(folder)
        encoder.describe_pooling(folder, config["hidden_size"], pooling)


def run(kind, processes, folder, options):
    """One run from start to the finished, checked `folder/model`. Returns what `done.json` says."""
    folder, base = Path(folder).resolve(), models.find_model(options["model_name_or_path"][0])
    work, reports = folder / "work", folder / "reports"
    rows_of = require(processes, options, folder, base)
    settings = {name: values for name, values in options.items() if name not in OURS}
    settings |= {"engine": kind, "processes": processes, "model": encoder.fingerprint(base)}
    settings["data"] = files.text_key([files.sha256_of(file) for file in data_files(options)])
    found = steps.open_step(folder, settings, keep=("work", "train.log"))
    if found:
        return found
    say_lengths(base, options, rows_of)
    reports.mkdir()
    words = [*words_of(options), "--output_dir", str(work), "--cache_path", str(folder / "cache")]
    if checkpoint := cut_off(folder, processes):
        words += ["--resume_from_checkpoint", str(checkpoint)]
    launch(kind, words, folder, processes)
    report = check_ranks(reports, processes)
    end = f"({report['after'][:12]}): {report['steps']} updates, {report['seconds']:.0f} s."
    print(f"All {processes} processes trained as one group and ended with the same parameters {end}")
    finish_model(work, base, folder / "model", options["sentence_pooling_method"][0])
    shutil.rmtree(work)
    shutil.rmtree(folder / "cache")
    losses = [loss for loss in report["losses"] if math.isfinite(loss)]
    found = {
        "processes": processes, "updates": report["steps"], "losses": losses, "checksum": report["after"],
        "precision": next((kind for kind in ("bf16", "fp16") if is_on(options, kind)), "fp32"),
        "passages_per_update": processes * report["passages"],
        "cpu_seconds_of_one_process": round(report["cpu_seconds"], 1),
        "peak_memory_gb_of_one_process": round(report["peak_memory_gb"], 2)}
    return steps.close_step(folder, found)


def main(words=None):
    words = list(sys.argv[1:] if words is None else words)
    if len(words) < 4 or words[0] not in ("base", "m3") or not words[1].isdigit():
        raise TutorialError(f"What is run here is printed by the recipes, --print.\n{__doc__}")
    return run(words[0], int(words[1]), words[2], options_of(words[3:]))


if __name__ == "__main__":
    steps.run(main)
