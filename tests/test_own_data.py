"""A reader's own file: every format, every fault, the split, and the commands from check to search."""

import json
import random
import sys
import types

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from helpers import as_pair

from embedding_tutorial import finetune, own_data, reports, training
from embedding_tutorial.__main__ import main
from embedding_tutorial.encoder import Encoder
from embedding_tutorial.files import TutorialError
from embedding_tutorial.pairs import (
    cut_between_groups,
    one_per_query,
    own_pairs,
    read_corpus,
    read_pairs,
    write_pairs,
)
from embedding_tutorial.profiles import PROFILES, rewrites_path

# ---------------------------------------------------------------- formats and names

ROWS = [{"question": "怎么退货？", "answer": "七天内\n可以"}, {"question": "q; 2", "answer": 'say "a"'}]
EXPECTED = [as_pair(row["question"], row["answer"]) for row in ROWS]


def test_every_format_gives_the_same_pairs(tmp_path):
    table = pd.DataFrame(ROWS)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "excel.csv", index=False, sep=";", encoding="utf-8-sig", lineterminator="\r\n")
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.json", orient="records")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "lines.json").write_bytes(text.encode())
    for file in tmp_path.iterdir():
        assert read_pairs(file) == EXPECTED, file.name


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"query": "q", "passage": "p"}, [as_pair("q", "p")]),
        ({"anchor": "q", "positive": "p", "negative": "n"}, [as_pair("q", "p", neg=["n"])]),
        ({"query": "q", "pos": ["a", "b"], "neg": ["n"]}, [as_pair("q", t, neg=["n"]) for t in "ab"]),
        ({"问题": "q", " 答案": "p"}, [as_pair("q", "p")]),
        ({"task_id": 3, "prompt": "q", "code": "p"}, [as_pair("q", "p")]),
        ({"task_id": 3, "text": "q", "code": "p"}, [as_pair("q", "p")]),
        ({"query": "q", "passage": "p", "neg": None}, [as_pair("q", "p", neg=[])]),
    ],
)
def test_names_that_others_give(tmp_path, row, expected):
    (tmp_path / "x.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert read_pairs(tmp_path / "x.jsonl") == expected


def test_columns_can_be_named(tmp_path):
    (tmp_path / "x.csv").write_text("frage,antwort\nq,a\n")
    assert read_pairs(tmp_path / "x.csv", "frage", "antwort") == [as_pair("q", "a")]
    with pytest.raises(
        TutorialError, match="the columns found are 'frage', 'antwort'. Rename one to 'query'"
    ):
        read_pairs(tmp_path / "x.csv")
    assert read_corpus(tmp_path / "x.csv", "antwort") == ["a"] and read_corpus(None) == []
    with pytest.raises(TutorialError, match="'antwort' can't be query and passage"):
        read_pairs(tmp_path / "x.csv", "antwort", "antwort")


def test_a_search_in_pairs_reads_what_the_pairs_answer_with(tmp_path):
    (tmp_path / "x.csv").write_text("text,code\nq,c\n")
    assert read_pairs(tmp_path / "x.csv") == [as_pair("q", "c")] and read_corpus(tmp_path / "x.csv") == ["c"]


def test_hard_negatives_are_found_in_every_row_by_any_of_their_names(tmp_path):
    rows = [{"query": "q", "passage": "p"}, {"query": "r", "passage": "s", "Negative": "n"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pairs(tmp_path / "x.jsonl") == [as_pair("q", "p"), as_pair("r", "s", neg=["n"])]


# ---------------------------------------------------------------- faults

GOOD = '{"query":"a","pos_doc":"b"}\n'
FAULTS = {
    "deep.jsonl": (GOOD + "[" * 100_000, "row 2"),
    "deep.json": ("[" * 100_000, "deep.json"),
    "digits.jsonl": ('{"query":' + "1" * 5000 + "}", "row 1: no valid JSON"),
    "huge.jsonl": (GOOD + json.dumps({"query": "x" * 10**6, "pos_doc": "b"}), "row 2: 'query' has 1,000,000"),
    "surrogate.jsonl": ('{"query":"a","pos_doc":"b","neg":["\\ud800"]}', "row 1: a text of 'neg' holds half"),
    "nul.jsonl": (GOOD + '{"query":"a\\u0000","pos_doc":"b"}', "row 2: 'query' holds a NUL"),
    "nul.csv": ("query,answer\nq\0,a\n", "row 2: 'query' holds a NUL"),
    "fields.csv": ("query,answer\nq,a\nq,a,b\n", "row 3: 3 fields under 2 columns"),
    "short.csv": ("query,answer\nq\n", "row 2: 'answer' is ''"),
    "open.csv": ('query,answer\nq,"a\n' + "x" * 200_000, "row 2: no valid CSV"),
    "gbk.csv": ("query,answer\n问,答\n".encode("gbk"), "row 2: not UTF-8 .*Save it as UTF-8"),
    "empty.csv": ("", "holds no rows"),
    "twice.csv": ("query,query\na,b\n", "column 'query' stands twice"),
    "empty_list.jsonl": ('{"query":"a","pos":[]}', "row 1: 'pos' is empty"),
    "cut.parquet": (b"PAR1 and no end", "cut short"),
    "sheet.xlsx": (b"PK", "known by their ending"),
    "line.jsonl": (b"x" * 20_000_001, "row 1: longer than"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_in_one_sentence(tmp_path, name):
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TutorialError, match=message) as error:
        read_pairs(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_folder_and_a_file_of_one_pair(tmp_path):
    with pytest.raises(TutorialError, match="is a folder"):
        read_pairs(tmp_path)
    (tmp_path / "one.jsonl").write_text(GOOD * 20)
    with pytest.raises(TutorialError, match="holds 1 different pair; 10 are the least"):
        own_pairs(tmp_path / "one.jsonl")


# ---------------------------------------------------------------- equal texts


def test_doubles_go_and_a_negative_that_is_right_too(tmp_path, capsys):
    rows = [as_pair(f"q{i}", f"a{i}") for i in range(10)] + [as_pair("q1", "other", neg=["a1", "a2"])]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:2]))
    assert own_pairs(tmp_path / "x.jsonl") == [*rows[:10], as_pair("q1", "other", neg=["a2"])]
    said = capsys.readouterr().out
    assert "2 of 13 pairs stand there twice" in said and "1 negatives are right answers" in said
    triplets = [as_pair("q1", "a1", neg=[text]) for text in ("n1", "n2", "n1", "r")]
    write_pairs(tmp_path / "x.jsonl", [*rows[:10], *triplets, as_pair("q1", "a1", other_pos_docs=["r"])])
    assert own_pairs(tmp_path / "x.jsonl")[1]["neg"] == ["n1", "n2"], "one row for each negative"


def test_the_split_is_a_plain_cut_where_no_text_is_shared(pairs):
    for seed in range(5):
        shuffled = list(pairs)
        random.Random(seed).shuffle(shuffled)
        assert finetune.split_pairs(pairs, seed) == (shuffled[:32], shuffled[32:])


def test_no_text_stands_on_both_sides_of_the_split():
    draw = random.Random(0)
    pairs = [as_pair(f"q{draw.randrange(80)}", f"a{draw.randrange(160)}") for _ in range(120)]
    for seed in range(10):
        train, held_out = finetune.split_pairs(pairs, seed)
        assert len(train) + len(held_out) == 120 and len(train) >= len(held_out) > 5
        for side in ("query", "pos_doc"):
            assert not {p[side] for p in train} & {p[side] for p in held_out}
    with pytest.raises(TutorialError, match="too few to split"):
        cut_between_groups([as_pair(f"q{i}", "the same") for i in range(50)], 0.8)


def test_the_best_of_several_answers_counts(tiny_bert, pairs):
    encoder, (one, other) = Encoder(tiny_bert).eval(), (pairs[0], pairs[1])
    single = [finetune.evaluate(encoder, [as_pair(one["query"], p["pos_doc"])], pairs) for p in (one, other)]
    [grouped] = one_per_query([one, as_pair(one["query"], other["pos_doc"])])
    assert grouped["other_pos_docs"] == [other["pos_doc"]]
    both = finetune.evaluate(encoder, [grouped], pairs)
    ranks = [result["ranks"][0] for result in single]
    assert both["ranks"][0] == min(ranks) and both["ranks"][0] <= 39


def test_rewrites_never_belong_to_own_pairs(tmp_path):
    file = tmp_path / "pocket_mbpp.jsonl"
    file.write_text('{"task_id": 1, "prompt": "q", "code": "p"}')
    assert rewrites_path(file) is None and "meta" not in read_pairs(file)[0]


def test_settings_follow_the_pairs(tiny_bert, pairs, capsys):
    encoder, long = Encoder(tiny_bert), [as_pair(p["query"], "word " * 600) for p in pairs]
    config = own_data.fitted(finetune.TrainConfig(), encoder, pairs[:12])
    assert config.batch_size == 12 and config.backward == "whole"
    assert own_data.fitted(finetune.TrainConfig(), encoder, long * 3).backward == "gradcache"
    said = capsys.readouterr().out
    assert "12 training pairs are fewer than the batch of 80" in said and "longer than 512 tokens" in said
    assert own_data.padded_batch(encoder, long) == 21 and own_data.padded_batch(encoder, pairs) == 32
    assert own_data.train_share(pairs) == 0.8 and own_data.train_share(range(100_000)) == 0.99


# ---------------------------------------------------------------- commands


@pytest.fixture
def call(capsys):
    def run(*arguments, code=0, **options):
        result = CliRunner().invoke(main, [str(a) for a in arguments], **options)
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    return run


@pytest.fixture(scope="module")
def faq(tmp_path_factory, pairs):
    """30 rows, every third query with a second answer."""
    file = tmp_path_factory.mktemp("faq") / "faq.csv"
    rows = [(p["query"], p["pos_doc"]) for p in pairs[:22]]
    rows += [(p["query"], f"see also {i}") for i, p in enumerate(pairs[:8])]
    pd.DataFrame(rows, columns=["question", "answer"]).to_csv(file, index=False, encoding="utf-8-sig")
    return file


def test_check(call, faq, tiny_bert):
    said = call("check", faq, "--model", tiny_bert)
    assert "pairs: 30, of them 0 twice" in said and "22 different, 8 with several passages" in said
    assert "likely false negatives" in said and "LATIN" in said
    assert "columns: question → answer\n" in said and "refuse" not in said
    assert "Fewer than 200 pairs" in said


def test_check_says_what_training_would_not_like(faq, minilm, tmp_path):
    rows = [{"Question": f"вопрос {i}", "answer": "ответ", "id": i} for i in range(11)]
    rows.append({"Question": "ответ", "answer": "ответ", "id": 11})
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    said = own_data.check(tmp_path / "x.csv", device="cpu")
    assert said.startswith("columns: Question → answer; beside them: id\n")
    assert "1 pairs have equal texts on both sides" in said and "`train` will refuse this file" in said
    assert "English alone" in said and "English alone" not in own_data.check(faq, device="cpu")
    encoder = Encoder(minilm).eval()
    close = [as_pair(f"Sort a list of\nnumbers{end}", f"Call sorted on the list{end}") for end in ".!"]
    [(cosine, *texts, kind)] = own_data.near_doubles(encoder, close)
    assert texts == sorted(pair["query"] for pair in close) and 0.95 < cosine < 1
    apart = {own_data.near_doubles(encoder, [close[0], {**close[1], side: "so"}])[0][0] for side in close[0]}
    assert cosine == max(apart), "the queries are close and the passages too: the closer of both, once"
    same = [{**pair, "pos_doc": "X"} for pair in close]
    assert not own_data.near_doubles(encoder, same), "a common passage is never its own negative"
    assert own_data.one_line(texts[0] + "\x1b[2J") == "Sort a list of numbers![2J"


def test_check_draws_its_sample_from_the_whole_file(faq, tiny_bert, monkeypatch):
    monkeypatch.setattr(own_data, "SAMPLE", 10)
    seen = []
    monkeypatch.setattr(own_data, "near_doubles", lambda encoder, pairs, progress: seen.extend(pairs) or [])
    assert "0 near doubles among 10 pairs" in own_data.check(faq, tiny_bert, device="cpu")
    assert seen != read_pairs(faq)[:10] and len(seen) == 10


def test_from_a_file_to_a_search(call, faq, tiny_bert, tmp_path):
    out = tmp_path / "mine"
    (tmp_path / "more.txt").write_text("one more passage\nand another\n")
    said = call("train", faq, "--model", tiny_bert, "--out", out, "--epochs", 1, "--device", "cpu",
                "--corpus", tmp_path / "more.txt")  # fmt: skip
    results = json.loads((tmp_path / "mine-run" / "results.json").read_text())
    assert results["training pairs"] == 24 and results["passages searched"] == 32
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "license" in card and "| training pairs | 24 |" in card
    assert reports.interval(results["results"]["MRR"]["merged"]) in card and "| MRR |" in said
    # the notebook's own functions on the same split
    train, held_out = finetune.split_pairs(own_pairs(faq))
    held_out = one_per_query(held_out)
    settings = {**PROFILES["pocket"].config("cpu"), "epochs": 1, "batch_size": 24}
    config = finetune.TrainConfig(**settings)
    tuned, _ = training.train(tiny_bert, train, held_out, config, tmp_path / "again", "cpu", progress=False)
    base = Encoder(tiny_bert).eval()
    merged = Encoder(tiny_bert).eval()
    merged.load_state_dict(finetune.mix([base.state_dict(), tuned.state_dict()], [0.5, 0.5]))
    candidates = [p["pos_doc"] for p in own_pairs(faq)] + ["one more passage", "and another"]
    for name, model in (("base", base), ("merged", merged)):
        ranks = finetune.evaluate(model, held_out, candidates)["ranks"]
        assert results["results"]["MRR"][name][0] == pytest.approx(np.mean(1 / ranks))

    assert "queries were trained on" in call("evaluate", out, faq, "--device", "cpu")
    said = call("evaluate", out, tmp_path / "mine-run" / "val.jsonl", "--corpus", faq, "--device", "cpu")
    assert f"{len(held_out)} queries, 30 passages" in said and "MRR" in said
    searched = tmp_path / "mine-run" / "passages.jsonl"
    said = call("evaluate", out, tmp_path / "mine-run" / "val.jsonl", "--corpus", searched, "--device", "cpu")
    assert f"{len(held_out)} queries, 32 passages" in said
    assert reports.interval(results["results"]["MRR"]["merged"]) in said
    assert call("search", out, faq, "see also 3", "--top", 1, "--device", "cpu").strip()
    asked = call("search", out, tmp_path / "more.txt", "--device", "cpu", input="passage\n\n")
    assert "one more passage" in asked and "query (empty: end)" in asked


def test_the_rows_of_a_corpus_may_name_their_column_differently(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text":"a"}\n{"content":"b"}\n')
    assert read_corpus(tmp_path / "c.jsonl") == ["a", "b"]


def test_a_corpus_may_name_its_column_as_the_pairs_do_or_not(tmp_path):
    (tmp_path / "own.csv").write_text("Frage,Antwort\nwas,das\n")
    write_pairs(tmp_path / "other.jsonl", [{"text": "dies"}])
    assert read_corpus(tmp_path / "own.csv", preferred="Antwort") == ["das"]
    assert read_corpus(tmp_path / "own.csv", preferred="antwort") == ["das"]  # as pairs are read
    assert read_corpus(tmp_path / "other.jsonl", preferred="Antwort") == ["dies"]
    assert read_corpus(None, preferred="Antwort") == []


def test_settings_of_the_command_line_reach_the_run(call, faq, tiny_bert, tmp_path):
    more = ("--epochs", 1, "--learning-rate", 3e-4, "--checkpointing", "--max-length", 16, "--device", "cpu")
    call("train", faq, "--model", tiny_bert, "--out", tmp_path / "m", *more)
    config = json.loads((tmp_path / "m-run" / "config.json").read_text())
    assert (config["epochs"], config["learning_rate"], config["checkpointing"]) == (1, 3e-4, True)
    assert config["max_length"] == 16
    assert own_data.task_of(faq, tiny_bert, max_length=16).base.max_length == 16, "judged as it is trained"
    assert own_data.opened(tmp_path / "m", "cpu").max_length == 16, "evaluated and searched too"
    call("train", faq, "--model", tiny_bert, "--out", tmp_path / "m", "--learning-rate", 0, code=2)
    for base in ("m", "m-run/fine-tuned"):
        arguments = ("train", faq, "--model", tmp_path / base, "--out", tmp_path / "m", "--epochs", 2)
        said = CliRunner().invoke(main, list(map(str, arguments))).stderr
        assert f"{base} would be replaced or moved" in said


def test_the_folder_one_stands_in_is_read_and_never_replaced(faq, tiny_bert, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny_bert)
    assert own_data.evaluate_file(".", faq, device="cpu")[1] == 22
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TutorialError, match="Name another with --out"):
        own_data.train(faq, ".", tiny_bert)


def test_further_pairs_are_trained_on_and_never_judged(faq, tiny_bert, tmp_path):
    held_out = one_per_query(finetune.split_pairs(own_pairs(faq))[1])
    more = [as_pair("a new query", "a new passage"), as_pair(held_out[0]["query"], "leaks")]
    write_pairs(tmp_path / "more.jsonl", more)
    task = own_data.task_of(faq, tiny_bert, more=tmp_path / "more.jsonl")
    assert len(task.train_pairs) == 25 and task.train_pairs[-1]["query"] == "a new query"
    assert task.held_out == held_out and len(task.candidates) == 30


def test_a_curve_goes_on_where_it_stopped(call, faq, tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own_data, "SMALLEST_CURVE", 6)
    arguments = ["train", faq, "--model", tiny_bert, "--out", tmp_path / "m", "--epochs", 1, "--curve"]
    call(*arguments, "--device", "cpu")
    file = tmp_path / "m-curve.json"
    known = json.loads(file.read_text())
    assert set(known["ranks"]) == {"0-base"} | {f"{n}-{seed}" for n in (6, 12, 24) for seed in (42, 43, 44)}
    assert known["ranks"]["6-42"] != known["ranks"]["6-43"], "each seed draws other pairs"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m-curve.json", "m-curve.png"]
    del known["ranks"]["12-43"]
    known["ranks"]["0-base"] = [1] * len(known["ranks"]["0-base"])  # taken as it stands there
    file.write_text(json.dumps(known))
    said = call(*arguments, "--device", "cpu")
    assert "9 of the curve's 10 models are judged" in said and "base  MRR 1.000" in said
    assert json.loads(file.read_text())["ranks"].keys() == known["ranks"].keys() | {"12-43"}
    assert "judged in" not in call(*arguments[:-2], 2, "--curve", "--device", "cpu"), "other settings"


def test_what_goes_wrong_is_one_line_on_stderr(faq, tmp_path, tiny_bert):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("mine")
    for arguments, message in (
        (["check", tmp_path / "absent.csv"], "does not exist"),
        (["train", faq, "--model", tmp_path, "--out", tmp_path / "m"], "is no model folder"),
        (["train", faq, "--model", tiny_bert, "--out", tmp_path / "papers"], "exists and is no model"),
        (["evaluate", tmp_path, faq, "--device", "cpu"], "is no model folder"),
        (["train", faq, "--model", tiny_bert, "--out", tiny_bert], "exists and is no model"),
    ):
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 1 and message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert (tmp_path / "papers" / "thesis.txt").read_text() == "mine"


def test_export_and_run_hand_on_what_they_are_told(call, monkeypatch, tmp_path):
    seen = []
    module = types.ModuleType("onnx_export")
    module.export_onnx = lambda folder, out, int8=False: seen.append((folder.name, out.name, int8))
    monkeypatch.setitem(sys.modules, "embedding_tutorial.onnx_export", module)
    call("export", tmp_path / "m", "--onnx", "--int8")
    call("export", tmp_path / "m", code=2)
    from embedding_tutorial import run_notebooks

    for name in ("PAIRS", "QUERY", "PASSAGE"):  # put back after the test
        monkeypatch.setenv(f"TUTORIAL_{name}", "")
    monkeypatch.setattr(run_notebooks, "main", seen.append)
    call("run", "--pairs", tmp_path / "x.csv", "--query", "Frage", "--passage", "Antwort")
    (tmp_path / "x.csv").write_text("Frage,Antwort\n" + "".join(f"q{i},a{i}\n" for i in range(10)))
    assert len(own_pairs(tmp_path / "x.csv")) == 10 == len(read_corpus(tmp_path / "x.csv"))
    assert seen == [("m", "m-onnx", True), run_notebooks.NOTEBOOKS]
    assert own_data.chosen_files() == (tmp_path / "x.csv", None)
    assert own_data.chosen_files("mine.jsonl")[0].name == "mine.jsonl"


def test_help_names_every_command(call):
    for command in ("check", "train", "ask", "answers", "evaluate", "search", "export", "run"):
        assert command in call("--help") and "Usage" in call(command, "--help")
