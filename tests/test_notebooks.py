"""The notebooks as a reader meets them: short, executed, clean, in order, in step with their modules."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from embedding_tutorial.finetune import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("01-train_embedding_with_validation.ipynb", "02-C-MTEB_retrieval_evaluation.ipynb")
BUDGETS = {NAMES[0]: (60, 450), NAMES[1]: (30, 250)}  # code cells, non-blank lines of code
MODULES = {"finetune.py": 300, "evaluation.py": 150}  # lines
FIGURES = {
    NAMES[0]: {
        "in_batch_negatives",
        "exp_softmax_log",
        "temperature_bars",
        "learning_rate",
        "padding",
        "training_curves",
        "loss_by_batch_size",
        "before_after",
        "similarity_heatmaps",
        "projection",
    },
    NAMES[1]: {"worked_ndcg", "mixture", "retrieval_metrics", "retrieval_differences"},
}


def read(name, folder=ROOT):
    return nbformat.read(folder / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def prose(notebook):
    return [cell.source if cell.cell_type == "markdown" else "" for cell in notebook.cells]


def output_text(cell):
    parts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(parts)


def all_output(name):
    return "\n".join(output_text(cell) for cell in code_cells(read(name)))


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
    check_executed(read(name))


@pytest.mark.parametrize("name", NAMES)
def test_budget_of_cells_and_lines(name):
    cells, most_cells, most_lines = code_cells(read(name)), *BUDGETS[name]
    assert len(cells) <= most_cells
    assert sum(bool(line.strip()) for cell in cells for line in cell.source.splitlines()) <= most_lines
    for cell in cells:
        lines = cell.source.strip().splitlines()
        assert len(lines) <= 25 and max(map(len, lines)) <= 100, cell.source[:80]
    assert (ROOT / name).stat().st_size < 5_000_000


@pytest.mark.parametrize("module", MODULES)
def test_exported_modules_stay_small(module):
    lines = (ROOT / "embedding_tutorial" / module).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MODULES[module]


@pytest.mark.parametrize("name", NAMES)
def test_each_heading_stands_before_its_code_and_cells_are_introduced(name):
    cells = [cell for cell in read(name).cells if cell.source.strip()]
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for before, after in zip(cells, cells[1:], strict=False):
        if before.cell_type == after.cell_type == "code":  # two in a row belong to one sentence, not three
            assert cells[cells.index(before) - 1].cell_type == "markdown", after.source[:80]


def test_a_reader_searches_early_and_has_trained_before_the_middle():
    cells = code_cells(read(NAMES[0]))
    searching = next(i for i, cell in enumerate(cells, 1) if re.search(r"^search\(", cell.source, re.M))
    trained = next(i for i, cell in enumerate(cells, 1) if "optimizer.step()" in cell.source)
    assert searching <= 10
    assert trained < len(cells) / 2


def test_the_reader_predicts_at_five_places_and_the_next_cell_answers():
    for name, count in zip(NAMES, (5, 3), strict=True):
        cells = read(name).cells
        places = [i for i, cell in enumerate(cells) if "**Predict " in cell.source]
        assert len(places) == count
        for i in places:
            assert cells[i + 1].cell_type == "code" and cells[i + 1].outputs, cells[i].source[-80:]


# ---------------------------------------------------------------- words


def glossary():
    """[(term, heading's anchor, name of the notebook)] of the table at the end of notebook 01."""
    table = read(NAMES[0]).cells[-1].source.split("## Glossary", 1)[1]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| \[[^]]+\]\(([^)#]*)#([^)]+)\) \|$", table, re.M)
    assert len(rows) > 50
    assert all(re.search(r"[一-鿿]", zh) or zh.strip().isascii() for _, zh, *_ in rows)
    return [(term.strip(), anchor, file or NAMES[0]) for term, _, _, file, anchor in rows]


def section_of(cells, number):
    """The anchor of the last heading above the end of a cell."""
    text = "\n".join(cells[: number + 1])
    headings = re.findall(r"^#{1,3} (.+)$", text, re.M)
    return [heading.strip().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize(("term", "anchor", "name"), glossary(), ids=[term for term, *_ in glossary()])
def test_a_term_is_defined_where_the_glossary_says_and_not_used_before(term, anchor, name):
    cells = prose(read(name))
    if name == NAMES[0]:
        cells[-1] = cells[-1].split("## Glossary", 1)[0]
    core = re.escape(term).replace(r"\ ", r"\s+")
    plural = core.removesuffix("s") + "s?"
    bold = re.compile(rf"\*\*{plural}\*\*", re.I)
    anywhere = re.compile(rf"(?<![\w/`-]){plural}(?![\w`])", re.I)
    defined = next((i for i, text in enumerate(cells) if bold.search(text)), None)
    assert defined is not None, f"{term} is never set in bold"
    # The first cell promises what will come; every other use comes after the definition.
    running = [re.sub(r"^#+ .+$", "", text, flags=re.M) for text in cells]  # a heading announces
    used = next(i for i, text in enumerate(running) if i and anywhere.search(text))
    assert used >= defined, f"{term} is used in: {cells[used][:120]}…"
    last_headings = section_of(cells, defined)
    in_cell = len(re.findall(r"^#{1,3} ", cells[defined], re.M))
    assert anchor in last_headings[-in_cell - 1 :], f"{term} is defined under {last_headings[-1]}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    notebook = read(name)
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(notebook))):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        assert not file or (ROOT / file).exists(), target
        if anchor:
            cells = prose(read(file or name))
            assert anchor in section_of(cells, len(cells)), target


def test_the_table_of_settings_is_the_recipe():
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \|", "\n".join(prose(read(NAMES[0]))), re.M)
    table = {name: float(value) for name, value in rows if name in TrainConfig.__dataclass_fields__}
    assert len(table) == 9
    assert table == {name: float(getattr(TrainConfig(), name)) for name in table}


def test_worked_numbers_of_the_text_stand_in_the_outputs():
    text = all_output(NAMES[0])
    for value in (
        "ranks [1, 2, 3]  Recall@1 0.333  MRR 0.611",
        "by hand 0.001859   info_nce 0.001859",
        "chance 4.382",
        "dot 24, norms 5 and 5, cosine 0.96",
    ):
        assert value in text


def test_the_first_screen_shows_what_this_run_found():
    notebook = read(NAMES[0])
    row = re.compile(r"^\| (?:question|found before|found after) \| (.+?) \|$", re.M)
    query, before, after = row.findall(notebook.cells[0].source)
    code = "\n".join(cell.source for cell in code_cells(notebook))
    assert "search(val_pairs[HARD]" in code
    searches = [output_text(c) for c in code_cells(notebook) if "search(val_pairs[HARD]" in c.source]
    assert query in searches[0]
    names = [re.search(r"`(\w+)\(", found)[1] for found in (before, after)]
    firsts = [re.search(r"^\d\.\d{3}\n\s+def (\w+)", text, re.M)[1] for text in searches]
    assert [firsts[0], firsts[-1]] == names


# ---------------------------------------------------------------- modules and a run


def test_exported_modules_equal_the_notebooks(tmp_path):
    (tmp_path / "embedding_tutorial").mkdir()
    for name in NAMES:
        shutil.copy(ROOT / name, tmp_path)
    export = "from nbdev.export import nb_export; nb_export({!r}, lib_path='embedding_tutorial')"
    for name in NAMES:
        subprocess.run([sys.executable, "-c", export.format(name)], cwd=tmp_path, check=True)
    for module in MODULES:
        made = (tmp_path / "embedding_tutorial" / module).read_text()
        assert made == (ROOT / "embedding_tutorial" / module).read_text(), (
            f"{module} differs: run `make export`"
        )


@pytest.fixture(scope="module")
def executed_copy(tmp_path_factory):
    """A copy of the repository in which both notebooks were run by the runner behind `make run`."""
    copy = tmp_path_factory.mktemp("copy") / "tutorial"
    left_out = (".git", ".venv", "*-finetuned*", "output", "T2Retrieval", "sanitized-mbpp.json", "vectors")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out, "mbpp_*.jsonl"))
    shutil.rmtree(copy / "c_mteb_results")
    (copy / "c_mteb_results").mkdir()
    home = copy.parent / "home"
    home.mkdir()
    foreign = ("HF_", "MTEB_", "TUTORIAL_", "BGE_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
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
    notebook = read(name, copy)
    check_executed(notebook)
    cells = len([cell for cell in notebook.cells if cell.cell_type == "code"])
    assert f"[cell {cells} of {cells}]" in log
    for figure in FIGURES[name]:
        assert (copy / "images" / f"{figure}.png").stat().st_mtime > (copy / "Makefile").stat().st_mtime


@pytest.mark.parametrize("name", NAMES)
def test_each_saved_figure_is_drawn_by_one_cell(name):
    code = "\n".join(cell.source for cell in code_cells(read(name)))
    drawn = re.findall(r"images/(\w+)\.png", code)
    assert sorted(drawn) == sorted(FIGURES[name])
    assert all((ROOT / "images" / f"{figure}.png").is_file() for figure in drawn)


def test_run_leaves_what_it_promises(executed_copy):
    copy, log = executed_copy
    run = copy / "models" / "MiniLM-finetuned"
    history = json.loads((run / "training_history.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert len(history["eval"]) == len(history["epoch"]) == config["epochs"]
    assert len(history["step_losses"]) == len(history["learning_rates"]) == 5 * config["epochs"]
    assert "Continuing models/MiniLM-finetuned after update 5" in log
    for folder in ("best_checkpoint", "fine-tuned", "merged"):
        assert (run / folder / "model.safetensors").exists()
        assert (run / folder / "1_Pooling" / "config.json").exists()
    results = json.loads((run / "eval_results.json").read_text())["results"]
    for row in results.values():
        assert row["difference"][1] <= row["difference"][0] <= row["difference"][2]
    assert results["MRR"]["difference"][0] > 0
    retrieval = json.loads((run / "retrieval_results.json").read_text())
    assert retrieval["task"] == "PocketT2Retrieval"
    assert len(list((copy / "c_mteb_results" / "results").iterdir())) == 3
