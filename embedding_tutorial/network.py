"""What the downloads need of the network: which hosts, whether they answer, and the fetches themselves.

Environment: `HF_ENDPOINT` and `MODELSCOPE_ENDPOINT` choose mirrors, `HF_HUB_OFFLINE=1` forbids every
network call. All are read when a function is called.
"""

import os
import queue
import threading
import time
from pathlib import Path

from .files import TutorialError

HTTP_TIMEOUT_S = 20  # without a single byte
HTTP_TOTAL_S = 120  # for one small file in all
PROBE_TIMEOUT_S = 3


def can_reach_hub(timeout=PROBE_TIMEOUT_S):
    """Ask once whether Hugging Face (`$HF_ENDPOINT`), else ModelScope, answers; `timeout` seconds each.

    Returns: (True, who answered) or (False, why not). Never raises; no call where `HF_HUB_OFFLINE` is set.
    """
    return can_reach((hf_endpoint(), modelscope_endpoint()), lambda endpoint: probe(endpoint, timeout))


def can_reach(endpoints, ask):
    """The same for any hosts, in order, until one answers. ask: what `probe` is, or its cached answers."""
    if hub_offline():
        return False, "HF_HUB_OFFLINE is set"
    causes = []
    for endpoint in endpoints:
        cause = ask(endpoint)
        if cause is None:
            return True, f"{endpoint} answers"
        causes.append(f"{endpoint}: {cause}")
    return False, "; ".join(causes)


def probe(endpoint, timeout=PROBE_TIMEOUT_S):
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
            answer.put(cause_of(error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=timeout)
    except queue.Empty:
        return f"no answer within {timeout:g} s"


def hf_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def modelscope_endpoint():
    """ModelScope's base URL, by the variables its own client reads."""
    chosen = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN")
    chosen = chosen or "www.modelscope.cn"
    return (chosen if "://" in chosen else f"https://{chosen}").rstrip("/")


def hub_offline():
    """Whether huggingface_hub's own switches forbid network calls."""
    values = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def hf_home():
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()


def hf_cache():
    return Path(os.environ.get("HF_HUB_CACHE") or hf_home() / "hub").expanduser()


def cause_of(error):
    """One line that says what went wrong, without the wrapping of the HTTP libraries."""
    failed = getattr(error, "failed_files", None)  # ModelScope names the files one by one
    if failed:
        name, first = next(iter(failed.items()))
        return f"{name}: {cause_of(first)}"
    if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__:  # huggingface_hub's wrapping
        error = error.__cause__
    reason = getattr(error.args[0], "reason", None) if error.args else None
    if reason is not None:  # requests' wrapping of "connection refused", "name not known", a bad certificate
        return str(reason).split("connection: ")[-1].rstrip(".")
    text = " ".join(str(error).split())[:300].rstrip(". ")
    return text if isinstance(error, TutorialError) else f"{type(error).__name__}: {text}"


def fetch_small(url, out):
    """Write a small file's bytes to the open file `out`; raises on an HTTP error or a slow host."""
    import requests

    deadline = time.monotonic() + HTTP_TOTAL_S
    with requests.get(url, stream=True, timeout=HTTP_TIMEOUT_S) as response:
        response.raise_for_status()
        for block in response.iter_content(1 << 16):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not finished after {HTTP_TOTAL_S} s")
            out.write(block)


def fetch_from_hugging_face(endpoint, repo, revision, names, large, folder):
    """Download the files `names` of a model at `revision` into `folder`, resuming what is there.

    huggingface_hub 2.4 keeps finished files but starts an interrupted one from its first byte again; those
    in `large` are therefore fetched by `fetch_resuming`. Raises what the client and `requests` raise.
    """
    from huggingface_hub import hf_hub_url, snapshot_download
    from huggingface_hub.utils import build_hf_headers

    small = [name for name in names if name not in large]
    snapshot_download(repo, revision=revision, allow_patterns=small, local_dir=folder, endpoint=endpoint)
    for name in large:
        url = hf_hub_url(repo, name, revision=revision, endpoint=endpoint)
        fetch_resuming(url, folder / name, build_hf_headers())


def fetch_from_modelscope(endpoint, repo, names, folder):
    """The same from ModelScope, whose commits have other names: the caller compares sha256 instead."""
    from modelscope import snapshot_download

    snapshot_download(repo, allow_patterns=names, local_dir=str(folder), endpoint=endpoint)


def fetch_resuming(url, target, headers):
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
