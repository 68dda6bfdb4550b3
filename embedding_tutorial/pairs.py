"""Rows in, pairs out: JSON lines, JSON, CSV, Parquet, both MBPP formats, rewrites. A bad row ends the run.

A pair is a dict: "query", "pos_doc", optional lists "neg" (hard negatives), "other_queries" (rewrites) and
"other_pos_docs" (rewrites; of a held-out query its further right answers), and for MBPP "meta": {"task_id"}.
"""

import json
import os
import reprlib
from collections import Counter

from .files import TutorialError, atomic_file, relative
from .rows import read_rows

MAX_CHARACTERS = 100_000  # of a text: models read a few thousand of them, and tokenizers choke on far more
# What others call the two columns. The first one that a file has is taken.
QUERIES = ("query", "question", "anchor", "prompt", "instruction", "问题", "查询", "text")
PASSAGES = ("pos_doc", "pos", "positive", "positives", "passage", "answer", "answers", "code", "document")
PASSAGES += ("doc", "response", "output", "context", "答案", "回答", "段落")
NEGATIVES = ("neg", "negative", "negatives", "hard_negatives")
TEXTS = (*PASSAGES, "text", "content", "contents")  # of a corpus; beside a "code", a "text" is a query
SMALLEST = 10  # pairs: with fewer there is nothing to hold out
ENOUGH = 200  # rows: a fifth is held out, and from 160 to train on the study shows a clear gain


# ---------------------------------------------------------------- texts of a row


def text_problem(text):
    """What keeps a value from being a text to embed, as half a sentence, or None."""
    if not isinstance(text, str) or not text.strip():
        return f"is {reprlib.repr(text)}, not a text. Fill it in or remove the row"
    if text != text.encode("utf-8", "ignore").decode():
        return "holds half a surrogate pair, which is no text. Correct or remove the row"
    if "\0" in text:
        return "holds a NUL character, which is no text. Correct or remove the row"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text):,} characters, more than {MAX_CHARACTERS:,}. Cut it into passages"
    return None


def field_of(row, names, where):
    """The first of `names` present in the row, as a non-empty string; TutorialError otherwise."""
    name = next((name for name in names if name in row), None)
    if name is None:
        raise TutorialError(f"{where}: no field {' or '.join(map(repr, names))}. Add it or remove the row.")
    if problem := text_problem(row[name]):
        raise TutorialError(f"{where}: {name!r} {problem}.")
    return row[name]


def texts_of(row, name, where):
    """The row's optional list of texts `name`, [] where it is absent; TutorialError where it is no list."""
    texts = [] if row.get(name) is None else row[name]
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise TutorialError(f"{where}: {name!r} must be a list of texts. Correct or remove it.")
    for text in texts:
        if problem := text_problem(text):
            raise TutorialError(f"{where}: a text of {name!r} {problem}.")
    return texts


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


# ---------------------------------------------------------------- pairs of one's own


def there(row, names):
    """The first of `names` that the row has, as the row spells it, or None."""
    plain = {str(name).strip().casefold(): name for name in reversed(row)}
    found = (name if name in row else plain.get(name.casefold()) for name in names)
    return next((name for name in found if name is not None), None)


def column_of(row, wanted, known, where, role):
    """The row's column for `role`: the one asked for, or the first known name; TutorialError otherwise."""
    names = (wanted,) if wanted else known
    if (name := there(row, names)) is not None:
        return name
    found = ", ".join(reprlib.repr(str(name)) for name in list(row)[:12]) or "none"
    raise TutorialError(
        f"{where}: no field {names[0]!r}; the columns found are {found}. Rename one to {known[0]!r}, "
        f"or name it: read_pairs(file, {role}='…'), --{role} on the command line."
    )


def several(row, name, where):
    """The texts in a column that holds a text or a list of them."""
    value = row[name]
    if isinstance(value, list):
        return texts_of(row, name, where)
    return [] if value in (None, "") else [field_of(row, (name,), where)]


def columns_of(row, query, passage, where):
    """The names of a row's two columns, those asked for or known ones; TutorialError otherwise."""
    first = column_of(row, query, QUERIES, where, "query")
    second = column_of(row, passage, PASSAGES, where, "passage")
    if first == second:
        raise TutorialError(f"{where}: {first!r} can't be query and passage. Name another with --passage.")
    return first, second


def pairs_of_row(row, columns, where):
    """The pairs of one row: as many as it has positives."""
    query, passage = columns
    shared = {"query": field_of(row, (query,), where)}
    if (negative := there(row, NEGATIVES)) is not None:
        shared["neg"] = several(row, negative, where)
    for name in ("other_queries", "other_pos_docs"):
        if name in row:
            shared[name] = texts_of(row, name, where)
    meta = row.get("meta")
    if query == "query" and isinstance(meta, dict) and isinstance(meta.get("task_id"), int | str):
        shared["meta"] = {"task_id": meta["task_id"]}  # our own files, as `write_pairs` leaves them
    if passage != "pos_doc" and isinstance(row.get(passage), list):
        if not (positives := texts_of(row, passage, where)):
            raise TutorialError(f"{where}: {passage!r} is empty. Fill it in or remove the row.")
    else:
        positives = [field_of(row, (passage,), where)]
    return [shared | {"pos_doc": text} for text in positives]


def read_pairs(path, query=None, passage=None):
    """Pairs of a file: texts "query" and "pos_doc", lists "neg", "other_queries", "other_pos_docs".

    query, passage: names of the columns; None: the first known name (QUERIES, PASSAGES). A list of positives,
    as FlagEmbedding's "pos", makes one pair each. TutorialError on a bad row.
    """
    pairs, columns, name = [], None, relative(path)
    for number, row in read_rows(path):
        where = f"{name}, row {number}"
        if columns is None:
            columns = columns_of(row, query, passage, where)
        pairs += pairs_of_row(row, columns, where)
    if not pairs:
        raise TutorialError(f"{relative(path)} holds no rows. Put the pairs there again.")
    return pairs


def own_pairs(path, query=None, passage=None):
    """`read_pairs` of a reader's own file, tidied.

    The columns, where not given, are TUTORIAL_QUERY and TUTORIAL_PASSAGE, which `run` sets for the notebooks.
    """
    query, passage = query or os.environ.get("TUTORIAL_QUERY"), passage or os.environ.get("TUTORIAL_PASSAGE")
    return tidied(read_pairs(path, query, passage), relative(path))


def tidied(rows, name):
    """Pairs of the file `name` without doubles, and without negatives that are right answers.

    Says in a sentence what it left out. TutorialError where too few are left to train on.
    """
    pairs, right = {}, {}
    for row in rows:
        right.setdefault(row["query"], set()).update(answers_of(row))
        first = pairs.setdefault((row["query"], row["pos_doc"]), row)
        if first is not row and row.get("neg"):  # triplets: a pair stands there once for each negative
            pairs[row["query"], row["pos_doc"]] = {**first, "neg": negatives_of(first, row)}
    if doubles := len(rows) - len(pairs):
        print(f"{doubles} of {len(rows):,} pairs stand there twice: each is kept once.")
    false, kept = 0, []
    for pair in pairs.values():
        wrong = [text for text in pair.get("neg", []) if text not in right[pair["query"]]]
        false += len(pair.get("neg", [])) - len(wrong)
        kept.append({**pair, "neg": wrong} if "neg" in pair else pair)
    if false:
        print(f"{false} negatives are right answers of the same query: left out.")
    if len(kept) < SMALLEST:
        raise TutorialError(
            f"{name} holds {len(kept)} different pair{'s' * (len(kept) > 1)}; {SMALLEST} are the "
            f"least that can be split, and with fewer than {ENOUGH} our study shows no clear gain. Add pairs."
        )
    return kept


def read_corpus(path, column=None, preferred=None):
    """The different texts of a file of passages; [] for None. TutorialError on a bad row.

    column: has to be there. preferred: is taken where it is there; where not given, TUTORIAL_PASSAGE.
    """
    preferred = preferred or os.environ.get("TUTORIAL_PASSAGE")
    texts, name, known = {}, None, (preferred, *TEXTS) if preferred else TEXTS
    for number, row in read_rows(path) if path else ():
        where = f"{relative(path)}, row {number}"
        if name not in row:
            name = column_of(row, column, known, where, "passage")
        texts |= dict.fromkeys(several(row, name, where))
    if path and not texts:
        raise TutorialError(f"{relative(path)} holds no passages. Put one in each row.")
    return list(texts)


def answers_of(pair):
    """All right answers of a pair's query that it names."""
    return [pair["pos_doc"], *pair.get("other_pos_docs", [])]


def negatives_of(*pairs):
    """The different hard negatives of pairs, in order."""
    return list(dict.fromkeys(text for pair in pairs for text in pair.get("neg", [])))


def passages_of(items):
    """The different passages of pairs, or of texts, in order: what is searched."""
    texts = (text for item in items for text in ([item] if isinstance(item, str) else answers_of(item)))
    return list(dict.fromkeys(texts))


def one_per_query(pairs):
    """Pairs with an equal query become one, whose further answers are in "other_pos_docs", with all "neg"."""
    grouped = {}
    for pair in pairs:
        if (first := grouped.setdefault(pair["query"], pair)) is not pair:
            others = passages_of([{"pos_doc": text} for p in (first, pair) for text in answers_of(p)])[1:]
            wrong = negatives_of(first, pair)
            more = {"other_pos_docs": others} if others else {}
            grouped[pair["query"]] = {**first, **more, **({"neg": wrong} if wrong else {})}
    return list(grouped.values())


def best_answers(similarity, right):
    """Of a query's right answers the best one stays: (similarity, its numbers (n,)).

    similarity (n, m) cosines. right: the numbers of each query's right candidates. The others get −2, so
    that none of them stands before the best one.
    """
    similarity, best = similarity.copy(), []
    for row, numbers in zip(similarity, right, strict=True):
        best.append(max(numbers, key=row.__getitem__))
        row[[number for number in numbers if number != best[-1]]] = -2
    return similarity, best


def linked(pairs):
    """A number (n,) for each pair: the same for those that share a text, also by way of other pairs."""
    parent = list(range(len(pairs)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first = {}
    for i, pair in enumerate(pairs):
        if isinstance(pair, dict):  # anything else, such as a number, shares nothing
            for key in (("query", pair["query"]), *(("passage", text) for text in answers_of(pair))):
                parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(pairs))]


def cut_between_groups(pairs, train_share):
    """(train, validation): pairs in order, cut at the share, but never between two that share a text.

    Where no text is shared it is a plain cut. TutorialError where a side would have fewer than two groups.
    """
    groups, train, room = linked(pairs), set(), int(len(pairs) * train_share)
    sizes = Counter(groups)
    for group in groups:  # one that does not fit any more goes to the validation pairs
        if group not in train and sizes[group] <= room:
            train.add(group)
            room -= sizes[group]
    sides = [[i for i, group in enumerate(groups) if (group in train) == side] for side in (True, False)]
    sides.sort(key=len, reverse=train_share > 0.5)  # one large group may have filled the wrong side
    if min(len({groups[i] for i in side}) for side in sides) < 2:
        raise TutorialError(
            f"{len(pairs)} pairs in {len(sizes)} groups without a common text are too few to split. "
            "Add pairs, or remove passages that answer nearly every query."
        )
    return tuple([pairs[i] for i in side] for side in sides)


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
