"""Recipe 1, data: from the notebook's pairs to FlagEmbedding's JSON lines, with negatives and teacher scores.

    python recipes/data.py random  --count 10       # random negatives
    python recipes/data.py hard    --count 7        # mined: near the query in a model's eyes, yet wrong
    python recipes/data.py teacher --data FILE      # adds a teacher's scores for distillation
    python recipes/data.py check   FILE             # says which row is wrong

A line is {"query": text, "pos": [texts], "neg": [texts]}, with "pos_scores" and "neg_scores" where a
teacher has spoken. A negative never equals a positive of the same query.
"""

import json
import math
import random
import sys
from pathlib import Path

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial import profiles  # noqa: E402
from embedding_tutorial.encoder import Encoder, embed, fingerprint  # noqa: E402
from embedding_tutorial.files import ROOT, TutorialError, atomic_file, relative, sha256_of  # noqa: E402
from embedding_tutorial.finetune import split_pairs  # noqa: E402
from embedding_tutorial.pairs import field_of, read_mbpp, read_pairs, read_rows, write_pairs  # noqa: E402
from recipes import steps  # noqa: E402
from recipes.models import find_model  # noqa: E402

TRAIN, VALIDATION = ROOT / "data" / "mbpp_train.jsonl", ROOT / "data" / "mbpp_val.jsonl"


def tutorial_pairs(train=TRAIN, validation=VALIDATION):
    """(training pairs, validation pairs) of notebook 01; splits the data as it does where it has not run."""
    train, validation = Path(train), Path(validation)
    if not train.exists() and not validation.exists():
        source = profiles.mbpp_path(profiles.PROFILES["pocket"])
        print(f"{relative(train)} is not there: splitting {relative(source)} as notebook 01 does.")
        for path, part in zip((train, validation), split_pairs(read_mbpp(source)), strict=True):
            write_pairs(path, part)
    return read_pairs(train), read_pairs(validation)


# ---------------------------------------------------------------- negatives


def positives_of(pairs):
    """{query: the set of its right answers}: a query may stand in several pairs."""
    right = {}
    for pair in pairs:
        right.setdefault(pair["query"], set()).add(pair["pos_doc"])
    return right


def random_negatives(pairs, count, seed=42):
    """FlagEmbedding's rows with `count` passages of other queries each, none of them right."""
    right, passages, draw = (
        positives_of(pairs),
        list(dict.fromkeys(p["pos_doc"] for p in pairs)),
        random.Random(seed),
    )
    rows = []
    for number, pair in enumerate(pairs, 1):
        wrong = [text for text in passages if text not in right[pair["query"]]]
        if len(wrong) < count:
            raise TutorialError(f"Row {number} can have {len(wrong)} negatives, not {count}. Lower --count.")
        rows.append({"query": pair["query"], "pos": [pair["pos_doc"]], "neg": draw.sample(wrong, count)})
    return rows


def vectors(encoder, texts):
    with torch.no_grad():
        return embed(encoder.eval(), texts, token_budget=4096, progress=True).cpu().float().numpy()


def exact_index(passages):
    """A faiss index that compares with every vector (n, dims) by inner product."""
    index = faiss.IndexFlatIP(passages.shape[1])
    index.add(np.ascontiguousarray(passages, dtype=np.float32))
    return index


def corpus_texts(path):
    """The passages of a JSON-lines file: the field "text", or "pos_doc" as in a file of pairs."""
    return [field_of(row, ("text", "pos_doc"), f"{relative(path)}, row {n}") for n, row in read_rows(path)]


def hard_negatives(
    pairs, encoder, count, window=(1, 60), margin=0.02, seed=42, *, share=1.0, corpus=(), hardest=False
):
    """Rows whose negatives are drawn from the ranks `window` of each query's wrong passages.

    A passage that scores more than the positive's score - margin, or more than share of it, may well be right
    although nobody said so, and is left out (0.95 is TopK-PercPos of NV-Retriever, arXiv 2407.15831). corpus:
    further passages. hardest: the best of those that are left, and not a sample of them. Queries with too few
    left get random ones in their place. Returns (rows, number of random fill-ins).
    """
    first, last = window
    if not 1 <= first <= last or last - first + 1 < count:
        raise TutorialError(f"The ranks {first} to {last} do not hold {count} negatives. Widen --window.")
    right, passages, draw = (
        positives_of(pairs),
        list(dict.fromkeys([*(p["pos_doc"] for p in pairs), *corpus])),
        random.Random(seed),
    )
    q, p = vectors(encoder, [pair["query"] for pair in pairs]), vectors(encoder, passages)
    place = {text: i for i, text in enumerate(passages)}
    most = max(len(texts) for texts in right.values())
    scores, found = exact_index(p).search(q, min(len(passages), last + most))
    rows, filled = [], 0
    for i, (pair, spare) in enumerate(zip(pairs, random_negatives(pairs, count, seed), strict=True)):
        own = float(q[i] @ p[place[pair["pos_doc"]]])
        limit = min(own - margin, own - (1 - share) * abs(own))
        wrong = [
            (s, passages[j])
            for s, j in zip(scores[i], found[i], strict=True)
            if passages[j] not in right[pair["query"]]
        ]
        allowed = [text for s, text in wrong[first - 1 : last] if s <= limit]
        chosen = allowed[:count] if hardest else draw.sample(allowed, min(count, len(allowed)))
        others = [text for text in spare["neg"] if text not in chosen]
        filled += count - len(chosen)
        rows.append(
            {"query": pair["query"], "pos": [pair["pos_doc"]], "neg": chosen + others[: count - len(chosen)]}
        )
    return rows, filled


def teacher_scores(rows, encoder, temperature=0.05):
    """The rows with `pos_scores` and `neg_scores`: cosines of the teacher's embeddings / temperature.

    FlagEmbedding takes a plain softmax of these numbers. Bare cosines lie so close together that the
    target would be nearly uniform, hence the temperature here.
    """
    texts = list(dict.fromkeys(text for row in rows for text in [row["query"], *row["pos"], *row["neg"]]))
    place, v = {text: i for i, text in enumerate(texts)}, vectors(encoder, texts)

    def score(row, name):
        return [round(float(v[place[row["query"]]] @ v[place[text]]) / temperature, 4) for text in row[name]]

    return [{**row, "pos_scores": score(row, "pos"), "neg_scores": score(row, "neg")} for row in rows]


# ---------------------------------------------------------------- validation


def row_problem(row, group=1, scores=False):
    """What is wrong with a row, or None. group: the `train_group_size` it will be used with."""
    if not isinstance(row.get("query"), str) or not row["query"].strip():
        return "'query' is no text"
    for name in ("pos", "neg"):
        if not isinstance(row.get(name), list) or not all(
            isinstance(t, str) and t.strip() for t in row[name]
        ):
            return f"{name!r} must be a list of texts" + (" ([] for none)" if name == "neg" else "")
    if not row["pos"]:
        return "'pos' is empty"
    same = {text.strip() for text in row["pos"]} & {text.strip() for text in row["neg"]}
    if same:
        return f"a negative equals a positive: {min(same)[:60]!r}"
    if group > 1 and not row["neg"]:
        return f"'neg' is empty, but a group of {group} needs a negative"
    for name in ("pos_scores", "neg_scores") if scores or "pos_scores" in row or "neg_scores" in row else ():
        values = row.get(name)
        if not isinstance(values, list) or len(values) != len(row[name[:3]]):
            return f"{name!r} must have one number for each text of {name[:3]!r}"
        if not all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
        ):
            return f"{name!r} holds something that is no finite number"
    return None


def check_file(path, group=1, scores=False):
    """The rows of a FlagEmbedding file. TutorialError with the row number when one is wrong."""
    rows = []
    for number, row in read_rows(path):
        problem = row_problem(row, group, scores)
        if problem:
            raise TutorialError(f"{relative(path)}, row {number}: {problem}. Correct or remove the row.")
        rows.append(row)
    if not rows:
        raise TutorialError(f"{relative(path)} holds no rows. Make it again with recipes/data.py.")
    return rows


# ---------------------------------------------------------------- the recipe


def place(kind, count=10, model="minilm", **_):
    """The folder of a data step: it says what kind, how many and, where a model chose, which one."""
    name = Path(model).parent.name if Path(model).name == "model" else Path(model).name
    return (
        steps.OUTPUT
        / "data"
        / (f"random-{count}" if kind == "random" else f"hard-{count}-{name}" if kind == "hard" else "teacher")
    )


def make(
    kind,
    output=None,
    *,
    count=10,
    window=(1, 60),
    margin=0.02,
    share=1.0,
    corpus=None,
    hardest=False,
    model="minilm",
    data=None,
    temperature=0.05,
    seed=42,
    train=TRAIN,
    validation=VALIDATION,
):
    """One data file, `output/train.jsonl`; returns its path. kind: "random", "hard" or "teacher"."""
    output = Path(output or place(kind, count, model))
    source = Path(data) if kind == "teacher" else Path(train)
    if kind != "teacher":
        # Only the notebook's own split comes in two files; pairs of one's own stand alone.
        pairs = tutorial_pairs(train, validation)[0] if Path(train) == TRAIN else read_pairs(train)
    settings = {"kind": kind, "source": sha256_of(source), "seed": seed}
    if kind != "teacher":
        settings["count"] = count
    if kind != "random":
        folder = find_model(model)
        settings["model"] = fingerprint(folder)
    if kind == "hard":
        settings |= {"window": list(window), "margin": margin}
        added = {"share": share, "hardest": hardest, "corpus": corpus and sha256_of(corpus)}
        settings |= {name: value for name, value in added.items() if value not in (1.0, False, None)}
        further = corpus_texts(corpus) if corpus else []
    if kind == "teacher":
        settings["temperature"] = temperature
        rows = check_file(source, group=2)
    file, found = Path(output) / "train.jsonl", steps.open_step(output, settings)
    if found:
        return file
    found = {}
    if kind == "random":
        rows = random_negatives(pairs, count, seed)
    elif kind == "hard":
        rows, found["random_fill_ins"] = hard_negatives(
            pairs,
            Encoder(folder, 256),
            count,
            window,
            margin,
            seed,
            share=share,
            corpus=further,
            hardest=hardest,
        )
    else:
        rows = teacher_scores(rows, Encoder(folder, 256), temperature)
    with atomic_file(file, "w") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    check_file(file, group=2, scores=kind == "teacher")
    first = rows[0]
    print(
        f"row 1: query {first['query'][:60]!r}, 1 positive, {len(first['neg'])} negatives, "
        f"the first of them {first['neg'][0][:40]!r}"
    )
    found["rows"] = len(rows)
    if kind == "teacher":
        found["teacher_prefers_a_negative"] = sum(
            max(row["neg_scores"]) >= row["pos_scores"][0] for row in rows
        )
    print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in found.items()))
    steps.close_step(output, found)
    return file


def main(words=None):
    parser = steps.parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text in (
        ("random", "random negatives"),
        ("hard", "mined hard negatives"),
        ("teacher", "teacher scores for an existing file"),
        ("check", "validate a file"),
    ):
        sub = kinds.add_parser(kind, help=text, formatter_class=parser.formatter_class)
        if kind == "check":
            sub.add_argument("data", type=Path)
            sub.add_argument("--group", type=int, default=1, help="the train_group_size it is meant for")
            continue
        sub.add_argument("--output", type=Path, help="folder; one under recipes/output/data otherwise")
        sub.add_argument("--seed", type=int, default=42)
        if kind != "teacher":
            sub.add_argument("--train", type=Path, default=TRAIN, help="pairs as notebook 01 writes them")
            sub.add_argument(
                "--count", type=int, default=10 if kind == "random" else 7, help="negatives per query"
            )
        if kind != "random":
            sub.add_argument(
                "--model", default="minilm", help="minilm, bge-m3 or the folder of any embedding model"
            )
        if kind == "hard":
            sub.add_argument(
                "--window",
                type=int,
                nargs=2,
                default=(1, 60),
                metavar=("FIRST", "LAST"),
                help="ranks among the wrong passages from which negatives are drawn",
            )
            sub.add_argument(
                "--margin", type=float, default=0.02, help="leave out what scores above positive - margin"
            )
            sub.add_argument(
                "--share",
                type=float,
                default=1.0,
                help="and what scores above this share of the positive; 0.95 is NV-Retriever's, 1 is off",
            )
            sub.add_argument("--corpus", type=Path, help="further passages: JSON lines with a field 'text'")
            sub.add_argument("--hardest", action="store_true", help="the best of what is left, not a sample")
        if kind == "teacher":
            sub.add_argument(
                "--data", type=Path, required=True, help="FlagEmbedding's JSON lines with negatives"
            )
            sub.add_argument("--temperature", type=float, default=0.05, help="cosines are divided by it")
    args = parser.parse_args(words)
    if args.kind == "check":
        print(f"{relative(args.data)}: {len(check_file(args.data, args.group))} rows, all in order.")
        return
    options = {
        name: value
        for name, value in vars(args).items()
        if name not in ("kind", "output") and value is not None
    }
    make(args.kind, args.output, **options)


if __name__ == "__main__":
    steps.run(main)
