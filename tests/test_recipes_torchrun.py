"""The training recipes under torchrun: two CPU processes, tiny checkpoints, and the silent failure."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from embedding_tutorial.encoder import HEAD_FILES, Encoder, embed
from embedding_tutorial.files import TutorialError, read_json, write_json
from recipes import engine, models, raw_bert
from recipes.engine import Training

TINY = Training(batch=8, max_steps=3, learning_rate=1e-2, query_length=16, passage_length=32)


@pytest.fixture(scope="module")
def rows():
    texts = [(f"add {i} to a number", f"def add_{i}(x): return x + {i}") for i in range(16)]
    return [
        {"query": query, "pos": [code], "neg": [c for _, c in texts if c != code][:11],
         "pos_scores": [5.0], "neg_scores": [1.0] * 11}
        for query, code in texts
    ]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return models.small_bert(tmp_path_factory.mktemp("models") / "bert", layers=1, hidden=32)


@pytest.fixture(scope="module")
def m3(tmp_path_factory, rows):
    """A tiny XLM-RoBERTa in BGE-M3's layout: Unigram tokenizer, CLS pooling, two heads."""
    folder = tmp_path_factory.mktemp("models") / "m3"
    tokenizer = Tokenizer(tokenizer_models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [text for row in rows for text in (row["query"], row["pos"][0])]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(fast), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=66, type_vocab_size=1,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    XLMRobertaModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    models.describe_pooling(folder, 32, "cls")
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    torch.save(torch.nn.Linear(32, 32).state_dict(), folder / "colbert_linear.pt")
    torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    return folder


def opens_everywhere(folder, texts, max_length=32):
    """SentenceTransformer and the notebook's Encoder read the same vectors from the folder; returns them."""
    with torch.no_grad():
        ours = embed(Encoder(folder, max_length).eval(), texts).numpy()
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)
    assert np.allclose(ours, theirs, atol=1e-5)
    return ours


def test_dense_with_hard_negatives(tmp_path, file, bert, rows, capsys):
    t = replace(TINY, model=str(bert), group=3, checkpointing=True, precision="bf16")
    found = engine.train(t, file, tmp_path / "run")
    assert found["updates"] == 3 and found["processes"] == 2 and len(found["losses"]) == 3
    reports = [read_json(tmp_path / "run" / "reports" / f"rank-{n}.json") for n in range(2)]
    assert reports[0]["group_size"] == reports[1]["group_size"] == 2
    assert reports[0]["after"] == reports[1]["after"] != reports[0]["before"]
    texts = [row["query"] for row in rows]
    tuned, base = opens_everywhere(tmp_path / "run" / "model", texts), opens_everywhere(bert, texts)
    assert np.abs(tuned - base).max() > 1e-3
    assert not (tmp_path / "run" / "work").exists()
    assert "3/3" in capsys.readouterr().out  # progress
    assert engine.train(t, file, tmp_path / "run") == found
    assert "skipped" in capsys.readouterr().out


def test_unified_with_self_distillation_sub_batches_and_frozen_positions(tmp_path, file, m3, rows):
    from FlagEmbedding import BGEM3FlagModel

    t = replace(TINY, engine="m3", model=str(m3), pooling="cls", group=2, sub_batch=2, self_distill_from=0,
                freeze_positions=True, checkpointing=True, precision="bf16")  # fmt: skip
    engine.train(t, file, tmp_path / "run")
    folder, texts = tmp_path / "run" / "model", [row["query"] for row in rows]
    # A CLS model: without 1_Pooling/ SentenceTransformer would take the mean.
    assert SentenceTransformer(str(folder), device="cpu")[1].pooling_mode == "cls"
    dense = opens_everywhere(folder, texts)
    theirs = BGEM3FlagModel(str(folder), use_fp16=False, devices="cpu").encode(
        texts, return_dense=True, return_sparse=True, return_colbert_vecs=True
    )
    assert np.allclose(theirs["dense_vecs"], dense, atol=1e-5)
    assert theirs["lexical_weights"] and theirs["colbert_vecs"][0].shape[1] == 32
    for name in HEAD_FILES:
        old, new = (torch.load(f / name, weights_only=True)["weight"] for f in (m3, folder))
        assert not torch.equal(old, new)
    old, new = (AutoModel.from_pretrained(f).embeddings for f in (m3, folder))
    assert torch.equal(old.position_embeddings.weight, new.position_embeddings.weight)
    assert not torch.equal(old.word_embeddings.weight, new.word_embeddings.weight)


def test_unified_with_a_teacher(tmp_path, file, m3, rows):
    t = replace(TINY, engine="m3", model=str(m3), pooling="cls", group=4, teacher=True)
    assert engine.train(t, file, tmp_path / "run")["updates"] == 3
    opens_everywhere(tmp_path / "run" / "model", [row["query"] for row in rows])


def test_raw_bert_as_a_command(tmp_path, file, bert, rows, capsys):
    words = ["--negatives", "10", "--model", str(bert), "--data", str(file), "--batch", "8", "--max-steps",
             "2", "--cpu", "--output", str(tmp_path / "run")]  # fmt: skip
    raw_bert.main(words)
    opens_everywhere(tmp_path / "run" / "model", [row["query"] for row in rows])
    assert read_json(tmp_path / "run" / "recipe.json")["group"] == 11
    assert "--train_group_size 11" in capsys.readouterr().out  # the GPU command stands below the result


def test_a_run_that_torchrun_ends_is_reported_with_its_log_and_done_again(tmp_path, file, bert, monkeypatch):
    t, real = replace(TINY, model=str(bert)), engine.flags
    monkeypatch.setattr(engine, "flags", lambda *a, **k: [*real(*a, **k), "--no_such_flag", "1"])
    with pytest.raises(TutorialError, match="no_such_flag"):
        engine.train(t, file, tmp_path / "run", processes=1)
    assert (tmp_path / "run" / "train.log").exists() and not (tmp_path / "run" / "done.json").exists()


# ---------------------------------------------------------------- the silent failure

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="without --use_cpu this would train on the GPU")


def without_use_cpu(monkeypatch, *more):
    real = engine.flags
    left_out = ("--use_cpu", "--negatives_cross_device")
    monkeypatch.setattr(
        engine, "flags", lambda *a, **k: [w for w in real(*a, **k) if w not in left_out] + list(more)
    )


@no_gpu
def test_processes_that_train_alone_are_caught(tmp_path, file, bert, monkeypatch):
    without_use_cpu(monkeypatch)
    with pytest.raises(TutorialError, match=r"groups have the sizes \[1, 1\].*--use_cpu is missing"):
        engine.train(replace(TINY, model=str(bert)), file, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "done.json").exists()


@no_gpu
def test_gradients_that_are_not_synchronised_are_caught(tmp_path, file, bert, monkeypatch):
    """With a process group but without --use_cpu both end with status 0 and different parameters."""
    without_use_cpu(monkeypatch, "--ddp_backend", "gloo")
    with pytest.raises(TutorialError, match="different parameters"):
        engine.train(replace(TINY, model=str(bert)), file, tmp_path / "run")
    reports = [read_json(tmp_path / "run" / "reports" / f"rank-{n}.json") for n in range(2)]
    assert [report["group_size"] for report in reports] == [2, 2]
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "done.json").exists()
