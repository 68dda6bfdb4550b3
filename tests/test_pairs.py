"""Rows in, pairs out."""

import json

from helpers import as_pair

from embedding_tutorial.pairs import read_mbpp, read_pairs, read_rows, shared_texts, write_pairs

# ---------------------------------------------------------------- data


def test_both_mbpp_formats_and_the_jsonl_round_trip(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps([{"task_id": 3, "prompt": "ask", "code": "x = 1", "test_list": []}])
    )
    (tmp_path / "b.jsonl").write_text('{"task_id": 3, "text": "ask", "code": "x = 1"}\n\n')
    expected = [as_pair("ask", "x = 1", meta={"task_id": 3})]
    assert read_mbpp(tmp_path / "a.json") == read_mbpp(tmp_path / "b.jsonl") == expected

    # every character that Unicode takes for the end of a line is legal inside a JSON string
    odd = [as_pair('a\n\r\t"\\ é 查询 \u2028 \u2029 \x85 \x0b \x1c end', "code\U0001f600", neg=["n\u2028n"])]
    write_pairs(tmp_path / "c.jsonl", odd + expected)
    assert read_pairs(tmp_path / "c.jsonl") == odd + expected


def test_read_rows_numbers_the_lines_of_the_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_rows(tmp_path / "rows.jsonl")) == [(1, {"a": 1}), (3, {"a": 2})]


def test_shared_texts():
    train, validation = [as_pair("q1", "c1"), as_pair("q2", "c2")], [as_pair("q2", "c3"), as_pair("q4", "c1")]
    assert shared_texts(train, validation) == {"query": ["q2"], "pos_doc": ["c1"]}
    assert shared_texts(train[:1], validation[:1]) == {"query": [], "pos_doc": []}
