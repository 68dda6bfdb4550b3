"""The training data as numbers, the rows of a batch, and the loss of their embeddings."""

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from .finetune import duplicate_mask, in_batch_accuracy, info_nce


def tokenize_pairs(encoder, pairs):
    """Tokenise once, and number the texts so that equal texts have equal numbers."""
    numbers = {}
    lists = {
        name: [pair.get(name, []) for pair in pairs] for name in ("neg", "other_queries", "other_pos_docs")
    }
    rows = {name: [encoder.tokenize(texts) for texts in column] for name, column in lists.items()}

    def number(texts):
        return [numbers.setdefault(text, len(numbers)) for text in texts]

    return {
        "query": encoder.tokenize([pair["query"] for pair in pairs]),
        "passage": encoder.tokenize([pair["pos_doc"] for pair in pairs]),
        "query_id": number([pair["query"] for pair in pairs]),
        "passage_id": number([pair["pos_doc"] for pair in pairs]),
        "neg": rows["neg"],
        "neg_id": [number(texts) for texts in lists["neg"]],
        "other_query": rows["other_queries"],
        "other_passage": rows["other_pos_docs"],
        "other_passage_id": [number(texts) for texts in lists["other_pos_docs"]],
    }


def view_of(data, epoch, seed):
    """The data as an epoch sees them: of each pair one wording and one code, drawn by seed and epoch."""
    if not any(data["other_query"]) and not any(data["other_passage"]):
        return data
    draw = random.Random(f"{seed}-{epoch}-view")
    view = {name: list(data[name]) for name in ("query", "passage", "passage_id")}
    for i, wordings in enumerate(data["other_query"]):
        wording, code = draw.randint(0, len(wordings)), draw.randint(0, len(data["other_passage"][i]))
        if wording:
            view["query"][i] = wordings[wording - 1]
        if code:
            view["passage"][i], view["passage_id"][i] = (
                data[name][i][code - 1] for name in ("other_passage", "other_passage_id")
            )
    return {**data, **view}


def drawn_batches(rows, batch, group, batches=300, seed=0):
    """Means of batches drawn from FlagEmbedding's rows as it draws them, which masks no equal texts.

    Of each row one of "pos" and group − 1 of "neg". Returns (different passages, queries whose right answer
    also stands among the wrong ones, how often it does).
    """
    draw, found = random.Random(seed), np.zeros(3)
    for _ in range(batches):
        chosen = draw.sample(rows, batch)
        texts = ([draw.choice(row["pos"]), *draw.sample(row["neg"], group - 1)] for row in chosen)
        count = Counter(itertools.chain.from_iterable(texts))
        wrong = [sum(count[text] for text in {*row["pos"]}) - 1 for row in chosen]
        found += len(count), sum(n > 0 for n in wrong), sum(wrong)
    return tuple((found / batches).round(2).tolist())


def batch_rows(data, batch):
    """Token ids of all texts of a batch: n queries, n positives, then the hard negatives."""
    return (
        [data["query"][i] for i in batch]
        + [data["passage"][i] for i in batch]
        + [row for i in batch for row in data["neg"][i]]
    )


def all_rows(data):
    """Token ids of every text that training may see."""
    nested = (texts for name in ("neg", "other_query", "other_passage") for texts in data[name])
    return [*data["query"], *data["passage"], *(row for texts in nested for row in texts)]


def batch_loss(vectors, data, batch, config, queue=None):
    """(loss, accuracy) of the embeddings of `batch_rows`. queue: a PassageQueue with further negatives."""
    n, device = len(batch), vectors.device
    q, p = vectors[:n], vectors[n:]
    hard = [number for i in batch for number in data["neg_id"][i]]
    query_ids = torch.tensor([data["query_id"][i] for i in batch])
    passage_ids = torch.tensor([data["passage_id"][i] for i in batch] + hard)
    owner_ids = torch.cat([query_ids, torch.full((len(hard),), -1)])
    if queue is not None and len(queue.vectors):
        p = torch.cat([p, queue.vectors.to(device)])
        passage_ids = torch.cat([passage_ids, queue.passage_ids])
        owner_ids = torch.cat([owner_ids, queue.owner_ids])
    mask = duplicate_mask(query_ids, passage_ids, owner_ids).to(device) if config.mask_duplicates else None
    loss = info_nce(q, p, config.temperature, mask)
    if config.symmetric:
        loss = (loss + info_nce(p[:n], q, config.temperature, None if mask is None else mask[:, :n].T)) / 2
    return loss, in_batch_accuracy(q.detach(), p.detach(), mask)


@dataclass
class PassageQueue:
    """The last `size` passage vectors (after MoCo, arXiv 1911.05722, without a second encoder)."""

    size: int
    vectors: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    passage_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    owner_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def push(self, vectors, passage_ids, owner_ids):
        """Add n vectors (n, dims) with the numbers of their texts; the oldest beyond `size` go."""
        old = self.vectors if len(self.vectors) else vectors[:0].cpu()
        self.vectors = torch.cat([old, vectors.cpu()])[-self.size :]
        self.passage_ids = torch.cat([self.passage_ids, torch.tensor(passage_ids)])[-self.size :]
        self.owner_ids = torch.cat([self.owner_ids, torch.tensor(owner_ids)])[-self.size :]
