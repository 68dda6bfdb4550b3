"""Rows in, pairs out: both MBPP formats, JSON lines of pairs, rewrites. A bad row ends the run.

A pair is a dict: "query", "pos_doc", optional lists "neg" (hard negatives), "other_queries" and
"other_pos_docs" (rewrites), and for MBPP "meta": {"task_id"}.
"""

import json
from pathlib import Path

from .files import TutorialError, atomic_file, relative


def read_text(path):
    """The file's text. TutorialError when it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TutorialError(
            f"{relative(path)} does not exist. Put the file there, or run the cell that writes it."
        ) from None
    except UnicodeDecodeError as error:
        raise TutorialError(
            f"{relative(path)} is not UTF-8 (byte {error.start}). Save it as UTF-8."
        ) from None


def read_rows(path):
    """Yield (row number from 1, dict) of a JSON list (`.json`) or of JSON lines (`.jsonl`)."""
    name, text = relative(path), read_text(path)
    try:
        if str(path).endswith(".jsonl"):
            lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        else:
            rows = json.loads(text)
            if not isinstance(rows, list):
                raise TutorialError(
                    f"{name}: not a list of rows but {type(rows).__name__}. Put the data there again."
                )
            lines = list(enumerate(rows, 1))
        for number, row in lines:
            row = json.loads(row) if isinstance(row, str) and str(path).endswith(".jsonl") else row
            if not isinstance(row, dict):
                raise TutorialError(
                    f"{name}, row {number}: not an object but {type(row).__name__}. "
                    "Correct or remove the row."
                )
            yield number, row
    except json.JSONDecodeError as error:
        place = f"row {number}" if str(path).endswith(".jsonl") else f"line {error.lineno}"
        raise TutorialError(f"{name}, {place}: no valid JSON ({error.msg}). Correct or remove it.") from None


def field_of(row, names, where):
    """The first of `names` present in the row, as a non-empty string; TutorialError otherwise."""
    name = next((name for name in names if name in row), None)
    if name is None:
        raise TutorialError(f"{where}: no field {' or '.join(map(repr, names))}. Add it or remove the row.")
    if not isinstance(row[name], str) or not row[name].strip():
        raise TutorialError(f"{where}: {name!r} is {row[name]!r}, not a text. Fill it in or remove the row.")
    if row[name] != row[name].encode("utf-8", "ignore").decode():
        raise TutorialError(
            f"{where}: {name!r} holds half a surrogate pair, which is no text. Correct or remove the row."
        )
    return row[name]


def read_mbpp(path):
    """Read either MBPP format: [{"query", "pos_doc", "meta": {"task_id"}}]. TutorialError on a bad row."""
    pairs = []
    for number, row in read_rows(path):
        where = f"{relative(path)}, row {number}"
        if "task_id" not in row:
            raise TutorialError(f"{where}: no field 'task_id'. Add it or remove the row.")
        pairs.append(
            {
                "query": field_of(row, ("prompt", "text"), where),
                "pos_doc": field_of(row, ("code",), where),
                "meta": {"task_id": row["task_id"]},
            }
        )
    if not pairs:
        raise TutorialError(f"{relative(path)} holds no rows. Put the data there again.")
    return pairs


def texts_of(row, name, where):
    """The row's optional list of texts `name`, [] where it is absent; TutorialError where it is no list."""
    texts = row.get(name, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise TutorialError(f"{where}: {name!r} must be a list of texts. Correct or remove it.")
    return texts


def read_pairs(path):
    """Read `{"query", "pos_doc"}` JSON lines with optional lists "neg", "other_queries", "other_pos_docs"."""
    pairs = []
    for number, row in read_rows(path):
        where = f"{relative(path)}, row {number}"
        field_of(row, ("query",), where), field_of(row, ("pos_doc",), where)
        for name in ("neg", "other_queries", "other_pos_docs"):
            texts_of(row, name, where)
        pairs.append(row)
    if not pairs:
        raise TutorialError(f"{relative(path)} holds no rows. Run the cell that splits the data again.")
    return pairs


def write_pairs(path, pairs):
    """Write pairs as UTF-8 JSON lines, atomically."""
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)


def shared_texts(train, validation):
    """Queries and codes that stand on both sides of the split: {"query": [...], "pos_doc": [...]}."""
    return {
        name: sorted({p[name] for p in train} & {p[name] for p in validation})
        for name in ("query", "pos_doc")
    }


def read_rewrites(path):
    """{task_id: {"other_queries", "other_pos_docs"}} of a file of `{"task_id", "prompts", "codes"}` rows."""
    rewrites = {}
    for number, row in read_rows(path):
        where = f"{relative(path)}, row {number}"
        if row.get("task_id") is None or row["task_id"] in rewrites:
            raise TutorialError(
                f"{where}: 'task_id' is missing or stood in an earlier row. Correct or remove the row."
            )
        rewrites[row["task_id"]] = {
            "other_queries": texts_of(row, "prompts", where),
            "other_pos_docs": texts_of(row, "codes", where),
        }
    return rewrites


def with_rewrites(pairs, rewrites):
    """The pairs, those that have rewrites with the lists "other_queries" and "other_pos_docs"."""
    return [{**pair, **rewrites.get(pair.get("meta", {}).get("task_id"), {})} for pair in pairs]
