"""The small word table: the same training as with the whole one, and a whole model after it."""

import dataclasses

import pytest
import torch
from helpers import gradients, relative_difference

from embedding_tutorial import training
from embedding_tutorial.encoder import Encoder, embed
from embedding_tutorial.finetune import TrainConfig
from embedding_tutorial.words import NAME, keep_rows, put_back, whole_state

CONFIG = TrainConfig(epochs=1, batch_size=8, max_length=96, token_budget=256, learning_rate=1e-3)


def start(folder, pairs, config=CONFIG, read=()):
    return training.start_run(
        folder, lambda encoder: training.tokenize_pairs(encoder, pairs), config, "cpu", read
    )


def seen_tokens(run):
    return sorted({token for name in ("query", "passage") for row in run.data[name] for token in row})


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_m3"])
def test_the_gradient_is_that_of_the_whole_table(model, pairs, request):
    folder = request.getfixturevalue(model)
    small, whole = start(folder, pairs[:8]), start(folder, pairs[:8], read=None)
    for run in (small, whole):
        training.compute_gradients(run, list(range(8)))
    seen = seen_tokens(small)
    a, b = gradients(small.encoder), gradients(whole.encoder)
    table = b[f"backbone.{NAME}"]
    assert 0 < len(seen) < len(table) and not table[[i for i in range(len(table)) if i not in seen]].any()
    assert relative_difference(a, b | {f"backbone.{NAME}": table[seen]}) < 1e-6


def test_training_equals_the_whole_table_without_decay_of_unseen_rows(tiny_bert, pairs):
    small, whole = start(tiny_bert, pairs[:16]), start(tiny_bert, pairs[:16], read=None)
    table = whole.encoder.backbone.get_input_embeddings().weight
    before, seen = table.detach().clone(), seen_tokens(small)
    unseen = [i for i in range(len(table)) if i not in seen]
    for _ in range(2):
        training.one_update(small)
        training.one_update(whole)
        with torch.no_grad():
            table[unseen] = before[unseen]  # decay off
    for name, w in whole_state(small.encoder).items():
        torch.testing.assert_close(w, whole.encoder.backbone.state_dict()[name], rtol=0, atol=1e-6, msg=name)
    assert torch.equal(whole_state(small.encoder)[NAME][unseen], before[unseen])
    assert not torch.equal(whole_state(small.encoder)[NAME][seen], before[seen])


def test_frozen_rows_are_read_and_never_trained(tiny_bert, pairs):
    held_out = [pair["query"] for pair in pairs[20:]]
    run, base = start(tiny_bert, pairs[:8], read=held_out), Encoder(tiny_bert, 96).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            embed(run.encoder.eval(), held_out), embed(base, held_out), rtol=0, atol=1e-6
        )
    trained = run.encoder.backbone.get_input_embeddings().weight
    frozen = run.encoder.small_table.rows[len(trained) :].clone()
    assert len(trained) == len(seen_tokens(run)) and len(frozen) > 0
    run.encoder.train()
    training.one_update(run)
    assert torch.equal(run.encoder.small_table.rows[len(trained) :], frozen)
    # the parameter is a view of the table that is read: the update is seen by both
    assert torch.equal(run.encoder.small_table.rows[: len(trained)], trained)


def test_put_back_is_the_whole_model_and_optimizer_and_state_hold_the_small_one(tiny_bert, pairs):
    run, base = start(tiny_bert, pairs[:8]), Encoder(tiny_bert, 96)
    training.one_update(run)
    size = len(seen_tokens(run))
    assert run.optimizer.state[run.encoder.backbone.get_input_embeddings().weight]["exp_avg"].shape[0] == size
    expected = whole_state(run.encoder)
    put_back(run.encoder)
    state = run.encoder.backbone.state_dict()
    assert [*state] == [*base.backbone.state_dict()] and state[NAME].shape == expected[NAME].shape
    assert all(torch.equal(w, expected[name]) for name, w in state.items())
    put_back(run.encoder)  # twice is once
    with torch.no_grad():
        embed(run.encoder, ["words that no training text has: zebra quartz"])


def test_a_text_outside_the_table_is_an_error_and_no_other_word(tiny_bert, pairs):
    encoder = Encoder(tiny_bert, 96)
    row = encoder.tokenize([pairs[0]["query"]])[0]
    keep_rows(encoder, [row])
    unseen = next(i for i in range(5, 10_000) if i not in row)
    with pytest.raises(IndexError), torch.no_grad():
        encoder([[row[0], unseen, row[-1]]])


def test_a_run_stopped_and_resumed_ends_bit_for_bit_like_one_that_was_not(tiny_m3, pairs, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=2, dropout=0.1, save_every=1)
    ends = {}
    for name, stops in (("whole", ()), ("stopped", (1, 3))):
        for stop in (*stops, None):
            encoder, _ = training.train(
                tiny_m3, pairs[:16], pairs[28:], config, tmp_path / name, progress=False, stop_after=stop
            )
        ends[name] = encoder.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends.values()), strict=True))
