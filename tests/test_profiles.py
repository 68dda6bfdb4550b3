"""Which device, precision and profile are chosen on which machine, what that asks of it, and what is printed.

No GPU, no full disk and no hub is needed: torch.cuda, psutil, the disk and the probes are replaced.
"""

import dataclasses
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import little_space

from embedding_tutorial import assets, files, profiles
from embedding_tutorial.files import TutorialError
from embedding_tutorial.finetune import TrainConfig
from embedding_tutorial.profiles import PROFILES, choose_device, choose_profile, describe

FULL, POCKET = PROFILES["full"], PROFILES["pocket"]
ARCHS = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120".split()  # of a torch wheel for CUDA 13
GB = 10**9
MISSING_ASSETS = assets.missing_assets  # before the fixture replaces it


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without a GPU, with 64 GB of RAM and 500 GB of disk, an empty repository, and no hub."""
    for name in ("TUTORIAL_PROFILE", "TUTORIAL_DEVICE", "TUTORIAL_PRECISION", "BGE_M3_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (files, profiles):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(assets, "local_bge_m3", lambda *args: None)
    monkeypatch.setattr(assets, "sanitized_mbpp_path", lambda *args, download: None)
    monkeypatch.setattr(assets, "missing_assets", lambda: [])
    little_space(monkeypatch, 500 * GB)
    ram(monkeypatch, 64)


def ram(monkeypatch, free, own=0.0):
    memory = namedtuple("memory", "total available")(64 * GB, int(free * GB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=int(own * GB)))
    monkeypatch.setattr(psutil, "Process", lambda: process)


@pytest.fixture
def gpu(monkeypatch):
    """Call to fit GPUs into the machine; keyword arguments say what they are like."""

    def fit(count=1, capability=(8, 6), free=12.0, reserved=0.0, archs=ARCHS, bf16=True, error=None):
        def mem_get_info(index):
            if error:
                raise error
            assert index < count
            return int(free * GB), 12 * GB

        fake = {
            "is_available": lambda: True,
            "device_count": lambda: count,
            "get_device_capability": lambda index: capability,
            "get_device_name": lambda index: f"GPU-{index}",
            "get_arch_list": lambda: archs,
            "mem_get_info": mem_get_info,
            "memory_reserved": lambda index: int(reserved * GB),
            "is_bf16_supported": lambda including_emulation=True: bf16 or including_emulation,
        }
        for name, function in fake.items():
            monkeypatch.setattr(torch.cuda, name, function)

    return fit


def refused(work, *parts):
    with pytest.raises(TutorialError) as error:
        work()
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


# ---------------------------------------------------------------- the device


def test_the_device_is_a_gpu_where_there_is_one(gpu):
    assert choose_device()[0] == profiles.device_of_this_machine() == "cpu"
    assert choose_device()[1].startswith("auto: no CUDA GPU here")
    gpu()
    assert choose_device() == choose_device("auto") == ("cuda", "auto: a CUDA GPU that torch can use")
    assert profiles.device_of_this_machine() == "cuda"


@pytest.mark.parametrize("for_cpu", [True, False])
def test_a_torch_without_cuda_is_named_as_the_cause(monkeypatch, for_cpu):
    """A GPU beside pip's CPU build is the usual reason for an unexpected "cpu"."""
    monkeypatch.setattr(torch.version, "cuda", None if for_cpu else "13.0")
    assert ("this torch is built for the CPU" in choose_device()[1]) == for_cpu


def test_the_device_can_be_chosen(gpu, monkeypatch):
    gpu(count=2)
    assert choose_device("cpu") == ("cpu", "chosen in the first cell")
    for wanted, device in {"cpu": "cpu", "cuda": "cuda", "cuda:0": "cuda", "cuda:1": "cuda:1"}.items():
        monkeypatch.setenv("TUTORIAL_DEVICE", wanted)
        assert choose_device() == (device, "chosen by TUTORIAL_DEVICE")
    assert choose_device("cpu")[0] == "cpu"  # the argument before the variable
    monkeypatch.setenv("TUTORIAL_DEVICE", "")
    assert choose_device()[0] == "cuda"


def test_a_device_that_is_not_there(gpu, monkeypatch):
    refused(lambda: choose_device("cuda"), "no CUDA GPU here", "TUTORIAL_DEVICE=cpu")
    refused(lambda: choose_device("gpu"), "Unknown device 'gpu'", "takes auto, cpu, cuda or cuda:1")
    refused(lambda: choose_device("cuda:"), "Unknown device 'cuda:'")
    gpu(count=2)
    refused(lambda: choose_device("cuda:2"), "cuda:2 can't be used: the last GPU here is cuda:1")
    monkeypatch.setenv("TUTORIAL_DEVICE", "cuda:7")
    refused(choose_profile, "the last GPU here is cuda:1", "TUTORIAL_DEVICE=cpu")


@pytest.mark.parametrize("present", [True, False])
def test_mps_is_never_taken(monkeypatch, present):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: present)
    assert choose_device()[0] == "cpu"
    refused(lambda: choose_device("mps"), "random state", "nothing was tested", "TUTORIAL_DEVICE=cpu")


@pytest.mark.parametrize(
    ("capability", "archs", "usable"),
    [
        ((8, 6), ARCHS, True),
        ((8, 9), ARCHS, True),  # by sm_86: an RTX 4090
        ((12, 0), ARCHS, True),
        ((6, 1), ARCHS, False),  # a GTX 1080
        ((7, 0), ARCHS, False),  # sm_75 is newer
        ((11, 0), ARCHS, False),  # sm_100 is another major version
        ((11, 0), [*ARCHS, "compute_90"], True),  # PTX is compiled on the spot
        ((8, 0), ["compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["compute_100f"], False),
        ((9, 0), ["gfx90a", "gfx1100"], True),  # ROCm has other names: nothing to compare with
        ((9, 0), [], True),
    ],
)
def test_a_gpu_counts_where_torch_has_kernels_for_it(gpu, capability, archs, usable):
    gpu(capability=capability, archs=archs)
    device, reason = choose_device()
    assert device == ("cuda" if usable else "cpu")
    if not usable:
        assert f"no kernels for GPU-0 (sm_{capability[0]}{capability[1]}), only {archs[0]}" in reason
        refused(lambda: choose_device("cuda"), "no kernels for GPU-0", "TUTORIAL_DEVICE=cpu", "torch build")
        assert choose_profile()[0] is POCKET and "no kernels for GPU-0" in choose_profile()[1]


def test_a_gpu_that_does_not_start(gpu):
    gpu(error=RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nMore lines."))
    assert choose_device()[0] == "cpu" and "busy or unavailable)" in choose_device()[1]
    refused(lambda: choose_device("cuda"), "GPU 0 does not start (CUDA error: all CUDA-capable devices")


# ---------------------------------------------------------------- the precision


def instructions(monkeypatch, *names):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))


@pytest.mark.parametrize("profile", [FULL, POCKET])
def test_training_is_in_half_precision_where_the_hardware_does_it_fast(gpu, monkeypatch, profile):
    for names, precision in {("avx2",): "fp32", ("avx512_bf16",): "bf16", ("amx_bf16",): "bf16"}.items():
        instructions(monkeypatch, *names)
        assert profiles.training_precision(profile, "cpu") == precision
    gpu(bf16=True)
    assert profiles.training_precision(profile, "cuda") == "bf16"
    gpu(bf16=False)  # a T4: it can, by emulation
    assert profiles.training_precision(profile, "cuda") == "fp16"


def test_the_precision_is_the_chosen_gpus(gpu, monkeypatch):
    gpu(count=2)
    current = [0]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *exc_info):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1] == 1)
    assert profiles.training_precision(FULL, "cuda:1") == "bf16"
    assert profiles.encoding_precision(FULL, "cuda:1") == "bf16"
    assert profiles.training_precision(FULL, "cuda") == "fp16"


def test_the_training_precision_can_be_chosen(gpu, monkeypatch):
    gpu(bf16=True)
    instructions(monkeypatch)
    for wanted in ("fp16", "bf16", "fp32"):
        monkeypatch.setenv("TUTORIAL_PRECISION", wanted)
        assert FULL.config("cuda")["precision"] == wanted
        assert profiles.encoding_precision(FULL, "cuda") == "bf16"
    monkeypatch.setenv("TUTORIAL_PRECISION", "bf16")
    assert POCKET.config("cpu")["precision"] == "bf16"
    monkeypatch.setenv("TUTORIAL_PRECISION", "fp16")
    refused(lambda: FULL.config("cpu"), "fp16 needs a CUDA GPU", "TUTORIAL_PRECISION=bf16 or fp32")
    monkeypatch.setenv("TUTORIAL_PRECISION", "fp8")
    refused(lambda: FULL.config("cuda"), "Unknown precision 'fp8'", "takes fp16, bf16 or fp32")


def test_a_precision_in_the_profile_is_kept(gpu):
    gpu(bf16=True)
    profile = dataclasses.replace(FULL, precision="fp32", encode_precision="fp16")
    assert profiles.training_precision(profile, "cuda") == "fp32"
    assert profiles.encoding_precision(profile, "cuda") == "fp16"


def test_encoding_is_in_half_precision_for_the_full_profile_alone(gpu, monkeypatch):
    gpu(bf16=False)
    instructions(monkeypatch, "amx_bf16")
    found = {
        (profile.name, device): profiles.encoding_precision(profile, device)
        for profile in (FULL, POCKET)
        for device in ("cpu", "cuda")
    }
    full = {("full", "cpu"): "bf16", ("full", "cuda"): "fp16"}
    assert found == full | {("pocket", "cpu"): "fp32", ("pocket", "cuda"): "fp32"}
    instructions(monkeypatch)
    assert profiles.encoding_precision(FULL, "cpu") == "fp32"


# ---------------------------------------------------------------- the training settings


def test_the_settings_are_fields_of_the_training(monkeypatch):
    instructions(monkeypatch)
    full, pocket = (TrainConfig(**profile.config("cpu")) for profile in (FULL, POCKET))
    assert (full.backward, full.keep_checkpoints, full.save_minutes) == ("gradcache", 1, 5.0)
    assert (full.learning_rate, full.token_budget, full.precision) == (2e-5, 512, "fp32")
    assert pocket == TrainConfig()  # the notebook's own defaults


# ---------------------------------------------------------------- the profile


def test_a_machine_without_a_gpu_takes_pocket_and_asks_no_host(monkeypatch):
    monkeypatch.setattr(assets, "missing_assets", lambda: pytest.fail("a host was asked"))
    profile, reason = choose_profile()
    assert profile is POCKET and reason.startswith("auto: no CUDA GPU here")


def test_a_gpu_with_all_that_is_needed_takes_full(gpu):
    gpu()
    assert choose_profile() == (FULL, "auto: a CUDA GPU, and all that both notebooks need")
    assert choose_profile("auto") == choose_profile()
    assert choose_profile(device="cpu") == (POCKET, "auto: the device chosen is the CPU")


def no_memory(gpu, monkeypatch):
    gpu(free=7.9)
    return "7.9 of 12.0 GB of GPU memory are free and 8.1 GB are needed"


def no_disk(gpu, monkeypatch):
    little_space(monkeypatch, 16 * GB)
    return "16.0 GB of disk are free and 16.8 GB are needed"


def no_assets(gpu, monkeypatch):
    monkeypatch.setattr(assets, "missing_assets", lambda: ["A is nowhere", "B is nowhere"])
    return "A is nowhere; B is nowhere"


@pytest.mark.parametrize(
    "lacks", [[no_memory], [no_disk], [no_assets], [no_memory, no_disk, no_assets]], ids=len
)
def test_auto_looks_at_everything_before_it_takes_full(gpu, monkeypatch, lacks):
    gpu()
    missing = [lack(gpu, monkeypatch) for lack in lacks]
    assert choose_profile() == (POCKET, f"auto: a CUDA GPU, but {'; '.join(missing)}")


def test_where_only_modelscope_answers_auto_takes_pocket(gpu, monkeypatch, tmp_path):
    """T2Retrieval is not there: to train and then stop in notebook 02 would be no service."""
    gpu()
    hub, scope = "https://hub.test", "https://scope.test"
    asked = []

    def probe(endpoint):
        asked.append(endpoint)
        return None if endpoint == scope else "no answer within 3 s"

    monkeypatch.setattr(assets.network, "probe", probe)
    monkeypatch.setattr(assets, "missing_assets", lambda: MISSING_ASSETS(tmp_path, tmp_path, str))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", scope)
    missing = "mteb/T2Retrieval is not on disk nor to be had (https://hub.test: no answer within 3 s)"
    assert choose_profile() == (POCKET, f"auto: a CUDA GPU, but {missing}")
    assert asked == [hub, scope]


def test_what_this_process_holds_counts_as_free(gpu, monkeypatch):
    """The first cell may run again when the model is loaded."""
    gpu(free=3.0, reserved=5.5)
    assert choose_profile()[0] is FULL
    ram(monkeypatch, free=4.0, own=10.5)
    assert choose_profile("full", "cpu")[0] is FULL


def test_the_profile_can_be_chosen(gpu, monkeypatch):
    gpu(free=1.0)
    assert choose_profile("pocket") == (POCKET, "chosen in the first cell")
    monkeypatch.setenv("TUTORIAL_PROFILE", "pocket")
    assert choose_profile() == (POCKET, "chosen by TUTORIAL_PROFILE")
    gpu()
    monkeypatch.setattr(assets, "missing_assets", lambda: pytest.fail("a host was asked"))
    assert choose_profile("full") == (FULL, "chosen in the first cell")
    monkeypatch.setenv("TUTORIAL_PROFILE", "full")
    assert choose_profile() == (FULL, "chosen by TUTORIAL_PROFILE")
    monkeypatch.setenv("TUTORIAL_PROFILE", "huge")
    refused(choose_profile, "Unknown profile 'huge'", "full, pocket or auto")


def test_full_on_a_cpu_asks_for_its_ram(monkeypatch):
    profile, reason = choose_profile("full")
    assert profile is FULL and reason.startswith("chosen in the first cell; no CUDA GPU here")
    ram(monkeypatch, 13.9)
    parts = ("13.9 of 64.0 GB of RAM are free and 14.0 GB are needed", "TUTORIAL_PROFILE=pocket")
    refused(lambda: choose_profile("full"), *parts)
    monkeypatch.setenv("TUTORIAL_PROFILE", "full")
    refused(choose_profile, *parts)
    assert choose_profile("pocket")[0] is POCKET


def test_full_on_a_gpu_asks_for_its_memory(gpu, monkeypatch):
    gpu(free=5.1)
    parts = ("5.1 of 12.0 GB of GPU memory", "8.1 GB", "TUTORIAL_DEVICE=cpu, or TUTORIAL_PROFILE=pocket")
    refused(lambda: choose_profile("full"), *parts)
    monkeypatch.setenv("TUTORIAL_DEVICE", "cpu")
    assert choose_profile("full") == (FULL, "chosen in the first cell; the device chosen is the CPU")


def test_the_memory_is_the_chosen_gpus(gpu, monkeypatch):
    gpu(count=2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((2, 11)[index] * GB, 12 * GB))
    refused(lambda: choose_profile("full", "cuda"), "2.0 of 12.0 GB")
    assert choose_profile("full", "cuda:1")[0] is FULL


# ---------------------------------------------------------------- the disk


def test_the_peak_on_disk_is_the_larger_of_training_and_what_follows():
    # Downloads of 3; while training 3 checkpoints of 2 and 2 states of 5, later 3 models and few vectors.
    assert profiles.peak_disk_gb(2, state=5, keep=1, texts=0, dims=8, downloads=3) == 3 + 6 + 10
    assert profiles.peak_disk_gb(2, state=5, keep=3, texts=0, dims=8, downloads=3) == 3 + 10 + 10
    # 3 models of 2 GB, and 3 × 10^9 texts × 8 numbers × 4 bytes.
    assert profiles.peak_disk_gb(2, state=5, keep=1, texts=10**9, dims=8, downloads=3) == 3 + 6 + 96
    assert FULL.disk_gb == pytest.approx(2.27 + 0.16 + 3 * 2.27 + 2 * 3.76)
    assert POCKET.disk_gb < 2 < FULL.disk_gb <= 20


@pytest.mark.parametrize("profile", [FULL, POCKET])
def test_what_earlier_runs_left_need_not_be_written_again(monkeypatch, tmp_path, profile):
    label, other = profile.label, (POCKET if profile is FULL else FULL).label
    own = [f"models/{label}-finetuned/fine-tuned", "c_mteb_results/vectors/0123"]
    downloads = ["data/T2Retrieval/corpus", "models/.bge-m3.partial"]
    for folder in [*own, *downloads, f"models/{other}-finetuned"]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_bytes(bytes(1000))
    count = 4 if profile is FULL else 2
    assert profiles.disk_here_gb(profile) == pytest.approx(count * 1000 / GB)
    monkeypatch.setattr(assets, "local_bge_m3", lambda: tmp_path / "elsewhere")
    expected = 4000 / GB + 2.27 if profile is FULL else 2000 / GB
    assert profiles.disk_here_gb(profile) == pytest.approx(expected)


def test_auto_takes_full_again_where_its_own_files_fill_the_disk(gpu, monkeypatch, tmp_path):
    gpu()
    little_space(monkeypatch, 10 * GB)
    monkeypatch.setattr(assets, "local_bge_m3", lambda: tmp_path)
    assert choose_profile()[0] is POCKET
    (tmp_path / "models" / "BGE-M3-finetuned").mkdir(parents=True)
    with (tmp_path / "models" / "BGE-M3-finetuned" / "resume.pt").open("wb") as file:
        file.truncate(5 * GB)  # a sparse file
    assert choose_profile()[0] is FULL


def test_the_disk_is_asked_for_before_the_first_download(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "bge_m3_path", lambda: tmp_path / "models" / "bge-m3")
    assert profiles.model_path(FULL) == tmp_path / "models" / "bge-m3"
    little_space(monkeypatch, 16 * GB)
    with monkeypatch.context() as patched:
        patched.setattr(assets, "bge_m3_path", lambda: pytest.fail("a download began"))
        refused(lambda: profiles.model_path(FULL), "BAAI/bge-m3", "needs 16.8 GB", "there are 16.0 GB")
    monkeypatch.setattr(assets, "local_bge_m3", lambda: tmp_path)
    little_space(monkeypatch, GB)  # nothing to download: training asks for what it writes
    assert profiles.model_path(FULL) == tmp_path / "models" / "bge-m3"


# ---------------------------------------------------------------- what the first cell prints


def printed(profile, *args):
    lines = describe(profile, "why", *args).splitlines()
    return dict(line.strip().split(": ", 1) for line in lines)


def test_the_block_says_what_runs_where(gpu, monkeypatch):
    instructions(monkeypatch)
    ram(monkeypatch, 12.34)
    monkeypatch.setattr(profiles, "speed_of_cpu", lambda layer, precision: 100)
    rows = printed(POCKET)
    names = "profile model pairs retrieval device precision time memory disk".split()
    assert list(rows) == [*names, "to change"]
    assert rows["profile"] == "pocket  (why)"
    assert rows["device"].startswith("cpu  (") and rows["device"].endswith(", 12.3 of 64.0 GB free)")
    assert rows["precision"] == "fp32 training, fp32 encoding"
    assert rows["time"] == profiles.time_on_cpu(POCKET) and rows["memory"] == POCKET.memory_cpu
    assert rows["disk"] == "about 1 GB at the peak, 500 GB free"
    for variable in ("TUTORIAL_PROFILE", "TUTORIAL_DEVICE"):
        assert variable in rows["to change"]

    rows = printed(FULL)
    assert "an epoch, five of them" in rows["time"] and rows["memory"] == FULL.memory_cpu
    gpu(count=2, free=11.4)
    rows = printed(FULL)
    assert rows["device"] == "cuda  (GPU-0, 11.4 of 12.0 GB free)"
    assert rows["precision"] == "bf16 training, bf16 encoding"
    assert (rows["time"], rows["memory"]) == (FULL.minutes, FULL.memory)
    monkeypatch.setattr(profiles, "native_precision", lambda device: "bf16")
    assert printed(FULL, "cuda:1")["device"].startswith("cuda:1  (GPU-1, ")
    assert printed(FULL, "cpu")["device"].startswith("cpu  (")


def test_the_minutes_follow_the_speed_of_the_cpu(monkeypatch):
    instructions(monkeypatch, "avx512_bf16")
    assert profiles.speed_of_cpu((64, 256), "fp32", 0.01) > 0 < profiles.speed_of_cpu((64, 256), "bf16", 0.01)
    work = dataclasses.replace(POCKET, cpu_work=("for both notebooks", 60, 24, 36))
    monkeypatch.setattr(profiles, "speed_of_cpu", lambda layer, kind: {"fp32": 200, "bf16": 400}[kind])
    assert profiles.time_on_cpu(work) == "about 4 min for both notebooks, at 400 GFLOP/s, measured just now"
    instructions(monkeypatch)  # no bf16: the training is in fp32 as well
    assert profiles.time_on_cpu(work).startswith("about 6 min ")


def test_the_block_names_the_pairs_that_are_read(monkeypatch, tmp_path):
    assert printed(POCKET)["pairs"] == "pocket MBPP"
    assert printed(FULL)["pairs"] == "sanitized MBPP (to be downloaded)"
    local = tmp_path / "data" / "sanitized-mbpp.json"
    monkeypatch.setattr(assets, "sanitized_mbpp_path", lambda download: local)
    for profile in (POCKET, FULL):
        assert printed(profile)["pairs"] == "sanitized MBPP (data/sanitized-mbpp.json)"
        assert profiles.mbpp_path(profile) == local


def test_the_block_announces_the_disk(monkeypatch, tmp_path):
    assert printed(FULL)["disk"] == "about 17 GB at the peak, 500 GB free"
    monkeypatch.setattr(assets, "local_bge_m3", lambda: tmp_path)
    assert printed(FULL)["disk"] == "about 17 GB at the peak, 2 of them here, 500 GB free"


@pytest.mark.parametrize("profile", [FULL, POCKET])
def test_the_block_fits_a_screen(gpu, profile):
    for device in ("cpu", "cuda"):
        gpu()
        lines = describe(profile, "auto: a CUDA GPU, and all that both notebooks need", device).splitlines()
        assert len(lines) == 10 and max(map(len, lines)) <= 115
