"""Pairs from a language model: what is asked, and which answers are refused and why."""

import json

import pytest
from click.testing import CliRunner
from helpers import as_pair

from embedding_tutorial import more_pairs
from embedding_tutorial.__main__ import main
from embedding_tutorial.files import TutorialError
from embedding_tutorial.pairs import read_pairs, write_pairs


@pytest.fixture(scope="module")
def own(tmp_path_factory, pairs):
    file = tmp_path_factory.mktemp("own") / "own.jsonl"
    write_pairs(file, pairs[:30])
    return file


def answer_file(folder, *texts):
    """A file of answers as three providers wrap them."""
    wraps = (
        lambda text: {"custom_id": "a", "text": text},
        lambda text: {"response": {"body": {"choices": [{"message": {"content": text}}]}}},
        lambda text: {"content": [{"type": "text", "text": text}]},
    )
    file = folder / "answers.jsonl"
    rows = [wraps[i % 3](text) for i, text in enumerate(texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def listed(*rows):
    return json.dumps([dict(zip(("query", "passage", "assertions"), row, strict=False)) for row in rows])


def test_requests_show_training_pairs_alone(own, tmp_path):
    said = CliRunner().invoke(main, ["ask", str(own), "--out", str(tmp_path / "r.jsonl"), "--count", "25"])
    assert said.exit_code == 0 and "3 requests for 25 pairs" in said.output
    train, held_out = more_pairs.split_of(own)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["custom_id"] for row in rows] == ["pairs-1", "pairs-2", "pairs-3"]
    asked = [row["messages"][0]["content"] for row in rows]
    assert "Write 10 new pairs" in asked[0] and "Write 5 new pairs" in asked[2]
    for text in asked:
        assert sum(json.dumps(pair["query"]) in text for pair in train) == 5
        assert not any(json.dumps(pair["query"]) in text for pair in held_out)
    again = tmp_path / "again.jsonl"
    more_pairs.write_requests(own, again, 25)
    assert again.read_text(encoding="utf-8") == (tmp_path / "r.jsonl").read_text(encoding="utf-8")


def test_what_is_kept_of_the_answers(own, tmp_path, minilm):
    train, held_out = more_pairs.split_of(own)
    good = ("Find the tallest tree of a forest", "def tallest(trees):\n    return max(trees)")
    other = "Feed the cat", "def feed(cat):\n    cat.food += 1"
    file = answer_file(
        tmp_path,
        f"Here you are:\n```json\n{listed(good, other)}\n```",
        listed(
            (held_out[0]["query"].upper(), "def other(): pass"),  # the exam, in other letters
            (train[0]["query"], "def another(): pass"),
            ("怎么退货？", "def give_back(): pass"),
            ("Spell a very long word", "x = 1\n" * 2000),
            ("Water the plants", ""),
            ("Find the tallest tree of the forest", "def tall(trees):\n    return trees[0]"),
        ),
        "I can't do that.",
    )
    out = tmp_path / "more.jsonl"
    arguments = ["answers", str(own), str(file), "--out", str(out), "--model", str(minilm)]
    said = CliRunner().invoke(main, arguments)
    assert said.exit_code == 0, said.output
    for line in (
        "2  kept", "1  a held-out text", "1  there already", "1  in another script", "1  too long",
        "1  no query or no passage", "1  answers without a JSON list", "1  close to another pair",
    ):  # fmt: skip
        assert line in said.output, said.output
    assert read_pairs(out)[0] == as_pair(*good) and len(read_pairs(out)) == 2


def test_assertions_run_only_when_asked(own, tmp_path, minilm, monkeypatch):
    trap = tmp_path / "ran"
    wrong = ("Add one to a number", f"open({str(trap)!r}, 'w')\ndef add(a): return a", ["assert add(1) == 2"])
    right = (
        "Join two words with a dash",
        "def join(a, b): return a + '-' + b",
        ["assert join('a', 'b') == 'a-b'"],
    )
    endless = ("Count for ever", "while True: pass", ["assert True"])
    file = answer_file(tmp_path, listed(wrong, right, endless))
    found = more_pairs.keep_answers(own, file, tmp_path / "a.jsonl", minilm)
    assert found["kept"] == 3 and not trap.exists()
    monkeypatch.setattr(more_pairs, "SECONDS", 2)
    found = more_pairs.keep_answers(own, file, tmp_path / "b.jsonl", minilm, run_code=True)
    assert found == {"kept": 1, "its assertions fail": 2} and trap.exists()


def test_nothing_kept_names_file_and_reasons(own, tmp_path, minilm):
    for texts, message in ((("no", "neither"), "2 answers without a JSON list"), ((), "it is empty")):
        with pytest.raises(TutorialError, match=rf"answers.jsonl: no pair could be kept.*{message}"):
            more_pairs.keep_answers(own, answer_file(tmp_path, *texts), tmp_path / "x.jsonl", minilm)
    assert not (tmp_path / "x.jsonl").exists()
