"""The two profiles of the tutorial, the device and the precision they run in, and the choice of all three.

Environment: `TUTORIAL_PROFILE`, `TUTORIAL_DEVICE` and `TUTORIAL_PRECISION`, read when a function is called.
"""

import contextlib
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from . import assets
from .files import ROOT, TutorialError, folders_gb, free_disk_gb, relative, require_disk


def peak_disk_gb(model, state, keep, texts, dims, downloads=0.0):
    """Gigabytes that both notebooks hold on disk at once, at most.

    model, state: GB of a model's weights and of a resume state. While training: what was downloaded, `keep`
    checkpoints, the best one and the one being written, and two states, as the new one is written before
    the old one goes. After it: three models (last, best, merged) and three models' vectors of `texts` texts.
    """
    training = (keep + 2) * model + 2 * state
    afterwards = 3 * model + 3 * texts * dims * 4 / 1e9
    return downloads + max(training, afterwards)


@dataclass(frozen=True)
class Profile:
    """What differs between the full-size run and the one that needs nothing but `pip`."""

    name: str
    model: str               # the published model
    label: str               # its short name in tables, figures and folders
    pairs: str               # the training data
    retrieval: str           # the retrieval test of notebook 02
    precision: str           # of training: "fp16", "bf16", "fp32", or "auto" (see `training_precision`)
    token_budget: int        # tokens that go through the model at once while training
    encode_budget: int       # the same while encoding, where no graph is kept
    encode_precision: str    # of encoding, weights and activations: the same names (see `encoding_precision`)
    retrieval_length: int    # tokens of a passage that are read in notebook 02
    shard_characters: int    # encoded between two saves: well under a minute's work
    learning_rate: float
    minutes: str             # of both notebooks on a GPU, after the install
    cpu_work: tuple          # (of what, fixed seconds, TFLOP in fp32, TFLOP in the training's precision)
    layer: tuple             # (hidden, intermediate) size of its largest product, whose speed is measured
    memory: str              # of the GPU
    memory_cpu: str
    gpu_gb: float            # free memory that the training asks of a GPU; 0: none is asked
    ram_gb: float            # the same of a CPU
    disk_gb: float           # of both notebooks at the peak

    def config(self, device):
        """The training settings that this profile decides: the one source of them, for TrainConfig(**...)."""
        settings = {
            "learning_rate": self.learning_rate,
            "precision": training_precision(self, device),
            "token_budget": self.token_budget,
        }
        if self.name == "full" and device == "cpu":  # a token's activations take 2.5 times a GPU's there
            settings["token_budget"] = self.token_budget // 4
        if self.name == "full":  # a model of 2.3 GB: one group's graph in memory, little on disk, few saves
            settings |= {"backward": "gradcache", "keep_checkpoints": 1, "save_minutes": 5.0}
        return settings


# Of BGE-M3's 568 M weights a run trains 312 M and the rows of the word table that its texts use. A state is
# three copies of them in fp32: weights and AdamW's two moments. T2Retrieval (0.16 GB) has 141,417 texts.
BGE_M3_GB = 2.27
FULL_DISK_GB = peak_disk_gb(BGE_M3_GB, state=3.76, keep=1, texts=141_417, dims=1024, downloads=2.27 + 0.16)
POCKET_DISK_GB = peak_disk_gb(0.09, state=0.27, keep=2, texts=800, dims=384)

PROFILES = {
    "full": Profile(
        name="full", model="BAAI/bge-m3", label="BGE-M3", pairs="sanitized MBPP",
        retrieval="T2Retrieval", precision="auto", token_budget=2048, encode_budget=32_768,
        encode_precision="auto", retrieval_length=8192, shard_characters=2_000_000, learning_rate=2e-5,
        minutes="not measured by us; the original article's run: 5 min of training, 6 h of T2Retrieval",
        cpu_work=("an epoch, five of them; T2Retrieval on a subset", 0, 0, 98), layer=(1024, 4096),
        memory="about 8 GB of the GPU, by count: not measured by us", memory_cpu="about 13 GB of RAM",
        gpu_gb=8.1, ram_gb=14.0, disk_gb=FULL_DISK_GB),
    "pocket": Profile(
        name="pocket", model="sentence-transformers/all-MiniLM-L6-v2", label="MiniLM", pairs="pocket MBPP",
        retrieval="PocketT2Retrieval", precision="auto", token_budget=1024, encode_budget=2048,
        encode_precision="fp32", retrieval_length=512, shard_characters=50_000, learning_rate=2e-4,
        minutes="not measured by us on a GPU; about 5 min on 2 CPU cores",
        cpu_work=("for both notebooks", 60, 41, 5), layer=(384, 1536),
        memory="not measured by us on a GPU", memory_cpu="about 3 GB of RAM",
        gpu_gb=0.0, ram_gb=0.0, disk_gb=POCKET_DISK_GB),
}


# ---------------------------------------------------------------- the device


def choose_device(override=None):
    """Return (device, reason): "cpu", "cuda" or "cuda:N".

    override: one of these, "auto" or None; None reads TUTORIAL_DEVICE, whose default is "auto": a CUDA GPU
    that this torch can compute on, else the CPU. Apple's "mps" is never taken: `encoder.random_state` does
    not save its random state, so dropout would fall otherwise in GradCache's second pass and after a kill;
    running out of its memory raises no torch.OutOfMemoryError, which halves the groups; nothing was tested
    there. Raises TutorialError for "mps", an unknown name, and a GPU that is absent or can't be used.
    """
    wanted = override or os.environ.get("TUTORIAL_DEVICE") or "auto"
    source = "chosen in the first cell" if override else "chosen by TUTORIAL_DEVICE"
    if wanted == "auto":
        problem = cuda_problem()
        return ("cpu", f"auto: {problem}") if problem else ("cuda", "auto: a CUDA GPU that torch can use")
    if wanted == "cpu":
        return "cpu", source
    if wanted == "mps":
        raise TutorialError(
            "The device mps is not supported: its random state is not saved, running out of its memory is "
            "not noticed, and nothing was tested there. Remedy: TUTORIAL_DEVICE=cpu."
        )
    if not re.fullmatch(r"cuda(:\d+)?", wanted):
        raise TutorialError(f"Unknown device {wanted!r}. TUTORIAL_DEVICE takes auto, cpu, cuda or cuda:1.")
    index = index_of(wanted)
    if problem := cuda_problem(index):
        raise TutorialError(
            f"The device {wanted} can't be used: {problem}. Remedy: TUTORIAL_DEVICE=cpu, another GPU's "
            "number, or a torch build that fits this one (https://pytorch.org/get-started/locally)."
        )
    return f"cuda:{index}" if index else "cuda", source


def device_of_this_machine():
    """The device of `choose_device` alone."""
    return choose_device()[0]


def index_of(device):
    """The number of a GPU, from "cuda" (0) or "cuda:N"."""
    return int(device.partition(":")[2] or 0)


def cuda_problem(index=0):
    """Why torch can't compute on CUDA GPU number `index`, as half a sentence, or None where it can."""
    if not torch.cuda.is_available():
        for_cpu = torch.version.cuda is None and torch.version.hip is None
        return "no CUDA GPU here" + (", and this torch is built for the CPU" if for_cpu else "")
    if index >= torch.cuda.device_count():
        return f"the last GPU here is cuda:{torch.cuda.device_count() - 1}"
    try:
        capability, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
        torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # a driver that is too old, or a GPU that another process has for itself
        first = str(error).partition("\n")[0]
        return f"GPU {index} does not start ({first})"
    kernels = [arch for arch in torch.cuda.get_arch_list() if arch.startswith(("sm_", "compute_"))]
    if kernels and not any(runs_on(arch, capability) for arch in kernels):
        version = "sm_{}{}".format(*capability)
        return f"this torch has no kernels for {name} ({version}), only {' '.join(kernels)}"
    return None


def runs_on(arch, capability):
    """Whether code for `arch`, such as "sm_86" or "compute_90", runs on a GPU of `capability` (major, minor).

    Binary code runs within its major version from its minor version on, PTX ("compute") on every later
    GPU; the ending "a" means this one GPU, "f" its family.
    """
    kind, number = arch.split("_")
    built_for = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return built_for == capability
    if kind == "compute" and not number.endswith("f"):
        return built_for <= capability
    return built_for[0] == capability[0] and built_for[1] <= capability[1]


# ---------------------------------------------------------------- the precision


def training_precision(profile, device):
    """The precision to train in: TUTORIAL_PRECISION, else the profile's; for "auto" what `device` does fast.

    On a CPU the rule is the instruction set and not a timing, so that a machine gives the same weights
    twice. `benchmarks/training.py` measures both: with AVX-512 BF16 (or AMX) bf16 is faster, without, far
    slower. Raises TutorialError for an unknown name, and for fp16 on a CPU.
    """
    chosen = os.environ.get("TUTORIAL_PRECISION") or "auto"
    if chosen not in ("auto", "fp16", "bf16", "fp32"):
        raise TutorialError(f"Unknown precision {chosen!r}. TUTORIAL_PRECISION takes fp16, bf16 or fp32.")
    precision = profile.precision if chosen == "auto" else chosen
    if precision == "fp16" and device == "cpu":
        raise TutorialError(
            "fp16 needs a CUDA GPU, and this trains on the CPU. Remedy: TUTORIAL_PRECISION=bf16 or fp32."
        )
    return native_precision(device) if precision == "auto" else precision


def encoding_precision(profile, device):
    """The precision to encode in for retrieval: the profile's, or for "auto" what `device` does fast."""
    auto = profile.encode_precision == "auto"
    return native_precision(device) if auto else profile.encode_precision


def native_precision(device):
    """"bf16" where the hardware multiplies it natively, else "fp16" on a GPU and "fp32" on a CPU."""
    if device == "cpu":
        can = torch.cpu.get_capabilities()
        return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "fp32"
    index = index_of(device)
    with torch.cuda.device(index) if index else contextlib.nullcontext():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# ---------------------------------------------------------------- the profile


def choose_profile(override=None, device=None):
    """Return (profile, reason).

    override: "full", "pocket", "auto" or None; None reads TUTORIAL_PROFILE, whose default is "auto".
    device: what `choose_device` returned; None calls it. `auto` takes `full` on a CUDA GPU, where memory,
    disk and all three assets suffice for both notebooks; the reason says what was missing. Asked for, `full`
    also runs on a CPU. Raises TutorialError for an unknown name, for `full` where memory is too small, and
    for a copy of an asset that is incomplete.
    """
    wanted = override or os.environ.get("TUTORIAL_PROFILE") or "auto"
    source = "chosen in the first cell" if override else "chosen by TUTORIAL_PROFILE"
    if wanted not in ("full", "pocket", "auto"):
        raise TutorialError(f"Unknown profile {wanted!r}. TUTORIAL_PROFILE takes full, pocket or auto.")
    if wanted == "pocket":
        return PROFILES["pocket"], source
    device, full = device or device_of_this_machine(), PROFILES["full"]
    no_gpu = device == "cpu" and (cuda_problem() or "the device chosen is the CPU")
    if wanted == "full":
        if problem := memory_problem(full, device):
            other = "" if device == "cpu" else " TUTORIAL_DEVICE=cpu,"
            raise TutorialError(
                f"The full profile can't train here: {problem}. Remedy: end what else uses that memory,"
                f"{other} or TUTORIAL_PROFILE=pocket."
            )
        return full, f"{source}; {no_gpu}" if no_gpu else source
    if no_gpu:
        return PROFILES["pocket"], f"auto: {no_gpu}"
    missing = [memory_problem(full, device), disk_problem(full), *assets.missing_assets()]
    if any(missing):
        return PROFILES["pocket"], f"auto: a CUDA GPU, but {'; '.join(filter(None, missing))}"
    return full, "auto: a CUDA GPU, and all that both notebooks need"


def free_memory_gb(device):
    """(free, total) GB of the GPU's memory, or the CPU's; what this process holds counts as free.

    A reader may run the first cell again when models are loaded already.
    """
    if device == "cpu":
        memory, own = psutil.virtual_memory(), psutil.Process().memory_info().rss
        return (memory.available + own) / 1e9, memory.total / 1e9
    free, total = torch.cuda.mem_get_info(index_of(device))
    return (free + torch.cuda.memory_reserved(index_of(device))) / 1e9, total / 1e9


def memory_problem(profile, device):
    """What `device` lacks in memory to train the profile's model, as half a sentence, or None."""
    needed, kind = (profile.ram_gb, "RAM") if device == "cpu" else (profile.gpu_gb, "GPU memory")
    free, total = free_memory_gb(device)
    if free >= needed:
        return None
    return f"{free:.1f} of {total:.1f} GB of {kind} are free and {needed:.1f} GB are needed"


def disk_here_gb(profile):
    """What of the profile's `disk_gb` is here already, left by earlier runs."""
    folders = [ROOT / "models" / f"{profile.label}-finetuned", ROOT / "c_mteb_results"]
    if profile.name == "pocket":
        return folders_gb(*folders)
    here = folders_gb(*folders, ROOT / "models" / ".bge-m3.partial", ROOT / "data" / "T2Retrieval")
    return here + (BGE_M3_GB if assets.local_bge_m3() else 0)


def disk_problem(profile):
    """What the disk lacks for the rest of both notebooks, as half a sentence, or None."""
    free, needed = free_disk_gb(ROOT / "models"), profile.disk_gb - disk_here_gb(profile)
    return None if free >= needed else f"{free:.1f} GB of disk are free and {needed:.1f} GB are needed"


def model_path(profile):
    """The folder of the profile's base model, downloaded where the profile says so.

    Raises TutorialError as `assets` does, and before a download where the disk can't hold the whole run.
    """
    if profile.name == "pocket":
        return assets.pocket_model_path()
    if not assets.local_bge_m3():
        what = f"the whole run ({profile.model}, checkpoints, resume states, vectors)"
        require_disk(ROOT / "models", profile.disk_gb - disk_here_gb(profile), what)
    return assets.bge_m3_path()


def mbpp_path(profile):
    """The training data: a local `data/sanitized-mbpp.json` for either profile, else the profile's own."""
    local = assets.sanitized_mbpp_path(download=profile.name == "full")
    return local or ROOT / "data" / "pocket_mbpp.json"


def rewrites_path(source):
    """The file with rewrites of the training data `source`, or None where nobody wrote any."""
    path = ROOT / "data" / f"{Path(source).stem}_rewrites.json"
    return path if Path(source).suffix == ".json" and path.exists() else None


# ---------------------------------------------------------------- what the first cell prints


def speed_of_cpu(layer, precision, seconds=0.5):
    """GFLOP/s of this CPU in the product of 1,024 tokens with a layer (hidden, intermediate).

    Of the fastest one: a neighbour's work on the same core slows the others for moments.
    """
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = torch.ones(1024, layer[0], dtype=kind), torch.ones(layer[1], layer[0], dtype=kind)
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        taken.append(time.perf_counter() - start)
    return 2 * 1024 * layer[0] * layer[1] / min(taken) / 1e9


def time_on_cpu(profile):
    """How long the profile takes on this CPU, in words: its counted work, by the speed measured just now."""
    what, fixed, exact, training = profile.cpu_work
    kinds = "fp32", training_precision(profile, "cpu")
    speed = {kind: speed_of_cpu(profile.layer, kind) for kind in dict.fromkeys(kinds)}
    minutes = (fixed + 1000 * (exact / speed["fp32"] + training / speed[kinds[1]])) / 60
    return f"about {minutes:.0f} min {what}, at {speed[kinds[1]]:.0f} GFLOP/s, measured just now"


def describe(profile, reason, device=None, pairs=None):
    """The printed block at the top of each notebook: what runs, why, where, for how long.

    device: what `choose_device` returned; None calls it. pairs: a reader's own file, or words. Raises
    TutorialError as `training_precision` does, and for an incomplete local copy of the data or the model.
    """
    device = device or device_of_this_machine()
    cpu, (free, total) = device == "cpu", free_memory_gb(device)
    gpu = None if cpu else torch.cuda.get_device_name(index_of(device))
    processor = gpu or f"{platform.machine()}, {torch.get_num_threads()} threads"
    here = disk_here_gb(profile)
    disk = f"about {profile.disk_gb:.0f} GB at the peak" + (f", {here:.0f} of them here" if here >= 1 else "")
    precision = training_precision(profile, device), encoding_precision(profile, device)
    rows = {
        "profile": f"{profile.name}  ({reason})",
        "model": profile.model,
        "pairs": pairs or pairs_read(profile),
        "retrieval": profile.retrieval,
        "device": f"{device}  ({processor}, {free:.1f} of {total:.1f} GB free)",
        "precision": f"{precision[0]} training, {precision[1]} encoding",
        "time": time_on_cpu(profile) if cpu else profile.minutes,
        "memory": profile.memory_cpu if cpu else profile.memory,
        "disk": f"{disk}, {free_disk_gb(ROOT / 'models'):.0f} GB free",
        "to change": "TUTORIAL_PROFILE=full|pocket, TUTORIAL_DEVICE=cpu|cuda, or this cell's variables",
    }
    return "\n".join(f"{name:>10}: {value}" for name, value in rows.items())


def pairs_read(profile):
    """The training data in words: what `mbpp_path` will return."""
    local = assets.sanitized_mbpp_path(download=False)
    if local:
        return f"sanitized MBPP ({relative(local)})"
    return f"{profile.pairs} (to be downloaded)" if profile.name == "full" else profile.pairs
