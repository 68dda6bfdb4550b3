"""More pairs of a reader's own kind: requests to a language model, and what of its answers is kept.

from embedding_tutorial import more_pairs
more_pairs.write_requests("my_pairs.csv", "requests.jsonl")  # send them, to whom you like
more_pairs.keep_answers("my_pairs.csv", "answers.jsonl", "more.jsonl")

Nothing is sent from here. Only training pairs are shown to the language model, and an answer that is, or
comes close to, a held-out text is refused: a model that has read the exam can't be judged by it.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections import Counter

import torch

from .encoder import Encoder, embed
from .files import TutorialError, atomic_file, relative
from .finetune import split_pairs
from .own_data import base_model, script_of, token_counts, train_share
from .pairs import own_pairs, write_pairs
from .rows import read_rows

NEAR = 0.95  # cosine from which two texts say the same
SECONDS = 10  # for the assertions of one answer

PROMPT = """\
You write training data for a search engine. Here are {shown} examples of a query and of the passage
that answers it:

{examples}

Write {count} new pairs of this kind. Keep the language, the manner and the length of the examples. Choose
other subjects, and let no two pairs be variants of each other. Each passage answers its own query
completely, and no other one's. If a passage is program code, add "assertions": three lines of code that
fail when it is wrong. Answer with a JSON list and nothing else:
[{{"query": "…", "passage": "…"}}, …]"""


def split_of(path, query=None, passage=None):
    """(training, held-out) pairs of a file: the split that `own_data.train` makes."""
    pairs = own_pairs(path, query, passage)
    return split_pairs(pairs, train_share=train_share(pairs))


def write_requests(path, out, count=200, each=10, examples=5, seed=42, query=None, passage=None):
    """Write the requests for about `count` pairs as JSON lines {"custom_id", "messages"}; returns how many.

    Each asks for `each` pairs and shows other training pairs as examples.
    """
    train_pairs, _ = split_of(path, query, passage)
    draw, number = random.Random(seed), -(-count // each)
    with atomic_file(out, "w") as file:
        for i in range(number):
            shown = draw.sample(train_pairs, min(examples, len(train_pairs)))
            rows = [{"query": pair["query"], "passage": pair["pos_doc"]} for pair in shown]
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            content = PROMPT.format(shown=len(shown), examples=text, count=min(each, count - i * each))
            row = {"custom_id": f"pairs-{i + 1}", "messages": [{"role": "user", "content": content}]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return number


def strings_in(value):
    """Every text in a JSON value: providers wrap their answers in different objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def list_in(text):
    """The JSON list of objects that a text holds, also between other words; None where there is none."""
    start, end = text.find("["), text.rfind("]")
    try:
        rows = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return None
    return rows if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) else None


def plain(text):
    return " ".join(text.casefold().split())


def assertions_hold(row):
    """Whether a passage of Python passes its assertions, in a process of its own and within SECONDS."""
    tests = row["assertions"] if isinstance(row["assertions"], list) else [row["assertions"]]
    code = "\n".join([row["passage"], *map(str, tests)])
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = [sys.executable, "-I", "-c", code]
            run = subprocess.run(command, cwd=folder, capture_output=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return False
    return run.returncode == 0


def close_to(encoder, texts, others, itself):
    """(n,) True where a text comes close to one of `others`, or, with `itself`, to an earlier of its own."""
    with torch.no_grad():
        own, rest = (embed(encoder, part).cpu() for part in (texts, others))
    close = (own @ rest.T).amax(1) >= NEAR
    if itself:
        for i in range(1, len(own)):  # only what is kept so far can refuse a later one
            close[i] |= bool(((own[:i] @ own[i] >= NEAR) & ~close[:i]).any())
    return close.tolist()


def keep_answers(path, answers, out, model="pocket", run_code=False, query=None, passage=None):
    """Write the answers that can be trained on to `out`; returns ({"kept" or reason: number}).

    answers: JSON lines, each with a text somewhere that holds the JSON list asked for. run_code: also run the
    assertions of an answer; it is a language model's code, so only where nothing can be harmed.
    TutorialError where nothing is kept.
    """
    train_pairs, held_out = split_of(path, query, passage)
    encoder = Encoder(base_model(model)[0]).eval()
    texts = {side: [pair[side] for pair in train_pairs] for side in ("query", "pos_doc")}
    kept, seen = [], {plain(text) for side in texts.values() for text in side}
    secret = {plain(pair[side]) for pair in held_out for side in ("query", "pos_doc")}
    scripts = {script_of(text) for text in texts["query"]}
    longest = {side: 2 * token_counts(encoder.tokenizer, texts[side])[0].max() for side in texts}
    found = Counter()

    def reason(row):
        """Why a row can't be kept; None if it can, as far as its own text tells."""
        pair = {"query": row.get("query"), "pos_doc": row.get("passage")}
        if not all(isinstance(text, str) and text.strip() for text in pair.values()):
            return "no query or no passage"
        words = {plain(text) for text in pair.values()}
        if words & secret:
            return "a held-out text"
        if words & seen:
            return "there already"
        if script_of(pair["query"]) not in scripts:
            return "in another script"
        for side, text in pair.items():
            tokens = token_counts(encoder.tokenizer, [text])[0][0]
            if tokens > min(longest[side], encoder.max_length):
                return "too long"
        if run_code and "assertions" in row and not assertions_hold(row):
            return "its assertions fail"
        seen.update(words)
        return None

    for _, answer in read_rows(answers):
        lists = [rows for text in strings_in(answer) if (rows := list_in(text))]
        if not lists:
            found["answers without a JSON list"] += 1
        for row in lists[0] if lists else []:
            if why := reason(row):
                found[why] += 1
            else:
                kept.append({"query": row["query"], "pos_doc": row["passage"]})
    for others, why in ((held_out, "close to a held-out text"), (train_pairs, "close to another pair")):
        for side in ("query", "pos_doc"):
            own = [pair[side] for pair in kept]
            itself = others is train_pairs
            close = close_to(encoder, own, [pair[side] for pair in others], itself) if own else []
            found[why] += sum(close)
            kept = [pair for pair, near in zip(kept, close, strict=True) if not near]
    if not kept:
        reasons = ", ".join(f"{n} {why}" for why, n in found.items() if n) or "it is empty"
        raise TutorialError(f"{relative(answers)}: no pair could be kept ({reasons}). Look at its first row.")
    write_pairs(out, kept)
    return {"kept": len(kept)} | {why: n for why, n in found.items() if n}
