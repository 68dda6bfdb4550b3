"""The fault campaign: a few of each kind, in a process of its own because it forks; every poisoned input."""

import subprocess
import sys

import poisoned
import pytest

from embedding_tutorial.files import ROOT, read_json

NAMES = [f"{reader}, {case}" for reader, _, case, *_ in poisoned.POISONED]
KINDS = ["kills", "full", "closed", "clock", "two", "damaged"]


def test_a_few_faults_of_each_kind(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks" / "faults.py",
        "--share",
        "0.02",
        "--out",
        tmp_path / "f.json",
    ]
    done = subprocess.run([*command, "--only", *KINDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = read_json(tmp_path / "f.json")["kinds"]
    assert list(found) == KINDS and all(kind["tried"] == kind["good"] > 0 for kind in found.values())


@pytest.mark.parametrize("reader, name, case, content, wanted", poisoned.POISONED, ids=NAMES)
def test_a_poisoned_input_ends_in_rows_or_in_an_error_with_its_name(
    reader, name, case, content, wanted, tmp_path
):
    found, broken = poisoned.outcome(tmp_path, reader, name, content)
    assert poisoned.as_wanted(found, wanted, name), f"{found} {broken}"


def test_there_are_enough_poisoned_inputs():
    assert len({(reader, case) for reader, _, case, *_ in poisoned.POISONED}) == len(poisoned.POISONED) >= 60
