"""The two profiles of the tutorial, and the choice between them."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from . import assets, network
from .files import ROOT, TutorialError, free_disk_gb


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
    encode_precision: str    # of encoding for retrieval: weights and activations
    retrieval_length: int    # tokens of a passage that are read in notebook 02
    shard_characters: int    # encoded between two saves: well under a minute's work
    learning_rate: float
    minutes: str             # of both notebooks, after the install
    memory: str

    def config(self, device):
        """The training settings that this profile decides: the one source of them, for TrainConfig(**...)."""
        return {
            "learning_rate": self.learning_rate,
            "precision": training_precision(self, device),
            "token_budget": self.token_budget,
        }


PROFILES = {
    "full": Profile(
        name="full", model="BAAI/bge-m3", label="BGE-M3", pairs="sanitized MBPP",
        retrieval="T2Retrieval", precision="fp16", token_budget=4096, encode_budget=32_768,
        encode_precision="fp16", retrieval_length=8192, shard_characters=2_000_000, learning_rate=2e-5,
        minutes="not measured by us; the predecessor's run took 5 min of training and 6 h of T2Retrieval",
        memory="GPU: not measured by us; by count 10 GB for weights, gradients, moments, plus one graph"),
    "pocket": Profile(
        name="pocket", model="sentence-transformers/all-MiniLM-L6-v2", label="MiniLM", pairs="pocket MBPP",
        retrieval="PocketT2Retrieval", precision="auto", token_budget=1024, encode_budget=1024,
        encode_precision="fp32", retrieval_length=512, shard_characters=50_000, learning_rate=2e-4,
        minutes="5 to 8 min on 2 CPU cores", memory="about 2.5 GB of RAM"),
}


def device_of_this_machine():
    """'cuda', 'mps' or 'cpu': the fastest device that torch sees."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def training_precision(profile, device):
    """The precision to train in: the profile's, or for "auto" bf16 where this CPU multiplies it natively.

    The rule is the CPU's instruction set and not a timing, so that a machine gives the same weights twice.
    `benchmarks/training.py` measures both: with AVX-512 BF16 (or AMX) bf16 is faster, without, far slower.
    """
    if profile.precision != "auto":
        return profile.precision
    can = torch.cpu.get_capabilities()
    native = device == "cpu" and (can.get("avx512_bf16") or can.get("amx_bf16"))
    return "bf16" if native else "fp32"


def choose_profile(override=None):
    """Return (profile, reason).

    override: "full", "pocket", "auto" or None; None reads TUTORIAL_PROFILE, whose default is "auto".
    `auto` takes `full` where a CUDA device is present and BGE-M3 is on disk or a model hub answers.
    Raises TutorialError for an unknown name, and for `full` on a machine without CUDA.
    """
    wanted = override or os.environ.get("TUTORIAL_PROFILE") or "auto"
    source = "chosen in the first cell" if override else "chosen by TUTORIAL_PROFILE"
    cuda = torch.cuda.is_available()
    if wanted == "pocket":
        return PROFILES["pocket"], source
    if wanted == "full":
        if not cuda:
            raise TutorialError(
                "The full profile needs a CUDA GPU and torch.cuda.is_available() is False here. "
                "Remedy: TUTORIAL_PROFILE=pocket, or a torch build with CUDA on a machine with a GPU.")
        return PROFILES["full"], source
    if wanted != "auto":
        raise TutorialError(f"Unknown profile {wanted!r}. TUTORIAL_PROFILE takes full, pocket or auto.")
    if not cuda:
        return PROFILES["pocket"], "auto: no CUDA GPU here"
    if assets.local_bge_m3():
        return PROFILES["full"], "auto: a CUDA GPU and a local BGE-M3"
    print("A CUDA GPU is here; asking the model hub whether BGE-M3 can be had (3 s at most) ...")
    reachable, why = network.can_reach_hub()
    if reachable:
        return PROFILES["full"], f"auto: a CUDA GPU, and {why}"
    return PROFILES["pocket"], f"auto: a CUDA GPU, but no BGE-M3 on disk and {why}"


def model_path(profile):
    """The folder of the profile's base model, downloaded where the profile says so."""
    return assets.pocket_model_path() if profile.name == "pocket" else assets.bge_m3_path()


def mbpp_path(profile):
    """The training data: a local `data/sanitized-mbpp.json` for either profile, else the profile's own."""
    local = assets.sanitized_mbpp_path(download=profile.name == "full")
    return local or ROOT / "data" / "pocket_mbpp.json"


def rewrites_path(source):
    """The file with rewrites of the training data `source`, or None where nobody wrote any."""
    path = ROOT / "data" / f"{Path(source).stem}_rewrites.json"
    return path if path.exists() else None


def describe(profile, reason):
    """The printed block at the top of each notebook: what runs, why, where, for how long."""
    device = device_of_this_machine()
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    rows = {
        "profile": f"{profile.name}  ({reason})",
        "model": profile.model,
        "pairs": profile.pairs,
        "retrieval": profile.retrieval,
        "device": f"{device}  ({hardware}, {torch.get_num_threads()} CPU threads)",
        "precision": f"{training_precision(profile, device)} training, {profile.encode_precision} encoding",
        "time": profile.minutes,
        "memory": profile.memory,
        "free disk": f"{free_disk_gb(ROOT):.0f} GB",
        "to change": "TUTORIAL_PROFILE=full|pocket, or PROFILE in this cell",
    }
    return "\n".join(f"{name:>10}: {value}" for name, value in rows.items())
