"""Encoding for retrieval: this project's tokens per second and its peers', and what T2Retrieval would take.

    python benchmarks/encoding.py                    # MiniLM on the CPU, a slice of the corpus
    python benchmarks/encoding.py --passages 200     # a quick look
    python benchmarks/encoding.py --cuda             # BGE-M3's architecture with random weights on a GPU
    python benchmarks/encoding.py --cuda-smoke       # the same code, tiny, on the CPU

The corpus is made of words of the pocket passages and has T2Retrieval's published lengths: 118,605 passages
of 874 characters on average, the longest of 42,956, log-normal between. The slice takes every n-th passage of
it in order of length, shuffled. Each contender encodes the same texts with the same maximum length in a fresh
process, tokenising included, loading the model and a warm-up not; ours writes its shards to the disk
meanwhile. Contenders take turns; medians over the rounds. sentence-transformers is tried in several settings
in the first round, the best one goes on. Counted are real tokens: what padding adds is time, not work.
"""

import argparse
import dataclasses
import json
import random
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import common
import numpy as np
import torch
import transformers

from embedding_tutorial.assets import pocket_model_path
from embedding_tutorial.encoder import Encoder, read_pooling
from embedding_tutorial.files import read_json, write_json
from embedding_tutorial.pocket_task import DATA, read_language
from embedding_tutorial.profiles import PROFILES

PASSAGES, MEAN_CHARACTERS, MAX_CHARACTERS = 118_605, 874, 42_956
T2_TOKENS = 65e6  # of all passages and queries
OUT, CUDA_OUT = common.RESULTS / "encoding.json", common.RESULTS / "encoding_cuda.json"
PACKAGES = ("torch", "transformers", "sentence-transformers", "FlagEmbedding", "tokenizers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Job:
    """One contender. `tried`: a setting that goes on after the first round only if it was the best one."""

    id: str
    name: str
    runner: str
    precision: str
    options: dict = dataclasses.field(default_factory=dict)
    tried: bool = False
    cuda: bool = False

    @property
    def ours(self):
        return self.runner == "ours"


def st(batch_size, precision="fp32", note="", tried=False, cuda=False):
    name = f"sentence-transformers, {precision}, batch {batch_size}{note}"
    job_id = f"{'cuda-' if cuda else ''}st-{precision}-{batch_size}"
    return Job(job_id, name, "sentence_transformers", precision, {"batch_size": batch_size}, tried, cuda)


POCKET, FULL = PROFILES["pocket"], PROFILES["full"]
CPU_JOBS = [
    st(16, note=" (the predecessor)"),
    st(32, note=" (its default)"),
    st(8, tried=True),
    st(64, tried=True),
    st(32, "bf16", tried=True),
    Job("flag-256", "FlagEmbedding, fp32, batch 256 (its default)", "flag", "fp32", {"batch_size": 256}),
    Job("flag-16", "FlagEmbedding, fp32, batch 16", "flag", "fp32", {"batch_size": 16}),
    Job("ours", "ours, fp32", "ours", "fp32", {"token_budget": POCKET.encode_budget}),
    Job("ours-bf16", "ours, bf16, groups of 8,192 tokens", "ours", "bf16", {"token_budget": 8192}),
]
CUDA_JOBS = [
    st(16, note=" (the predecessor)", cuda=True),
    st(32, "fp16", tried=True, cuda=True),
    st(64, "fp16", tried=True, cuda=True),
    st(128, "fp16", tried=True, cuda=True),
    st(32, "bf16", tried=True, cuda=True),
    Job("cuda-flag-default", "BGEM3FlagModel, fp16, its defaults", "flag_m3", "fp16", {}, cuda=True),
    Job("cuda-flag-32", "BGEM3FlagModel, fp16, batch 32", "flag_m3", "fp16", {"batch_size": 32}, cuda=True),
    Job("cuda-ours", "ours, fp16", "ours", "fp16", {"token_budget": FULL.encode_budget}, cuda=True),
    Job("cuda-ours-16k", "ours, fp16, 16,384 tokens", "ours", "fp16", {"token_budget": 16_384}, True, True),
    Job("cuda-ours-64k", "ours, fp16, 65,536 tokens", "ours", "fp16", {"token_budget": 65_536}, True, True),
    Job("cuda-ours-bf16", "ours, bf16", "ours", "bf16", {"token_budget": FULL.encode_budget}, cuda=True),
]
JOBS = {job.id: job for job in CPU_JOBS + CUDA_JOBS}
CEILING = "ceiling"


# ---------------------------------------------------------------- the corpus


def lengths_of_slice(count):
    """Characters of `count` passages: every n-th of the whole corpus in order of length, shuffled."""
    whole = np.exp(np.random.default_rng(0).standard_normal(PASSAGES))
    whole = np.sort(np.clip(whole * MEAN_CHARACTERS / whole.mean(), 8, MAX_CHARACTERS))
    places = (np.arange(count) + 0.5) * PASSAGES / count
    chosen = whole[places.astype(int)].round().astype(int).tolist()
    random.Random(0).shuffle(chosen)
    return chosen


def make_texts(count):
    """English texts of these lengths, words drawn from the pocket passages."""
    words = [word for passage in read_language(DATA / "en")[0] for word in passage["text"].split()]
    draw, texts = random.Random(1), []
    for length in lengths_of_slice(count):
        parts, used = [], 0
        while used <= length:
            parts.append(draw.choice(words))
            used += len(parts[-1]) + 1
        texts.append(" ".join(parts)[:length])
    return texts


# ---------------------------------------------------------------- the contenders: () → a function of texts


def sentence_transformers(job, args, folder):
    from sentence_transformers import SentenceTransformer

    half = {} if job.precision == "fp32" else {"model_kwargs": {"dtype": DTYPES[job.precision]}}
    model = SentenceTransformer(str(args.model), device=args.device, **half)
    model.max_seq_length = args.max_length
    return lambda texts: model.encode(
        texts,
        batch_size=job.options["batch_size"],
        normalize_embeddings=True,
        show_progress_bar=False,
    )


def flag(job, args, folder):
    from FlagEmbedding import FlagModel

    pooling = read_pooling(args.model)
    model = FlagModel(str(args.model), pooling_method=pooling, use_fp16=False, devices=args.device)
    return lambda texts: model.encode(texts, batch_size=job.options["batch_size"], max_length=args.max_length)


def flag_m3(job, args, folder):
    from FlagEmbedding import BGEM3FlagModel

    model = BGEM3FlagModel(str(args.model), use_fp16=args.device == "cuda", devices=args.device)
    return lambda texts: model.encode(texts, max_length=args.max_length, **job.options)["dense_vecs"]


def ours(job, args, folder):
    """The StoredEncoder of the tutorial: sorted over the whole call, shards written as they are done."""
    from embedding_tutorial.retrieval import stored_encoder

    characters = (FULL if job.cuda else POCKET).shard_characters
    settings = (args.max_length, job.precision, args.device)
    encoder = stored_encoder(args.model, folder, *settings, **job.options, shard_characters=characters)
    encoder.encoder = encoder.load()
    return encoder


RUNNERS = {f.__name__: f for f in (sentence_transformers, flag, flag_m3, ours)}


def worker(args):
    """Seconds, memory and vectors of one contender; for "ceiling", FLOP per second of a matrix product."""
    if args.worker == CEILING:
        size = 4096 if args.device == "cuda" else 2048 if args.model_is_real else 128
        kinds = ("fp32", "fp16", "bf16") if args.device == "cuda" else ("fp32", "bf16")
        return {k: common.matmul_ceiling(args.device, DTYPES[k], size, args.ceiling_repeats) for k in kinds}
    job = JOBS[args.worker]
    texts = json.loads(args.texts.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        encode = RUNNERS[job.runner](job, args, folder)
        # Other texts, because ours would read what it has stored; the longest, for the GPU's memory.
        encode([text[1:] + " once more" for text in [*texts[:16], max(texts, key=len)]])
        begin, cpu = common.now(args.device), time.process_time()
        vectors = encode(texts)
        seconds, cpu = common.now(args.device) - begin, time.process_time() - cpu
    memory = torch.cuda.max_memory_reserved() / 1e9 if args.device == "cuda" else common.peak_memory_gb()
    np.save(args.texts.with_name(f"{job.id}.npy"), np.asarray(vectors, dtype=np.float32))
    return {"seconds": seconds, "cpu_seconds": cpu, "memory_gb": memory}


# ---------------------------------------------------------------- all of it


def measure(args):
    transformers.logging.disable_progress_bar()
    cuda = args.cuda or args.cuda_smoke
    jobs = [job for job in (CUDA_JOBS if cuda else CPU_JOBS) if not args.only or job.id in args.only]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = make_texts(args.passages)
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        if cuda:
            shape = common.BGE_M3_SHAPE if args.cuda else common.SMOKE_SHAPE
            model = common.random_m3(folder / "model", shape)
        else:
            model = args.model
            shape = read_json(model / "config.json")
        tokens = Encoder(model, args.max_length).tokenize(texts)
        work = {"lengths": [len(row) for row in tokens], "shape": shape, "folder": folder}
        runs, ceilings = {job.id: [] for job in jobs}, []
        for turn in range(args.repeats):
            ceilings.append(run(args, CEILING, model, folder))
            for job in jobs:
                if turn and job.tried and not is_best(job, jobs, runs):
                    continue
                runs[job.id].append(run(args, job.id, model, folder))
                row = row_of(job, runs[job.id][-1:], ceilings, work)
                print(
                    f"{turn + 1}. {job.name:<50} {row['tokens_per_second']:>9,.0f} tokens/s "
                    f"({row['seconds']:.1f} s, {row['cpu_seconds']:.1f} s of CPU), {row['memory_gb']:.2f} GB",
                    flush=True,
                )
        rows = [row_of(job, runs[job.id], ceilings, work) for job in jobs]
    return {
        "machine": common.machine(PACKAGES, args.device),
        "command": command_of(args),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "settings": {"passages": args.passages, "max_length": args.max_length, "repeats": args.repeats}
        | {"model": model_name(args), "threads": torch.get_num_threads()},
        "corpus": {
            "passages": args.passages,
            "characters": sum(map(len, texts)),
            "longest_characters": max(map(len, texts)),
            "tokens": sum(work["lengths"]),
            "longest_tokens": max(work["lengths"]),
            "t2retrieval_tokens": int(T2_TOKENS),
        },
        "ceiling_gflops": {k: max(c[k] for c in ceilings) / 1e9 for k in ceilings[0]},
        "contenders": rows,
        "ratios": ratios(rows),
    }


def run(args, worker_id, model, folder):
    words = ["--worker", worker_id, "--model", model, "--texts", folder / "texts.json"]
    words += ["--max-length", args.max_length, "--device", args.device]
    return common.run_worker(__file__, [*words, *([] if args.cuda_smoke else ["--model-is-real"])])


def is_best(job, jobs, runs):
    """Whether this tried setting was the fastest of its runner in the first round."""
    rivals = [other for other in jobs if other.runner == job.runner]
    return min(rivals, key=lambda other: runs[other.id][0]["seconds"]) == job


def row_of(job, runs, ceilings, work):
    tokens = sum(work["lengths"])
    speeds = [tokens / run["seconds"] for run in runs]
    flop = common.model_flop(work["shape"], work["lengths"]) / 3  # forward is a third of a training step
    ceiling = max(c[job.precision] for c in ceilings) if job.precision in ceilings[0] else None
    reference = work["folder"] / f"{'cuda-' if job.cuda else ''}st-fp32-16.npy"
    difference = None
    if reference.is_file():
        difference = float(np.abs(np.load(work["folder"] / f"{job.id}.npy") - np.load(reference)).max())
    speed = median(speeds)
    return {
        "id": job.id,
        "name": job.name,
        "ours": job.ours,
        "precision": job.precision,
        "tokens_per_second": speed,
        "seconds": median(run["seconds"] for run in runs),
        "cpu_seconds": median(run["cpu_seconds"] for run in runs),
        "memory_gb": max(run["memory_gb"] for run in runs),
        "utilisation": speed / tokens * flop / ceiling if ceiling else None,
        "projected_hours": T2_TOKENS / speed / 3600,
        "largest_difference": difference,
        "repeats": speeds,
    }


def ratios(rows):
    """Ours against the predecessor, the default and the best setting of sentence-transformers."""
    speed = {row["id"].removeprefix("cuda-"): row["tokens_per_second"] for row in rows}
    ours = speed.get("ours")
    theirs = {name: value for name, value in speed.items() if name.startswith("st-")}
    if not ours or not theirs:
        return {}
    same_precision = [value for name, value in theirs.items() if "-fp32-" in name]
    found = {
        "sentence-transformers fp32 batch 16": theirs.get("st-fp32-16"),
        "sentence-transformers fp32 batch 32, its default": theirs.get("st-fp32-32"),
        "sentence-transformers fp32, best": max(same_precision, default=None),
        "sentence-transformers, best": max(theirs.values()),
    }
    table = {f"ours / {name}": ours / value for name, value in found.items() if value}
    half = max((value for name, value in theirs.items() if "-bf16-" in name), default=None)
    if half and speed.get("ours-bf16"):
        table["ours, bf16 / sentence-transformers, bf16"] = speed["ours-bf16"] / half
    return table


def model_name(args):
    if args.cuda_smoke:
        return "tiny, random weights, BGE-M3's layout"
    if args.cuda:
        return "BGE-M3's architecture, random weights"
    return POCKET.model.split("/")[1] if args.model == pocket_model_path() else args.model.name


def command_of(args):
    words = [f"--{name.replace('_', '-')}" for name in ("cuda", "cuda_smoke") if getattr(args, name)]
    words += [f"--passages {args.passages}"] if args.passages != default_passages(args) else []
    words += [f"--repeats {args.repeats}"] if args.repeats != 3 else []
    return " ".join(["python benchmarks/encoding.py", *words])


def default_passages(args):
    return 6000 if args.cuda else 30 if args.cuda_smoke else 2000


def readme_text(result):
    rows = [
        [
            f"**{row['name']}**" if row["ours"] else row["name"],
            f"{row['tokens_per_second']:,.0f}",
            "" if row["utilisation"] is None else f"{row['utilisation']:.0%}",
            f"{row['memory_gb']:.2f}",
            hours(row["projected_hours"]),
            "" if row["largest_difference"] is None else f"{row['largest_difference']:.0e}",
        ]
        for row in result["contenders"]
    ]
    head = ["", "tokens/s", "of the ceiling", "peak memory, GB", "all of T2Retrieval", "largest difference"]
    corpus, ceiling = result["corpus"], result["ceiling_gflops"]
    shown = ", ".join(f"{name} {value:,.0f}" for name, value in ceiling.items())
    against = "; ".join(f"{name}: {value:.2f}x" for name, value in result["ratios"].items())
    return f"""## Encoding: {result["settings"]["model"]}

{corpus["passages"]:,} passages with T2Retrieval's lengths, {corpus["tokens"]:,} tokens, cut at
{result["settings"]["max_length"]}; medians of {result["settings"]["repeats"]}.
`{result["command"]}`, {result["date"]}.
{result["machine"]["summary"]}.
Matrix product, measured in the same run, GFLOP/s: {shown}.

{common.markdown_table(head, rows)}

{against}.

The ceiling is that of the row's precision. "All of T2Retrieval": its 65 million tokens at this speed, for one
model. "Largest difference": of any component of any vector from sentence-transformers' in fp32.
"""


def hours(value):
    return f"{value:.1f} h" if value >= 1 else f"{value * 60:.1f} min"


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--passages", type=int, help="of the slice (2,000; with --cuda 6,000)")
    add("--repeats", type=int, default=3)
    add("--max-length", type=int, help="tokens (512; with --cuda 8,192)")
    add("--model", type=Path, help="another sentence-transformers folder, on the CPU")
    add("--only", nargs="+", metavar="ID", choices=JOBS, help="these contenders alone")
    add("--cuda", action="store_true", help="BGE-M3's size on the GPU")
    add("--cuda-smoke", action="store_true", help="the same code with a tiny model on the CPU")
    add("--out", type=Path)
    add("--no-readme", action="store_true")
    add("--worker", choices=[*JOBS, CEILING], help=argparse.SUPPRESS)
    add("--texts", type=Path, help=argparse.SUPPRESS)
    add("--device", default=None, help=argparse.SUPPRESS)
    add("--model-is-real", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = args.device or ("cuda" if args.cuda else "cpu")
    args.ceiling_repeats = 20 if args.device == "cuda" else 5
    args.passages = args.passages or default_passages(args)
    args.max_length = args.max_length or (8192 if args.cuda else 512)
    args.model = args.model or pocket_model_path()
    args.out = args.out or (CUDA_OUT if args.cuda or args.cuda_smoke else OUT)
    return args


def main():
    args = arguments()
    if args.worker:
        args.out.write_text(json.dumps(worker(args)), encoding="utf-8")
        return
    if args.cuda and not torch.cuda.is_available():
        raise SystemExit("--cuda needs a CUDA GPU, and torch.cuda.is_available() is False here.")
    result = measure(args)
    write_json(args.out, result)
    if not args.no_readme and not args.cuda_smoke:
        common.put_into_readme("encoding-cuda" if args.cuda else "encoding", readme_text(result))
    for name, value in result["ratios"].items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
