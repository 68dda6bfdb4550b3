"""The notebooks as a reader meets them: executed, clean, in step with the exported modules, and running."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("01-train_embedding_with_validation.ipynb", "02-C-MTEB_retrieval_evaluation.ipynb")
FIGURES = {
    NAMES[0]: {
        "temperature_lines",
        "temperature_bars",
        "exp_softmax_log",
        "lengths",
        "run_configuration",
        "training_benchmark",
        "training_curves",
        "learning_rate",
        "before_after",
        "similarity_heatmaps",
        "projection",
        "study_overview",
        "loss_by_batch_size",
    },
    NAMES[1]: {"retrieval_before_after", "retrieval_difference", "interpolation"},
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def output_text(cell):
    parts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(parts)


def check_executed(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for number, cell in enumerate(cells, 1):
        text = output_text(cell)
        where = f"cell {number}: {cell.source[:60]!r}"
        assert not any(output.output_type == "error" for output in cell.outputs), where
        assert not any(output.get("name") == "stderr" for output in cell.outputs), (
            f"{where} wrote to stderr: {text[:300]}"
        )
        assert not re.search(r"warning|deprecat", text, re.IGNORECASE), f"{where}: {text[:300]}"
        assert not re.search(r"(?<![\w.])/(?:work|root|home/\w+|tmp|usr)/[\w./-]+", text), (
            f"{where}: {text[:300]}"
        )
        assert "\r" not in text, where


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebook_is_executed_and_clean(name):
    check_executed(nbformat.read(ROOT / name, as_version=4))


@pytest.mark.parametrize("name", NAMES)
def test_cells_fit_on_a_screen_and_are_introduced(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for cell in code_cells(notebook):
        assert len(cell.source.strip().splitlines()) <= 40, cell.source[:80]
    assert (ROOT / name).stat().st_size < 5_000_000


def test_exported_modules_equal_the_notebooks(tmp_path):
    (tmp_path / "embedding_tutorial").mkdir()
    for name in NAMES:
        shutil.copy(ROOT / name, tmp_path)
    for name in NAMES:
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"from nbdev.export import nb_export; nb_export({name!r}, lib_path='embedding_tutorial')",
            ],
            cwd=tmp_path,
            check=True,
        )
    for module in ("finetune.py", "evaluation.py"):
        made = (tmp_path / "embedding_tutorial" / module).read_text()
        assert made == (ROOT / "embedding_tutorial" / module).read_text(), (
            f"{module} differs: run `make export`"
        )


@pytest.fixture(scope="module")
def executed_copy(tmp_path_factory):
    """A copy of the repository in which both notebooks were run by the runner behind `make run`."""
    copy = tmp_path_factory.mktemp("copy") / "tutorial"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".git",
            ".venv",
            "*-finetuned*",
            "output",
            "T2Retrieval",
            "sanitized-mbpp.json",
            "mbpp_*.jsonl",
            "vectors",
        ),
    )
    shutil.rmtree(copy / "c_mteb_results")
    (copy / "c_mteb_results").mkdir()
    home = copy.parent / "home"
    home.mkdir()
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MTEB_", "TUTORIAL_", "BGE_"))
    }
    environment |= {"HOME": str(home), "TUTORIAL_PROFILE": "pocket"}
    run = subprocess.run(
        [sys.executable, "-m", "embedding_tutorial.run_notebooks", *NAMES],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return copy, run.stdout


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_top_to_bottom(executed_copy, name):
    copy, log = executed_copy
    notebook = nbformat.read(copy / name, as_version=4)
    check_executed(notebook)
    cells = len([cell for cell in notebook.cells if cell.cell_type == "code"])
    assert f"[cell {cells} of {cells}]" in log
    for figure in FIGURES[name]:
        assert (copy / "images" / f"{figure}.png").stat().st_mtime > (copy / "Makefile").stat().st_mtime


def test_run_leaves_what_it_promises(executed_copy):
    copy, _ = executed_copy
    run = copy / "models" / "MiniLM-finetuned"
    history = json.loads((run / "training_history.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert len(history["eval"]) == len(history["epoch"]) == config["epochs"]
    assert len(history["step_losses"]) == len(history["learning_rates"]) == 5 * config["epochs"]
    for folder in ("best_checkpoint", "final_model", "merged_model"):
        assert (run / folder / "model.safetensors").exists()
        assert (run / folder / "1_Pooling" / "config.json").exists()
    results = json.loads((run / "eval_results.json").read_text())
    for table in results["comparison"].values():
        for row in table.values():
            assert row["difference"][1] <= row["difference"][0] <= row["difference"][2]
    assert results["comparison"]["all codes"]["MRR"]["difference"][0] > 0
    retrieval = json.loads((run / "retrieval_results.json").read_text())
    assert retrieval["task"] == "PocketT2Retrieval"
    assert len(list((copy / "c_mteb_results" / "results").iterdir())) >= 2


def test_prose_names_the_published_examples():
    """The worked numbers of the text, checked against the outputs that stand in the committed notebook."""
    text = "\n".join(output_text(cell) for cell in code_cells(nbformat.read(ROOT / NAMES[0], as_version=4)))
    for value in (
        "0.326  0.295  0.218  0.162",
        "0.721  0.265  0.013  0.001",
        "341 training pairs, 86 validation pairs",
        "info_nce 0.001859   F.cross_entropy 0.001859",
    ):
        assert value in text
