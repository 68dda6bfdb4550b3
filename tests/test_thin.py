"""LoRA: what is trained, what is saved, and a run that was stopped."""

import dataclasses

import pytest
import torch
from test_training import SMALL

from embedding_tutorial import training
from embedding_tutorial.encoder import Encoder, embed, vectors_elsewhere
from embedding_tutorial.thin import LAYERS, lora_layers

CONFIG = dataclasses.replace(SMALL, lora_rank=4, save_every=1)


def trained(base, pairs, folder, stops=(), **changes):
    for stop in (*stops, None):
        encoder, _ = training.train(
            base,
            pairs[:16],
            pairs[28:],
            dataclasses.replace(CONFIG, **changes),
            folder,
            progress=False,
            stop_after=stop,
        )
    return encoder


@pytest.mark.parametrize("way", [{}, {"backward": "gradcache"}, {"checkpointing": True}])
def test_only_linear_layers_are_changed_and_the_saved_model_is_an_ordinary_one(tiny_m3, pairs, tmp_path, way):
    encoder, base = trained(tiny_m3, pairs, tmp_path / "run", **way), Encoder(tiny_m3, 96)
    state, before = encoder.state_dict(), base.state_dict()
    assert [*state] == [*before] and not lora_layers(encoder.backbone)
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    layers = {name for name in state if name.endswith(tuple(f"{layer}.weight" for layer in LAYERS))}
    assert changed == {name for name in layers if "pooler" not in name}
    assert all(w.requires_grad for w in encoder.parameters())
    saved = Encoder(tmp_path / "run" / "fine-tuned", 96).eval()
    texts = [pair["query"] for pair in pairs[:3]]
    with torch.no_grad():
        ours = embed(encoder, texts)
        torch.testing.assert_close(embed(saved, texts), ours, rtol=0, atol=1e-6)
    theirs = vectors_elsewhere(tmp_path / "run" / "fine-tuned", texts)["AutoModel"]
    torch.testing.assert_close(torch.tensor(theirs), ours, rtol=0, atol=1e-5)


def test_the_moments_are_those_of_the_thin_matrices(tiny_m3, pairs):
    run = training.start_run(
        tiny_m3, lambda encoder: training.tokenize_pairs(encoder, pairs[:8]), CONFIG, "cpu", ()
    )
    training.one_update(run)
    sizes = {
        len(state["exp_avg"].squeeze().shape) and min(state["exp_avg"].shape)
        for state in run.optimizer.state.values()
    }
    assert sizes == {4} and len(run.optimizer.state) == 2 * len(lora_layers(run.encoder.backbone)) - 2


def test_a_run_stopped_and_resumed_ends_bit_for_bit_like_one_that_was_not(tiny_m3, pairs, tmp_path):
    ends = [
        trained(tiny_m3, pairs, tmp_path / name, stops).state_dict()
        for name, stops in (("a", ()), ("b", (1, 3)))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))


def test_the_rank_is_part_of_what_a_run_is(tiny_m3, pairs, tmp_path, capsys):
    trained(tiny_m3, pairs, tmp_path / "run")
    trained(tiny_m3, pairs, tmp_path / "run", lora_rank=2)
    assert "had other settings (lora_rank)" in capsys.readouterr().out
