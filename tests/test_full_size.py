"""benchmarks/full_size.py and memory_ladder.py, tiny: each stage, the JSON, the counting, the README."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import full_size  # noqa: E402
import memory_ladder  # noqa: E402

from embedding_tutorial import assets  # noqa: E402
from embedding_tutorial.encoder import Encoder  # noqa: E402
from embedding_tutorial.files import read_json  # noqa: E402
from embedding_tutorial.pairs import read_mbpp  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("full-size")


@pytest.fixture(scope="module")
def result(folder):
    """What the whole script leaves. The run goes on in a fresh process, as every stage does by itself."""
    really, out = full_size.fresh_process, folder / "full_size.json"
    words = ["--smoke", "--folder", folder / "kept", "--data", common.POCKET_PAIRS, "--out", out]

    def here(args, name):
        return really(args, name) if name == "resumed" else (full_size.worker(args, name), 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_size, "fresh_process", here)
        patch.setattr(sys, "argv", ["full_size.py", *map(str, words)])
        full_size.main()
    return read_json(out)


def test_every_stage_has_its_row(result, folder):
    assert list(result["stages"]) == list(full_size.STAGES)
    for name, row in result["stages"].items():
        assert row["kind"] == ("counted" if name == "ladder" else "measured")
        assert row["seconds"] > 0 and row["peak_gb"] > 0.05 and row["name"]
        assert 0 < row["disk_gb"] <= row["disk_peak_gb"] < 0.1
    assert result["machine"]["versions"]["torch"] and result["machine"]["instructions"] is not None
    assert str(folder) not in json.dumps(result) and str(ROOT) not in json.dumps(result)
    built = result["stages"]["build"]
    assert built["vocabulary"] == common.SMOKE_SHAPE["vocab_size"]
    assert built["parameters"] == 30522 * 32 + 8194 * 32 + 32 * 3 + 2 * 8544 + 32 * 33


def test_the_full_profile_is_trained_and_going_on_after_a_kill_changes_nothing(result):
    stages = result["stages"]
    half, rest, one = (stages[name] for name in ("stopped", "resumed", "uninterrupted"))
    assert [len(row["updates"]) for row in (half, rest, one)] == [1, 1, 2]
    assert one["same weights"] is True
    assert half["losses"] == one["losses"][:1] and rest["losses"] == one["losses"]
    assert [u["tokens"] for u in half["updates"] + rest["updates"]] == [u["tokens"] for u in one["updates"]]
    # The whole graph gives the loss of GradCache, up to the rounding of bf16.
    assert stages["whole"]["losses"] == pytest.approx(half["losses"], rel=1e-2)
    config = full_size.config_of(Namespace(device="cpu", batch_size=80))
    assert (config.backward, config.token_budget, config.save_every) == ("gradcache", 512, 1)


def test_an_epoch_is_scaled_by_tokens(result):
    stages, epoch = result["stages"], result["epoch"]
    updates = [u for name in ("stopped", "resumed", "uninterrupted") for u in stages[name]["updates"]]
    rate = min(u["seconds"] / u["tokens"] for u in updates)  # the quickest: other work only adds
    assert epoch["kind"] == "scaled" and epoch["pairs"] == 341
    assert epoch["seconds"] == pytest.approx(rate * epoch["tokens"])


def test_what_is_saved_opens_elsewhere_and_holds_the_mean(result, folder):
    found = result["stages"]["opened"]["difference"]
    assert set(found) == {"AutoModel", "SentenceTransformer", "FlagModel", "BGEM3FlagModel"}
    assert max(found.values()) < 1e-5
    places = (folder / "kept" / name for name in ("bge-m3", "run/fine-tuned", "run/merged"))
    base, tuned, merged = (Encoder(place).state_dict() for place in places)
    assert any(not torch.equal(base[name], tuned[name]) for name in base)
    for name, w in merged.items():
        assert torch.allclose(w, (base[name] + tuned[name]) / 2, atol=1e-7), name
    assert "subset" in result["stages"]["searched"]["task"]


def test_the_files_are_those_that_are_published(result, folder):
    base = folder / "kept" / "bge-m3"
    assert assets._bge_m3_problems(base) == []
    assert not list(base.glob("*.safetensors"))
    weights = torch.load(base / "pytorch_model.bin", weights_only=True)
    assert weights["embeddings.word_embeddings.weight"].shape == (30522, 32)
    config = read_json(base / "config.json")
    assert [config[f"{name}_token_id"] for name in ("bos", "pad", "eos")] == [0, 1, 2]


def test_the_tokenizer_reads_text_as_xlm_roberta_does(result, folder):
    tokenizer = Encoder(folder / "kept" / "bge-m3").tokenizer
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("def f(x): return x 汉字")["input_ids"])
    assert pieces[0] == "<s>" and pieces[-1] == "</s>" and "▁return" in pieces
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (1, 3, 30521)
    pair = tokenizer("x", "x")["input_ids"]
    assert pair.count(2) == 3 and pair.count(0) == 1  # <s> a </s> </s> b </s>


def test_a_pair_of_mbpp_has_about_the_tokens_that_it_has_in_xlm_roberta(result, folder, mbpp_file):
    encoder, pairs = Encoder(folder / "kept" / "bge-m3"), read_mbpp(mbpp_file)
    rows = [row for side in ("query", "pos_doc") for row in encoder.tokenize([pair[side] for pair in pairs])]
    assert 85 < sum(map(len, rows)) / len(pairs) < 95


# ---------------------------------------------------------------- the ladder


def test_the_ladder_descends(result):
    reported, *rows = result["ladder"]
    assert (reported["gb"], reported["kind"]) == (45, "reported")
    assert len(rows) == len(memory_ladder.RUNGS) and {row["kind"] for row in rows} == {"counted"}
    updates = [row["update_gb"] for row in rows]
    assert updates == sorted(updates, reverse=True) and len(set(updates)) == len(updates)
    assert all(row["gb"] == max(row["update_gb"], row["loading_gb"]) for row in rows)


def test_the_ladder_counts_what_can_be_counted_by_hand(result):
    """fp32 weights, gradients and AdamW's two moments: 16 bytes a parameter, but the pooler has no gradient.

    What the small word table saves is those 16 bytes of each row that never occurs, at least.
    """
    parameters, pooler = result["stages"]["build"]["parameters"], 32 * 33
    padded, packed, cached, small, again, adafactor, lora = (row["update_gb"] for row in result["ladder"][1:])
    fixed = (16 * (parameters - pooler) + 4 * pooler) / 1e9
    assert fixed < cached < 1.5 * fixed < padded
    rows_that_occur = 6000  # at most: the learnt pieces
    assert cached - small > 16 * 32 * (30522 - rows_that_occur) / 1e9
    assert lora < adafactor < again < small


def test_counter_knows_what_is_alive():
    with memory_ladder.Counter() as counter:
        weight = torch.nn.Parameter(torch.empty(256, 256, device="meta"))
        size = 4 * 256 * 256
        assert counter.alive == size
        view = weight.detach()[3:5]
        assert counter.alive == size  # a view has no memory of its own
        kept = torch.tanh(view @ weight)  # the graph keeps tanh's result; the product before it is gone
        small = 4 * 2 * 256
        assert counter.alive == size + small and counter.peak == size + 2 * small
        loss = kept.sum()
        del kept
        assert counter.alive == size + small + 512  # a number takes a block
        loss.backward()
        assert counter.alive == 2 * size + 512 and weight.grad.shape == (256, 256)
        assert loss.item() == 1.0 and bool(torch.isfinite(loss))
        assert loss.cpu().device.type == "cpu"
        counter.reset()
        assert counter.peak == counter.alive
    assert torch.empty(256, device="meta").device.type == "meta" and counter.peak == counter.alive


def test_autocast_put_in_place_of_cudas():
    layer = torch.nn.Linear(4, 4, device="meta")
    x = torch.empty(2, 4, device="meta")
    with memory_ladder.CudaAutocast() as autocast:
        assert layer(x).dtype == torch.bfloat16 and torch.nn.functional.layer_norm(x, (4,)).dtype == x.dtype
        assert set(autocast.copies) == set(layer.parameters())  # made once, as autocast's cache does
    assert not autocast.copies and layer(x).dtype == torch.float32


def test_the_engine_is_as_it_was_after_counting(result):
    engine = memory_ladder.engine
    assert engine.compute_gradients_safely.__module__ == "embedding_tutorial.training"
    assert memory_ladder.encoders.has_flash.__module__ == "embedding_tutorial.encoder"
    assert memory_ladder.finetune.autocast is memory_ladder.encoders.autocast


# ---------------------------------------------------------------- around it


def test_text_and_figure(result, tmp_path):
    title = memory_ladder.draw(result, tmp_path / "ladder.png")
    assert "45 GB" in title and imread(tmp_path / "ladder.png").size
    big = {"name": "whole", "kind": "ended: too much RAM", "peak_gb": 22.1, "disk_gb": 1, "disk_peak_gb": 2}
    text = full_size.readme_text(result | {"stages": {**result["stages"], "whole": big}}, title)
    for words in ("bit for bit", "scaled", "counted", "reported", "measured", "ended: too much RAM", title):
        assert words in text
    assert "None" not in text and "nan" not in text and text.count("\n| ") > 15


def arguments(folder, **changes):
    return Namespace(folder=folder, base=folder / "bge-m3", device="cpu", limit_gb=22, **changes)


def test_a_stage_that_takes_too_much_memory_is_ended(tmp_path):
    args = arguments(tmp_path)
    args.limit_gb = 0.05  # less than Python with torch
    row, _ = full_size.fresh_process(args, "mixed")
    assert row["kind"] == "ended: too much RAM" and row["peak_gb"] > 0.05


def test_a_stage_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="mixed ended with status 1"):
        full_size.fresh_process(arguments(tmp_path), "mixed")


def test_stages_can_be_run_again_alone(result, folder, tmp_path, monkeypatch):
    out = tmp_path / "full_size.json"
    out.write_text(json.dumps(result), encoding="utf-8")
    words = ["--smoke", "--folder", folder / "kept", "--data", common.POCKET_PAIRS, "--out", out]
    monkeypatch.setattr(sys, "argv", ["full_size.py", *map(str, words), "--only", "mixed"])
    monkeypatch.setattr(full_size, "fresh_process", lambda args, name: (full_size.worker(args, name), 0.0))
    full_size.main()
    again = read_json(out)
    assert again["stages"]["mixed"] != result["stages"]["mixed"]
    assert again["stages"]["build"] == result["stages"]["build"] and again["ladder"] == result["ladder"]


@pytest.mark.parametrize("name", full_size.PEERS)
def test_one_update_of_the_peers(result, folder, name):
    sizes = {"batch_size": 4, "updates": 2, "smoke": True, "data": common.POCKET_PAIRS}
    row = full_size.worker(arguments(folder / "kept", **sizes), name)
    (update,) = row["updates"]
    assert row["precision"] == "fp32" and update["seconds"] > 0 and update["pairs"] == 4
    own = full_size.train(arguments(folder / "kept", **sizes), f"of-{name}", 1, precision="fp32")
    assert update["real_tokens"] == own["updates"][0]["tokens"]


def test_disk_counts_a_file_with_two_names_once(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1_000_000))
    once = common.disk_gb(tmp_path)
    os.link(tmp_path / "a", tmp_path / "b")
    assert common.disk_gb(tmp_path) == once > 0.0009
