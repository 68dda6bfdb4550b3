"""The engine around what notebook 01 teaches: updates, out of memory, checkpoints, going on after a kill.

The loss, the batches, the schedule and both backward passes are the notebook's own (`finetune`). A run is a
folder: `checkpoint-epoch-N/`, `best_checkpoint/`, `fine-tuned/` (the last epoch), `training_history.json`,
`config.json`, and `resume.pt` to go on from.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .batches import PassageQueue, all_rows, batch_loss, batch_rows, tokenize_pairs, view_of
from .encoder import (
    Encoder,
    fingerprint,
    give_memory_back,
    random_state,
    save_model,
    set_random_state,
    weights_file,
)
from .files import (
    TutorialError,
    file_problem,
    link_folder,
    move_aside,
    only_process,
    relative,
    remove_leftovers,
    text_key,
    write_json,
)
from .finetune import (
    TrainConfig,
    backward_gradcache,
    backward_whole,
    batch_of,
    evaluate,
    learning_rate,
    updates_per_epoch,
)
from .pairs import answers_of
from .profiles import device_of_this_machine
from .runs import keep_weights_only, load_state, prune, require_run_space, save_state
from .thin import add_lora, merge_lora
from .words import keep_rows, put_back

STATE_FORMAT = 2  # raised when a state of an earlier version can't be continued
MAX_BAD_UPDATES = 10  # non-finite updates in a row before a run stops
# What sets memory, disk and time, and not the result: it may change between a kill and the next call.
FREE_TO_CHANGE = "backward checkpointing keep_checkpoints save_every save_minutes token_budget".split()
# What a reader calls the parts of a run's identity that are no setting of the configuration.
CHANGED = {
    "base": "the base model's weights, tokenizer or pooling",
    "data": "the pairs",
    "format": "an earlier version of this code",
}


@dataclass
class Run:
    """A training run: what it trains, and everything that has to survive a kill."""

    encoder: Encoder
    data: dict
    config: TrainConfig
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    queue: PassageQueue | None
    backward: str  # the config's, until the GPU runs out of memory
    token_budget: int
    saved_at: float = 0.0  # when the last state was written, by time.monotonic
    update: int = 0
    bad_in_a_row: int = 0
    best_mrr: float = -1.0
    history: dict = field(
        default_factory=lambda: {
            "step_losses": [],
            "step_accs": [],
            "learning_rates": [],
            "epoch": [],
            "epoch_loss": [],
            "epoch_acc": [],
            "eval": [],
            "skipped_updates": [],
            "repeated_updates": [],
        }
    )
    viewed: tuple = (None, None)  # (epoch, its view)

    @property
    def view(self):
        """The data as the current epoch sees them, made once per epoch."""
        epoch = self.update // updates_per_epoch(len(self.data["query"]), self.config)
        if self.viewed[0] != epoch:
            self.viewed = epoch, view_of(self.data, epoch, self.config.seed)
        return self.viewed[1]


def start_run(base, data_of, config, device, read=None):
    """A fresh run from the base model. data_of: encoder → what `tokenize_pairs` returns.

    read: texts that the run embeds and never trains on. The word table then has the rows of these and of
    the training texts alone (see words.py); None: the whole table.
    """
    torch.manual_seed(config.seed)
    encoder = Encoder(base, config.max_length, config.dropout).to(device)
    if config.checkpointing:
        encoder.backbone.activation_checkpointing_enable({"use_reentrant": False})
    data = data_of(encoder)
    if read is not None:
        keep_rows(encoder, all_rows(data), encoder.tokenize(read))
    if config.lora_rank:
        add_lora(encoder, config.lora_rank)
    trained = [w for w in encoder.parameters() if w.requires_grad]
    matrices, others = [w for w in trained if w.dim() > 1], [w for w in trained if w.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        fused=encoder.device.type in ("cpu", "cuda"),
    )
    scaler = torch.amp.GradScaler(encoder.device.type, enabled=config.precision == "fp16")
    queue = PassageQueue(config.queue) if config.queue else None
    return Run(encoder, data, config, optimizer, scaler, queue, config.backward, config.token_budget)


def compute_gradients(run, batch):
    """Leave the update's gradient in the weights; returns (loss, accuracy, passage embeddings)."""
    config, data, results = run.config, run.view, []
    backward = {"whole": backward_whole, "gradcache": backward_gradcache}[run.backward]
    run.optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(batch), config.micro_batch or len(batch)):
        part = batch[start : start + (config.micro_batch or len(batch))]
        share = len(part) / len(batch)
        seen = {}

        def loss_of(vectors, part=part, share=share, seen=seen):
            loss, accuracy = batch_loss(vectors, data, part, config, run.queue)
            seen |= {"loss": loss.item() * share, "accuracy": accuracy * share}
            return run.scaler.scale(loss * share)

        vectors = backward(run.encoder, batch_rows(data, part), loss_of, run.token_budget, config.precision)
        results.append((seen["loss"], seen["accuracy"], vectors[len(part) : 2 * len(part)]))
    losses, accuracies, passages = zip(*results, strict=True)
    return sum(losses), sum(accuracies), torch.cat(passages)


def compute_gradients_safely(run, batch):
    """`compute_gradients`, repeated with less memory as long as the GPU runs out of it.

    GradCache first: the whole graph keeps every group's activations, so smaller groups would not help it.
    Then half the tokens in a group.
    """
    state = random_state(run.encoder.device)
    longest = max(len(row) for row in batch_rows(run.view, batch))
    while True:
        try:
            return compute_gradients(run, batch)
        except torch.OutOfMemoryError as error:
            if run.backward == "gradcache" and run.token_budget <= longest:
                raise TutorialError(
                    f"Out of GPU memory with GradCache and a single text of {longest} tokens in a group. "
                    "Remedy: checkpointing=True, a smaller max_length, or a larger GPU."
                ) from error
        run.optimizer.zero_grad(set_to_none=True)  # outside `except`: the traceback holds the graph alive
        if run.backward == "whole":
            run.backward, change = "gradcache", "GradCache from here on"
        else:
            run.token_budget = max(longest, run.token_budget // 2)
            change = f"token budget halved to {run.token_budget}"
        print(f"Out of GPU memory in update {run.update + 1}: {change}, update repeated.")
        set_random_state(state, run.encoder.device)
        give_memory_back(run.encoder.device)


def step(run, batch):
    """Gradient, clipping and optimizer step of one batch; returns (good, loss, accuracy, passages).

    fp16: where the gradient overflows, the scaler lowers its factor and the batch is repeated, so that
    no update is lost. A loss that is not finite itself is not repeated.
    """
    for attempt in range(MAX_BAD_UPDATES + 1):
        loss, accuracy, passages = compute_gradients_safely(run, batch)
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(run.encoder.parameters(), run.config.clip)
        good = math.isfinite(loss) and bool(torch.isfinite(norm))
        if good:
            run.scaler.step(run.optimizer)
        run.scaler.update()
        if good or not math.isfinite(loss) or not run.scaler.is_enabled():
            break
        if attempt == 0:
            run.history["repeated_updates"].append(run.update + 1)
    return good, loss, accuracy, passages


def one_update(run):
    """The run's next update; appends to its history."""
    config, pairs = run.config, len(run.data["query"])
    batch = batch_of(run.update, pairs, config)
    rate = learning_rate(run.update, pairs, config)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    good, loss, accuracy, passages = step(run, batch)
    if not good:
        run.history["skipped_updates"].append(run.update + 1)
    run.bad_in_a_row = 0 if good else run.bad_in_a_row + 1
    if run.bad_in_a_row > MAX_BAD_UPDATES:
        raise TutorialError(
            f"{run.bad_in_a_row} updates in a row had a non-finite loss or gradient, the last with rows "
            f"{sorted(i + 1 for i in batch)} of the training data. Look at them, or lower the learning rate."
        )
    if run.queue is not None and good:
        view = run.view
        run.queue.push(passages, [view["passage_id"][i] for i in batch], [view["query_id"][i] for i in batch])
    run.history["step_losses"].append(loss if math.isfinite(loss) else None)
    run.history["step_accs"].append(accuracy)
    run.history["learning_rates"].append(rate)
    run.update += 1


def run_identity(base, train_pairs, val_pairs, config):
    """What a saved state must match to be continued: what decides the result, base weights, data."""
    sides = ([json.dumps(pair, sort_keys=True) for pair in side] for side in (train_pairs, val_pairs))
    recipe = {name: v for name, v in dataclasses.asdict(config).items() if name not in FREE_TO_CHANGE}
    data = " ".join(map(text_key, sides))
    return {**recipe, "base": fingerprint(base), "data": data, "format": STATE_FORMAT}


def save_run(run, folder, identity):
    """Write `resume.pt`: weights, optimizer, scaler, random state, queue, history and place."""
    queue = dataclasses.asdict(run.queue) if run.queue else None
    run.saved_at = time.monotonic()
    save_state(
        folder,
        {
            "identity": identity,
            "weights": run.encoder.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "random": random_state(run.encoder.device),
            "queue": queue,
            "update": run.update,
            "bad_in_a_row": run.bad_in_a_row,
            "best_mrr": run.best_mrr,
            "history": run.history,
        },
    )


def restore_run(run, state):
    """Put a saved state into a fresh run of the same identity."""
    run.encoder.load_state_dict(state["weights"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    set_random_state(state["random"], run.encoder.device)
    run.queue = PassageQueue(**state["queue"]) if state["queue"] else None
    for name in ("update", "bad_in_a_row", "best_mrr", "history"):
        setattr(run, name, state[name])


def finish(run, folder, identity):
    """Replace the state of a complete run: its weights are in `fine-tuned`, its moments nobody needs."""
    done = {"identity": identity, "history": run.history, "update": run.update}
    save_state(folder, {**done, "fine-tuned": fingerprint(folder / "fine-tuned")})


def finished_run(state, folder, config, device):
    """(encoder, history) of a complete run; TutorialError when its model is not the one that it left."""
    model = folder / "fine-tuned"
    remedy = f"Delete {relative(folder)} to train again."
    weights = model / "model.safetensors"
    if problem := file_problem(weights, relative(weights)):
        raise TutorialError(f"The run in {relative(folder)} is complete, but {problem}. {remedy}")
    if fingerprint(model) != state["fine-tuned"]:
        raise TutorialError(f"{relative(model)} was changed after the run that made it. {remedy}")
    print(f"The run in {relative(folder)} is complete: nothing was computed again.")
    return Encoder(model, config.max_length, config.dropout).to(device).eval(), state["history"]


def check_before_training(base, train_pairs, val_pairs, config, folder, device):
    """Raise TutorialError for anything that would fail or mislead later."""
    if len(train_pairs) < config.batch_size:
        raise TutorialError(
            f"{len(train_pairs)} training pairs are fewer than the batch of {config.batch_size}. "
            "Lower batch_size or add pairs."
        )
    if not val_pairs:
        raise TutorialError(
            "The validation set is empty. Split the data again; the training file is no stand-in."
        )
    key = {
        (query, code)
        for pair in train_pairs
        for query in (pair["query"], *pair.get("other_queries", []))
        for code in (pair["pos_doc"], *pair.get("other_pos_docs", []))
    }
    leaked = [
        n for n, pair in enumerate(val_pairs, 1) if any((pair["query"], c) in key for c in answers_of(pair))
    ]
    if leaked:
        raise TutorialError(
            f"Rows {leaked[:10]} of the validation set also stand in the training set. Remove them from one."
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TutorialError(
            f'device="{device}", but torch.cuda.is_available() is False. Use "cpu", or a torch with CUDA.'
        )
    if config.precision == "fp16" and not device.startswith("cuda"):
        raise TutorialError(f'precision="fp16" needs CUDA and this runs on {device}. Use "fp32" or "bf16".')
    if config.precision not in ("fp32", "bf16", "fp16") or config.backward not in ("whole", "gradcache"):
        raise TutorialError(f"Unknown precision {config.precision!r} or backward {config.backward!r}.")
    if config.queue and config.micro_batch:
        raise TutorialError(
            "A queue and a micro_batch together are not supported: set one of them to its default."
        )


def open_run(base, train_pairs, val_pairs, config, folder, device, state):
    """A run at the place of `state`, or a fresh one where that is None. Writes nothing."""
    read = [text for pair in val_pairs for text in (pair["query"], *answers_of(pair))]
    run = start_run(base, lambda encoder: tokenize_pairs(encoder, train_pairs), config, device, read)
    trained = sum(w.numel() * w.element_size() for w in run.encoder.parameters())
    sizes = weights_file(base).stat().st_size, 3 * trained, config.keep_checkpoints
    require_run_space(folder, *sizes, goes_on=state is not None)
    if state:
        restore_run(run, state)
        print(
            f"Continuing {relative(folder)} after update {run.update}: what is before was not computed again."
        )
    run.saved_at = time.monotonic()
    return run


def open_folder(folder, changed, goes_on):
    """An empty or tidy run folder. changed: the settings in which the run that lies there differs, if any."""
    if changed:
        aside = folder.with_name(folder.name + ".previous")
        move_aside(folder, aside)
        what = ", ".join(CHANGED.get(name, name) for name in changed)
        print(f"The run in {relative(folder)} had other settings ({what}): moved to {aside.name}.")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not goes_on:  # checkpoints of a run that ended before its first state
        keep_weights_only(folder)


def close_epoch(run, epoch, val_pairs, folder, identity):
    """Evaluate, write the epoch's checkpoint, keep the best one, then the state and the history."""
    run.optimizer.zero_grad(set_to_none=True)  # nothing below needs the last gradient
    give_memory_back(run.encoder.device)
    h, per_epoch = run.history, updates_per_epoch(len(run.data["query"]), run.config)
    sizes = [
        len(batch_of(u, len(run.data["query"]), run.config))
        for u in range(run.update - per_epoch, run.update)
    ]
    steps = zip(h["step_losses"][-per_epoch:], h["step_accs"][-per_epoch:], sizes, strict=True)
    finite = [step for step in steps if step[0] is not None]
    result = evaluate(run.encoder, val_pairs, token_budget=run.token_budget)
    h["epoch"].append(epoch)
    for name, column in (("epoch_loss", 0), ("epoch_acc", 1)):
        h[name].append(
            float(np.average([s[column] for s in finite], weights=[s[2] for s in finite])) if finite else None
        )
    h["eval"].append({"epoch": epoch, "recall@1": result["recall@1"], "mrr": result["mrr"]})
    checkpoint = folder / f"checkpoint-epoch-{epoch}"
    save_model(run.encoder, checkpoint)
    if result["mrr"] > run.best_mrr:
        run.best_mrr = result["mrr"]
        link_folder(checkpoint, folder / "best_checkpoint")
    if epoch == run.config.epochs:
        link_folder(checkpoint, folder / "fine-tuned")
    write_json(folder / "training_history.json", h)
    prune(folder, run.config.keep_checkpoints)
    if epoch == run.config.epochs:
        finish(run, folder, identity)
    elif time.monotonic() - run.saved_at >= 60 * run.config.save_minutes:
        save_run(run, folder, identity)


def train(base, train_pairs, val_pairs, config, folder, device=None, progress=True, stop_after=None):
    """Fine-tune `base` on pairs and leave the run in `folder`; continues a run that was interrupted.

    device: "cpu", "cuda" or "cuda:1"; None: what `profiles.choose_device` takes.
    stop_after: updates after which to stop dead, as a kill would: what was not saved by then is lost.
    Returns (encoder, history). Raises TutorialError before the first update when something is wrong.
    """
    folder, device = Path(folder), device or device_of_this_machine()
    check_before_training(base, train_pairs, val_pairs, config, folder, device)
    with only_process(folder):
        return train_alone(base, train_pairs, val_pairs, config, folder, device, progress, stop_after)


def train_alone(base, train_pairs, val_pairs, config, folder, device, progress, stop_after):
    """`train`, checked, while no other process works in the folder."""
    give_memory_back(torch.device(device))  # what the caller let go of: gigabytes, after a lesson with BGE-M3
    identity = run_identity(base, train_pairs, val_pairs, config)
    state = load_state(folder) if folder.exists() else None
    changed = [name for name in identity if state and state["identity"].get(name) != identity[name]]
    if state and "fine-tuned" in state and not changed:
        return finished_run(state, folder, config, device)
    state = None if changed else state
    run = open_run(base, train_pairs, val_pairs, config, folder, device, state)
    open_folder(folder, changed, goes_on=state is not None)
    del state  # as large as the weights
    sizes = {"train_pairs": len(train_pairs), "val_pairs": len(val_pairs)}
    write_json(folder / "config.json", {**dataclasses.asdict(config), **identity, **sizes})
    per_epoch = updates_per_epoch(len(train_pairs), config)
    updates = config.epochs * per_epoch
    run.encoder.train()
    with tqdm(total=updates, initial=run.update, unit="update", file=sys.stdout, disable=not progress) as bar:
        while run.update < updates:
            if run.update == stop_after:
                break
            one_update(run)
            epoch, position = divmod(run.update, per_epoch)
            if position == 0:
                close_epoch(run, epoch, val_pairs, folder, identity)
            elif config.save_every and run.update % config.save_every == 0:
                save_run(run, folder, identity)
            bar.set_postfix(
                epoch=math.ceil(run.update / per_epoch),
                loss=run.history["step_losses"][-1],
                acc=f"{run.history['step_accs'][-1]:.2f}",
            )
            bar.update()
    encoder, history = run.encoder, run.history
    encoder.zero_grad(set_to_none=True)
    del run  # a finished model needs neither gradients nor moments
    give_memory_back(encoder.device)
    merge_lora(encoder)
    put_back(encoder)
    return encoder.eval(), history
