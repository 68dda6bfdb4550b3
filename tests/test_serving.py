"""recipes/serving.md and serving.py: every block runs, all ways agree, the page holds the figures."""

import re

import numpy as np
import pytest
from helpers import unit

from embedding_tutorial.encoder import Encoder, embed
from embedding_tutorial.files import ROOT, TutorialError, link_folder, read_json
from recipes import serving


def test_the_code_of_the_page_runs_and_all_libraries_agree(minilm, tmp_path, monkeypatch, no_network, capsys):
    link_folder(minilm, tmp_path / "models" / "MiniLM-finetuned" / "merged")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", serving.PAGE.read_text(encoding="utf-8"), re.DOTALL)
    found = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"serving.md, block {number}", "exec"), found)
    assert len(blocks) == 6 and capsys.readouterr().out.count("def biggest") == 3
    expected = embed(Encoder(minilm).eval(), found["CODES"]).detach().numpy()
    for name, lowest in (("passages", 0.9999), ("by_hand", 0.9999), ("by_flag", 0.9999), ("by_onnx", 0.9999)):
        assert (found[name] * expected).sum(axis=1).min() > lowest, name
    assert (found["by_int8"] * expected).sum(axis=1).min() > 0.98
    assert found["scores"][0, 0] == pytest.approx(1 - found["found"][0]["_distance"], abs=1e-5)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_m3"])
def test_the_benchmark_at_small_size(model, pairs, tmp_path, request, no_network):
    results = serving.benchmark(request.getfixturevalue(model), "tiny", pairs, times=1)
    assert [row["name"] for row in results["ways"]] == list(serving.WAYS)
    for row in results["ways"]:
        assert row["cosine_lowest"] > (0.98 if "int8" in row["name"] else 0.9999), row["name"]
        assert row["tokens_per_second"] > 0 and row["megabytes"] > 0
    assert all(row["mrr_difference"] == (0, 0, 0) for row in results["ways"] if "int8" not in row["name"])
    assert [row["name"] for row in results["indexes"]] == list(serving.INDEXES)
    assert all(row["recall"] > 0.99 for row in results["indexes"])  # 40 codes: HNSW misses none either
    page = tmp_path / "page.md"
    page.write_text(f"before\n{serving.START}\nold\n{serving.END}\nafter\n", encoding="utf-8")
    serving.write_page(results, page)
    text = page.read_text(encoding="utf-8")
    assert text == f"before\n{serving.tables(results)}\nafter\n" and "reference" in text and "old" not in text


def test_an_index_finds_what_a_product_finds(tmp_path):
    q, p = unit(5, 32, seed=1).float().numpy(), unit(300, 32, seed=2).float().numpy()
    for name in ("faiss, exact", "LanceDB, exact"):
        search = serving.INDEXES[name](p, tmp_path)
        for query in q:
            assert list(search(query, 10)) == list(np.argsort(-(p @ query))[:10])


def test_a_fresh_clone_serves_the_model_before_training(tmp_path, monkeypatch, minilm):
    calls = []

    def benchmark(model, label, pairs, times):
        calls.append((model, label, len(pairs), times))
        raise TutorialError("measured enough")

    monkeypatch.setattr(serving, "benchmark", benchmark)
    monkeypatch.setattr(serving, "MERGED", tmp_path / "merged")
    monkeypatch.setattr(serving.torch, "set_num_threads", lambda n: None)
    with pytest.raises(TutorialError, match="measured enough"):
        serving.main(["--threads", "1"])
    link_folder(minilm, tmp_path / "merged")
    with pytest.raises(TutorialError, match="measured enough"):
        serving.main(["--threads", "1", "--times", "2"])
    (first, second) = calls
    assert first == (minilm, "all-MiniLM-L6-v2, not fine-tuned", 427, 3)
    assert second[0].samefile(tmp_path / "merged") and second[3] == 2


def test_the_committed_page_holds_the_committed_figures():
    results = read_json(serving.RESULTS)
    assert serving.tables(results) in serving.PAGE.read_text(encoding="utf-8")
    assert str(ROOT) not in serving.RESULTS.read_text(encoding="utf-8")
