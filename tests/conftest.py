"""An empty home for every test, no hub, and the models and pairs that the tests share."""

import atexit
import os
import shutil
import sys
import tempfile
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
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "BGE_M3_PATH", "TUTORIAL_PROFILE"):
    os.environ.pop(name, None)
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
from kill_worker import tiny_bert_model, tiny_m3_model  # noqa: E402

from embedding_tutorial import assets, finetune  # noqa: E402


@pytest.fixture(scope="session")
def pairs():
    """40 pairs of the pocket data: [{"query", "pos_doc", "meta"}]."""
    return finetune.read_mbpp(ROOT / "data" / "pocket_mbpp.json")[:40]


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
