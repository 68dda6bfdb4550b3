"""Files that a reader of pairs may be given, and what must come out: rows, or words of a TutorialError."""

import codecs
import json

PAIR = {"query": "ask", "pos_doc": "x = 1"}
ROW = {"task_id": 1, "prompt": "ask", "code": "x = 1"}
FOLDER = object()  # instead of bytes: the name is a folder's


def lines(*rows):
    """JSON lines as bytes."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def with_field(name, value):
    return lines(PAIR, {**PAIR, name: value})


GOOD, DEEP = lines(PAIR), b"[" * 3000 + b"]" * 3000
# What ends both readers alike, whatever the file is called: one row each, for `.jsonl` and for `.json`.
ANYWHERE = {
    "missing": (None, "does not exist"),
    "a folder": (FOLDER, ""),
    "nested 3,000 deep": (DEEP, ""),
    "nested 3,000 deep, objects": (b'{"a":' * 3000 + b"1" + b"}" * 3000, ""),
    "a NUL byte alone": (b"\0", "no valid JSON"),
    "ten thousand NUL bytes": (b"\0" * 10_000, "no valid JSON"),
    "a gzip file": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "not UTF-8"),
    "a PNG": (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8"),
    "noise": (bytes(range(256)), ""),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not UTF-8"),
    "half a UTF-8 letter": (b'{"query": "\xe4\xb8', "not UTF-8"),
    "an open bracket": (b"[", "no valid JSON"),
    "an open text": (b'"', "no valid JSON"),
    "a number": (b"5\n", "not a"),
    "null": (b"null\n", "not a"),
    "a text": (b'"ask"\n', "not a"),
    "true": (b"true\n", "not a"),
    "Python's own quotes": (b"{'query': 'ask', 'pos_doc': 'x'}\n", "no valid JSON"),
    "a comment": (b"// pairs\n" + GOOD, "no valid JSON"),
    "HTML of a login page": (b"<!doctype html><html></html>", "no valid JSON"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "no valid JSON"),
    "a row of five thousand digits": (b"[" + b"1" * 5000 + b"]\n", ""),
}
PAIRS = {
    "whole": (GOOD, 1),
    "empty": (b"", "holds no rows"),
    "blank lines alone": (b"\n \n\t\n", "holds no rows"),
    "a BOM, as Windows' editors write": (codecs.BOM_UTF8 + GOOD, 1),
    "Windows' line ends": (GOOD.replace(b"\n", b"\r\n") * 2, 2),
    "no line end": (GOOD.rstrip(), 1),
    "a line separator within a text": (lines({**PAIR, "query": "a \u2028 b"}), 1),
    "that separator, not escaped": (
        json.dumps({**PAIR, "query": "a\u2028b"}, ensure_ascii=False).encode(),
        1,
    ),
    "a NUL within a text": (lines({**PAIR, "query": "a\0b"}), "row 1"),
    "more fields": (lines({**PAIR, "id": 7, "note": None}), 1),
    "a text of ninety thousand letters": (lines({**PAIR, "pos_doc": "x" * 90_000}), 1),
    "Chinese and emoji": (lines({**PAIR, "query": "排序 🙂"}), 1),
    "the same row twice": (lines(PAIR, PAIR), 2),
    "cut short": (lines(PAIR, PAIR)[:-9], "row 2"),
    "two rows in one line": (GOOD.rstrip() + GOOD, "row 1"),
    "a comma after a row": (GOOD.rstrip() + b",\n", "row 1"),
    "a list of rows": (json.dumps([PAIR]).encode(), "row 1"),
    "half a surrogate": (b'{"query": "a \\ud800", "pos_doc": "x"}\n', "row 1"),
    "query empty": (with_field("query", ""), "row 2"),
    "query blank": (with_field("query", " \u3000\n"), "row 2"),
    "query null": (with_field("query", None), "row 2"),
    "query a list": (with_field("query", ["ask"]), "row 2"),
    "query an object": (with_field("query", {"text": "ask"}), "row 2"),
    "query true": (with_field("query", True), "row 2"),
    "pos_doc a number": (with_field("pos_doc", 3), "row 2"),
    "pos_doc NaN": (b'{"query": "ask", "pos_doc": NaN}\n', "row 1"),
    "no pos_doc": (lines(PAIR, {"query": "x"}), "row 2"),
    "other names": (lines({"one": "x", "other": "y"}), "row 1"),
    "neg null": (with_field("neg", None), 2),
    "neg a text": (with_field("neg", "x"), 2),
    "neg with a number": (with_field("neg", ["x", 1]), "row 2"),
    "neg with an empty text": (with_field("neg", [""]), "row 2"),
    "neg nested": (with_field("neg", [["x"]]), "row 2"),
    "other_queries an object": (with_field("other_queries", {"a": 1}), "row 2"),
}
MBPP = {
    "whole": (json.dumps([ROW]).encode(), 1),
    "a BOM": (codecs.BOM_UTF8 + json.dumps([ROW]).encode(), 1),
    "empty": (b"", "no valid JSON"),
    "an empty list": (b"[]", "holds no rows"),
    "an object": (b"{}", "not a list"),
    "no task_id": (json.dumps([{"prompt": "x", "code": "y"}]).encode(), "row 1"),
    "no code": (json.dumps([ROW, {"task_id": 2, "prompt": "x"}]).encode(), "row 2"),
    "a row is null": (b"[null]", "row 1"),
    "a row is a list": (b"[[]]", "row 1"),
    "cut short": (json.dumps([ROW, ROW]).encode()[:-5], "no valid JSON"),
}
# [(reader's name, file name, case, bytes or None or FOLDER, rows or words)]
POISONED = [
    *(("read_pairs", "pairs.jsonl", case, *what) for case, what in (ANYWHERE | PAIRS).items()),
    *(("read_mbpp", "mbpp.json", case, *what) for case, what in (ANYWHERE | MBPP).items()),
]


def outcome(folder, reader, name, content):
    """(number of rows or message, None), or (None, what else was raised) of reading `content`."""
    from embedding_tutorial import pairs
    from embedding_tutorial.files import TutorialError

    path = folder / name
    if content is FOLDER:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    try:
        return len(getattr(pairs, reader)(path)), None
    except TutorialError as error:
        return str(error), None
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error)[:80]}"


def as_wanted(found, wanted, name):
    """Whether rows came out where rows are wanted, else a message with the file's name and these words."""
    if isinstance(wanted, int):
        return found == wanted
    return isinstance(found, str) and name in found and wanted in found
