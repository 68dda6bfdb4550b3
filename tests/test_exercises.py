"""The exercises' solutions run, and the notebooks ask exactly the questions that are solved."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {
    "notebook_01": "01-train_embedding_with_validation.ipynb",
    "notebook_02": "02-C-MTEB_retrieval_evaluation.ipynb",
}


def solutions(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "exercises" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXERCISES


CASES = [(name, exercise) for name in NOTEBOOKS for exercise in solutions(name)]


@pytest.mark.parametrize(("name", "exercise"), CASES, ids=[f"{n}-{e.__name__}" for n, e in CASES])
def test_solution(name, exercise, capsys):
    exercise()
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_asks_what_is_solved(name):
    notebook = nbformat.read(ROOT / NOTEBOOKS[name], as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells).split("## Exercises", 1)[1]
    asked = re.findall(r"^\d\. (.+)$", text, flags=re.MULTILINE)
    solved = [exercise.__doc__.strip().replace("`", "") for exercise in solutions(name)]
    assert [question.replace("`", "") for question in asked] == solved
    assert len(solved) == 8
