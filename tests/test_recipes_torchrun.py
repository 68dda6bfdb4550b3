"""The training recipes under torchrun: two CPU processes, tiny checkpoints, and the silent failure."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from embedding_tutorial.encoder import HEAD_FILES, Encoder, embed, read_pooling
from embedding_tutorial.files import ROOT, TutorialError, read_json, write_json
from embedding_tutorial.pairs import write_pairs
from recipes import compare, data, dense, engine, models, raw_bert, steps

TINY = """--max_steps 3 --learning_rate 1e-2 --temperature 0.05 --query_max_len 16 --passage_max_len 32
    --per_device_train_batch_size 4 --use_cpu True --negatives_cross_device True"""


def train(kind, model, file, folder, more="", processes=2):
    """A tiny run of engine.py, with `more` of FlagEmbedding's arguments as typed."""
    options = engine.options_of(f"{engine.COMMON} {TINY} {more}")
    options |= {"model_name_or_path": [str(model)], "train_data": [str(file)]}
    options |= {"sentence_pooling_method": [read_pooling(model)]}
    return engine.run(kind, processes, folder, options)


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
    more = "--train_group_size 3 --gradient_checkpointing True --bf16 True"
    found = train("base", bert, file, tmp_path / "run", more)
    assert found["updates"] == 3 and found["processes"] == 2 and len(found["losses"]) == 3
    assert found["precision"] == "bf16" and found["passages_per_update"] == 24
    reports = [read_json(tmp_path / "run" / "reports" / f"rank-{n}.json") for n in range(2)]
    assert reports[0]["group_size"] == reports[1]["group_size"] == 2
    assert reports[0]["after"] == reports[1]["after"] != reports[0]["before"]
    texts = [row["query"] for row in rows]
    tuned, base = opens_everywhere(tmp_path / "run" / "model", texts), opens_everywhere(bert, texts)
    assert np.abs(tuned - base).max() > 1e-3
    assert not (tmp_path / "run" / "work").exists()
    assert "3/3" in capsys.readouterr().out  # progress
    assert train("base", bert, file, tmp_path / "run", more) == found
    assert "skipped" in capsys.readouterr().out


def test_unified_with_self_distillation_sub_batches_and_frozen_positions(tmp_path, file, m3, rows):
    from FlagEmbedding import BGEM3FlagModel

    more = """--train_group_size 2 --sub_batch_size 2 --pad_to_multiple_of 32 --unified_finetuning True
        --use_self_distill True --self_distill_start_step 0 --fix_position_embedding True
        --gradient_checkpointing True --bf16 True"""
    train("m3", m3, file, tmp_path / "run", more)
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


def test_a_base_saved_in_bf16_is_trained_in_fp32(tmp_path, file, m3, capsys):
    """Dense training of a base with BGE-M3's heads: its heads know other weights and do not come along."""
    base, read = tmp_path / "base", {"dtype": torch.bfloat16}
    shutil.copytree(m3, base)
    AutoModel.from_pretrained(m3, **read).save_pretrained(base)
    assert AutoModel.from_pretrained(base).dtype == torch.bfloat16  # what FlagEmbedding would train
    found = train("base", base, file, tmp_path / "run", "--max_steps 2 --learning_rate 1e-6")
    model = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32} and found["updates"] == 2
    old = AutoModel.from_pretrained(base, dtype=torch.float32).state_dict()
    moved = [(weight - old[name]).abs().max().item() for name, weight in model.state_dict().items()]
    assert 0 < max(moved) < 1e-5  # smaller than bf16 can hold beside a weight
    assert not [name for name in HEAD_FILES if (tmp_path / "run" / "model" / name).exists()]
    assert set(compare.encoder_of(tmp_path / "run" / "model", max_length=32)(["add 1"])) == {"dense"}


def test_unified_with_a_teacher(tmp_path, file, m3, rows):
    more = """--train_group_size 4 --unified_finetuning True --knowledge_distillation True
        --kd_loss_type m3_kd_loss"""
    assert train("m3", m3, file, tmp_path / "run", more)["updates"] == 3
    opens_everywhere(tmp_path / "run" / "model", [row["query"] for row in rows])


def test_length_groups_and_mrl(tmp_path, rows, bert):
    """Batches from one file each, of a size of their own; no query begins with "None"."""
    for name, part, batch in (("short", rows[:8], 4), ("long", rows[8:], 2)):
        lines = [json.dumps(row | {"batch_size": batch}) + "\n" for row in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    more = """--same_dataset_within_batch True --num_train_epochs 1 --max_steps -1 --use_mrl True
        --mrl_dims 8 32 --query_instruction_for_retrieval="" """
    found = train("base", bert, tmp_path, tmp_path.parent / f"{tmp_path.name}-run", more)
    assert found["updates"] == 3  # 8 = 2 × 4 once, 8 = 2 × 2 twice
    (tmp_path / "long.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(TutorialError, match="long.jsonl has 3 rows, fewer than one batch of 4"):
        train("base", bert, tmp_path, tmp_path.parent / "none", more)


def test_what_is_printed_is_what_runs(tmp_path, file, bert, rows, capfd):
    """The line that --print prints, executed in another folder, and the recipe's own run: equal models."""
    words = ["--negatives", "10", "--model", str(bert), "--data", str(file), "--cpu", "--output"]
    theirs = ["--", "--per_device_train_batch_size", "4", "--max_steps", "2"]
    assert raw_bert.main([*words, str(tmp_path / "a run"), "--print", *theirs]) is None
    line = capfd.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "a run").exists()
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    own = raw_bert.main([*words, str(tmp_path / "own"), *theirs])
    printed = read_json(tmp_path / "a run" / "done.json")
    assert printed["checksum"] == own["checksum"] and printed["losses"] == own["losses"]
    assert read_json(tmp_path / "own" / "recipe.json")["train_group_size"] == ["11"]
    opens_everywhere(tmp_path / "a run" / "model", [row["query"] for row in rows])


def test_the_worked_example_of_the_readme(tmp_path, bert, monkeypatch, capsys):
    """From an own file to a comparison: each line as it stands there, with a small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "OUTPUT", tmp_path / "recipes" / "output")
    for name in ("TRAIN", "VALIDATION"):  # as in a clone in which notebook 01 has not run
        monkeypatch.setattr(data, name, tmp_path / "no such file.jsonl")
    own = [{"query": f"add {i} to a number", "pos_doc": f"def add_{i}(x): return x + {i}"} for i in range(84)]
    for name, part in (("my", own[:80]), ("held_out", own[80:])):
        write_pairs(tmp_path / f"{name}.jsonl", part)
    write_pairs(tmp_path / "passages.jsonl", [{"passage": pair["pos_doc"]} for pair in own])
    section = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").split("\n## 6.")[1]
    lines = re.search(r"```bash\n(.+?)```", section, re.S)[1].splitlines()
    modules, made = {"data.py": data, "dense.py": dense, "compare.py": compare}, None
    for line in lines:
        _, script, *words = shlex.split(line.replace("minilm", str(bert)).replace("FOLDER", str(made)))
        if script == "recipes/dense.py":
            words[words.index("--") : words.index("--")] = ["--model", str(bert), "--cpu"]
        modules[os.path.basename(script)].main(words)
        if script == "recipes/dense.py":  # "prints the folder that stands for FOLDER"
            made = ROOT / re.findall(r"^Written: (.+)$", capsys.readouterr().out, re.M)[-1]
    assert len(lines) == 4 and made.parent == steps.OUTPUT
    found = read_json(steps.OUTPUT / "comparison" / "results.json")
    assert (found["queries"], found["passages"]) == (4, 84)
    assert {row["name"] for row in found["rows"]} == {"base", "mine"}


def test_a_kill_in_the_middle_repeats_what_came_after_the_checkpoint(tmp_path, file, bert, capsys):
    more = "--max_steps 40 --save_steps 4"
    options = engine.options_of(f"{engine.COMMON} {TINY} {more}") | {
        "model_name_or_path": [str(bert)], "train_data": [str(file)], "sentence_pooling_method": ["mean"],
    }  # fmt: skip
    words = [sys.executable, engine.__file__, "base", "2", str(tmp_path / "run"), *engine.words_of(options)]
    process, log = subprocess.Popen(words), tmp_path / "run" / "train.log"
    while not (log.exists() and "progress: 6 " in log.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.send_signal(signal.SIGKILL)
    process.wait()
    capsys.readouterr()
    found = train("base", bert, file, tmp_path / "run", more)
    said = capsys.readouterr().out
    cut, start = (int(said.split(word)[1].split()[0].strip(".:")) for word in ("after update", "from update"))
    assert 6 <= cut < 40 and 4 <= start <= cut and start % 4 == 0 and f": {cut - start} are repeated" in said
    whole = train("base", bert, file, tmp_path / "whole", more)
    assert found["updates"] == 40 and len(found["losses"]) == 40
    assert found["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    old, new = (
        AutoModel.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "run")
    )
    assert all(torch.allclose(old[name], new[name], atol=1e-5) for name in old)


def test_a_run_that_torchrun_ends_is_reported_with_its_log_and_done_again(tmp_path, file, bert):
    with pytest.raises(TutorialError, match="no_such_flag"):
        train("base", bert, file, tmp_path / "run", "--no_such_flag 1", processes=1)
    assert (tmp_path / "run" / "train.log").exists() and not (tmp_path / "run" / "done.json").exists()


def test_gathered_negatives_have_the_gradient_of_the_whole_batch(tmp_path, tiny_bert, tiny_m3):
    """2 and 3 processes against one; as FlagEmbedding gathers, the gradient is divided by their number."""
    worker = str(ROOT / "tests" / "gathered_worker.py")
    words = [sys.executable, worker, str(tiny_bert), str(tiny_m3), str(tmp_path)]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for processes in (2, 3):
        for mode in ("dense", "dense, taught", "unified"):
            loss, gradient, largest = found[f"{mode}, {processes} processes"]
            assert loss < 1e-5 and gradient < 1e-5 < largest
    _, gradient, largest = found["unmended, 3 processes"]
    assert gradient == pytest.approx(largest * (1 - 1 / 3), rel=0.01)


# ---------------------------------------------------------------- the silent failure

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="without --use_cpu this would train on the GPU")


def without_use_cpu(monkeypatch, *more):
    """Without the flag, and past the look at the GPUs that asks for it."""
    real = engine.words_of
    left_out = ("use_cpu", "negatives_cross_device")
    monkeypatch.setattr(
        engine, "words_of", lambda o: [*real({k: v for k, v in o.items() if k not in left_out}), *more]
    )


@no_gpu
def test_processes_that_train_alone_are_caught(tmp_path, file, bert, monkeypatch):
    without_use_cpu(monkeypatch)
    with pytest.raises(TutorialError, match=r"groups have the sizes \[1, 1\].*--use_cpu is missing"):
        train("base", bert, file, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "done.json").exists()


@no_gpu
def test_gradients_that_are_not_synchronised_are_caught(tmp_path, file, bert, monkeypatch):
    """With a process group but without --use_cpu both end with status 0 and different parameters."""
    without_use_cpu(monkeypatch, "--ddp_backend", "gloo")
    with pytest.raises(TutorialError, match="different parameters"):
        train("base", bert, file, tmp_path / "run")
    reports = [read_json(tmp_path / "run" / "reports" / f"rank-{n}.json") for n in range(2)]
    assert [report["group_size"] for report in reports] == [2, 2]
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "done.json").exists()
