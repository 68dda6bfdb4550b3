"""data/*_rewrites.json: complete, new, every code runs; and how training uses them."""

import ast
import json
import random
from pathlib import Path

import pytest
import torch
from test_pocket_data import SECONDS_PER_RECORD, called_name, faults_of

from embedding_tutorial import finetune, training
from embedding_tutorial.encoder import Encoder
from embedding_tutorial.files import TutorialError
from embedding_tutorial.pairs import read_pairs, read_rewrites, with_rewrites, write_pairs

ROOT = Path(__file__).resolve().parents[1]


def rewrites_of(source):
    return json.loads((ROOT / "data" / f"{source.stem}_rewrites.json").read_text(encoding="utf-8"))


def parsed(code):
    return ast.dump(ast.parse(code))


@pytest.fixture(params=["pocket", "mbpp"])
def source(request):
    """The file that was rewritten; sanitized MBPP only where a copy is present."""
    return (
        ROOT / "data" / "pocket_mbpp.json"
        if request.param == "pocket"
        else request.getfixturevalue("mbpp_file")
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_problem_has_wordings_and_codes_that_are_new(source):
    records = json.loads(source.read_text(encoding="utf-8"))
    rewrites = rewrites_of(source)
    assert [row["task_id"] for row in rewrites] == sorted(record["task_id"] for record in records)
    prompts, codes = {r["prompt"] for r in records}, {parsed(r["code"]) for r in records}
    for row in rewrites:
        assert set(row) == {"task_id", "prompts", "codes"}
        for texts, least in ((row["prompts"], 3), (row["codes"], 2)):
            assert len(texts) == len(set(texts)) >= least, row["task_id"]
        assert not prompts & set(row["prompts"]), row["task_id"]
        assert not codes & {parsed(code) for code in row["codes"]}, row["task_id"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MBPP's regular expressions are not raw strings
def test_every_rewritten_code_passes_the_assertions_of_its_problem(source):
    records, jobs = {r["task_id"]: r for r in json.loads(source.read_text(encoding="utf-8"))}, []
    for row in rewrites_of(source):
        record = records[row["task_id"]]
        name = called_name(record)
        for code in row["codes"]:
            own = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
            assert name not in own, f"task {row['task_id']}: the original's name gives it away"
            jobs.append({**record, "code": f"{code}\n{name} = {own[-1]}", "name": name})
    faults = faults_of(jobs, 2 * SECONDS_PER_RECORD)
    assert [fault for fault in faults if "returns None" not in fault] == []


# ---------------------------------------------------------------- how training uses them


def rewritten_pairs(n=6):
    return [
        {"query": f"query {i}", "pos_doc": f"def code_{i}(): pass", "meta": {"task_id": i}} for i in range(n)
    ]


REWRITES = {
    i: {
        "other_queries": [f"wording {i} {k}" for k in range(3)],
        "other_pos_docs": [f"def other_{i}_{k}(): pass" for k in range(2)],
    }
    for i in range(5)
}


def texts(encoder, rows):
    return [encoder.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def test_an_epoch_sees_one_wording_and_one_code_of_each_pair(tiny_bert):
    encoder, pairs = Encoder(tiny_bert, 64), with_rewrites(rewritten_pairs(), REWRITES)
    data = training.tokenize_pairs(encoder, pairs)
    plain = texts(encoder, data["query"])
    seen = [set() for _ in pairs]
    for epoch in range(60):
        view = training.view_of(data, epoch, 42)
        assert view["query_id"] == data["query_id"] and view["neg"] == data["neg"]
        for i, pair in enumerate(pairs):
            query = [data["query"][i], *data["other_query"][i]].index(view["query"][i])
            code = [data["passage"][i], *data["other_passage"][i]].index(view["passage"][i])
            number = [data["passage_id"][i], *data["other_passage_id"][i]][code]
            assert view["passage_id"][i] == number, pair
            seen[i].add((query, code))
    assert [len(s) for s in seen] == [12] * 5 + [1]  # 4 wordings by 3 codes; the last pair has no rewrites
    assert texts(encoder, data["query"]) == plain, "a view must not change what it is a view of"


def test_a_view_depends_on_seed_and_epoch_alone(tiny_bert):
    data = training.tokenize_pairs(Encoder(tiny_bert, 64), with_rewrites(rewritten_pairs(), REWRITES))
    first = training.view_of(data, 3, 42)
    random.seed(1)
    assert training.view_of(data, 3, 42) == first
    assert training.view_of(data, 4, 42) != first != training.view_of(data, 3, 43)


def test_pairs_without_rewrites_are_seen_as_they_are(tiny_bert):
    data = training.tokenize_pairs(Encoder(tiny_bert, 64), rewritten_pairs())
    assert training.view_of(data, 7, 42) == data


def test_a_run_takes_the_view_of_its_epoch(tiny_bert):
    pairs = with_rewrites(rewritten_pairs(), REWRITES)
    config = finetune.TrainConfig(epochs=3, batch_size=3, queue=6)
    run = training.start_run(tiny_bert, lambda e: training.tokenize_pairs(e, pairs), config, "cpu")
    for update in range(6):
        assert run.view == training.view_of(run.data, update // 2, 42)
        batch, view = finetune.batch_of(update, 6, config), run.view
        training.one_update(run)
        assert run.queue.passage_ids[-3:].tolist() == [view["passage_id"][i] for i in batch]
        assert run.queue.owner_ids[-3:].tolist() == [run.data["query_id"][i] for i in batch]


def test_another_code_of_the_same_pair_in_the_queue_is_no_negative(tiny_bert):
    pairs = with_rewrites(rewritten_pairs(), REWRITES)
    data = training.tokenize_pairs(Encoder(tiny_bert, 64), pairs)
    own, passages = data["query_id"], data["passage_id"] + data["other_passage_id"][2]
    mask = finetune.duplicate_mask(*map(torch.tensor, (own, passages, own + [own[2]] * 2)))
    assert mask[:, 6:].sum() == 2 and mask[2, 6:].all()


def test_a_rewrite_that_is_a_held_out_pair_is_a_leak(tiny_bert, tmp_path):
    pairs = with_rewrites(rewritten_pairs(), REWRITES)
    held_out = [{"query": "wording 3 1", "pos_doc": "def other_3_0(): pass"}]
    with pytest.raises(TutorialError, match="also stand in the training set"):
        training.check_before_training(
            tiny_bert, pairs, held_out, finetune.TrainConfig(batch_size=2), tmp_path / "run", "cpu"
        )


def test_files_of_rewrites_are_checked_row_by_row(tmp_path):
    good = {"task_id": 1, "prompts": ["a"], "codes": ["b"]}
    for rows, message in (
        ([good, good], "row 2: 'task_id' is missing or stood in an earlier row"),
        ([{"prompts": ["a"]}], "row 1: 'task_id' is missing"),
        ([good | {"prompts": "a"}], "row 1: 'prompts' must be a list of texts"),
        ([good | {"codes": [""]}], "row 1: 'codes' must be a list of texts"),
    ):
        path = tmp_path / "x_rewrites.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        with pytest.raises(TutorialError, match=message):
            read_rewrites(path)
    path.write_text(json.dumps([good]), encoding="utf-8")
    assert read_rewrites(path) == {1: {"other_queries": ["a"], "other_pos_docs": ["b"]}}


def test_pairs_with_rewrites_survive_the_file(tmp_path):
    pairs = with_rewrites(rewritten_pairs(), REWRITES)
    write_pairs(tmp_path / "train.jsonl", pairs)
    assert read_pairs(tmp_path / "train.jsonl") == pairs
    write_pairs(tmp_path / "bad.jsonl", [pairs[0] | {"other_queries": [1]}])
    with pytest.raises(TutorialError, match="row 1: 'other_queries' must be a list of texts"):
        read_pairs(tmp_path / "bad.jsonl")
