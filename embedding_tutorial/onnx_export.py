"""A model folder as ONNX: token ids in, L2-normalised embeddings out, for ONNX Runtime in any language.

    export_onnx("models/MiniLM-finetuned/merged", "models/onnx", int8=True)
    vectors = OnnxEncoder("models/onnx", "model_int8.onnx")(["a text", "another"])

Pooling and normalisation are part of the graph, so that nobody has to know the model's own.
"""

import contextlib
import importlib.util
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from .encoder import HEAD_FILES, copy_companions, group_by_length, read_pooling, tokenize, weights_file
from .files import TutorialError, atomic_folder, relative, require_disk

# ONNX Runtime 1.29 and newer report to Microsoft unless told otherwise before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

FP32, INT8 = "model.onnx", "model_int8.onnx"
LOWEST_COSINE = {FP32: 0.9999, INT8: 0.98}  # to the original; an export below it is refused
ONE_FILE = 1.9e9  # bytes of weights: a protobuf file ends at 2 GiB, beyond it they go to model.onnx.data
CHECK = (  # different lengths in one batch, so that a pad token that leaks into a vector is found
    "sort a list",
    "def add(a, b):\n    return a + b",
    "Write a function that returns the second largest number of a list, or None where there is none.",
    "def count(text):\n    found = {}\n    for letter in text.lower():\n        if letter.isalpha():\n"
    "            found[letter] = found.get(letter, 0) + 1\n    return sorted(found.items())",
    "怎样把列表中的数字从小到大排列？",
)


class Embedding(torch.nn.Module):
    """What is exported: the transformer, the pooling of its folder, L2 normalisation."""

    def __init__(self, folder):
        super().__init__()
        self.backbone = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.pooling = read_pooling(folder)

    def forward(self, input_ids, attention_mask):
        """Two int64 (n, length) to (n, dims) float32."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return F.normalize(hidden[:, 0], dim=-1)
        mask = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class OnnxEncoder:
    """Texts to L2-normalised embeddings (n, dims) float32, with the files that `export_onnx` wrote.

    threads: of ONNX Runtime; 0 is one for each core.
    """

    def __init__(self, folder, file=FP32, max_length=512, threads=0):
        require_packages()
        import onnxruntime

        path, options = Path(folder) / file, onnxruntime.SessionOptions()
        if not path.is_file():
            raise TutorialError(f"{relative(path)} is missing. Write it with export_onnx(model, folder).")
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.tokenizer, self.max_length = AutoTokenizer.from_pretrained(folder), max_length

    def __call__(self, texts, token_budget=1024):
        rows = tokenize(self.tokenizer, texts, self.max_length)
        lengths, vectors = [len(row) for row in rows], [None] * len(rows)
        for group in group_by_length(lengths, token_budget):
            shape = len(group), max(lengths[i] for i in group)
            ids, mask = np.full(shape, self.tokenizer.pad_token_id or 0, np.int64), np.zeros(shape, np.int64)
            for line, i in enumerate(group):
                ids[line, : lengths[i]], mask[line, : lengths[i]] = rows[i], 1
            found = self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
            for line, i in enumerate(group):
                vectors[i] = found[line]
        return np.stack(vectors)


def require_packages():
    """Raise TutorialError where a package is missing: only an export needs them."""
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(n)]
    if missing:
        raise TutorialError(
            f"ONNX needs {', '.join(missing)}, not installed here: pip install -r recipes/requirements.txt"
        )


def export_onnx(folder, out, int8=False):
    """Write `out`/model.onnx, with int8 also `out`/model_int8.onnx, and the tokenizer beside; returns `out`.

    folder: a BERT, RoBERTa or XLM-RoBERTa model with CLS or mean pooling. Inputs: input_ids and
    attention_mask, int64 (batch, length); output: sentence_embedding, float32 (batch, dims). An earlier
    export in `out` is replaced. TutorialError where a package is missing, where `out` holds something else,
    or where the cosine of a vector to the original's is below LOWEST_COSINE.
    """
    require_packages()
    folder, out = Path(folder), Path(out)
    size = weights_file(folder).stat().st_size
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / FP32).is_file()):
        raise TutorialError(f"{relative(out)} exists and is no ONNX export. Choose another folder.")
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise TutorialError(f"{relative(out)} holds the model itself. Choose another folder for its export.")
    require_disk(out, 2.5 * size / 1e9, "the export to ONNX")
    model = Embedding(folder).eval()
    expected = vectors_one_by_one(model, AutoTokenizer.from_pretrained(folder))
    with atomic_folder(out) as target:
        copy_companions(folder, target, without=HEAD_FILES)  # their vectors are not exported
        with quiet():
            write_graph(model, target / FP32, external_data=size > ONE_FILE)
            del model
            if int8:
                write_int8(target / FP32, target / INT8)
        for file in (FP32, INT8) if int8 else (FP32,):
            check_export(OnnxEncoder(target, file), expected, file)
    return out


def write_graph(model, path, external_data):
    # Two tensors, since one given twice becomes one input; and two texts, since 1 becomes a constant.
    example = torch.full((2, 7), 5), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    torch.onnx.export(
        model,
        example,
        path,
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        dynamic_shapes=(axes, axes),
        external_data=external_data,
        dynamo=True,
        verbose=False,
    )


def write_int8(source, path):
    """Weights in int8 with a scale for each column; activations are scaled while it runs.

    One scale for a whole matrix gave MiniLM cosines of 0.92. Weights of 7 bits cost 0.002 and keep the sums
    from overflowing on CPUs without VNNI, where 8 bits would give other vectors than elsewhere.
    """
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, path, per_channel=True, reduce_range=True)


def vectors_one_by_one(model, tokenizer):
    """The original's vectors (n, dims) of CHECK, each text alone: nothing is padded."""
    with torch.no_grad():
        rows = [torch.tensor([row]) for row in tokenize(tokenizer, CHECK, 128)]
        return torch.cat([model(row, torch.ones_like(row)) for row in rows]).numpy()


def check_export(encoder, expected, file):
    """Raise TutorialError where a vector of CHECK is too far from the expected one."""
    encoder.max_length = 128
    lowest = float((encoder(CHECK) * expected).sum(axis=1).min())
    if not lowest >= LOWEST_COSINE[file]:
        raise TutorialError(
            f"{file}: a vector has a cosine of {lowest:.4f} to the model's, below {LOWEST_COSINE[file]}; "
            "nothing was written. " + ("Serve fp32 (int8=False)." if file == INT8 else "Report it, please.")
        )


@contextlib.contextmanager
def quiet():
    """Without the exporter's remarks on axis names and absent packages; the vectors are checked instead."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
