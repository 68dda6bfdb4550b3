"""A small word table for a training run: only the rows that occur, put back before anything is saved.

BGE-M3's table has 250,002 rows, 45 % of its parameters, and 341 pairs touch a few thousand of them. The other
rows get no gradient, so they need none, and no moments: they stay as they were published. One thing
differs from training the whole table: weight decay no longer pulls at rows that the training never reads.
"""

from dataclasses import dataclass

import torch

from .thin import without_lora

NAME = "embeddings.word_embeddings.weight"  # in BERT, RoBERTa and XLM-RoBERTa


@dataclass
class SmallTable:
    """What a shrunk word table needs to work, and to become whole again."""

    full: torch.Tensor  # (vocabulary, dims), on the CPU, as it was before
    ids: torch.Tensor  # (rows,) token ids of the rows, those of the training texts first
    place: torch.Tensor  # (vocabulary,) the row of a token id; past the end where it has none
    rows: torch.Tensor  # (rows, dims); the model's parameter is a view of its first rows


def distinct(rows, seen=()):
    """The sorted token ids of lists of token ids, without those in `seen`."""
    return sorted({token for row in rows for token in row}.difference(seen))


def keep_rows(encoder, trained, read=()):
    """Shrink the word table, in place, to the tokens of `trained` and `read` (lists of token ids).

    Rows of `trained` stay a parameter; rows that only occur in `read` are frozen. Other texts can't be
    embedded until `put_back`. Call it on the device where the encoder stays.
    """
    embedding = encoder.backbone.get_input_embeddings()
    full = embedding.weight.detach()
    first = distinct(trained)
    ids = torch.tensor(first + distinct(read, first))
    place = torch.full((len(full),), len(ids))
    place[ids] = torch.arange(len(ids))
    rows = full[ids.to(full.device)]
    embedding.weight = torch.nn.Parameter(rows[: len(first)])
    encoder.small_table = SmallTable(full.cpu(), ids, place.to(full.device), rows)


def table_of(encoder, tokens):
    """(table, row numbers) to look `tokens` up in; without a gradient the frozen rows are there as well."""
    table, small = encoder.backbone.get_input_embeddings().weight, encoder.small_table
    if small is None:
        return table, tokens
    return table if torch.is_grad_enabled() else small.rows, small.place.index_select(0, tokens)


def whole_state(encoder):
    """The backbone's state dict as a model that is saved: with the whole word table, and no LoRA layers."""
    state, small = without_lora(encoder.backbone), encoder.small_table
    if small is not None:
        trained = state[NAME]
        state[NAME] = small.full.clone()
        state[NAME][small.ids[: len(trained)]] = trained.cpu()
    return state


def put_back(encoder):
    """Undo `keep_rows`: the whole table is a parameter again, with the trained rows in it."""
    if encoder.small_table is not None:
        table = whole_state(encoder)[NAME].to(encoder.device)
        encoder.backbone.get_input_embeddings().weight = torch.nn.Parameter(table)
        encoder.small_table = None
