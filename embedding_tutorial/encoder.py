"""Texts to vectors: tokenizer, transformer, the model's own pooling; and a model as a folder of files.

Texts go through the model in groups of similar length, each laid end to end in one long row, so that no
pad token is computed. Only attention has to know where a text begins and ends.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import itertools
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from . import words
from .files import TutorialError, atomic_folder, read_json, relative, sha256_once, write_json

disable_progress_bar()  # a bar for each of the many short loads would bury what a cell shows

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD_FILES = ("colbert_linear.pt", "sparse_linear.pt")  # BGE-M3's sparse and multi-vector outputs
LENGTH_FILE = "sentence_bert_config.json"  # where sentence-transformers cuts a text


def tokenize(tokenizer, texts, max_length):
    """Token ids of each text, special tokens included, cut at `max_length`: a list of lists."""
    texts, rows = list(texts), []
    for start in range(0, len(texts), 1024):  # the tokenizer keeps 100 bytes a token until its call is over
        rows += tokenizer(
            texts[start : start + 1024],
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    return rows


def group_by_length(lengths, token_budget):
    """Indices of the texts, shortest first, in groups of at most `token_budget` tokens, or of one text."""
    groups, used = [[]], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups[-1] and used + lengths[i] > token_budget:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += lengths[i]
    return [group for group in groups if group]


class Layout:
    """Where each text of a packed row begins and ends: made once per group, used in every layer.

    lengths: tokens of each text, in order.
    """

    def __init__(self, lengths, device):
        self.lengths, self.longest, self.device = list(lengths), max(lengths), torch.device(device)
        self.runs = equal_runs(self.lengths)

    @functools.cached_property
    def ends(self):
        """(texts + 1,) int32: the first token of each text, and the number of all tokens."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(self.device)

    @functools.cached_property
    def cells(self):
        """(tokens,): the place of each token in a rectangle of texts × longest, row by row."""
        rows = (torch.arange(n) + i * self.longest for i, n in enumerate(self.lengths))
        return torch.cat(list(rows)).to(self.device)

    @functools.cached_property
    def real(self):
        """(texts, 1, 1, longest) bool: the cells of the rectangle that hold a token."""
        column = torch.arange(self.longest)
        return (column < torch.tensor(self.lengths)[:, None])[:, None, None].to(self.device)


def equal_runs(lengths):
    """Runs of neighbouring texts of equal length: [(first token, texts, length)]."""
    runs, start = [], 0
    for length, texts in itertools.groupby(lengths):
        count = len(list(texts))
        runs.append((start, count, length))
        start += count * length
    return runs


def packed_attention(module, query, key, value, attention_mask, layout, scaling=None, dropout=0.0, **kwargs):
    """Attention within each text of a packed row: (1, heads, tokens, d) in, (1, tokens, heads, d) out.

    layout: the row's Layout. Registered with transformers' AttentionInterface as "packed".
    """
    kind = query.dtype
    if query.device.type == "cpu":
        way = attention_by_runs
        if kind == torch.bfloat16 and module.training:  # the backward pass is four times faster in fp32
            query, key, value = query.float(), key.float(), value.float()
    elif has_flash(query) and not dropout:  # torch's variable-length attention knows no dropout
        way = flash_attention
    else:
        way = rectangular_attention
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return way(q, k, v, layout, scaling, dropout).unsqueeze(0).to(kind), None


def has_flash(query):
    """Whether this GPU runs torch's variable-length flash attention: half precision, Ampere or newer."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(query.device) >= (8, 0)


def flash_attention(query, key, value, layout, scaling, dropout):
    """One call for texts of any lengths, without a pad token or a mask; (tokens, heads, d) in and out."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = layout.ends, layout.longest
    return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling)


def attention_by_runs(query, key, value, layout, scaling, dropout):
    """One call for each run of texts of equal length; (tokens, heads, d) in and out."""
    results, sizes = [], [count * length for _, count, length in layout.runs]
    parts = zip(*(x.split(sizes) for x in (query, key, value)), layout.runs, strict=True)
    for *qkv, (_, count, length) in parts:
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results)


def rectangular_attention(query, key, value, layout, scaling, dropout):
    """One masked call, for GPUs without flash and for dropout: the texts are padded for attention alone."""
    texts, longest, heads = len(layout.lengths), layout.longest, query.shape[1:]

    def padded(x):  # each token has a cell of its own, so the backward pass is a plain look-up
        cells = x.new_zeros(texts * longest, *heads).index_copy(0, layout.cells, x)
        return cells.unflatten(0, (texts, longest)).transpose(1, 2)

    q, k, v = padded(query), padded(key), padded(value)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.real, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, layout.cells)


AttentionInterface.register("packed", packed_attention)


class LookUp(torch.autograd.Function):
    """`table[ids]` (n, dims); its backward pass adds n rows to `table.grad` instead of making a new table.

    Autograd would make the whole table anew for every group: 47 MB of zeros for MiniLM, 1 GB for BGE-M3.
    """

    @staticmethod
    def forward(ctx, table, ids):
        ctx.table, ctx.ids = table, ids
        return table.detach().index_select(0, ids)

    @staticmethod
    def backward(ctx, gradient):
        table, ids = ctx.table, ctx.ids
        if table.grad is None:
            table.grad = torch.zeros_like(table)
        if table.device.type == "cpu":  # on each device the call that gives the same sum every time
            table.grad.index_add_(0, ids, gradient.to(table.dtype))
        else:
            table.grad.index_put_((ids,), gradient.to(table.dtype), accumulate=True)
        return None, None


class Encoder(torch.nn.Module):
    """Tokenizer, transformer, the model's own pooling, and L2 normalisation.

    folder: a BERT, RoBERTa or XLM-RoBERTa model with `1_Pooling/config.json`; TutorialError otherwise.
    dropout: probability in hidden states and attention while training (None: the model's own).
    """

    def __init__(self, folder, max_length=512, dropout=0.0):
        super().__init__()
        self.folder, self.max_length, self.pooling = Path(folder), max_length, read_pooling(folder)
        require_no_other_steps(folder)
        weights_file(folder)
        with damage_named(folder):
            config = AutoConfig.from_pretrained(self.folder)
        if config.model_type not in ("bert", "roberta", "xlm-roberta"):
            raise TutorialError(
                f"{relative(folder)} is a {config.model_type}; this code knows bert, roberta and xlm-roberta."
            )
        if dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        # RoBERTa counts positions from the padding id on, BERT from 0.
        self.first_position = 0 if config.model_type == "bert" else config.pad_token_id + 1
        limit = config.max_position_embeddings - self.first_position
        if max_length > limit:
            raise TutorialError(
                f"max_length {max_length} is more than the {limit} tokens that {relative(folder)} can read."
            )
        with damage_named(folder):
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
            self.backbone = AutoModel.from_pretrained(
                self.folder, config=config, attn_implementation="packed", dtype=torch.float32
            )
        self.small_table = None  # while training: the rows of the word table that occur (see words.py)

    device = property(lambda self: next(self.parameters()).device)

    def tokenize(self, texts):
        return tokenize(self.tokenizer, texts, self.max_length)

    def fillers(self, rows):
        """Texts of one token, never pooled, that fill a packed row up to a multiple of 64 tokens.

        On a CPU in bf16 each new number of tokens is compiled anew and kept: without them MiniLM's training
        grew from 1.7 to 2.3 GB within 20 updates of MBPP, and on. No gradient reaches them.
        """
        if self.device.type != "cpu":
            return []
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.backbone.dtype
        return [rows[0][:1]] * (-sum(map(len, rows)) % 64 if kind == torch.bfloat16 else 0)

    def forward(self, rows):
        """Token ids, a list of n lists, to L2-normalised embeddings (n, dims) in float32 or wider."""
        texts, rows = len(rows), [*rows, *self.fillers(rows)]
        lengths = [len(row) for row in rows]
        layout = Layout(lengths, self.device)
        tokens = torch.tensor(list(itertools.chain.from_iterable(rows)), device=self.device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device) + self.first_position
        table, tokens = words.table_of(self, tokens)
        hidden = self.backbone(
            inputs_embeds=LookUp.apply(table, tokens).unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            layout=layout,
        ).last_hidden_state.squeeze(0)
        if self.pooling == "cls":
            pooled = hidden.index_select(0, layout.ends.narrow(0, 0, texts))
        else:
            parts = (
                hidden[start : start + count * length].unflatten(0, (count, length))
                for start, count, length in layout.runs
            )
            pooled = torch.cat([part.mean(dim=1) for part in parts])[:texts]
        return F.normalize(pooled if pooled.dtype == torch.float64 else pooled.float(), dim=-1)


def in_order(groups, parts):
    """Put the embeddings of groups, a list of tensors, back into the order of the texts: (n, dims)."""
    order = torch.tensor([i for group in groups for i in group])
    return torch.cat(parts)[order.argsort().to(parts[0].device)]


def embed(encoder, texts, token_budget=1024, progress=False):
    """L2-normalised embeddings (n, dims), in the order given.

    texts: strings, or token ids already made by `encoder.tokenize`. token_budget: tokens that go through
    the model at once; it sets memory, not results.
    """
    if not len(texts):
        raise ValueError("embed needs at least one text")
    rows = encoder.tokenize(texts) if isinstance(texts[0], str) else texts
    groups = group_by_length([len(row) for row in rows], token_budget)
    bar = tqdm(groups, desc="embedding", file=sys.stdout, disable=not progress)
    return in_order(groups, [encoder([rows[i] for i in group]) for group in bar])


def autocast(encoder, precision):
    """The autocast context of a precision: "fp32" (none), "bf16" or "fp16" (CUDA)."""
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return torch.autocast(encoder.device.type, kinds[precision], enabled=precision != "fp32")


def random_state(device):
    """The random state that dropout draws from, on the CPU and on `device`."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state, device):
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def give_memory_back(device):
    """Return what was freed to the GPU, or on Linux to the system: both allocators keep it for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None):
        trim(0)  # glibc's; gigabytes after an update of BGE-M3


# ---------------------------------------------------------------- a model as a folder of files


def read_pooling(folder):
    """'cls' or 'mean', from the model's own `1_Pooling/config.json`; TutorialError if missing or another."""
    path = Path(folder) / "1_Pooling" / "config.json"
    known = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
    config, legacy = read_json(path), "pooling_mode_"
    modes = []
    if isinstance(config, dict):
        modes = [name.removeprefix(legacy) for name, on in config.items() if name.startswith(legacy) and on]
        modes = [str(config["pooling_mode"])] if config.get("pooling_mode") else modes
    if len(modes) == 1 and modes[0] in known:  # of several, sentence-transformers lays one behind the other
        return known[modes[0]]
    raise TutorialError(
        f"{relative(path)} does not ask for CLS or mean pooling alone: {config}. Use a model that does."
    )


def require_no_other_steps(folder):
    """Raise TutorialError where `modules.json` names a step that Encoder does not take, as LaBSE's Dense."""
    path = Path(folder) / "modules.json"
    parts = read_json(path) if path.is_file() else []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise TutorialError(f"{relative(path)} is not a list of steps. Download the model again.")
    kinds = {str(part.get("type")).rsplit(".", 1)[-1] for part in parts}
    if others := kinds - {"Transformer", "Pooling", "Normalize"}:
        raise TutorialError(
            f"{relative(path)} asks for {', '.join(sorted(others))}, which is not made here, so the vectors "
            "would be others. Use a model without it."
        )


def describe_pooling(folder, dims, pooling):
    """Write the files by which SentenceTransformer and `Encoder` know how a vector is made."""
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    kinds = [(path, f"sentence_transformers.models.{kind}") for path, kind in parts.items()]
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)]
    modes = {"cls_token": pooling == "cls", "mean_tokens": pooling == "mean", "max_tokens": False}
    how = {f"pooling_mode_{name}": on for name, on in (modes | {"mean_sqrt_len_tokens": False}).items()}
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dims, **how})
    (folder / "2_Normalize").mkdir(exist_ok=True)
    if not (folder / LENGTH_FILE).exists():
        write_json(folder / LENGTH_FILE, {"max_seq_length": 512, "do_lower_case": False})


@contextlib.contextmanager
def damage_named(folder):
    """Turn whatever a library raises over a model folder that it can't read into a TutorialError."""
    try:
        yield
    except Exception as error:  # of many types: JSON, UTF-8, safetensors, torch, tokenizers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TutorialError(
            f"{relative(folder)} can't be read as a model ({reason}). Delete the folder and run the cell "
            "that makes it again, or download it again."
        ) from error


def weights_file(folder):
    """The weights of a model folder. Raises TutorialError when there are none."""
    for name in WEIGHT_FILES:
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise TutorialError(
        f"{folder} holds neither {' nor '.join(WEIGHT_FILES)}: it is no complete model. "
        "Delete the folder and run the cell that makes it again."
    )


def companions(folder):
    """Names of the files that make a model together with its weights, sorted: the one list of them.

    Configuration, tokenizer, pooling, BGE-M3's two heads. What is copied with a model is also what its
    fingerprint covers.
    """
    names = []
    for file in sorted(Path(folder).rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        wanted = file.suffix in {".json", ".txt", ".model"} or file.name in HEAD_FILES
        if file.is_file() and wanted and not hidden and name.parts[0] not in {"onnx", "imgs"}:
            names.append(name.as_posix())
    return names


def copy_companions(folder, target, without=()):
    """Copy what makes a model together with its weights, but for the names in `without`."""
    for name in companions(folder):
        if name not in without:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)


def fingerprint(folder):
    """16 hex digits that change whenever anything that shapes the model's vectors changes.

    A file that has not changed is read once per process.
    """
    digest = hashlib.sha256(sha256_once(weights_file(folder)).encode())
    for name in companions(folder):
        digest.update(f"{name} {sha256_once(Path(folder) / name)}".encode())
    return digest.hexdigest()[:16]


def save_model(encoder, folder):
    """Write a folder that SentenceTransformer, AutoModel and FlagEmbedding open: weights in float32,
    and from the base tokenizer, configuration, pooling, and the sparse and ColBERT heads if it has them.

    sentence-transformers will read at least `encoder.max_length` tokens: MiniLM's own file says 256.
    """
    with atomic_folder(folder) as target:
        copy_companions(encoder.folder, target)
        if (target / LENGTH_FILE).exists():
            lengths = read_json(target / LENGTH_FILE)
            if (lengths.get("max_seq_length") or encoder.max_length) < encoder.max_length:
                write_json(target / LENGTH_FILE, lengths | {"max_seq_length": encoder.max_length})
        weights = {
            name: w.detach().float().cpu().contiguous() for name, w in words.whole_state(encoder).items()
        }
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def vectors_elsewhere(folder, texts):
    """The dense vectors that other libraries compute from a saved model folder: {library: (n, dims)}.

    One library at a time, and its model goes before the next one comes: BGE-M3 takes 2.3 GB in each.
    """
    from FlagEmbedding import BGEM3FlagModel, FlagModel
    from sentence_transformers import SentenceTransformer

    folder, pooling = str(folder), read_pooling(folder)
    usual = {"use_fp16": False, "devices": "cpu"}

    def auto_model():
        tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(pooled, dim=-1).numpy()

    def sentence_transformer():
        model = SentenceTransformer(folder, device="cpu")
        return model.encode(texts, normalize_embeddings=True, show_progress_bar=False)

    ways = {
        "AutoModel": auto_model,
        "SentenceTransformer": sentence_transformer,
        "FlagModel": lambda: FlagModel(folder, pooling_method=pooling, **usual).encode(texts),
    }
    if (Path(folder) / "colbert_linear.pt").exists():
        ways["BGEM3FlagModel"] = lambda: BGEM3FlagModel(folder, **usual).encode(texts)["dense_vecs"]
    found = {}
    for library, vectors in ways.items():
        found[library] = vectors()
        gc.collect()  # their models refer to themselves
        give_memory_back(torch.device("cpu"))
    return found
