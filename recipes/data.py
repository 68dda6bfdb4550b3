"""Recipe 1, data: from pairs to FlagEmbedding's JSON lines, with negatives and teacher scores.

    python recipes/data.py random  --count 10       # random negatives
    python recipes/data.py hard    --count 7        # mined: near the query in a model's eyes, yet wrong
    python recipes/data.py teacher --data FILE      # adds a teacher's scores for distillation
    python recipes/data.py lengths --data FILE      # a file for each length, with a batch of its own
    python recipes/data.py check   FILE             # says which row is wrong

random and hard read the pairs of notebook 01, or with --data your own: any file that the tutorial reads, or
FlagEmbedding's. A line is {"query": text, "pos": [texts], "neg": [texts]}, with "pos_scores" and "neg_scores"
where a teacher has spoken. Pairs with one query become one row: all its answers are in "pos". Negatives that
a row has stay, in front; --count fills up.
"""

import inspect
import itertools
import math
import random
import sys
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_tutorial import pairs as texts_of  # noqa: E402
from embedding_tutorial import profiles  # noqa: E402
from embedding_tutorial.encoder import embed, fingerprint  # noqa: E402
from embedding_tutorial.files import ROOT, TutorialError, relative, sha256_of  # noqa: E402
from embedding_tutorial.finetune import split_pairs  # noqa: E402
from embedding_tutorial.own_data import token_counts  # noqa: E402
from embedding_tutorial.pairs import answers_of, passages_of, read_pairs, read_rows, write_pairs  # noqa: E402
from recipes import models, steps  # noqa: E402

TRAIN, VALIDATION = ROOT / "data" / "mbpp_train.jsonl", ROOT / "data" / "mbpp_val.jsonl"
EXACT = 50_000  # passages: with more the search is approximate and its vectors are float16
BLOCK = 20_000  # texts, queries or rows that are worked on at once


def tutorial_pairs(train=TRAIN, validation=VALIDATION):
    """(training pairs, validation pairs) of notebook 01; splits the data as it does where it has not run."""
    train, validation = Path(train), Path(validation)
    if not train.exists() and not validation.exists():
        source = profiles.mbpp_path(profiles.PROFILES["pocket"])
        print(f"{relative(train)} is not there: splitting {relative(source)} as notebook 01 does.")
        for path, part in zip((train, validation), split_pairs(texts_of.read_mbpp(source)), strict=True):
            write_pairs(path, part)
    return read_pairs(train), read_pairs(validation)


def blocks(items, size=None):
    items = iter(items)
    while block := list(itertools.islice(items, size or BLOCK)):
        yield block


def positives_of(pairs):
    """{query: the set of its right answers}: a query may stand in several pairs."""
    right = {}
    for pair in pairs:
        right.setdefault(pair["query"], set()).update(answers_of(pair))
    return right


def row_of(pair, wrong):
    return {"query": pair["query"], "pos": answers_of(pair), "neg": wrong}


def own_negatives(pair):
    """The negatives that a pair came with, without those that are its right answers."""
    right = {text.strip() for text in answers_of(pair)}
    return [text for text in dict.fromkeys(pair.get("neg", ())) if text.strip() not in right]


def random_negatives(pairs, count=10, seed=42):
    """Yield FlagEmbedding's rows: their own negatives, filled up to `count` by passages of other queries."""
    right, passages, draw = positives_of(pairs), passages_of(pairs), random.Random(seed)
    place = {text: i for i, text in enumerate(passages)}
    for number, pair in enumerate(pairs, 1):
        wrong = own_negatives(pair)
        out = sorted(place[text] for text in {*right[pair["query"]], *wrong} if text in place)
        left = len(passages) - len(out)
        if (can := left + len(wrong)) < count:
            raise TutorialError(f"Row {number} can have {can} negatives, not {count}. Lower --count.")
        for n in draw.sample(range(left), max(0, count - len(wrong))):  # the n-th of those that are left
            for taken in out:
                n += n >= taken
            wrong.append(passages[n])
        yield row_of(pair, wrong)


def vectors(encoder, texts):
    """Unit vectors (n, dims) on the machine's own device: float32, for many texts float16."""
    encoder, found = encoder.to(profiles.device_of_this_machine()).eval(), None
    many = len(texts) > EXACT
    for start in range(0, len(texts), BLOCK):
        part, shown = texts[start : start + BLOCK], len(texts) > 1000
        with torch.no_grad():
            part = embed(encoder, part, token_budget=4096, progress=shown).float().cpu().numpy()
        if found is None:
            found = np.empty((len(texts), part.shape[1]), np.float16 if many else np.float32)
        found[start : start + BLOCK] = part
    return found


def faiss():
    try:
        import faiss
    except ImportError:
        raise TutorialError("faiss is not installed: pip install -r recipes/requirements.txt") from None
    return faiss


def exact_index(passages):
    """A faiss index that compares with every vector (n, dims) by inner product."""
    index = faiss().IndexFlatIP(passages.shape[1])
    index.add(np.ascontiguousarray(passages, dtype=np.float32))
    return index


def index_of(passages):
    """`exact_index`, or above EXACT passages one of inverted lists: it looks at those nearest to a query."""
    if len(passages) <= EXACT:
        return exact_index(passages)
    lists = 4 * math.isqrt(len(passages))
    index = faiss().index_factory(passages.shape[1], f"IVF{lists},SQfp16", faiss().METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(len(passages), 40 * lists, replace=len(passages) < 40 * lists)
    index.train(passages[np.sort(sample)].astype(np.float32))
    for start in range(0, len(passages), BLOCK):
        index.add(passages[start : start + BLOCK].astype(np.float32))
    faiss().extract_index_ivf(index).nprobe = 16
    return index


def mined(pairs, encoder, count=7, window=(1, 60), margin=0.02, seed=42, share=1.0, corpus=(),
          hardest=False, instruction=""):
    """Yield (row, random fill-ins): negatives drawn from the ranks `window` of each query's wrong passages.

    A passage that scores more than the positive's score - margin, or more than share of it, may well be right
    although nobody said so, and is left out (0.95 is TopK-PercPos of NV-Retriever, arXiv 2407.15831). corpus:
    further passages. hardest: the best of those that are left, and not a sample of them. Own negatives come
    first; queries with too few left get random ones. instruction: stands before every query.
    """
    first, last = window
    if not 1 <= first <= last or last - first + 1 < count:
        raise TutorialError(f"The ranks {first} to {last} do not hold {count} negatives. Widen --window.")
    right, draw = positives_of(pairs), random.Random(seed)
    passages = list(dict.fromkeys([*passages_of(pairs), *corpus]))
    place = {text: i for i, text in enumerate(passages)}
    p = vectors(encoder, passages)
    index, k = index_of(p), min(len(passages), last + max(map(len, right.values())))
    spares = random_negatives(pairs, count, seed)
    for block in blocks(pairs):
        q = vectors(encoder, [instruction + pair["query"] for pair in block]).astype(np.float32)
        scores, found = index.search(q, k)
        for i, pair in enumerate(block):
            given, own_right = own_negatives(pair), right[pair["query"]]
            taken, want = {place.get(text) for text in {*own_right, *given}}, max(0, count - len(given))
            own = min(float(q[i] @ p[place[text]]) for text in answers_of(pair))
            limit = min(own - margin, own - (1 - share) * abs(own))
            near = zip(scores[i].tolist(), found[i].tolist(), strict=True)
            wrong = [(score, j) for score, j in near if j >= 0 and j not in taken]
            allowed = [passages[j] for score, j in wrong[first - 1 : last] if score <= limit]
            chosen = given + (allowed[:want] if hardest else draw.sample(allowed, min(want, len(allowed))))
            others = [text for text in next(spares)["neg"] if text not in chosen]
            fill = others[: max(0, count - len(chosen))]
            yield row_of(pair, chosen + fill), len(fill)


def cosines(encoder, instruction=""):
    """A scorer of [(query, text)]: cosines of an embedding model, each text embedded once."""

    def score(cells):
        asked = [instruction + query for query, _ in cells]
        texts = list(dict.fromkeys([*asked, *(text for _, text in cells)]))
        place, v = {text: i for i, text in enumerate(texts)}, vectors(encoder, texts)
        return [float(v[place[q]] @ v[place[text]]) for q, (_, text) in zip(asked, cells, strict=True)]

    return score


def cross_encoder(folder, max_length):
    """A scorer of [(query, text)]: the logits of a cross-encoder, which reads both together."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), max_length=max_length, device=profiles.device_of_this_machine())
    return lambda cells: model.predict(cells, activation_fn=torch.nn.Identity()).tolist()


def teacher_scores(rows, score, temperature=0.2):
    """Yield the rows with `pos_scores` and `neg_scores`: what `score` says of [(query, text)] / temperature.

    FlagEmbedding takes a plain softmax of these numbers. That of bare cosines is nearly flat, that of cosines
    over 0.05 nearly one-hot: it says what the row says already. The logits of a --cross encoder take 1.
    """
    for block in blocks(rows):
        cells = [(row["query"], text) for row in block for text in [*row["pos"], *row["neg"]]]
        values = iter(score(cells))
        for row in block:
            for name in ("pos", "neg"):
                row = row | {f"{name}_scores": [round(next(values) / temperature, 4) for _ in row[name]]}
            yield row


def target_of(row):
    """What the teacher's softmax gives the first right answer beside each of the negatives alone."""
    return [1 / (1 + math.exp(min(700, n - row["pos_scores"][0]))) for n in row["neg_scores"]]


def row_problem(row, group=1, scores=False):
    """What is wrong with a row, or None. group: the `train_group_size` it will be used with."""
    if not isinstance(row.get("query"), str) or not row["query"].strip():
        return "'query' is no text"
    for name in ("pos", "neg"):
        if not isinstance(row.get(name), list) or any(map(texts_of.text_problem, row[name])):
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
        if not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            return f"{name!r} holds something that is no finite number"
    return None


def check_file(path, group=1, scores=False):
    """What is in a FlagEmbedding file that will be used with a `train_group_size` of `group`.

    {"rows", "batch_size", "shared": pairs of rows with a common positive, "crossed": rows with a negative
    that is another's positive, "clash": for `clashes`, "few": numbers of the rows with too few negatives}.
    TutorialError with the row number when one is wrong, or asks what an earlier row asks: in one batch each
    would be the other's negative. Nothing is kept but a number for each text.
    """
    asked, answers, drawn, wrong, sizes = {}, Counter(), Counter(), array("q"), array("q")
    found = {"rows": 0, "batch_size": None, "crossed": 0, "few": []}
    for number, row in read_rows(path):
        problem = row_problem(row, group, scores)
        if not problem and (first := asked.setdefault(hash(row["query"]), number)) != number:
            problem = f"the query of row {first} again: in one batch they are each other's negatives"
            raise TutorialError(f"{relative(path)}, row {number}: {problem}. Put all answers into one 'pos'.")
        if problem:
            raise TutorialError(f"{relative(path)}, row {number}: {problem}. Correct or remove the row.")
        answers.update(map(hash, set(row["pos"])))
        drawn.update({hash(text): 1 / len(row["pos"]) for text in row["pos"]})
        wrong.extend(map(hash, row["neg"]))
        sizes.append(len(row["neg"]))
        found["few"] += [number] if len(row["neg"]) < group - 1 else []
        found["rows"] += 1
        found["batch_size"] = found["batch_size"] or row.get("batch_size")
    if not found["rows"]:
        raise TutorialError(f"{relative(path)} holds no rows. Make it again with recipes/data.py.")
    clash, texts = sum((n - 1) * drawn[text] for text, n in answers.items()), iter(wrong)
    for size in sizes:
        right = sum(answers[text] for text in itertools.islice(texts, size))
        found["crossed"] += right > 0
        clash += right * min(1, (group - 1) / size) if right else 0
    return found | {"shared": sum(n * (n - 1) // 2 for n in answers.values()), "clash": round(clash, 3)}


def clashes(found, batch):
    """How often a right answer is expected to count as wrong in a batch of `batch` rows of a checked file."""
    rows, batch = max(2, found["rows"]), min(batch, found["rows"])
    return found["clash"] * batch * (batch - 1) / (rows * (rows - 1))


def remarks(found, group, batch):
    """What a reader should know before training on a checked file, a line each; FlagEmbedding is silent."""
    if few := found["few"]:
        where = ", ".join(map(str, few[:5])) + (", …" if few[5:] else "")
        yield f"{len(few):,} rows have fewer than {group - 1} negatives, which are repeated: rows {where}."
    if found["clash"]:
        yield (
            f"{found['shared']:,} pairs of rows have a positive in common, {found['crossed']:,} rows have a "
            "negative that is another row's positive. Where two meet in a batch, a right answer may count as "
            f"wrong: {clashes(found, batch):.2f} times in a batch of {batch}.")


def length_groups(rows, tokenizer, bounds=(64, 128, 256, 512), tokens=8192, group=1, processes=2):
    """([(bound, queries per process, rows)], the bound (n,) of each row): a row's longest text decides.

    A batch is what fits into `tokens` padded tokens. A group smaller than one batch of all processes would
    vanish without a word, so it joins the next longer one.
    """
    longest = []
    for block in blocks(rows):
        texts = [[row["query"], *row["pos"], *(row["neg"] if group > 1 else ())] for row in block]
        each = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
        count = dict(zip(each, token_counts(tokenizer, each)[0].tolist(), strict=True))
        longest += [max(count[text] for text in own) for own in texts]
    bounds = np.array(sorted(bounds))
    own = bounds[np.minimum(np.searchsorted(bounds, longest), len(bounds) - 1)]
    found = []
    for number, bound in enumerate(bounds.tolist()):
        batch, size = max(1, tokens // (bound * (1 + group))), int((own == bound).sum())
        if number + 1 < len(bounds) and size < batch * processes:
            own[own == bound] = bounds[number + 1]
        elif size:
            batch = min(batch, size // processes)
            if not batch:
                raise TutorialError(
                    f"{size} rows above {bounds[number - 1]} tokens are too few: lower --bounds.")
            found.append((bound, batch, size))
    return found, own


MODEL = {"model": "minilm", "max_length": 512}
KINDS = {  # what does it, and what it is given beside its own options
    "random": (random_negatives, {}),
    "hard": (mined, MODEL | {"corpus": ""}),
    "teacher": (teacher_scores, MODEL | {"instruction": "", "cross": False}),
    "lengths": (length_groups, MODEL)}


def defaults_of(kind):
    function, more = KINDS[kind]
    found = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    return {name: value for name, value in found.items() if value is not inspect.Parameter.empty} | more


def place(kind, data=None, **given):
    """What a data step makes, absolute; its folder says what kind, how many, of what, by which model."""
    settings = defaults_of(kind) | given
    name = f"{kind}-{settings['count']}" if kind in ("random", "hard") else kind
    name += f"-{steps.label(settings['model'])}" if kind in ("hard", "teacher") else ""
    name += f"-{steps.label(data)}" if data else ""
    return (steps.OUTPUT / "data" / name / ("groups" if kind == "lengths" else "train.jsonl")).resolve()


def make(kind, output=None, data=None, **given):
    """What a data step makes, a file or a folder of files; returns its path. kind: one of KINDS."""
    made = Path(output).resolve() / place(kind).name if output else place(kind, data, **given)
    settings, pairs = defaults_of(kind), None
    settings |= {name: value for name, value in given.items() if name in settings}
    own = {name: value for name, value in settings.items() if name not in KINDS[kind][1]}
    if kind in ("random", "hard"):
        pairs = texts_of.one_per_query(read_pairs(data) if data else tutorial_pairs()[0])
        if right := sum(len({*pair.get("neg", ())}) - len(own_negatives(pair)) for pair in pairs):
            print(f"{right} negatives are right answers of the same query: left out.")
    else:
        found = check_file(data, group=settings["group"] if kind == "lengths" else 2)
    said = {"kind": kind, "source": sha256_of(data or TRAIN), **settings}
    if "model" in settings:
        folder, length = models.find_model(settings["model"]), settings["max_length"]
        said["model"] = fingerprint(folder)
    said |= {"corpus": sha256_of(settings["corpus"])} if settings.get("corpus") else {}
    if steps.open_step(made.parent, said):
        return made
    rows, filled, targets = (row for _, row in read_rows(data)) if data else None, Counter(), array("d")
    if kind == "random":
        rows = random_negatives(pairs, **own)
    elif kind == "hard":
        corpus = texts_of.read_corpus(settings["corpus"])
        rows = mined(pairs, models.load(folder, length), corpus=corpus, **own)
        rows = (filled.update(random_fill_ins=n) or row for row, n in rows)
    elif kind == "teacher":
        plain = not settings["cross"]
        score = cosines(models.load(folder, length), settings["instruction"]) if plain else None
        rows = teacher_scores(rows, score or cross_encoder(folder, length), **own)
        rows = (targets.extend(target_of(row)) or row for row in rows)
    else:
        groups, lengths = length_groups(rows, models.load(folder, length).tokenizer, **own)
        for bound, batch, size in groups:
            print(f"up to {bound} tokens: {size:,} rows, {batch} queries per process and update")
            chosen = (row for n, (_, row) in enumerate(read_rows(data)) if lengths[n] == bound)
            write_pairs(made / f"up-to-{bound}.jsonl", (row | {"batch_size": batch} for row in chosen))
        steps.close_step(made.parent, found | {"groups": groups})
        return made
    write_pairs(made, rows)
    if targets:
        shares = f"mean {np.mean(targets):.3f}, median {np.median(targets):.3f} beside one negative"
        filled["target_on_the_positive"] = shares
    found = check_file(made, group=2, scores=kind == "teacher") | filled
    shown = ("rows", "shared", *filled)
    print(", ".join(f"{name.replace('_', ' ')}: {found[name]}" for name in shown))
    steps.close_step(made.parent, found)
    return made


def main(words=None):
    parser = steps.parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    sub = kinds.add_parser("check", formatter_class=parser.formatter_class)
    sub.add_argument("data", type=Path)
    sub.add_argument("--group", type=int, default=1)
    sub.add_argument("--batch", type=int, default=80, help="queries of an update")
    for kind in KINDS:
        about = inspect.cleandoc(KINDS[kind][0].__doc__)
        sub = kinds.add_parser(kind, formatter_class=parser.formatter_class, description=about)
        sub.add_argument("--output", type=Path, help="folder; otherwise one whose name says what it holds")
        text = "pairs, of notebook 01 otherwise" if kind in ("random", "hard") else "FlagEmbedding's lines"
        sub.add_argument("--data", type=Path, help=text, required=kind in ("teacher", "lengths"))
        for name, default in defaults_of(kind).items():
            how = {"default": default, "type": type(default)}
            how = {"action": "store_true"} if default is False else how
            if isinstance(default, tuple):
                how |= {"type": int, "nargs": 2 if name == "window" else "+"}
            sub.add_argument(f"--{name.replace('_', '-')}", help=f"otherwise {default}", **how)
    args = parser.parse_args(words)
    if args.kind != "check":
        return make(**vars(args))
    found = check_file(args.data, args.group)
    more = f"; {n:,} have a negative that is another row's positive" if (n := found["crossed"]) else ""
    print(f"{relative(args.data)}: {found['rows']:,} rows, all in order{more}.")
    print(*(line + "\n" for line in remarks(found, args.group, args.batch)), sep="", end="")


if __name__ == "__main__":
    steps.run(main)
