"""Pocket T2: a small bilingual retrieval test with graded judgements, as a task that mteb can run.

The data are the JSONL files under `data/pocket_t2/en` and `data/pocket_t2/zh` (see `data/README.md`).
Queries of a language search all passages of that language. Nothing here touches the network.
"""

import hashlib
import json
from pathlib import Path

from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

DATA = Path(__file__).resolve().parents[1] / "data" / "pocket_t2"
LANGUAGES = ("en", "zh")
SPLIT = "dev"
FILES = ("corpus.jsonl", "queries.jsonl", "qrels.jsonl")
GRADES = range(4)
REMEDY = "Restore it with `git checkout -- data/pocket_t2`, or correct it: data/README.md gives the format."


def fingerprint(folder):
    """First 16 hex digits of the sha256 over all data files of `folder`: changes when any byte does."""
    digest = hashlib.sha256()
    for language in LANGUAGES:
        for name in FILES:
            path = Path(folder) / language / name
            # Name and length go in as well, so that moving a row from one file to the next shows.
            content = _read(path)
            digest.update(f"{language}/{name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def read_language(folder):
    """Read one language's folder.

    Returns `corpus` (list of {"id", "title", "text"}), `queries` (list of {"id", "text"}) and
    `relevant_docs` ({query id: {passage id: grade}}), as mteb wants them.
    Raises FileNotFoundError or ValueError naming the file, the line and the remedy.
    """
    folder = Path(folder)
    corpus, queries, relevant_docs = [], [], {}
    for where, row in _rows(folder / "corpus.jsonl", {"_id": str, "title": str, "text": str}):
        _demand(row["text"].strip(), where, "the passage has no text")
        corpus.append({"id": row["_id"], "title": row["title"], "text": row["text"]})
    for where, row in _rows(folder / "queries.jsonl", {"_id": str, "text": str}):
        _demand(row["text"].strip(), where, "the query has no text")
        queries.append({"id": row["_id"], "text": row["text"]})
    passage_ids = _unique_ids(corpus, folder / "corpus.jsonl")
    query_ids = _unique_ids(queries, folder / "queries.jsonl")
    for where, row in _rows(folder / "qrels.jsonl", {"query-id": str, "corpus-id": str, "score": int}):
        query, passage, grade = row["query-id"], row["corpus-id"], row["score"]
        _demand(query in query_ids, where, f"query {query!r} is not in queries.jsonl")
        _demand(passage in passage_ids, where, f"passage {passage!r} is not in corpus.jsonl")
        _demand(grade in GRADES, where, f"grade {grade} is not one of 0, 1, 2, 3")
        judged = relevant_docs.setdefault(query, {})
        _demand(passage not in judged, where, f"query {query!r} judges passage {passage!r} twice")
        judged[passage] = grade
    for query in queries:
        best = max(relevant_docs.get(query["id"], {"": 0}).values())
        # mteb drops such a query in silence, which would change the score without a word.
        _demand(best > 0, folder / "qrels.jsonl", f"query {query['id']!r} has no relevant passage")
    return corpus, queries, relevant_docs


class PocketT2(AbsTaskRetrieval):
    """T2Retrieval in miniature, in English (`en`) and Chinese (`zh`).

    Runs as any mteb task: `mteb.evaluate(model, PocketT2(), co2_tracker=False, cache=...)`.
    `data_dir`: another folder of the same layout, for your own passages and queries.
    """

    metadata = TaskMetadata(
        name="PocketT2Retrieval",
        description="A small bilingual test of passage retrieval with graded judgements: short questions of "
        "daily life and general knowledge, distractors on the same topic.",
        reference=None,
        dataset={"path": "pocket_t2", "revision": "not read yet"},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=[SPLIT],
        eval_langs={"en": ["eng-Latn"], "zh": ["cmn-Hans"]},
        main_score="ndcg_at_10",
        date=("2026-11-01", "2026-11-30"),
        domains=["Encyclopaedic", "Non-fiction", "Written"],
        task_subtypes=["Question answering"],
        license="mit",
        annotations_creators="LM-generated",
        dialect=[],
        sample_creation="LM-generated and verified",
        bibtex_citation="",
        is_public=True,
    )

    def __init__(self, data_dir=DATA, **kwargs):
        self.data_dir = Path(data_dir)
        self._describe_data()
        super().__init__(**kwargs)

    def _describe_data(self):
        # mteb writes the revision into every result file: with a fingerprint of the data there, a score
        # that was measured on other data can be told from one measured on these.
        dataset = {**type(self).metadata.dataset, "revision": fingerprint(self.data_dir)}
        self.metadata = type(self).metadata.model_copy(update={"dataset": dataset})

    def load_data(self, num_proc=None, **kwargs):
        if self.data_loaded:
            return
        self._describe_data()  # the files may have been edited since the task was made
        self.dataset = {}
        for language in self.hf_subsets:
            corpus, queries, relevant_docs = read_language(self.data_dir / language)
            self.dataset[language] = {
                SPLIT: {
                    "corpus": Dataset.from_list(corpus),
                    "queries": Dataset.from_list(queries),
                    "relevant_docs": relevant_docs,
                    "top_ranked": None,
                }
            }
        self.data_loaded = True

    def unload_data(self):
        super().unload_data()  # mteb falls back to the class's metadata here, which know of no data
        self._describe_data()


def _read(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing. {REMEDY}") from None


def _rows(path, fields):
    """Yield (place, row) for each line; `place` is `file:line` for messages. Empty files are refused."""
    lines = _read(path).decode("utf-8").split("\n")
    _demand(any(line.strip() for line in lines), path, "the file is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not valid JSON ({error.msg}, column {error.colno}). {REMEDY}"
            ) from None
        _demand(isinstance(row, dict), where, "a row must be a JSON object")
        for field, kind in fields.items():
            _demand(field in row, where, f"the field {field!r} is missing")
            # bool is an int in Python, but `true` is no grade.
            right = isinstance(row[field], kind) and not isinstance(row[field], bool)
            _demand(right, where, f"the field {field!r} must be of type {kind.__name__}, not {row[field]!r}")
        yield where, row


def _unique_ids(rows, path):
    ids = set()
    for row in rows:
        _demand(row["id"] not in ids, path, f"the id {row['id']!r} occurs twice")
        ids.add(row["id"])
    return ids


def _demand(condition, where, problem):
    if not condition:
        raise ValueError(f"{where}: {problem}. {REMEDY}")
