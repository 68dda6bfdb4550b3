"""The full profile from its first cell to its last: both notebooks, on BGE-M3's layout in a small size."""

import sys

import nbformat
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import common  # noqa: E402
import full_notebooks  # noqa: E402


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(copy of the repository, what `run` measured, what was printed)."""
    folder = tmp_path_factory.mktemp("full")
    model = common.published_m3(folder / "bge-m3", common.SMOKE_SHAPE)
    copy, log = folder / "tutorial", folder / "log"
    full_notebooks.copy_repository(copy, ROOT / "data" / "pocket_mbpp.json", epochs=1)
    with open(log, "w") as file:
        measured = full_notebooks.run(copy, model, "cpu", file)
    return copy, measured, log.read_text()


def test_both_notebooks_run_to_the_end_in_the_full_profile(executed):
    copy, measured, log = executed
    for name in full_notebooks.NAMES:
        cells = [cell for cell in nbformat.read(copy / name, 4).cells if cell.cell_type == "code"]
        assert f"[cell {len(cells)} of {len(cells)}]" in log and measured[name]["gb"] > 0
        outputs = [output for cell in cells for output in cell.outputs]
        assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)


def test_it_is_bge_m3_that_ran_with_the_settings_of_the_profile(executed):
    copy, _, log = executed
    assert "profile: full" in log and "model: BAAI/bge-m3" in log and "sanitized MBPP" in log
    run = copy / "models" / "BGE-M3-finetuned"
    config = full_notebooks.json.loads((run / "config.json").read_text())
    assert config["backward"] == "gradcache" and config["learning_rate"] == 2e-5 and config["epochs"] == 1
    assert {"colbert_linear.pt", "sparse_linear.pt"} <= {p.name for p in (run / "merged").iterdir()}
    assert "BGEM3FlagModel: largest difference" in log.replace("      ", "")


def test_each_of_three_models_is_encoded_once(executed):
    """Base, fine-tuned and merged: the mixture in the middle is the merged model, read from disk."""
    copy, _, log = executed
    assert len(list((copy / "c_mteb_results" / "vectors").iterdir())) == 3
    results = copy / "c_mteb_results" / "results"
    tasks = {path.stem for path in results.rglob("*.json")} - {"model_meta", "run_settings"}
    assert tasks == {"T2Retrieval-subset-50q-200d"}  # a CPU takes a part of T2Retrieval by itself
