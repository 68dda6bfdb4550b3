"""The engine: its gradients against plain PyTorch's, out of memory, bad numbers, whole runs, kill -9."""

import contextlib
import dataclasses
import json
import math
import shutil
import time

import kill_worker
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Spy, as_pair, gradients, little_space, relative_difference, unit
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from transformers import AutoModel

from embedding_tutorial import files, finetune, training
from embedding_tutorial.encoder import Encoder, embed, fingerprint, read_pooling, save_model
from embedding_tutorial.files import TutorialError
from embedding_tutorial.finetune import TrainConfig
from embedding_tutorial.pairs import read_mbpp, read_pairs, shared_texts, write_pairs
from embedding_tutorial.runs import checkpoint_epochs, load_state

SMALL = TrainConfig(epochs=2, batch_size=8, max_length=96, token_budget=256, learning_rate=1e-3)


# ---------------------------------------------------------------- the loss of a batch


def numbered(n, hard=0):
    """What `batch_loss` reads of n pairs whose texts all differ, the first with `hard` negatives."""
    ids = list(range(2 * n + hard))
    return {
        "query_id": ids[:n],
        "passage_id": ids[n : 2 * n],
        "neg_id": [ids[2 * n :], *[[]] * (n - 1)],
    }


@pytest.mark.parametrize("masks", [True, False])
def test_symmetric_loss_is_the_mean_of_both_directions_and_asks_only_the_positives(masks):
    q, p = unit(5, 8), unit(9, 8, seed=1)  # 4 hard negatives have no query of their own
    config = TrainConfig(temperature=0.1, symmetric=True, mask_duplicates=masks)
    loss, accuracy = training.batch_loss(torch.cat([q, p]), numbered(5, 4), range(5), config)
    scores, own = q @ p.T / 0.1, torch.arange(5)
    expected = (F.cross_entropy(scores, own) + F.cross_entropy(scores[:, :5].T, own)) / 2
    torch.testing.assert_close(loss, expected)
    assert accuracy == pytest.approx((scores.argmax(1) == own).double().mean().item())
    plain = dataclasses.replace(config, symmetric=False)
    one_way, _ = training.batch_loss(torch.cat([q, p]), numbered(5, 4), range(5), plain)
    torch.testing.assert_close(one_way, F.cross_entropy(scores, own))


def test_both_directions_leave_out_the_masked_cells():
    """Pairs 0 and 2 ask the same: neither passage is a negative for it, nor the question for them."""
    data = numbered(4)
    data["query_id"][2] = data["query_id"][0]
    q, p = unit(4, 8), unit(4, 8, seed=1)
    q[2] = q[0]
    scores, own = q @ p.T / 0.1, torch.arange(4)
    scores[0, 2] = scores[2, 0] = -math.inf
    loss, accuracy = training.batch_loss(
        torch.cat([q, p]), data, range(4), TrainConfig(temperature=0.1, symmetric=True)
    )
    torch.testing.assert_close(loss, (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2)
    assert accuracy == pytest.approx((scores.argmax(1) == own).double().mean().item())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_of_a_batch_equals_that_of_sentence_transformers(tiny_bert, symmetric):
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    peer = losses.MultipleNegativesRankingLoss(
        SentenceTransformer(str(tiny_bert), device="cpu"),
        scale=20,
        directions=directions,
        partition_mode="per_direction",
    )
    q, p = (3 * unit(7, 8, seed=0)).requires_grad_(), (2 * unit(7, 8, seed=3)).requires_grad_()
    vectors, config = F.normalize(torch.cat([q, p]), dim=-1), TrainConfig(symmetric=symmetric)
    loss, _ = training.batch_loss(vectors, numbered(7), range(7), config)
    expected = peer.compute_loss_from_embeddings([q, p], None)  # normalises them itself
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for a, b in zip(torch.autograd.grad(loss, (q, p)), torch.autograd.grad(expected, (q, p)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- gradients


def make_run(folder, pairs, config, double=False):
    run = training.start_run(folder, lambda encoder: training.tokenize_pairs(encoder, pairs), config, "cpu")
    if double:
        run.encoder.double()
    run.encoder.train()
    return run


def padded_reference(folder, data, batch, config, parts=None, dtype=torch.float64):
    """(loss, {name: gradient}) the plain way: pad everything to the longest text, transformers' own
    attention and position ids, cross-entropy; `parts` batches that do not see each other, averaged."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()
    pooling, pad = read_pooling(folder), model.config.pad_token_id
    total = 0
    for part in parts or [batch]:
        rows = training.batch_rows(data, part)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, pad)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(row), dtype=torch.long) for row in rows], True, 0
        )
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors = F.normalize(hidden[:, 0] if pooling == "cls" else means, dim=-1)
        scores = vectors[: len(part)] @ vectors[len(part) :].T / config.temperature
        total = total + F.cross_entropy(scores, torch.arange(len(part))) * len(part) / len(batch)
    total.backward()
    return total.item(), gradients(model)


WAYS = {
    "whole": ({}, None),
    "gradcache": ({"backward": "gradcache"}, None),
    "halves": ({"micro_batch": 8}, [list(range(8)), list(range(8, 16))]),
    "unequal parts of gradcache": (
        {"micro_batch": 12, "backward": "gradcache"},
        [list(range(12)), list(range(12, 16))],
    ),
}


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_m3"])
@pytest.mark.parametrize("way", WAYS)
def test_gradient_equals_one_big_padded_float64_batch(model, way, pairs, request):
    folder, (options, parts) = request.getfixturevalue(model), WAYS[way]
    config = TrainConfig(batch_size=16, max_length=128, token_budget=300, temperature=0.05, **options)
    batch = list(range(16))
    for double, tolerance in ((True, 1e-6), (False, 1e-3)):
        run = make_run(folder, pairs[:16], config, double)
        loss, _, passages = training.compute_gradients(run, batch)
        expected, reference = padded_reference(folder, run.data, batch, config, parts)
        assert loss == pytest.approx(expected, rel=tolerance)
        assert relative_difference(gradients(run.encoder.backbone), reference) < tolerance
        with torch.no_grad():
            again = embed(run.encoder, run.data["passage"])
        torch.testing.assert_close(passages, again, rtol=0, atol=1e-5)  # in the batch's order, for the queue


def test_halves_differ_from_the_whole_batch_because_they_do_not_see_each_other(tiny_bert, pairs):
    batch, config = list(range(16)), TrainConfig(batch_size=16, max_length=64)
    whole, halves = (
        make_run(tiny_bert, pairs[:16], dataclasses.replace(config, micro_batch=m)) for m in (None, 8)
    )
    assert training.compute_gradients(whole, batch)[0] > training.compute_gradients(halves, batch)[0] + 0.1


def test_gradient_equals_sentence_transformers_own_training_step(tiny_bert, pairs):
    config = TrainConfig(batch_size=12, max_length=128, token_budget=300)
    run = make_run(tiny_bert, pairs[:12], config, double=True)
    loss, _, _ = training.compute_gradients(run, list(range(12)))
    peer = SentenceTransformer(str(tiny_bert), device="cpu", model_kwargs={"dtype": torch.float64}).eval()
    peer.max_seq_length = 128
    features = [peer.preprocess([p[name] for p in pairs[:12]]) for name in ("query", "pos_doc")]
    expected = losses.MultipleNegativesRankingLoss(peer, scale=1 / config.temperature)(features, None)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    theirs = {name.split("auto_model.")[-1].split("model.")[-1]: g for name, g in gradients(peer).items()}
    assert relative_difference(gradients(run.encoder.backbone), theirs) < 1e-6


def test_with_dropout_gradcache_equals_the_whole_graph_when_both_draw_the_same(tiny_bert, pairs):
    """Both go through the same groups in the same order, so one seed gives both the same dropout."""
    config = TrainConfig(batch_size=16, max_length=128, token_budget=300, dropout=0.3)
    results = []
    for backward in ("whole", "gradcache"):
        run = make_run(tiny_bert, pairs[:16], dataclasses.replace(config, backward=backward), double=True)
        torch.manual_seed(7)
        results.append((*training.compute_gradients(run, list(range(16)))[:2], gradients(run.encoder)))
    (loss, accuracy, whole), (cached_loss, cached_accuracy, cached) = results
    assert cached_loss == pytest.approx(loss, rel=1e-10) and cached_accuracy == accuracy
    assert relative_difference(cached, whole) < 1e-9
    torch.manual_seed(8)  # other dropout: another gradient, so the equality above says something
    training.compute_gradients(run, list(range(16)))
    assert relative_difference(gradients(run.encoder), whole) > 0.05


@contextlib.contextmanager
def kept_for_backward():
    """Count the numbers that all live graphs keep for the backward pass: {"alive", "peak"}."""
    count = {"alive": 0, "peak": 0}

    class Kept:
        def __init__(self, tensor):
            self.tensor, self.size = tensor.detach(), tensor.numel()  # detached: else a circle keeps it
            count["alive"] += self.size
            count["peak"] = max(count["peak"], count["alive"])

        def __del__(self):
            count["alive"] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield count


def test_gradcache_holds_one_group_at_a_time(tiny_bert, pairs):
    """What autograd keeps for the backward pass, at its highest."""
    peaks = {}
    for backward in ("whole", "gradcache"):
        config = TrainConfig(batch_size=40, max_length=128, token_budget=200, backward=backward)
        run = make_run(tiny_bert, pairs, config)
        with kept_for_backward() as count:
            training.compute_gradients(run, list(range(40)))
        peaks[backward] = count["peak"]
    assert peaks["gradcache"] < peaks["whole"] / 5


def test_hard_negatives_are_further_columns_and_never_a_positive(tiny_bert, pairs):
    hard = [{**p, "neg": [pairs[20 + i]["pos_doc"], p["pos_doc"]][: i % 3]} for i, p in enumerate(pairs[:9])]
    config = TrainConfig(batch_size=9, max_length=128, token_budget=300)
    run = make_run(tiny_bert, hard, config, double=True)
    rows = training.batch_rows(run.data, list(range(9)))
    assert len(rows) == 9 + 9 + sum(len(p["neg"]) for p in hard)
    loss, _, passages = training.compute_gradients(run, list(range(9)))
    assert len(passages) == 9  # hard negatives do not enter the queue

    with torch.no_grad():
        q = embed(run.encoder, [p["query"] for p in hard])
        p = embed(run.encoder, [p["pos_doc"] for p in hard] + [n for p in hard for n in p["neg"]])
    scores = q @ p.T / config.temperature
    column, masked = 9, 0
    for pair in hard:
        for negative in pair["neg"]:
            for i, other in enumerate(hard):  # a copy of any query's own code is no negative of that query
                if negative == other["pos_doc"]:
                    scores[i, column] = -math.inf
                    masked += 1
            column += 1
    assert masked and loss == pytest.approx(F.cross_entropy(scores, torch.arange(9)).item(), rel=1e-9)


def test_duplicates_in_a_batch_are_masked_and_can_be_left_unmasked(tiny_bert, pairs):
    twice = [
        pairs[0],
        as_pair(pairs[0]["query"], "another answer"),
        as_pair("another question", pairs[0]["pos_doc"]),
        *pairs[1:4],
    ]
    cells = {(0, 1), (1, 0), (0, 2), (2, 0)}  # equal queries, equal codes
    run = make_run(tiny_bert, twice, TrainConfig(batch_size=6, max_length=128), double=True)
    with torch.no_grad():
        q = embed(run.encoder, [p["query"] for p in twice])
        p = embed(run.encoder, [p["pos_doc"] for p in twice])
    for masks in (True, False):
        scores = q @ p.T / run.config.temperature
        for cell in cells if masks else ():
            scores[cell] = -math.inf
        run.config = dataclasses.replace(run.config, mask_duplicates=masks)
        loss, _, _ = training.compute_gradients(run, list(range(6)))
        assert loss == pytest.approx(F.cross_entropy(scores, torch.arange(6)).item(), rel=1e-9)


def test_tokenize_pairs_numbers_equal_texts_equally(tiny_bert):
    data = training.tokenize_pairs(
        Encoder(tiny_bert, 64), [as_pair("a", "x", neg=["y", "x"]), as_pair("a", "y")]
    )
    assert data["query_id"][0] == data["query_id"][1] != data["passage_id"][0]
    assert data["neg_id"] == [[data["passage_id"][1], data["passage_id"][0]], []]
    assert data["neg"][0] == [data["passage"][1], data["passage"][0]] and data["neg"][1] == []


# ---------------------------------------------------------------- the queue


def test_queued_passages_are_stale_negatives_without_gradient(tiny_bert, pairs):
    """Update 2 sees update 1's passages as they were then, not as the changed weights would embed them."""
    config = TrainConfig(epochs=1, batch_size=10, queue=10, max_length=128, learning_rate=1e-2)
    run = make_run(tiny_bert, pairs[:20], config)
    first, second = (finetune.batch_of(u, 20, config) for u in (0, 1))
    with torch.no_grad():
        before = embed(run.encoder, [run.data["passage"][i] for i in first])
    training.one_update(run)
    torch.testing.assert_close(run.queue.vectors, before, rtol=0, atol=1e-5)
    assert not run.queue.vectors.requires_grad and len(run.queue.vectors) == 10

    q = embed(run.encoder, [run.data["query"][i] for i in second])
    p = embed(run.encoder, [run.data["passage"][i] for i in second])
    fresh = embed(run.encoder, [run.data["passage"][i] for i in first])
    expected, up_to_date = (
        F.cross_entropy(q @ torch.cat([p, old]).T / config.temperature, torch.arange(10))
        for old in (before, fresh.detach())
    )
    loss, _, _ = training.compute_gradients(run, second)
    ours = gradients(run.encoder)
    run.optimizer.zero_grad(set_to_none=True)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert abs(up_to_date.item() - loss) > 1e-3  # the staleness is real
    assert relative_difference(ours, gradients(run.encoder)) < 1e-4


def test_a_query_never_meets_its_own_earlier_passage_as_a_negative(tiny_bert, pairs):
    config = TrainConfig(batch_size=6, queue=6, max_length=64)
    run = make_run(tiny_bert, pairs[:6], config, double=True)
    plain, _, passages = training.compute_gradients(run, list(range(6)))
    run.queue.push(passages, run.data["passage_id"], run.data["query_id"])  # the same six, from "last epoch"
    loss, _, _ = training.compute_gradients(run, list(range(6)))
    q = embed(run.encoder, run.data["query"])
    scores = q @ torch.cat([passages, passages]).T / config.temperature
    scores[torch.arange(6), torch.arange(6) + 6] = -math.inf
    assert loss == pytest.approx(F.cross_entropy(scores, torch.arange(6)).item(), rel=1e-9) and loss > plain


def test_another_answer_to_the_same_question_in_the_queue_is_no_negative(tiny_bert, pairs):
    twice = [*pairs[:4], as_pair(pairs[0]["query"], "another answer"), *pairs[5:8]]
    config = TrainConfig(batch_size=4, queue=4, max_length=64)
    run = make_run(tiny_bert, twice, config, double=True)
    with torch.no_grad():
        q = embed(run.encoder, [p["query"] for p in twice])
        p = embed(run.encoder, [p["pos_doc"] for p in twice])
    run.queue.push(p[4:], run.data["passage_id"][4:], run.data["query_id"][4:])
    scores = q[:4] @ p.T / config.temperature
    scores[0, 4] = -math.inf
    loss, _, _ = training.compute_gradients(run, [0, 1, 2, 3])
    assert loss == pytest.approx(F.cross_entropy(scores, torch.arange(4)).item(), rel=1e-9)


# ---------------------------------------------------------------- schedule and batches


def test_weight_decay_spares_biases_and_layernorm(tiny_bert, pairs):
    run = make_run(tiny_bert, pairs[:8], dataclasses.replace(SMALL, weight_decay=0.3))
    decay = {id(w): group["weight_decay"] for group in run.optimizer.param_groups for w in group["params"]}
    for name, w in run.encoder.named_parameters():
        assert decay[id(w)] == (0 if name.endswith("bias") or "LayerNorm" in name else 0.3), name


def test_one_update_is_clipped_adamw(tiny_bert, pairs):
    config = dataclasses.replace(SMALL, clip=0.01, epochs=1)
    run = make_run(tiny_bert, pairs[:8], config)
    twin = make_run(tiny_bert, pairs[:8], config)
    training.one_update(run)
    training.compute_gradients(twin, finetune.batch_of(0, 8, config))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients(twin.encoder).values()))
    assert norm > 0.01
    for group in twin.optimizer.param_groups:
        group["lr"] = finetune.learning_rate(0, 8, config)
    for w in twin.encoder.parameters():
        if w.grad is not None:
            w.grad *= 0.01 / norm
    twin.optimizer.step()
    for (name, a), b in zip(run.encoder.named_parameters(), twin.encoder.parameters(), strict=True):
        # AdamW's first step divides each gradient by its own size, hence the tolerance of tiny entries
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=name)
    assert run.update == 1 and run.history["learning_rates"] == [finetune.learning_rate(0, 8, config)]


# ---------------------------------------------------------------- out of memory, bad numbers


def memory_of(encoder, limit, monkeypatch):
    """Let the encoder raise as CUDA does above `limit` tokens at once; returns the list of sizes it saw."""
    real, seen = encoder.forward, []

    def forward(rows):
        seen.append(sum(map(len, rows)))
        if seen[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(rows)

    monkeypatch.setattr(encoder, "forward", forward)
    return seen


def test_out_of_memory_of_the_whole_graph_takes_gradcache_and_keeps_the_groups(
    tiny_bert, pairs, monkeypatch, capsys
):
    """Memory follows all live graphs: halving the groups would not help, and isn't tried."""
    config = TrainConfig(batch_size=16, max_length=96, token_budget=256)
    batch = list(range(16))
    run, calm = (make_run(tiny_bert, pairs[:16], config, double=True) for _ in range(2))
    real = run.encoder.forward
    with kept_for_backward() as whole:
        expected = training.compute_gradients(calm, batch)

    def forward(rows):  # raises as CUDA does where the graphs that are alive hold too much already
        if count["alive"] > whole["peak"] / 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(rows)

    monkeypatch.setattr(run.encoder, "forward", forward)
    with kept_for_backward() as count:
        loss, *_ = training.compute_gradients_safely(run, batch)
    assert (run.backward, run.token_budget) == ("gradcache", 256) and count["alive"] == 0
    assert loss == pytest.approx(expected[0], rel=1e-10)
    assert relative_difference(gradients(run.encoder), gradients(calm.encoder)) < 1e-9
    said = capsys.readouterr().out
    assert "update 1: GradCache from here on, update repeated" in said and "halved" not in said
    with kept_for_backward() as count:
        training.compute_gradients_safely(run, batch)  # the next update does not try the whole graph again
    assert capsys.readouterr().out == ""


def test_out_of_memory_halves_the_groups_and_nothing_else(tiny_bert, pairs, monkeypatch, capsys):
    config = TrainConfig(batch_size=16, max_length=96, token_budget=1024, backward="gradcache")
    batch = list(range(16))
    run, calm = (make_run(tiny_bert, pairs[:16], config, double=True) for _ in range(2))
    expected = training.compute_gradients(calm, batch)
    seen = memory_of(run.encoder, 300, monkeypatch)
    monkeypatch.setattr(training, "batch_loss", spy := Spy(training.batch_loss))
    loss, accuracy, passages = training.compute_gradients_safely(run, batch)

    assert run.token_budget == 256 and max(seen) > 300 and run.config == config
    assert [call[2] for call in spy.calls] == [batch]  # the 15 negatives of the recipe, once
    assert (loss, accuracy) == pytest.approx(expected[:2], rel=1e-10)
    torch.testing.assert_close(passages, expected[2])
    assert relative_difference(gradients(run.encoder), gradients(calm.encoder)) < 1e-9
    said = capsys.readouterr().out
    assert "update 1: token budget halved to 512" in said and "halved to 256, update repeated" in said


def test_out_of_memory_replays_the_dropout_of_the_first_try(tiny_bert, pairs, monkeypatch):
    """A failed try draws random numbers; the repetition starts from the state before it."""
    config = TrainConfig(batch_size=8, max_length=96, token_budget=512, dropout=0.3, backward="gradcache")
    run = make_run(tiny_bert, pairs[:8], config)
    real, fail = run.encoder.forward, [True]

    def forward(rows):
        out = real(rows)  # draws, then fails once
        if fail.pop() if fail else False:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out

    monkeypatch.setattr(run.encoder, "forward", forward)
    torch.manual_seed(5)
    loss = training.compute_gradients_safely(run, list(range(8)))[0]
    twin = make_run(tiny_bert, pairs[:8], dataclasses.replace(config, token_budget=256))
    torch.manual_seed(5)
    assert loss == training.compute_gradients(twin, list(range(8)))[0] and run.token_budget == 256


def test_a_text_that_does_not_fit_at_all_is_an_error_that_says_so(tiny_bert, pairs, monkeypatch):
    run = make_run(tiny_bert, pairs[:8], TrainConfig(batch_size=8, max_length=96, token_budget=1024))
    seen = memory_of(run.encoder, 10, monkeypatch)
    with pytest.raises(
        TutorialError, match="GradCache and a single text of 96 tokens.*checkpointing=True, a smaller max_l"
    ):
        training.compute_gradients_safely(run, list(range(8)))
    assert len(seen) < 50


def weights_of(run):
    return {name: w.detach().clone() for name, w in run.encoder.named_parameters()}


def test_a_non_finite_loss_skips_the_update_and_counts_it(tiny_bert, pairs, monkeypatch):
    run = make_run(tiny_bert, pairs[:16], dataclasses.replace(SMALL, queue=16))
    before = weights_of(run)
    real = training.batch_loss

    def broken(*args, **kwargs):
        loss, accuracy = real(*args, **kwargs)
        return loss * math.nan, accuracy

    monkeypatch.setattr(training, "batch_loss", broken)
    training.one_update(run)
    training.one_update(run)
    assert all(torch.equal(w, before[name]) for name, w in weights_of(run).items())
    assert run.history["skipped_updates"] == [1, 2] and run.history["step_losses"] == [None, None]
    assert run.bad_in_a_row == 2 and run.update == 2 and len(run.queue.vectors) == 0

    monkeypatch.setattr(training, "batch_loss", real)
    training.one_update(run)
    assert (
        run.bad_in_a_row == 0 and math.isfinite(run.history["step_losses"][2]) and len(run.queue.vectors) == 8
    )
    assert not any(w.isnan().any() for w in run.encoder.parameters())
    assert not all(torch.equal(w, before[name]) for name, w in weights_of(run).items())


def test_a_finite_loss_with_a_non_finite_gradient_is_skipped_too(tiny_bert, pairs):
    run = make_run(tiny_bert, pairs[:8], SMALL)
    before = weights_of(run)
    run.encoder.backbone.encoder.layer[0].output.dense.weight.register_hook(lambda grad: grad * math.inf)
    training.one_update(run)
    assert run.history["skipped_updates"] == [1] and math.isfinite(run.history["step_losses"][0])
    assert all(torch.equal(w, before[name]) for name, w in weights_of(run).items())


def test_an_overflow_of_fp16_repeats_the_batch_with_a_smaller_scale(tiny_bert, pairs):
    """A scale of 2^140 makes every gradient infinite; halved often enough, the update is the plain one."""
    run, twin = (make_run(tiny_bert, pairs[:16], SMALL) for _ in range(2))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-20)
    for module in run.encoder.backbone.encoder.layer:  # as fp16 would: no gradient beyond 2^70
        module.output.dense.weight.register_hook(lambda g: g.masked_fill(g.abs() > 2.0**70, math.inf))
    for _ in range(2):
        training.one_update(run)
        training.one_update(twin)
    assert run.history["repeated_updates"] == [1] and run.history["skipped_updates"] == []
    assert run.scaler.get_scale() < 2.0**90 and run.update == 2
    for (name, a), b in zip(run.encoder.named_parameters(), twin.encoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)


def test_an_overflow_that_no_scale_mends_is_skipped(tiny_bert, pairs):
    run = make_run(tiny_bert, pairs[:8], SMALL)
    run.scaler = torch.amp.GradScaler("cpu")
    run.encoder.backbone.encoder.layer[0].output.dense.weight.register_hook(lambda grad: grad * math.inf)
    training.one_update(run)
    assert run.history["skipped_updates"] == [1] and run.update == 1


def test_too_many_bad_updates_in_a_row_stop_the_run_and_name_the_rows(tiny_bert, pairs, monkeypatch):
    config = dataclasses.replace(SMALL, epochs=9)
    monkeypatch.setattr(training, "MAX_BAD_UPDATES", 3)
    run = make_run(tiny_bert, pairs[:16], config)
    monkeypatch.setattr(training, "batch_loss", lambda vectors, *rest: (vectors.sum() * math.nan, 0.0))
    for _ in range(3):
        training.one_update(run)
    rows = sorted(i + 1 for i in finetune.batch_of(3, 16, config))
    with pytest.raises(TutorialError) as error:
        training.one_update(run)
    assert f"4 updates in a row had a non-finite loss or gradient, the last with rows {rows}" in str(
        error.value
    )
    assert "lower the learning rate" in str(error.value)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_m3"])
def test_train_leaves_what_the_tutorial_promises(model, pairs, tmp_path, request, capsys):
    base, run = request.getfixturevalue(model), tmp_path / "run"
    config = dataclasses.replace(SMALL, epochs=3, keep_checkpoints=2, learning_rate=2e-3)
    encoder, history = training.train(base, pairs[:20], pairs[28:], config, run)
    assert sorted(p.name for p in run.iterdir()) == [
        "best_checkpoint",
        "checkpoint-epoch-2",
        "checkpoint-epoch-3",
        "config.json",
        "fine-tuned",
        "resume.pt",
        "training_history.json",
    ]
    assert not encoder.training
    assert "9/9" in capsys.readouterr().out  # the progress bar

    assert json.loads((run / "training_history.json").read_text()) == history
    assert set(history) == {
        "step_losses",
        "step_accs",
        "learning_rates",
        "epoch",
        "epoch_loss",
        "epoch_acc",
        "eval",
        "skipped_updates",
        "repeated_updates",
    }
    assert len(history["step_losses"]) == len(history["step_accs"]) == len(history["learning_rates"]) == 9
    assert history["epoch"] == [1, 2, 3] and [e["epoch"] for e in history["eval"]] == [1, 2, 3]
    assert history["skipped_updates"] == []
    assert history["learning_rates"] == [finetune.learning_rate(u, 20, config) for u in range(9)]
    sizes = [8, 8, 4]  # an epoch's loss is the mean over pairs, not over batches
    assert history["epoch_loss"][1] == pytest.approx(np.dot(history["step_losses"][3:6], sizes) / 20)
    assert history["epoch_acc"][2] == pytest.approx(np.dot(history["step_accs"][6:9], sizes) / 20)
    assert np.mean(history["step_losses"][6:]) < np.mean(history["step_losses"][:3])  # it learns

    # the last evaluation is that of the last weights, the best checkpoint that of the best epoch
    for name, entry in (
        ("fine-tuned", history["eval"][-1]),
        ("checkpoint-epoch-2", history["eval"][1]),
        ("best_checkpoint", max(history["eval"], key=lambda e: e["mrr"])),
    ):
        result = finetune.evaluate(Encoder(run / name, config.max_length), pairs[28:])
        assert (result["recall@1"], result["mrr"]) == (entry["recall@1"], entry["mrr"]), name
    with torch.no_grad():
        ours = embed(encoder, ["x", "def f(): pass"])
        final = embed(Encoder(run / "fine-tuned", config.max_length).eval(), ["x", "def f(): pass"])
    assert torch.equal(ours, final)
    recorded = json.loads((run / "config.json").read_text())
    assert recorded.items() >= dataclasses.asdict(config).items()
    assert (recorded["train_pairs"], recorded["val_pairs"]) == (20, 12)
    assert recorded["base"] == fingerprint(base)


def test_equal_seeds_give_equal_weights_and_another_seed_does_not(tiny_bert, pairs, tmp_path):
    config = dataclasses.replace(SMALL, dropout=0.1, queue=8)
    runs = {"a": config, "b": config, "c": dataclasses.replace(config, seed=1)}
    for name, recipe in runs.items():
        torch.manual_seed(hash(name) % 1000)  # what ran before must not matter
        training.train(tiny_bert, pairs[:20], pairs[28:], recipe, tmp_path / name, progress=False)
    weights = {name: (tmp_path / name / "fine-tuned" / "model.safetensors").read_bytes() for name in runs}
    assert weights["a"] == weights["b"] != weights["c"]


def test_a_finished_run_is_not_computed_again_and_says_so(tiny_bert, pairs, tmp_path, monkeypatch, capsys):
    first, history = training.train(
        tiny_bert, pairs[:16], pairs[28:], SMALL, tmp_path / "run", progress=False
    )
    before = kill_worker.contents(tmp_path / "run")
    capsys.readouterr()

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(training, "compute_gradients", never)
    begin = time.perf_counter()
    again, history_again = training.train(
        tiny_bert, pairs[:16], pairs[28:], SMALL, tmp_path / "run", progress=False
    )
    assert time.perf_counter() - begin < 5
    assert "is complete: nothing was computed again" in capsys.readouterr().out
    assert history_again == history and kill_worker.contents(tmp_path / "run") == before
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_finished_run_keeps_no_moments_and_needs_no_room(tiny_bert, pairs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    training.train(tiny_bert, pairs[:16], pairs[28:], SMALL, run, progress=False)
    assert (run / "resume.pt").stat().st_size < 20_000
    little_space(monkeypatch, free=0)
    training.train(tiny_bert, pairs[:16], pairs[28:], SMALL, run, progress=False)


@pytest.mark.parametrize("damage", ["missing", "cut", "exchanged", "tokenizer"])
def test_a_finished_run_whose_model_is_not_its_own_is_refused(damage, tiny_bert, pairs, tmp_path):
    run = tmp_path / "run"
    training.train(tiny_bert, pairs[:16], pairs[28:], SMALL, run, progress=False)
    weights = run / "fine-tuned" / "model.safetensors"
    if damage == "missing":
        shutil.rmtree(run / "fine-tuned")
    elif damage == "tokenizer":
        config = run / "fine-tuned" / "tokenizer_config.json"
        config.write_text(config.read_text() + " ")
    else:
        new = weights.read_bytes()[:-100] if damage == "cut" else (tiny_bert / weights.name).read_bytes()
        weights.unlink()  # it is a hard link
        weights.write_bytes(new)
    expected = "(is complete, but|was changed after).*Delete .*run to train again"
    with pytest.raises(TutorialError, match=expected):
        training.train(tiny_bert, pairs[:16], pairs[28:], SMALL, run, progress=False)


def test_what_sets_memory_and_disk_alone_may_change_between_a_kill_and_the_next_call(
    tiny_bert, pairs, tmp_path, capsys
):
    config = dataclasses.replace(SMALL, epochs=3)
    whole, _ = training.train(tiny_bert, pairs[:16], pairs[28:], config, tmp_path / "a", progress=False)
    training.train(tiny_bert, pairs[:16], pairs[28:], config, tmp_path / "b", progress=False, stop_after=3)
    capsys.readouterr()
    spare = {"backward": "gradcache", "token_budget": 96, "keep_checkpoints": 1, "save_every": 1}
    other = dataclasses.replace(config, **spare, save_minutes=1.0, checkpointing=True)
    assert set(training.FREE_TO_CHANGE) == {*spare, "save_minutes", "checkpointing"}
    again, _ = training.train(tiny_bert, pairs[:16], pairs[28:], other, tmp_path / "b", progress=False)
    assert "after update 2" in capsys.readouterr().out
    with torch.no_grad():  # the last digits differ, and AdamW makes a step of a gradient of mere rounding
        a, b = (embed(model, [pair["query"] for pair in pairs]) for model in (whole, again))
    assert ((a * b).sum(dim=1) > 0.999).all()


def test_checkpointing_gives_the_same_gradient(tiny_bert, pairs):
    config = TrainConfig(batch_size=16, max_length=96, token_budget=300)
    runs = [
        make_run(tiny_bert, pairs[:16], dataclasses.replace(config, checkpointing=way), double=True)
        for way in (False, True)
    ]
    for run in runs:
        training.compute_gradients(run, list(range(16)))
    assert runs[1].encoder.backbone.is_activation_checkpointing
    assert relative_difference(*(gradients(run.encoder) for run in runs)) < 1e-12


def test_states_are_saved_at_most_every_so_many_minutes(tiny_bert, pairs, tmp_path, monkeypatch):
    clock, saves = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    real, epoch = training.save_state, training.close_epoch

    def close(*args):
        clock[0] += 60  # an epoch takes a minute
        epoch(*args)

    monkeypatch.setattr(training, "close_epoch", close)
    monkeypatch.setattr(
        training, "save_state", lambda folder, state: saves.append(state["update"]) or real(folder, state)
    )
    config = dataclasses.replace(SMALL, epochs=6, save_minutes=2.0)
    training.train(tiny_bert, pairs[:16], pairs[28:], config, tmp_path / "run", progress=False)
    assert saves == [4, 8, 12]  # after epochs 2 and 4, and the end


@pytest.mark.parametrize("change", ["recipe", "data", "cut", "base"])
def test_other_settings_move_the_old_run_aside(change, tiny_bert, tiny_m3, pairs, tmp_path, capsys):
    run, short = tmp_path / "run", dataclasses.replace(SMALL, epochs=1)
    first = pairs[:20] if change == "cut" else pairs[:16]  # the same list of pairs, cut elsewhere
    held_out = pairs[20:32] if change == "cut" else pairs[28:]
    training.train(tiny_bert, first, held_out, short, run, progress=False)
    old = kill_worker.contents(run)
    capsys.readouterr()
    recipe = dataclasses.replace(short, temperature=0.1) if change == "recipe" else short
    training.train(
        tiny_m3 if change == "base" else tiny_bert,
        {"data": pairs[1:17], "cut": pairs[:24]}.get(change, pairs[:16]),
        held_out[4:] if change == "cut" else held_out,
        recipe,
        run,
        progress=False,
    )
    assert kill_worker.contents(tmp_path / "run.previous") == old != kill_worker.contents(run)
    name = {"recipe": "temperature", "base": "the base model's weights, tokenizer or pooling"}
    name = name.get(change, "the pairs")
    assert f"had other settings ({name}): moved to run.previous" in capsys.readouterr().out


TOUCHED = {  # file of the base, a word in it, another one
    "tokenizer": ("tokenizer_config.json", '"do_lower_case": true', '"do_lower_case": false'),
    "vocabulary": ("tokenizer.json", "[UNK]", "[unk]"),
    "pooling": (
        "1_Pooling/config.json",
        '"pooling_mode_mean_tokens": true',
        '"pooling_mode_cls_token": true',
    ),
    "settings": ("sentence_bert_config.json", "512", "128"),
}


@pytest.mark.parametrize("change", [*TOUCHED, "max_length"])
def test_an_interrupted_run_is_not_continued_with_another_tokenizer_pooling_or_length(
    change, tiny_bert, pairs, tmp_path, capsys
):
    """Moved aside with the reason, and then what a run from nothing gives."""
    base, config = shutil.copytree(tiny_bert, tmp_path / "base"), SMALL
    training.train(base, pairs[:16], pairs[28:], config, tmp_path / "run", progress=False, stop_after=3)
    assert load_state(tmp_path / "run")["update"] == 2
    if change == "max_length":
        config, reason = dataclasses.replace(config, max_length=48), "max_length"
    else:
        (name, old, new), reason = TOUCHED[change], "the base model's weights, tokenizer or pooling"
        text = (base / name).read_text()
        assert old in text
        (base / name).write_text(text.replace(old, new))
    capsys.readouterr()
    training.train(base, pairs[:16], pairs[28:], config, tmp_path / "run", progress=False)
    said = capsys.readouterr().out
    assert f"had other settings ({reason}): moved to run.previous" in said and "Continuing" not in said
    training.train(base, pairs[:16], pairs[28:], config, tmp_path / "fresh", progress=False)
    assert kill_worker.differences(tmp_path / "run", tmp_path / "fresh") == []


def test_every_epoch_is_evaluated_and_the_best_one_kept(tiny_bert, pairs, tmp_path, monkeypatch):
    """MRR 0.2, 0.9, 0.4: the best checkpoint is the second's, though its own folder is pruned."""
    scores, saved = iter([0.2, 0.9, 0.4]), {}
    monkeypatch.setattr(training, "evaluate", lambda *args, **kwargs: {"recall@1": 0.1, "mrr": next(scores)})
    real = save_model

    def save(encoder, folder):
        real(encoder, folder)
        saved[folder.name] = (folder / "model.safetensors").read_bytes()

    monkeypatch.setattr(training, "save_model", save)
    config = dataclasses.replace(SMALL, epochs=3, keep_checkpoints=1)
    _, history = training.train(tiny_bert, pairs[:16], pairs[28:], config, tmp_path / "run", progress=False)
    assert [e["mrr"] for e in history["eval"]] == [0.2, 0.9, 0.4]
    assert checkpoint_epochs(tmp_path / "run") == [3]
    best, final = (
        (tmp_path / "run" / name / "model.safetensors").read_bytes()
        for name in ("best_checkpoint", "fine-tuned")
    )
    assert best == saved["checkpoint-epoch-2"] and final == saved["checkpoint-epoch-3"] != best


def test_a_skipped_update_leaves_no_nan_in_the_history(tiny_bert, pairs, tmp_path, monkeypatch):
    real, count = training.batch_loss, iter(range(100))

    def sometimes(*args, **kwargs):
        loss, accuracy = real(*args, **kwargs)
        return loss * (math.nan if next(count) in (0, 2, 3) else 1), accuracy

    monkeypatch.setattr(training, "batch_loss", sometimes)
    training.train(tiny_bert, pairs[:16], pairs[28:], SMALL, tmp_path / "run", progress=False)
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert history["skipped_updates"] == [1, 3, 4]
    assert history["epoch_loss"] == [history["step_losses"][1], None]


# ---------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def kill_base(tmp_path_factory):
    base = tmp_path_factory.mktemp("kill") / "base"
    base.mkdir()
    return kill_worker.tiny_bert_model(
        base, [text for p in kill_worker.run_pairs()[0] for text in p.values() if isinstance(text, str)]
    )


def worker(*args):
    output, _ = (process := kill_worker.start(*args)).communicate()
    assert process.returncode == 0, output
    return output.strip().splitlines()[-1]


def test_kill_9_at_random_moments_changes_nothing(kill_base, tmp_path):
    """A new process trains, is killed three times and ends bit-identical to one that was left alone."""
    moments = worker("random", kill_base, tmp_path)
    assert "-9" in moments  # at the very end, it may have been too late
    assert load_state(tmp_path / "run")["update"] == 15
    assert kill_worker.differences(tmp_path / "run", tmp_path / "reference") == [], moments


def test_kill_9_before_every_single_rename_changes_nothing(kill_base, tmp_path):
    """Every file and folder of a run becomes visible by a rename: die before each of them in turn."""
    kills = int(worker("sweep", kill_base, tmp_path))
    assert kills > 10
    wrong = {
        n: kill_worker.differences(tmp_path / str(n), tmp_path / str(kills + 1)) for n in range(1, kills + 1)
    }
    assert {n: names for n, names in wrong.items() if names} == {}


def test_a_disk_that_fills_up_leaves_the_last_state_and_the_run_goes_on(
    tiny_bert, pairs, tmp_path, monkeypatch
):
    config = dataclasses.replace(SMALL, dropout=0.1, save_every=1)
    training.train(tiny_bert, pairs[:16], pairs[28:], config, tmp_path / "reference", progress=False)
    real = files.os.fsync
    for full_at in (2, 3, 7, 16):
        run, count = tmp_path / f"run-{full_at}", iter(range(1, 1000))

        def fsync(handle, count=count, full_at=full_at):
            if next(count) >= full_at:
                raise OSError(28, "No space left on device")
            real(handle)

        monkeypatch.setattr(files.os, "fsync", fsync)
        with pytest.raises(TutorialError, match="the disk is full .*No space left"):
            training.train(tiny_bert, pairs[:16], pairs[28:], config, run, progress=False)
        monkeypatch.setattr(files.os, "fsync", real)
        state = load_state(run)
        assert state is None if full_at == 2 else state["update"] >= 1
        assert not [p for p in run.rglob("*") if p.name.endswith(".tmp")]
        training.train(tiny_bert, pairs[:16], pairs[28:], config, run, progress=False)
        assert kill_worker.differences(run, tmp_path / "reference") == []


# ---------------------------------------------------------------- stop_after


@pytest.mark.parametrize("save_every", [0, 2])
@pytest.mark.parametrize("stop_after", [1, 3, 5, 6])
def test_stopping_loses_what_a_kill_loses_and_the_next_call_goes_on(
    tiny_bert, pairs, tmp_path, capsys, stop_after, save_every
):
    """6 updates in epochs of 2, or of 3 with save_every: what was not saved is made again, bit for bit."""
    per_epoch = 3 if save_every else 2
    config = dataclasses.replace(
        SMALL, epochs=6 // per_epoch, batch_size=4, dropout=0.1, queue=8, save_every=save_every
    )
    data = pairs[: 4 * per_epoch], pairs[28:]
    first, whole = training.train(tiny_bert, *data, config, tmp_path / "whole", progress=False)
    capsys.readouterr()

    encoder, history = training.train(
        tiny_bert, *data, config, tmp_path / "run", progress=False, stop_after=stop_after
    )
    assert not encoder.training and history["step_losses"] == whole["step_losses"][:stop_after]
    saves = {2, 3, 4, 6} if save_every else {2, 4, 6}  # after each epoch, and after every second update
    saved = max((n for n in saves if n <= stop_after), default=0)
    state = load_state(tmp_path / "run")
    assert (state["update"] if state else 0) == saved
    assert (tmp_path / "run" / "fine-tuned").exists() == (stop_after == 6)

    encoder, history = training.train(tiny_bert, *data, config, tmp_path / "run", progress=False)
    said = "is complete" if saved == 6 else f"Continuing {tmp_path / 'run'} after update {saved}"
    assert (said in capsys.readouterr().out) == (saved > 0)
    assert history == whole
    for a, b in zip(first.state_dict().values(), encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert kill_worker.differences(tmp_path / "run", tmp_path / "whole") == []


def test_stopping_leaves_the_files_of_a_kill(tiny_bert, pairs, tmp_path, monkeypatch):
    """The same files, byte for byte, as a run that dies at the beginning of the update after."""
    config = dataclasses.replace(SMALL, epochs=2, batch_size=8, dropout=0.1, save_every=2)
    training.train(
        tiny_bert, pairs[:24], pairs[28:], config, tmp_path / "stopped", progress=False, stop_after=5
    )
    real = training.one_update

    def dies(run):
        if run.update == 5:
            raise KeyboardInterrupt
        real(run)

    monkeypatch.setattr(training, "one_update", dies)
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny_bert, pairs[:24], pairs[28:], config, tmp_path / "killed", progress=False)
    assert kill_worker.differences(tmp_path / "stopped", tmp_path / "killed") == []
    assert load_state(tmp_path / "killed")["update"] == 5 - 1


def test_stopping_at_an_update_that_is_past_or_never_comes(tiny_bert, pairs, tmp_path):
    config = dataclasses.replace(SMALL, epochs=1, batch_size=8)
    _, history = training.train(
        tiny_bert, pairs[:16], pairs[28:], config, tmp_path / "run", progress=False, stop_after=0
    )
    assert history["step_losses"] == [] and load_state(tmp_path / "run") is None
    _, history = training.train(
        tiny_bert, pairs[:16], pairs[28:], config, tmp_path / "run", progress=False, stop_after=99
    )
    assert len(history["step_losses"]) == 2 and (tmp_path / "run" / "fine-tuned").is_dir()


# ---------------------------------------------------------------- the real data and the real small model


def test_sanitized_mbpp_is_split_and_trained_for_two_steps(mbpp_file, minilm, tmp_path):
    pairs = read_mbpp(mbpp_file)
    train, validation = finetune.split_pairs(pairs, seed=42)
    assert (len(pairs), len(train), len(validation)) == (427, 341, 86)
    write_pairs(tmp_path / "mbpp_train.jsonl", train)
    assert read_pairs(tmp_path / "mbpp_train.jsonl") == train
    shared = shared_texts(train, validation)
    assert not shared["pos_doc"] and len(shared["query"]) <= 2
    config = TrainConfig(epochs=1, batch_size=8, max_length=128, token_budget=1024)
    _, history = training.train(minilm, train[:16], validation[:16], config, tmp_path / "run", progress=False)
    assert len(history["step_losses"]) == 2 and all(map(math.isfinite, history["step_losses"]))
    assert history["eval"][0]["mrr"] > 0.9
