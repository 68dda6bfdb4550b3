"""Whatever is wrong with the input ends in a TutorialError with file, row, remedy, before any training."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers import little_space, tree

from embedding_tutorial import files, finetune, training
from embedding_tutorial.files import TutorialError, read_json
from embedding_tutorial.pairs import read_mbpp, read_pairs, write_pairs

CONFIG = finetune.TrainConfig(epochs=1, batch_size=8, max_length=64)
GOOD = {"task_id": 1, "prompt": "ask", "code": "x = 1"}
PAIR = {"query": "ask", "pos_doc": "x = 1"}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Call what must be refused; returns the message after checking that nothing was trained or written."""

    def no_training(*args):
        raise AssertionError("training started")

    monkeypatch.setattr(training, "one_update", no_training)

    def call(work, *parts):
        before = tree(tmp_path)
        with pytest.raises(TutorialError) as error:
            work()
        for part in parts:
            assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"
        assert tree(tmp_path) == before, "something was written"
        return str(error.value)

    return call


# ---------------------------------------------------------------- files and rows


def json_file(*rows):
    return json.dumps(rows).encode()


def lines(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


MBPP = {
    "missing": (None, "does not exist", "Put the file there"),
    "empty file": (b"", "line 1", "no valid JSON"),
    "cut short": (json_file(GOOD, GOOD)[:-20], "no valid JSON", "Correct or remove it"),
    "empty list": (b"[]", "holds no rows"),
    "a number": (b"5",),
    "an object": (json.dumps({"rows": [GOOD]}).encode(),),
    "row is a text": (json_file(GOOD, "row"), "row 2", "not an object but str", "remove the row"),
    "row is null": (json_file(GOOD, None), "row 2", "not an object but NoneType"),
    "no prompt": (
        json_file(GOOD, {"task_id": 2, "code": "x"}),
        "row 2",
        "no field 'prompt' or 'text'",
        "Add it",
    ),
    "no code": (json_file(GOOD, GOOD, {"task_id": 2, "prompt": "x"}), "row 3", "no field 'code'"),
    "no task_id": (json_file({"prompt": "x", "code": "x"}), "row 1", "no field 'task_id'"),
    "empty prompt": (
        json_file({**GOOD, "prompt": ""}),
        "row 1",
        "'prompt' is ''",
        "Fill it in or remove the row",
    ),
    "blank code": (json_file(GOOD, {**GOOD, "code": " \n"}), "row 2", "'code' is ' \\n'"),
    "prompt null": (json_file({**GOOD, "prompt": None}), "row 1", "'prompt' is None"),
    "code a number": (json_file(GOOD, {**GOOD, "code": 3}), "row 2", "'code' is 3, not a text"),
    "code a list": (json_file({**GOOD, "code": ["x"]}), "row 1", "not a text"),
    "latin-1": (
        '[{"task_id": 1, "prompt": "für", "code": "x"}]'.encode("latin-1"),
        "not UTF-8 (byte 28)",
        "Save it as",
    ),
    "utf-16": (json_file(GOOD).decode().encode("utf-16"), "not UTF-8 (byte 0)"),
    "half a surrogate": (b'[{"task_id": 1, "prompt": "a \\ud800 b", "code": "x"}]', "row 1", "prompt"),
}


@pytest.mark.parametrize("case", MBPP)
def test_a_bad_mbpp_file(case, tmp_path, refused):
    content, *parts = MBPP[case]
    path = tmp_path / "data" / "sanitized-mbpp.json"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    refused(lambda: read_mbpp(path), "data/sanitized-mbpp.json", *parts)


PAIRS = {
    "missing": (None, "does not exist", "run the cell that writes it"),
    "empty": (b"", "holds no rows", "Put the pairs there again"),
    "no JSON": (lines(PAIR, b"{query: ask}"), "row 2", "no valid JSON", "Correct or remove it"),
    "cut short": (lines(PAIR, PAIR)[:-9], "row 2", "no valid JSON"),
    "no JSON after an empty line": (lines(PAIR, b"", b"x"), "row 3", "no valid JSON"),
    "row is a list": (lines(PAIR, [1]), "row 2", "not an object but list"),
    "row is a text": (lines(PAIR, "text"), "row 2", "not an object but str"),
    "row is JSON in a text": (lines(PAIR, json.dumps(PAIR)), "row 2", "not an object but str"),
    "no query": (lines(PAIR, {"pos_doc": "x"}), "row 2", "no field 'query'"),
    "no pos_doc": (lines({"query": "x"}), "row 1", "no field 'pos_doc'"),
    "empty query": (lines(PAIR, {**PAIR, "query": ""}), "row 2", "'query' is ''"),
    "query a number": (lines({**PAIR, "query": 1.5}), "row 1", "'query' is 1.5"),
    "pos_doc a list": (lines(PAIR, {**PAIR, "pos_doc": ["x"]}), "row 2", "'pos_doc' is ['x']"),
    "neg with an empty text": (
        lines(PAIR, {**PAIR, "neg": ["x", ""]}),
        "row 2",
        "'neg' must be a list of texts",
    ),
    "neg with a number": (lines({**PAIR, "neg": [1]}), "row 1", "'neg' must be a list of texts"),
    "latin-1": (lines(PAIR) + '{"query": "für"}\n'.encode("latin-1"), "not UTF-8", "Save it as UTF-8"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_bad_file_of_pairs(case, tmp_path, refused):
    content, *parts = PAIRS[case]
    path = tmp_path / "data" / "mbpp_train.jsonl"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    refused(lambda: read_pairs(path), "data/mbpp_train.jsonl", *parts)


def test_mbpp_json_lines_name_the_row_too(tmp_path, refused):
    (tmp_path / "mbpp.jsonl").write_bytes(
        lines({"task_id": 1, "text": "a", "code": "b"}, {"task_id": 2, "text": "a"})
    )
    refused(lambda: read_mbpp(tmp_path / "mbpp.jsonl"), "mbpp.jsonl, row 2", "no field 'code'")


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ("does not exist", "Run the cell")),
        (b"", ("not readable as JSON", "Delete it and run again")),
        (b'{"a": 1', ("not readable as JSON",)),
        (b"\xff\xfe", ("not readable as JSON",)),
    ],
)
def test_a_missing_or_broken_result(tmp_path, refused, content, parts):
    path = tmp_path / "eval_results.json"
    if content is not None:
        path.write_bytes(content)
    refused(lambda: read_json(path), "eval_results.json", *parts)


# ---------------------------------------------------------------- before training


@pytest.fixture
def attempt(tiny_bert, pairs, tmp_path, refused):
    """Train with something changed; it must be refused without a trace."""

    def call(*parts, base=tiny_bert, train=pairs[:16], validation=pairs[28:], config=CONFIG, device="cpu"):
        return refused(
            lambda: training.train(base, train, validation, config, tmp_path / "run", device), *parts
        )

    return call


def test_a_missing_model(attempt, tmp_path):
    attempt("models/absent", "model.safetensors", "run the cell", base=tmp_path / "models" / "absent")


def test_a_model_without_weights(attempt, tiny_bert, tmp_path):
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    (model / "model.safetensors").unlink()
    attempt("model holds neither model.safetensors nor pytorch_model.bin", base=model)


def test_a_model_without_its_pooling(attempt, tiny_bert, tmp_path):
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    shutil.rmtree(model / "1_Pooling")
    attempt("1_Pooling/config.json", "does not exist", base=model)


def test_a_model_of_another_architecture(attempt, tiny_bert, tmp_path):
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    attempt("is a gpt2; this code knows bert, roberta and xlm-roberta", base=model)


def test_a_longer_text_than_the_model_reads(attempt):
    attempt(
        "max_length 1000 is more than the 512 tokens", config=dataclasses.replace(CONFIG, max_length=1000)
    )


def test_fewer_pairs_than_a_batch(attempt, pairs):
    attempt(
        "7 training pairs are fewer than the batch of 8", "Lower batch_size or add pairs", train=pairs[:7]
    )


def test_an_empty_validation_set(attempt):
    attempt("validation set is empty", "Split the data again", validation=[])


def test_a_validation_set_that_overlaps(attempt, pairs):
    attempt(
        "Rows [3, 4] of the validation set also stand in the training set",
        "Remove them",
        validation=[*pairs[28:30], *pairs[4:6], pairs[31]],
    )


def test_fp16_without_cuda(attempt):
    attempt(
        'precision="fp16" needs CUDA and this runs on cpu',
        '"fp32" or "bf16"',
        config=dataclasses.replace(CONFIG, precision="fp16"),
    )


def test_unknown_names(attempt):
    attempt("Unknown precision 'fp8'", config=dataclasses.replace(CONFIG, precision="fp8"))
    attempt("backward 'magic'", config=dataclasses.replace(CONFIG, backward="magic"))


def test_queue_and_micro_batch_together(attempt):
    attempt("queue and a micro_batch", config=dataclasses.replace(CONFIG, queue=8, micro_batch=4))


def test_cuda_where_there_is_none(attempt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    attempt("cuda", device="cuda")


def test_a_disk_too_small_for_the_run(attempt, monkeypatch, tmp_path):
    little_space(monkeypatch, free=100)
    attempt(str(tmp_path / "run"), "of free disk here", "Free 0.0 GB, or move the folder to a larger disk")


def test_a_refused_run_leaves_an_earlier_one_where_it_is(tiny_bert, pairs, tmp_path, monkeypatch):
    """Errors that only the model can tell come before the old run is moved aside."""
    training.train(tiny_bert, pairs[:16], pairs[28:], CONFIG, tmp_path / "run", progress=False)
    before = tree(tmp_path)
    for change in ({"max_length": 1000}, {"batch_size": 100}, {"precision": "fp16"}):
        with pytest.raises(TutorialError):
            training.train(
                tiny_bert, pairs[:16], pairs[28:], dataclasses.replace(CONFIG, **change), tmp_path / "run"
            )
        assert tree(tmp_path) == before, change


def test_a_damaged_state(attempt, tiny_bert, pairs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resume.pt").write_bytes(b"half a file")
    attempt("resume.pt is damaged", "Delete it to train from the start")


# ---------------------------------------------------------------- a full disk


def test_a_disk_that_is_full_when_the_split_is_written(tmp_path, monkeypatch, pairs):
    write_pairs(tmp_path / "mbpp_train.jsonl", pairs[:3])
    before = tree(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for name in ("mbpp_train.jsonl", "mbpp_val.jsonl"):
        with pytest.raises(TutorialError, match=f"{name} could not be written.*No space left"):
            write_pairs(tmp_path / name, pairs)
    assert tree(tmp_path) == before
