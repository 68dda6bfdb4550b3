"""Texts to vectors, and a model as a folder of files, against PyTorch, transformers, sentence-transformers
and FlagEmbedding."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tree, unit
from sentence_transformers import SentenceTransformer
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoTokenizer

from embedding_tutorial import encoder as encoder_module
from embedding_tutorial.encoder import (
    HEAD_FILES,
    LENGTH_FILE,
    Encoder,
    Layout,
    LookUp,
    autocast,
    companions,
    embed,
    equal_runs,
    fingerprint,
    flash_attention,
    group_by_length,
    in_order,
    packed_attention,
    random_state,
    read_pooling,
    rectangular_attention,
    save_model,
    set_random_state,
    tokenize,
    vectors_elsewhere,
    weights_file,
)
from embedding_tutorial.files import TutorialError, read_json, write_json
from embedding_tutorial.retrieval import token_identity

# ---------------------------------------------------------------- tokens and groups


def test_tokenize_equals_the_tokenizer_one_text_at_a_time(tiny_m3, texts):
    tokenizer = AutoTokenizer.from_pretrained(tiny_m3)
    rows = tokenize(tokenizer, texts, 20)
    assert rows == [tokenizer(text, truncation=True, max_length=20)["input_ids"] for text in texts]
    assert max(map(len, rows)) == 20 and all(row[0] == 0 and row[-1] == 2 for row in rows)
    assert tokenize(tokenizer, [], 20) == []
    assert tokenize(tokenizer, texts * 60, 20) == rows * 60, "more texts than go to the tokenizer at once"


def test_groups_hold_each_text_once_shortest_first_and_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 90, 200).tolist() + [500, 5]
    groups = group_by_length(lengths, 128)
    order = [i for group in groups for i in group]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths)
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert all(total <= 128 for total in sums[:-1])
    assert groups[-1] == [200] and sums[-1] == 500  # a text longer than the budget is a group of its own
    nexts = [lengths[group[0]] for group in groups[1:]]
    assert all(a + b > 128 for a, b in zip(sums[:-1], nexts, strict=True))  # no group closes too early
    assert group_by_length([], 10) == []


def test_equal_runs_by_hand():
    assert equal_runs([3, 3, 5, 3]) == [(0, 2, 3), (6, 1, 5), (11, 1, 3)]


def varlen_by_hand(q, k, v, ends, ends_k, longest, longest_k, *, scale):
    """What torch.nn.attention.varlen.varlen_attn computes: (tokens, heads, d), text by text."""
    assert ends is ends_k and ends.dtype == torch.int32 and longest == longest_k == ends.diff().max()
    texts = zip(*(x.split(ends.diff().tolist()) for x in (q, k, v)), strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv), scale=scale).transpose(0, 1)
            for qkv in texts
        ]
    )


@pytest.mark.parametrize("kind", ["packed", "rectangular", "flash"])
def test_attention_within_texts_equals_one_masked_attention(kind, monkeypatch):
    lengths = [2, 2, 2, 5, 7, 7]
    q, k, v = (unit(1, 3, sum(lengths), 4, seed=s).requires_grad_() for s in range(3))
    layout = Layout(lengths, "cpu")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    if kind == "packed":
        out = packed_attention(None, q, k, v, None, layout, scaling=0.7)[0]
    else:
        way = flash_attention if kind == "flash" else rectangular_attention
        out = way(*(x[0].transpose(0, 1) for x in (q, k, v)), layout, 0.7, 0.0)[None]
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=text[:, None] == text[None], scale=0.7)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    upstream = unit(*out.shape, seed=9)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), upstream),
        torch.autograd.grad(expected.transpose(1, 2), (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def on_fake_cuda(monkeypatch, capability):
    """A torch that believes in a GPU of this capability; its tensors have shapes and no numbers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return FakeTensorMode()


@pytest.mark.parametrize(
    "capability, kind, dropout, way",
    [
        ((9, 0), torch.bfloat16, 0.0, "flash"),
        ((8, 0), torch.float16, 0.0, "flash"),
        ((7, 5), torch.float16, 0.0, "rectangular"),  # no flash before Ampere
        ((9, 0), torch.float32, 0.0, "rectangular"),
        ((9, 0), torch.bfloat16, 0.1, "rectangular"),
    ],
)
def test_on_cuda_real_groups_take_the_way_without_pad_cells(
    capability, kind, dropout, way, monkeypatch, pairs, minilm
):
    """Groups of the data's own lengths: with flash, no mask and no cell beyond the tokens."""
    rows = Encoder(minilm).tokenize([text for p in pairs for text in (p["query"], p["pos_doc"])])
    groups = group_by_length([len(row) for row in rows], 2048)
    calls = []
    for name in ("flash_attention", "rectangular_attention"):
        monkeypatch.setattr(
            encoder_module, name, lambda q, *rest, name=name: calls.append((name, len(q))) or q
        )
    with on_fake_cuda(monkeypatch, capability):
        for group in groups:
            lengths = [len(rows[i]) for i in group]
            q = torch.empty(1, 12, sum(lengths), 32, dtype=kind, device="cuda")
            out = packed_attention(None, q, q, q, None, Layout(lengths, "cuda"), dropout=dropout)[0]
            assert out.shape == (1, sum(lengths), 12, 32)
    assert calls == [(f"{way}_attention", sum(len(rows[i]) for i in group)) for group in groups]
    assert len(groups) > 1 and len({len(row) for row in rows}) > 8


def test_flash_attention_hands_torch_what_it_takes(monkeypatch):
    """torch's own shape check of the operator, on tensors without numbers."""
    with on_fake_cuda(monkeypatch, (9, 0)):
        q = torch.empty(1, 16, 12, 64, dtype=torch.bfloat16, device="cuda")
        layout = Layout([3, 4, 5], "cuda")
        layout.ends = torch.empty(4, dtype=torch.int32, device="cuda")
        out, _ = packed_attention(None, q, q, q, None, layout, scaling=0.125)
        assert out.shape == (1, 12, 16, 64) and out.dtype == torch.bfloat16


def test_pooling_is_read_from_the_model(tiny_bert, tiny_m3, tmp_path):
    assert (read_pooling(tiny_bert), read_pooling(tiny_m3)) == ("mean", "cls")
    write_json(tmp_path / "new" / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    assert read_pooling(tmp_path / "new") == "cls"
    write_json(tmp_path / "max" / "1_Pooling" / "config.json", {"pooling_mode_max_tokens": True})
    with pytest.raises(TutorialError, match="1_Pooling/config.json does not ask for CLS or mean"):
        read_pooling(tmp_path / "max")
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    for other in (both, [], {"pooling_mode": ["cls"]}):
        write_json(tmp_path / "max" / "1_Pooling" / "config.json", other)
        with pytest.raises(TutorialError, match="does not ask"):
            read_pooling(tmp_path / "max")


def test_a_model_with_a_step_of_its_own_after_the_pooling_is_refused(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "labse")
    parts = ("models.Transformer", "models.Pooling", "models.Dense", "base.modules.normalize.Normalize")
    write_json(folder / "modules.json", [{"type": f"sentence_transformers.{part}"} for part in parts])
    with pytest.raises(TutorialError, match="labse/modules.json asks for Dense"):
        Encoder(folder)
    for damaged in ({"a": 1}, ["x"], None):
        write_json(folder / "modules.json", damaged)
        with pytest.raises(TutorialError, match="labse/modules.json"):
            Encoder(folder)


# ---------------------------------------------------------------- the encoder


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_m3", "minilm"])
def test_vectors_equal_those_of_sentence_transformers(model, texts, request):
    folder = request.getfixturevalue(model)
    encoder = Encoder(folder, max_length=256).eval()
    peer = SentenceTransformer(str(folder), device="cpu")
    peer.max_seq_length = 256
    with torch.no_grad():
        ours = embed(encoder, texts, token_budget=300)
    theirs = peer.encode(texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    spread = (ours @ ours.T).min().item()
    assert spread < 0.95  # a model whose vectors all agree would make this test say nothing


def test_embed_keeps_the_order_and_does_not_depend_on_the_budget(tiny_m3, texts):
    encoder = Encoder(tiny_m3, max_length=128).eval().double()
    alone = torch.cat([encoder([row]) for row in encoder.tokenize(texts)])
    for budget in (1, 100, 500, 10**6):
        torch.testing.assert_close(embed(encoder, texts, budget), alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(embed(encoder, encoder.tokenize(texts)), alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(embed(encoder, texts[::-1]), alone.flip(0), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="at least one text"):
        embed(encoder, [])


def test_in_order_undoes_the_grouping():
    groups = [[2, 0], [3], [1, 4]]
    parts = [torch.tensor([[float(i)] for i in group]) for group in groups]
    assert in_order(groups, parts).flatten().tolist() == [0, 1, 2, 3, 4]


def test_encoder_settings(tiny_bert, tiny_m3, tmp_path):
    assert Encoder(tiny_bert).backbone.config.hidden_dropout_prob == 0
    own = Encoder(tiny_bert, dropout=None).backbone.config
    assert (own.hidden_dropout_prob, own.attention_probs_dropout_prob) == (0.1, 0.1)
    assert Encoder(tiny_m3, max_length=8192).max_length == 8192
    with pytest.raises(TutorialError, match="max_length 513 is more than the 512 tokens"):
        Encoder(tiny_bert, max_length=513)
    shutil.copytree(tiny_bert, tmp_path / "other")
    write_json(tmp_path / "other" / "config.json", {"model_type": "gpt2"})
    with pytest.raises(TutorialError, match="is a gpt2; this code knows bert"):
        Encoder(tmp_path / "other")


def test_dropout_acts_in_training_only(tiny_bert, texts):
    encoder = Encoder(tiny_bert, max_length=64, dropout=0.5)
    with torch.no_grad():
        encoder.train()
        assert not torch.equal(embed(encoder, texts), embed(encoder, texts))
        encoder.eval()
        assert torch.equal(embed(encoder, texts), embed(encoder, texts))


# ---------------------------------------------------------------- gradients


def test_random_state_round_trip():
    state = random_state(torch.device("cpu"))
    first = torch.rand(5)
    set_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(5), first)


# ---------------------------------------------------------------- schedule and batches


def test_autocast(tiny_bert):
    encoder = Encoder(tiny_bert, 64)
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(encoder, precision):
            assert (a @ b).dtype == dtype


def test_bf16_vectors_are_float32_and_close(tiny_bert, texts):
    encoder = Encoder(tiny_bert, 64).eval()
    with torch.no_grad():
        exact = embed(encoder, texts)
        with autocast(encoder, "bf16"):
            rough = embed(encoder, texts)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_m3"])
def test_bf16_on_a_cpu_sees_few_lengths_and_what_fills_a_row_is_not_read(model, texts, monkeypatch, request):
    encoder = Encoder(request.getfixturevalue(model), 64)
    rows, seen = encoder.tokenize(texts), []
    encoder.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )

    def vectors_and_gradients(precision):
        encoder.zero_grad()
        with autocast(encoder, precision):
            vectors = encoder(rows)
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
        return vectors.detach(), [x.grad.clone() for x in encoder.parameters() if x.grad is not None]

    tokens = sum(map(len, rows))
    encoder.bfloat16().float()  # weights that bf16 holds, so that they survive it below
    vectors, gradients = vectors_and_gradients("fp32")
    vectors_and_gradients("bf16")
    encoder.bfloat16()(rows)
    encoder.float()
    filled = -(-tokens // 64) * 64
    assert tokens < filled and seen == [tokens, filled, filled]

    monkeypatch.setattr(Encoder, "fillers", lambda self, rows: [rows[-1][:1]] * 5)
    others, their_gradients = vectors_and_gradients("fp32")
    assert seen[-1] == tokens + 5 and len(others) == len(texts)
    torch.testing.assert_close(others, vectors)
    torch.testing.assert_close(their_gradients, gradients)


# ---------------------------------------------------------------- out of memory, bad numbers


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_lookup_has_the_gradient_of_an_embedding_and_adds_to_what_is_there(kind):
    table = torch.randn(50, 4, dtype=kind, requires_grad=True)
    same = table.detach().clone().requires_grad_()
    for ids in (
        torch.tensor([3, 7, 3, 49]),
        torch.tensor([0, 3]),
    ):  # token 3 twice in a call, and in both calls
        weight = torch.randn(len(ids), 4, dtype=kind)
        (LookUp.apply(table, ids) * weight).sum().backward()
        (torch.nn.functional.embedding(ids, same) * weight).sum().backward()
    assert torch.allclose(table.grad, same.grad, rtol=0, atol=1e-6) and table.grad.abs().sum() > 0


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_m3"])
def test_a_saved_model_opens_everywhere_with_the_same_vectors(model, texts, tmp_path, request):
    base = request.getfixturevalue(model)
    texts = texts[:-1]  # the last is longer than 512 tokens, where the libraries' limits differ
    encoder = Encoder(base, max_length=512)
    with torch.no_grad():  # not the base's weights any more
        for w in encoder.parameters():
            w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
        ours = embed(encoder.eval(), texts).numpy()
    save_model(encoder, tmp_path / "saved")
    found = vectors_elsewhere(tmp_path / "saved", texts)
    expected = {"AutoModel", "SentenceTransformer", "FlagModel"} | (
        {"BGEM3FlagModel"} if model == "tiny_m3" else set()
    )
    assert found.keys() == expected
    for library, vectors in found.items():
        np.testing.assert_allclose(vectors, ours, rtol=0, atol=1e-5, err_msg=library)
    again = Encoder(tmp_path / "saved", max_length=512).eval()
    with torch.no_grad():
        assert np.array_equal(embed(again, texts).numpy(), ours)
    unchanged = Encoder(base, max_length=512).eval()
    with torch.no_grad():
        assert np.abs(embed(unchanged, texts).numpy() - ours).max() > 0.01


def test_a_long_text_is_read_by_sentence_transformers_as_far_as_in_training(minilm, tmp_path):
    """MiniLM's own file cuts at 256 tokens; it was trained here, and judged, with 512."""
    encoder, text = Encoder(minilm, max_length=512).eval(), ["first " * 300 + "and the last word"]
    save_model(encoder, tmp_path / "saved")
    with torch.no_grad():
        ours = embed(encoder, text).numpy()
    for folder, same in ((minilm, False), (tmp_path / "saved", True)):
        theirs = SentenceTransformer(str(folder), device="cpu").encode(text, show_progress_bar=False)
        assert (np.abs(theirs - ours).max() < 1e-5) == same
    assert token_identity(minilm, 512) == token_identity(tmp_path / "saved", 512)
    save_model(Encoder(minilm, max_length=64), tmp_path / "short")  # never lowered
    assert read_json(tmp_path / "short" / LENGTH_FILE) == read_json(minilm / LENGTH_FILE)


def test_the_two_heads_of_bge_m3_are_carried_and_work(tiny_m3, pairs, tmp_path):
    from FlagEmbedding import BGEM3FlagModel

    save_model(Encoder(tiny_m3, max_length=512), tmp_path / "saved")
    for name in (
        *HEAD_FILES,
        "sentencepiece.bpe.model",
        "tokenizer.json",
        "modules.json",
        "config.json",
    ):
        assert (tmp_path / "saved" / name).read_bytes() == (tiny_m3 / name).read_bytes(), name
    assert not (tmp_path / "saved" / "pytorch_model.bin").exists()
    texts = [pair["query"] for pair in pairs[:3]]
    outputs = [
        BGEM3FlagModel(str(folder), use_fp16=False, devices="cpu").encode(
            texts, return_dense=True, return_sparse=True, return_colbert_vecs=True
        )
        for folder in (tiny_m3, tmp_path / "saved")
    ]
    assert all(outputs[1]["lexical_weights"])
    for a, b in zip(outputs[0]["lexical_weights"], outputs[1]["lexical_weights"], strict=True):
        assert a.keys() == b.keys() and np.allclose(list(a.values()), list(b.values()))
    for a, b in zip(outputs[0]["colbert_vecs"], outputs[1]["colbert_vecs"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# ---------------------------------------------------------------- models


def test_weights_file(tmp_path):
    with pytest.raises(TutorialError, match="holds neither model.safetensors nor pytorch_model.bin"):
        weights_file(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert weights_file(tmp_path).name == "pytorch_model.bin"
    (tmp_path / "model.safetensors").touch()
    assert weights_file(tmp_path).name == "model.safetensors"


# What `tiny_m3` holds: all that is copied with a model, and its weights.
FILES = [
    "pytorch_model.bin",
    "1_Pooling/config.json",
    "colbert_linear.pt",
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "sparse_linear.pt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
ABOUT_THE_MODEL = ("README.md", "onnx/config.json", ".cache/x.json", "imgs/a.json", ".gitattributes")


@pytest.mark.parametrize("name", FILES)
def test_the_fingerprint_changes_with_every_file_that_is_copied_with_a_model(tiny_m3, tmp_path, name):
    model = shutil.copytree(tiny_m3, tmp_path / "model")
    before = fingerprint(model)
    assert before == fingerprint(tiny_m3) and len(before) == 16  # the place does not matter
    for other in ABOUT_THE_MODEL:
        (model / other).parent.mkdir(exist_ok=True)
        (model / other).write_text("{}")
    assert fingerprint(model) == before
    content = bytearray((model / name).read_bytes())
    content[len(content) // 2] ^= 1
    (model / name).write_bytes(content)
    changed = fingerprint(model)
    assert changed != before
    if name != "pytorch_model.bin":
        (model / name).unlink()
        assert fingerprint(model) not in (before, changed)


def test_the_fingerprint_knows_which_file_holds_what(tiny_m3, tmp_path):
    model = shutil.copytree(tiny_m3, tmp_path / "model")
    before = fingerprint(model)
    (model / "vocab.txt").write_text("one more file")
    more = fingerprint(model)
    (model / "vocab.txt").rename(model / "merges.txt")
    assert len({before, more, fingerprint(model)}) == 3


def test_companions_are_everything_but_weights_and_a_saved_model_holds_them(tiny_m3, tmp_path):
    base = shutil.copytree(tiny_m3, tmp_path / "base")
    for name in (*ABOUT_THE_MODEL, "model.safetensors"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    inside = sorted(name for name, content in tree(tiny_m3).items() if content is not None)
    assert sorted(FILES) == inside  # or the test above leaves one out
    assert companions(base) == sorted(FILES[1:])
    (base / "model.safetensors").unlink()
    save_model(Encoder(base, 64), tmp_path / "saved")
    saved = {name: content for name, content in tree(tmp_path / "saved").items() if content is not None}
    assert saved.keys() == {*FILES[1:], "model.safetensors"}
    assert all(
        content == (tiny_m3 / n).read_bytes() for n, content in saved.items() if n != "model.safetensors"
    )
    assert companions(tmp_path / "saved") == companions(base)
