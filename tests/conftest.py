"""An empty home for every test, no hub, and the models and pairs that the tests share."""

import atexit
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

# The libraries read these when they are imported, so they are set before any test module is.
SANDBOX = Path(tempfile.mkdtemp(prefix="tutorial-tests-"))
atexit.register(shutil.rmtree, SANDBOX, ignore_errors=True)
ROOT = Path(__file__).resolve().parents[1]
os.environ.update(
    HOME=str(SANDBOX),
    HF_HOME=str(SANDBOX / "hf"),
    MTEB_CACHE=str(SANDBOX / "mteb"),
    HF_HUB_OFFLINE="1",
    XDG_CACHE_HOME=str(SANDBOX / "cache"),
    TOKENIZERS_PARALLELISM="false",
)
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "BGE_M3_PATH"):
    os.environ.pop(name, None)
for name in ("TUTORIAL_PROFILE", "TUTORIAL_DEVICE", "TUTORIAL_PRECISION"):
    os.environ.pop(name, None)
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from kill_worker import tiny_bert_model, tiny_m3_model  # noqa: E402

from embedding_tutorial import assets, files, pocket_task  # noqa: E402
from embedding_tutorial.pairs import read_mbpp  # noqa: E402

LOCAL = ("127.0.0.1", "localhost", "::1", b"localhost")
CLOSED = "http://127.0.0.1:9"  # the discard port: refuses at once


@pytest.fixture(autouse=True)
def same_threads(monkeypatch):
    """A test that computes on one thread leaves the others theirs: their number decides the rounding."""
    threads, name = torch.get_num_threads(), "OMP_NUM_THREADS"
    monkeypatch.setenv(name, os.environ.get(name, str(threads)))  # put back after the test
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pairs():
    """40 pairs of the pocket data: [{"query", "pos_doc", "meta"}]."""
    return read_mbpp(ROOT / "data" / "pocket_mbpp.json")[:40]


@pytest.fixture(scope="session")
def texts(pairs):
    """Queries and codes of very different lengths, one a single letter, one far beyond 64 tokens."""
    return [
        "x",
        *(pair["query"] for pair in pairs[:9]),
        *(pair["pos_doc"] for pair in pairs[:9]),
        " ".join(pair["query"] for pair in pairs[:9]),
    ]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, pairs):
    """A tiny random BERT with mean pooling, in all-MiniLM-L6-v2's layout."""
    texts = [text for pair in pairs for text in (pair["query"], pair["pos_doc"])]
    return tiny_bert_model(tmp_path_factory.mktemp("models") / "tiny-bert", texts)


@pytest.fixture(scope="session")
def tiny_m3(tmp_path_factory, pairs):
    """A tiny random XLM-RoBERTa with CLS pooling and two heads, in BGE-M3's published layout."""
    texts = [text for pair in pairs for text in (pair["query"], pair["pos_doc"])]
    return tiny_m3_model(tmp_path_factory.mktemp("models") / "tiny-m3", texts)


@pytest.fixture(scope="session")
def minilm():
    """The folder of the real all-MiniLM-L6-v2."""
    return assets.pocket_model_path()


@pytest.fixture(scope="session")
def mbpp_file():
    """The real sanitized MBPP; only the tests that need it are skipped where it is absent."""
    places = (ROOT.parent / "shared" / "data" / "sanitized-mbpp.json", ROOT / "data" / "sanitized-mbpp.json")
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        pytest.skip("sanitized-mbpp.json is neither in ../shared/data nor in data")
    return path


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty home, no real host in reach, retries without their pauses."""
    import huggingface_hub.constants

    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "MODELSCOPE_CACHE", "MODELSCOPE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_CACHE",
        "HF_DATASETS_CACHE",
        "BGE_M3_PATH",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("MODELSCOPE_DOMAIN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", CLOSED)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(assets, "GITHUB_RAW", CLOSED)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def local_connect(self, address):
        assert address[0] in ("127.0.0.1", "localhost"), f"a test called {address}"
        return connect(self, address)

    def local_getaddrinfo(host, *args, **kwargs):
        assert host in ("127.0.0.1", "localhost", b"127.0.0.1"), f"a test looked up {host}"
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    monkeypatch.setattr(socket, "getaddrinfo", local_getaddrinfo)


@pytest.fixture
def no_network(monkeypatch):
    """Every connection and look-up beyond this machine is an error."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def local_connect(self, address):
        assert not isinstance(address, tuple) or address[0] in LOCAL, f"a test called {address}"
        return connect(self, address)

    def local_look_up(host, *args, **kwargs):
        assert host in LOCAL, f"a test looked up {host}"
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    monkeypatch.setattr(socket, "getaddrinfo", local_look_up)


@pytest.fixture(scope="session")
def passages():
    """The passages of the pocket test, both languages, in the order of the files."""
    return [
        row["text"]
        for language in pocket_task.LANGUAGES
        for row in pocket_task.read_language(pocket_task.DATA / language)[0]
    ]
