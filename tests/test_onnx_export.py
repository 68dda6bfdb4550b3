"""A model folder as ONNX: the same vectors, padded or alone, in fp32 and in int8; nothing else is written."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import tree

from embedding_tutorial import onnx_export
from embedding_tutorial.encoder import HEAD_FILES, Encoder, embed
from embedding_tutorial.files import ROOT, TutorialError
from embedding_tutorial.onnx_export import FP32, INT8, LOWEST_COSINE, OnnxEncoder, export_onnx


@pytest.fixture(scope="module", params=["tiny_bert", "tiny_m3", "minilm"])
def exported(request, tmp_path_factory):
    """(model folder, folder of its export in fp32 and int8)."""
    model = request.getfixturevalue(request.param)
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "out", int8=True)


def cosines(folder, file, model, texts):
    q = embed(Encoder(model).eval(), texts).detach().numpy()
    p = OnnxEncoder(folder, file, threads=1)(texts)
    np.testing.assert_allclose(np.linalg.norm(p, axis=1), 1, rtol=1e-5)
    return (q * p).sum(axis=1)


def test_the_vectors_are_those_of_the_original(exported, texts):
    model, folder = exported
    assert cosines(folder, FP32, model, texts).min() >= LOWEST_COSINE[FP32]
    # The fixture's "x" alone is at the limit in int8: three tokens, two of them special.
    assert cosines(folder, INT8, model, texts[1:]).min() >= LOWEST_COSINE[INT8]


def test_batch_and_length_are_free_and_the_names_are_the_usual_ones(exported):
    session = OnnxEncoder(exported[1]).session
    assert {(i.name, *i.shape) for i in session.get_inputs()} == {
        ("input_ids", "batch", "length"),
        ("attention_mask", "batch", "length"),
    }
    (output,) = session.get_outputs()  # text-embeddings-inference takes a pooled vector under this name
    assert output.name == "sentence_embedding" and output.shape[0] == "batch"
    for shape in ((1, 1), (3, 40)):
        ids = np.full(shape, 5, np.int64)
        found = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        assert found.shape == (shape[0], output.shape[1])


def test_the_tokenizer_lies_beside_and_the_weights_and_heads_do_not(exported):
    names = set(tree(exported[1]))
    assert {"tokenizer.json", "config.json", "1_Pooling/config.json", FP32, INT8} <= {
        name.replace("\\", "/") for name in names
    }
    assert not names & {*HEAD_FILES, "model.safetensors", "pytorch_model.bin"}
    assert (exported[1] / INT8).stat().st_size < 0.7 * (exported[1] / FP32).stat().st_size


def test_weights_beyond_a_protobuf_file_lie_beside(tiny_m3, tmp_path, monkeypatch, texts):
    monkeypatch.setattr(onnx_export, "ONE_FILE", 0)
    folder = export_onnx(tiny_m3, tmp_path / "out", int8=True)
    assert (folder / "model.onnx.data").stat().st_size > (folder / FP32).stat().st_size
    folder = folder.rename(tmp_path / "elsewhere")  # the graph names the file by its place beside it
    assert cosines(folder, FP32, tiny_m3, texts).min() >= LOWEST_COSINE[FP32]


def test_a_bad_export_is_refused_and_the_earlier_one_stays(tiny_bert, tmp_path, monkeypatch):
    folder = export_onnx(tiny_bert, tmp_path / "out")
    before = tree(folder)
    monkeypatch.setattr(onnx_export, "read_pooling", lambda folder: "cls")  # a wrong pooling in the graph …
    right = onnx_export.vectors_one_by_one

    def right_vectors(model, tokenizer):  # … and the right one in what is expected
        model.pooling = "mean"
        expected = right(model, tokenizer)
        model.pooling = "cls"
        return expected

    monkeypatch.setattr(onnx_export, "vectors_one_by_one", right_vectors)
    with pytest.raises(TutorialError, match="model.onnx: .* cosine of .* nothing was written"):
        export_onnx(tiny_bert, folder)
    assert tree(folder) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_holds_something_else_is_not_replaced(tiny_bert, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for out in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", tiny_bert):
        with pytest.raises(TutorialError, match="is no ONNX export. Choose another folder"):
            export_onnx(tiny_bert, out)
    (tmp_path / "mine" / "thesis.txt").rename(tmp_path / "mine" / FP32)
    (tmp_path / "mine" / "model").mkdir()
    model = tmp_path / "mine" / "model"
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(TutorialError, match="holds the model itself"):
        export_onnx(model, tmp_path / "mine")


def test_onnx_runtime_reports_nothing(exported, tmp_path):
    # Where it reports it first writes the id of the device and a queue of events into the cache folder.
    program = (
        "import sys\nfrom embedding_tutorial.onnx_export import OnnxEncoder\nOnnxEncoder(sys.argv[1])(['x'])"
    )
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **places}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", program, str(exported[1])], env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name or path.name == "deviceid"]


def test_a_missing_package_or_file_is_named_with_the_remedy(tiny_bert, tmp_path, monkeypatch):
    with pytest.raises(TutorialError, match="model.onnx is missing. Write it with export_onnx"):
        OnnxEncoder(tiny_bert)
    find = onnx_export.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(TutorialError, match="needs onnxscript, .*pip install -r recipes/requirements.txt"):
        export_onnx(tiny_bert, tmp_path / "out")
    assert not list(tmp_path.iterdir())
