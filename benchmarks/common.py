"""What the benchmarks share: the machine in words, a process's peak memory, fresh processes, the README."""

import json
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"

# The settings of the recipe this tutorial follows, as fields of TrainConfig: batches of 80, two accumulated.
ORIGINAL = {
    "learning_rate": 2e-4,
    "temperature": 0.02,
    "epochs": 10,
    "batch_size": 160,
    "micro_batch": 80,
    "dropout": None,
}

README_START = """# Benchmarks

Each script measures this project and its peers in one run on one machine, writes `results/*.json` and the
table below that belongs to it.
"""


def processor():
    """The CPU's name, without frequencies or host names."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def machine(packages):
    """{"summary": one line, "cpu", "cores", "memory_gb", "system", "versions"}; no host name, no path."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    shown = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return {
        "summary": f"{processor()}, {cores} cores, {memory:.0f} GB RAM, {platform.system()}; {shown}",
        "cpu": processor(),
        "cores": cores,
        "memory_gb": round(memory, 1),
        "system": platform.system(),
        "versions": versions,
    }


def peak_memory_gb():
    """Largest resident memory that this process has had, in GB (1e9 bytes).

    Linux's ru_maxrss starts from the peak of the process that started this one, so a small worker of a
    large driver would report the driver's. VmHWM counts from this program's own start.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def run_worker(script, arguments, **environment):
    """Run `script` with `arguments` in a fresh process; returns the JSON that it writes to its --out FILE.

    Raises RuntimeError with the end of its output when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(script), *map(str, arguments), "--out", str(out)]
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            command, env={**os.environ, **quiet, **environment}, capture_output=True, text=True, check=False
        )
        if done.returncode or not out.is_file():
            end = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise RuntimeError(f"{' '.join(map(str, arguments))} ended with status {done.returncode}:\n{end}")
        return json.loads(out.read_text(encoding="utf-8"))


def flagembedding_runner(model, pooling, pairs, folder, options):
    """FlagEmbedding's dense trainer over pairs, on the CPU and silent; runner.trainer.train() trains.

    options: command-line words of its own, after which its defaults hold.
    """
    from FlagEmbedding.finetune.embedder.encoder_only import base
    from transformers import HfArgumentParser

    logging.getLogger("FlagEmbedding").setLevel(logging.ERROR)  # it logs all its settings, 200 lines a run
    data = Path(folder) / "pairs.jsonl"
    rows = [{"query": pair["query"], "pos": [pair["pos_doc"]], "neg": []} for pair in pairs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = f"""--model_name_or_path {model} --train_data {data} --cache_path {folder}/cache
        --output_dir {folder}/run --train_group_size 1 --sentence_pooling_method {pooling} --use_cpu
        --save_strategy no --logging_strategy no --report_to none --disable_tqdm True""".split()
    kinds = (
        base.EncoderOnlyEmbedderModelArguments,
        base.EncoderOnlyEmbedderDataArguments,
        base.EncoderOnlyEmbedderTrainingArguments,
    )
    return base.EncoderOnlyEmbedderRunner(
        *HfArgumentParser(kinds).parse_args_into_dataclasses([*words, *options])
    )


def put_into_readme(name, text, path=README):
    """Replace what stands between `<!-- name:start -->` and `<!-- name:end -->`; append both where absent."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    path = Path(path)
    old = path.read_text(encoding="utf-8") if path.is_file() else README_START
    if start not in old:
        old = f"{old.rstrip()}\n\n{start}\n{end}\n"
    if end not in old.split(start, 1)[1]:
        raise ValueError(f"{path.name} has {start} without {end} after it. Put the second marker back.")
    before, rest = old.split(start, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
