"""The memory of one update at BGE-M3's size, idea by idea: counted without a GPU, or measured on one.

    python benchmarks/memory_ladder.py    # draws the figure from results/full_size.json again

Each rung runs the engine's own `start_run` and `one_update`. On a GPU the peak is read from torch's
allocator. Without one they run on torch's "meta" device, whose tensors have a shape and no data, and the
storages alive after each operation are added up. What CUDA does otherwise there is put in place: autocast,
flash and memory-efficient attention. Not in either figure: the CUDA context (0.3 to 0.6 GB), workspaces.
"""

import contextlib
import gc
import sys
import weakref
from typing import NamedTuple
from unittest.mock import patch

import common
import torch
import torch.nn.functional as F
import training_cuda
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

from embedding_tutorial import encoder as encoders
from embedding_tutorial import finetune
from embedding_tutorial import training as engine
from embedding_tutorial.batches import tokenize_pairs
from embedding_tutorial.figures import style as st
from embedding_tutorial.files import read_json
from embedding_tutorial.finetune import TrainConfig, batch_of, updates_per_epoch
from embedding_tutorial.profiles import PROFILES
from embedding_tutorial.thin import add_lora

aten, BUDGET = torch.ops.aten, PROFILES["full"].token_budget


class Counter(TorchDispatchMode):
    """Bytes of the storages on "meta" that are alive, and their peak, while the mode is on."""

    def __init__(self):
        super().__init__()
        self.seen, self.alive, self.peak = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, cpu = kwargs or {}, torch.device("cpu")
        if operation is aten._local_scalar_dense.default:
            return 1.0  # a loss, a norm, an accuracy: the engine only asks whether they are finite
        if operation is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == cpu:
            return torch.empty(args[0].shape, dtype=args[0].dtype)  # there are no numbers to copy
        return tree_map_only(torch.Tensor, self.add, operation(*args, **kwargs))

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage not in self.seen:
            size = -(-storage.nbytes() // 512) * 512  # as CUDA's allocator rounds it up
            self.seen.add(storage)
            self.grow(size)
            weakref.finalize(storage, self.grow, -size)
        return tensor

    def grow(self, size):
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def reset(self):
        self.peak = self.alive


class CudaAutocast(TorchFunctionMode):
    """What torch.autocast("cuda") does to this network, for tensors on a device that has none.

    Linear layers and attention compute in half precision, LayerNorm in fp32, as its input is. The half copies
    of the weights live as long as the context, as in autocast's cache. fp16 and bf16 take the same memory.
    """

    def __init__(self):
        super().__init__()
        self.copies = {}

    def half(self, tensor):
        half = self.copies.get(tensor)
        half = tensor.bfloat16() if half is None else half
        if tensor.is_leaf and tensor.requires_grad:
            self.copies[tensor] = half
        return half

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            args = [x if x is None else self.half(x) for x in args]
        elif function is F.scaled_dot_product_attention:
            function, args = efficient_attention, map(self.half, args)
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error):
        self.copies.clear()
        super().__exit__(*error)


def efficient_attention(query, key, value, attn_mask=None, dropout_p=0.0, scale=None, **_):
    """torch's memory-efficient attention, a GPU's choice where there is a mask: added, in half precision."""
    bias, options = None, {"compute_log_sumexp": True, "dropout_p": dropout_p, "scale": scale}
    if attn_mask is not None:
        shape = *attn_mask.shape[:-2], query.shape[-2], key.shape[-2]
        bias = query.new_zeros(shape).expand(-1, query.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, **options)[0]


def shapes_only(folder, config, **options):
    """AutoModel.from_pretrained, without reading any weights."""
    with torch.device("meta"):
        return encoders.AutoModel.from_config(config, **options)


def without_gpu():
    """The patches under which the engine runs on "meta" as it would on CUDA."""
    return [
        patch.object(encoders.AutoModel, "from_pretrained", shapes_only),
        patch.object(encoders, "has_flash", lambda query: True),
        patch.object(finetune, "autocast", lambda *_: CudaAutocast()),
        patch.object(training_cuda, "autocast", lambda *_: CudaAutocast()),
        patch.object(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *_: False),  # it reads values
        patch.object(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None),
    ]


def with_adafactor(run):
    """torch's Adafactor: of a matrix's squared gradients it keeps the sums of rows and columns, no mean."""
    run.optimizer = torch.optim.Adafactor(run.encoder.parameters(), foreach=False)


def with_lora(run):
    """LoRA, as `lora_rank=16` of TrainConfig, put into a run that has begun."""
    with torch.device(run.encoder.device):
        add_lora(run.encoder, 16)
    run.optimizer = torch.optim.AdamW(w for w in run.encoder.parameters() if w.requires_grad)


class Rung(NamedTuple):
    """One update. small_table: only the word rows that occur (words.py); change: run → None."""

    name: str
    options: dict  # of TrainConfig
    small_table: bool = True
    change: object = None
    padded: bool = False


GRADCACHE, AGAIN = {"backward": "gradcache"}, {"backward": "gradcache", "checkpointing": True}
RUNGS = [
    Rung("padded, half precision, dropout 0.1", {"dropout": None}, False, padded=True),
    Rung("packed, no dropout", {}, False),
    Rung(f"GradCache, groups of {BUDGET:,} tokens", GRADCACHE, False),
    Rung("only the word rows that occur", GRADCACHE),
    Rung("each layer computed again", AGAIN),
    Rung("Adafactor instead of AdamW", AGAIN, change=with_adafactor),
    Rung("LoRA of rank 16, with AdamW", AGAIN, change=with_lora),
]


def heaviest(data, config):
    """The update of the first epoch whose padded batch is the largest."""
    pairs, sides = len(data["query"]), (data["query"], data["passage"])
    batches = [batch_of(update, pairs, config) for update in range(updates_per_epoch(pairs, config))]
    positions = [len(batch) * sum(max(len(side[i]) for i in batch) for side in sides) for batch in batches]
    return positions.index(max(positions))


def two_updates(rung, folder, pairs, device, batch_size, peak, reset):
    """Bytes at the peak: (while loading, in the second update; the first one makes the moments)."""
    sizes = {"token_budget": BUDGET, "batch_size": batch_size}
    config, read = TrainConfig(precision="bf16", **sizes, **rung.options), () if rung.small_table else None
    reset()
    run = engine.start_run(folder, lambda encoder: tokenize_pairs(encoder, pairs), config, device, read)
    if rung.change:
        rung.change(run)
    if rung.padded:
        run.encoder.backbone.set_attn_implementation("sdpa")
    if device == "meta" and isinstance(run.optimizer, torch.optim.AdamW):
        for group in run.optimizer.param_groups:
            group |= {"fused": True, "foreach": False}
    if device == "meta" and config.checkpointing:  # a layer is computed again outside its autocast
        options = {"use_reentrant": False, "preserve_rng_state": False}
        options["context_fn"] = lambda: (contextlib.nullcontext(), CudaAutocast())
        run.encoder.backbone.activation_checkpointing_enable(options)
    run.encoder.train()
    loading, update = peak(), heaviest(run.data, config)
    for run.update in (update, update):
        reset()
        engine.one_update(run)
    return loading, peak()


def peaks(rung, folder, pairs, device, batch_size):
    """`two_updates`, counted where the device is "meta", else read from CUDA's allocator."""
    arguments = rung, folder, pairs, device, batch_size
    with contextlib.ExitStack() as stack:
        way = training_cuda.padded_gradients if rung.padded else engine.compute_gradients
        changes = [patch.object(engine, "compute_gradients_safely", way)]  # no second try with less
        for change in changes + (without_gpu() if device == "meta" else []):
            stack.enter_context(change)
        if device == "meta":
            counter = stack.enter_context(Counter())
            return two_updates(*arguments, lambda: counter.peak, counter.reset)
        gc.collect()
        torch.cuda.empty_cache()
        read, reset = torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
        return two_updates(*arguments, read, reset)


def ladder(folder, pairs, device="cpu", batch_size=80):
    """[{"rung", "gb", "loading_gb", "update_gb", "kind"}], from the original article's report down.

    folder: a model in BGE-M3's layout, of which only the shape is read without a GPU. pairs: for training.
    "gb" is the larger one of the other two, in GB (1e9 bytes). kind: "reported"; "measured" on a GPU;
    "counted", also where the GPU is too small.
    """
    rows = [{"rung": "the original article's run", "gb": 45, "kind": "reported"}]  # with 80 pairs as well
    for rung in RUNGS:
        found, kind = None, "measured"
        with contextlib.suppress(torch.OutOfMemoryError):
            found = device != "cpu" and peaks(rung, folder, pairs, device, batch_size)
        if not found:
            found, kind = peaks(rung, folder, pairs, "meta", batch_size), "counted"
        loading, update = (n / 1e9 for n in found)
        sizes = {"gb": max(loading, update), "loading_gb": loading, "update_gb": update}
        rows.append({"rung": rung.name, **sizes, "kind": kind})
    return rows


@st.styled
def draw(result, path=common.ROOT / "images" / "memory_ladder.png"):
    """The figure of a result of full_size.py; returns its title, the finding."""
    rows, look = result["ladder"], {"reported": 0, "counted": 3, "measured": 1}
    title = f"What took {rows[0]['gb']} GB takes {rows[4]['gb']:.1f} GB as the full profile trains it"
    fig, [[ax]] = st.figure(8.5, 1.2 + 0.45 * len(rows))
    for y, row in enumerate(rows):
        bar = ax.barh(y, row["gb"], 0.62, **st.bar_style(st.OTHERS[look[row["kind"]]]))
        ax.bar_label(bar, [f"{row['gb']:.3g} {row['kind']}"], padding=4, fontsize=8.5)
    st.rows_down(ax, [row["rung"] for row in rows])
    ax.set(xlabel="memory of one update at its peak, GB", xlim=(0, 1.2 * max(row["gb"] for row in rows)))
    st.finish(fig, title, path, f"benchmarks/full_size.py, {result['settings']['data']}")
    return title


if __name__ == "__main__":
    print(draw(read_json(common.RESULTS / "full_size.json")))
