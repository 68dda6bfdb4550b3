"""data/synthetic_pairs.json: every code runs, and nothing is taken from sanitized MBPP."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from test_pocket_data import called_name, faults_of

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "data" / "synthetic_pairs.json"


@pytest.fixture(scope="module")
def records():
    return json.loads(FILE.read_text(encoding="utf-8"))


def word_grams(text, n=5):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_format_and_no_doubles(records):
    assert [record["task_id"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) == 1500
    for record in records:
        assert list(record) == ["task_id", "prompt", "code", "test_imports", "test_list"], record["task_id"]
        assert len(set(record["test_list"])) == 3 and record["prompt"].startswith("Write a ")
    for field in ("prompt", "code"):
        assert len({" ".join(record[field].lower().split()) for record in records}) == len(records)
    assert len({ast.dump(ast.parse(record["code"])) for record in records}) == len(records)


def test_every_code_passes_its_assertions_and_none_does_not(records):
    faults = faults_of([{**record, "name": called_name(record)} for record in records])
    expected = Counter(fault.split(":")[0] for fault in faults if "returns None" in fault)
    assert [fault for fault in faults if "returns None" not in fault] == []
    assert [task for task, count in expected.items() if count > 1] == [], "two answers tell it from nothing"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MBPP's regular expressions are not raw strings
def test_no_prompt_and_no_code_of_mbpp(records, mbpp_file):
    theirs = json.loads(mbpp_file.read_text(encoding="utf-8"))
    grams = [word_grams(record["prompt"]) for record in theirs]
    codes = {ast.dump(ast.parse(record["code"])) for record in theirs}
    for record in records:
        own = word_grams(record["prompt"])
        overlap = max(len(own & other) / max(1, min(len(own), len(other))) for other in grams)
        assert overlap <= 0.6, (record["task_id"], record["prompt"])
        assert ast.dump(ast.parse(record["code"])) not in codes, record["task_id"]
