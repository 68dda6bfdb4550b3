"""What the notebooks print beside the lesson, and the mean of several runs."""

import numpy as np
import torch
from helpers import as_pair
from safetensors.torch import load_file

from embedding_tutorial import reports
from embedding_tutorial.encoder import Encoder
from embedding_tutorial.files import ROOT, read_json
from embedding_tutorial.finetune import TrainConfig


def test_averaged_is_the_mean_of_runs_with_other_seeds(tiny_bert, pairs, tmp_path):
    config = TrainConfig(epochs=1, batch_size=8, max_length=64, learning_rate=1e-3)
    run = tmp_path / "run"
    model = reports.averaged_model(tiny_bert, pairs[:8], pairs[28:], config, run, "cpu", runs=3)
    folders = [tmp_path / f"run-seed-{seed}" for seed in (42, 43, 44)]
    assert sorted(tmp_path.iterdir()) == [run, *folders] and not model.training
    states = [load_file(folder / "fine-tuned" / "model.safetensors") for folder in folders]
    saved = load_file(run / "averaged" / "model.safetensors")
    for name, w in model.backbone.state_dict().items():
        torch.testing.assert_close(w, torch.stack([state[name] for state in states]).mean(dim=0))
        assert torch.equal(w, saved[name])
    assert not torch.equal(*(states[i]["encoder.layer.0.output.dense.weight"] for i in (0, 1)))
    for folder in folders:  # of a run that only gives its weights, no checkpoint and no moments stay
        left = {p.name for p in folder.iterdir()}
        assert left == {"fine-tuned", "resume.pt", "config.json", "training_history.json"}
    again = reports.averaged_model(tiny_bert, pairs[:8], pairs[28:], config, run, "cpu", runs=3)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    Encoder(run / "averaged")


def test_averaged_with_rewrites_has_folders_of_its_own(tiny_bert, pairs, tmp_path):
    config, source = TrainConfig(epochs=1, batch_size=8, max_length=64), ROOT / "data" / "pocket_mbpp.json"
    for rewrites_of in (None, source):
        reports.averaged_model(
            tiny_bert, pairs[:8], pairs[28:], config, tmp_path / "run", "cpu", 1, rewrites_of=rewrites_of
        )
    plain, rewritten = (
        read_json(tmp_path / f"run{kind}-seed-42" / "config.json") for kind in ("", "-rewrites")
    )
    assert plain["data"] != rewritten["data"] and plain["train_pairs"] == rewritten["train_pairs"] == 8


def test_labels_are_short_in_any_language():
    assert reports.short_label(as_pair("Sum the first numbers of a list", "")) == "Sum the first numbers of …"
    assert reports.short_label(as_pair("怎样把一个列表倒过来" * 20, "")) == "怎样把一个列表倒过来怎 …"


def test_the_queries_that_moved_most_are_named_with_what_was_found():
    pairs = [as_pair(f"query {i}", f"import re\n\ndef code_{i}(x):\n    return x") for i in range(4)]
    code = [pair["pos_doc"] for pair in pairs]
    before = {"ranks": np.array([1, 4, 1, 2]), "top": [code[0], code[3], code[2], code[0]]}
    after = {"ranks": np.array([1, 1, 2, 2]), "top": [code[0], code[1], code[3], code[0]]}
    assert reports.changed_queries(pairs, before, after, count=2).split("\n") == [
        "1 queries rank better than before, 1 worse. The 2 that moved most:",
        "",
        "query 1",
        "  rank 4 → 1",
        "  before, wrong: code_3(x)",
        "  after, right: code_1(x)",
        "",
        "query 2",
        "  rank 1 → 2",
        "  before, right: code_2(x)",
        "  after, wrong: code_3(x)",
        "",
    ]


def test_short_texts():
    code = "import re\n\n\ndef f(a, b=1):\n\n    c = a\n    return c\n"
    assert reports.preview(code, 2) == "    def f(a, b=1):\n        c = a"
    assert reports.preview("x = 1\ny = 2") == "    x = 1\n    y = 2"
    assert reports.signature(code) == "f(a, b=1)"
    assert reports.short_label(as_pair("one two three four five six", "")) == "one two three four five …"
    assert reports.interval((0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert reports.interval((0.5, -0.25, 0.75), sign=True) == "+0.500 [-0.250, +0.750]"


def test_flat_vectors_share_one_set_of_axes(tiny_bert, pairs):
    models = {"base": Encoder(tiny_bert, 64).eval(), "same": Encoder(tiny_bert, 64).eval()}
    found = reports.flat_vectors(models, pairs[:5])
    assert found.keys() == models.keys() and [v.shape for v in found["base"]] == [(5, 2), (5, 2)]
    np.testing.assert_allclose(found["base"], found["same"], atol=1e-6)
    centre = np.concatenate([np.concatenate(parts) for parts in found.values()]).mean(axis=0)
    np.testing.assert_allclose(centre, 0, atol=1e-6)


def test_below_counts_the_scores_that_fell_and_names_the_worst():
    scores = {"base": (0.5, 0.8), "a": (0.49, 0.7), "b": (0.5, 0.8001)}
    tables = {name: {"ndcg": {"@1": one, "@10": ten}} for name, (one, ten) in scores.items()}
    assert reports.below(tables, "a") == "2 of 2 scores, by 0.100 at most"
    assert reports.below(tables, "b") == "0 of 2 scores"


def scored(code, general):
    each = {"code": np.array(code), "general": np.array(general)}
    return {"each": each, **{side: (values.mean(), 0.0, 1.0) for side, values in each.items()}}


def test_the_bill_compares_query_by_query(tmp_path):
    base, up = [0.5, 0.25, 1.0, 0.5] * 5, [0.6, 0.35, 1.1, 0.6] * 5
    rows = {"base": scored(base, up), "merged": scored(up, base)}
    table = reports.bill(rows, tmp_path / "bill.json", "a task")
    assert list(table.columns) == ["code MRR", "code − base", "general nDCG@10", "general − base"]
    assert table.loc["merged", "code − base"] == "+0.100 [+0.100, +0.100]"
    assert table.loc["merged", "general − base"] == "-0.100 [-0.100, -0.100]"
    assert list(table.loc["base", ["code − base", "general − base"]]) == ["", ""]
    saved = read_json(tmp_path / "bill.json")["models"]["merged"]
    np.testing.assert_allclose(saved["code - base"], 0.1)


def test_a_title_says_what_the_intervals_say():
    base, up, mixed = [0.5] * 20, [0.6] * 20, [0.4, 0.6] * 10
    for code, general, said in (
        (up, mixed, "a gain on code, no clear change elsewhere"),
        (mixed, [0.4] * 20, "no clear change on code, a loss elsewhere"),
        (mixed, mixed, "no clear change on code or elsewhere"),
        (up, up, "a gain on code and elsewhere"),
        ([0.5] * 16 + [0.6] * 4, up, "no clear change on code, a gain elsewhere"),  # 0.02 [+0.005, …], p 0.13
    ):
        assert reports.verdict({"base": scored(base, base), "merged": scored(code, general)}, "code") == said
