"""The engine around what notebook 01 teaches: updates, out of memory, checkpoints, going on after a kill.

The loss, the batches, the schedule and both backward passes are the notebook's own (`finetune`). A run is a
folder: `checkpoint-epoch-N/`, `best_checkpoint/`, `fine-tuned/` (the last epoch), `training_history.json`,
`config.json`, and `resume.pt` to go on from.
"""

import dataclasses
import json
import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .encoder import Encoder, fingerprint, random_state, save_model, set_random_state, weights_file
from .files import (
    TutorialError,
    link_folder,
    move_aside,
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
    duplicate_mask,
    evaluate,
    in_batch_accuracy,
    info_nce,
    learning_rate,
    updates_per_epoch,
)
from .runs import load_state, prune, require_run_space, save_state


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


def batch_rows(data, batch):
    """Token ids of all texts of a batch: n queries, n positives, then the hard negatives."""
    return (
        [data["query"][i] for i in batch]
        + [data["passage"][i] for i in batch]
        + [row for i in batch for row in data["neg"][i]]
    )


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


@dataclass
class Run:
    """A training run: what it trains, and everything that has to survive a kill."""

    encoder: Encoder
    data: dict
    config: TrainConfig
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    queue: PassageQueue | None
    token_budget: int
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


def start_run(base, data_of, config, device):
    """A fresh run from the base model. data_of: encoder → what `tokenize_pairs` returns."""
    torch.manual_seed(config.seed)
    encoder = Encoder(base, config.max_length, config.dropout).to(device)
    matrices = [w for w in encoder.parameters() if w.dim() > 1]
    others = [w for w in encoder.parameters() if w.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        fused=encoder.device.type in ("cpu", "cuda"),
    )
    scaler = torch.amp.GradScaler(encoder.device.type, enabled=config.precision == "fp16")
    queue = PassageQueue(config.queue) if config.queue else None
    return Run(encoder, data_of(encoder), config, optimizer, scaler, queue, config.token_budget)


def compute_gradients(run, batch):
    """Leave the update's gradient in the weights; returns (loss, accuracy, passage embeddings)."""
    config, data, results = run.config, run.view, []
    backward = {"whole": backward_whole, "gradcache": backward_gradcache}[config.backward]
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
    """`compute_gradients`, repeated with half the token budget as long as the GPU runs out of memory."""
    state = random_state(run.encoder.device)
    longest = max(len(row) for row in batch_rows(run.view, batch))
    while True:
        try:
            return compute_gradients(run, batch)
        except torch.OutOfMemoryError as error:
            if run.token_budget <= longest:
                raise TutorialError(
                    f"Out of GPU memory with a single text of {longest} tokens in a group. Remedy: "
                    'backward="gradcache", a smaller max_length, or a larger GPU.'
                ) from error
        run.optimizer.zero_grad(set_to_none=True)  # outside `except`: the traceback holds the graph alive
        run.token_budget = max(longest, run.token_budget // 2)
        print(
            f"Out of GPU memory in update {run.update + 1}: "
            f"token budget halved to {run.token_budget}, update repeated."
        )
        set_random_state(state, run.encoder.device)
        if run.encoder.device.type == "cuda":
            torch.cuda.empty_cache()


def one_update(run):
    """Gradient, clipping and optimizer step of the run's next update; appends to its history."""
    config, pairs = run.config, len(run.data["query"])
    batch = batch_of(run.update, pairs, config)
    rate = learning_rate(run.update, pairs, config)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    loss, accuracy, passages = compute_gradients_safely(run, batch)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.encoder.parameters(), config.clip)
    good = math.isfinite(loss) and bool(torch.isfinite(norm))
    if good:
        run.scaler.step(run.optimizer)
    else:
        run.history["skipped_updates"].append(run.update + 1)
    run.scaler.update()
    run.bad_in_a_row = 0 if good else run.bad_in_a_row + 1
    if run.bad_in_a_row > config.max_bad_updates:
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
    """What a saved state must match to be continued: recipe, base weights, data."""
    texts = [json.dumps(pair, sort_keys=True) for pair in [*train_pairs, *val_pairs]]
    return {**dataclasses.asdict(config), "base": fingerprint(base), "data": text_key(texts)}


def save_run(run, folder, identity):
    """Write `resume.pt`: weights, optimizer, scaler, random state, queue, history and place."""
    queue = dataclasses.asdict(run.queue) if run.queue else None
    save_state(
        folder,
        {
            "identity": identity,
            "weights": run.encoder.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "random": random_state(run.encoder.device),
            "queue": queue,
            "token_budget": run.token_budget,
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
    for name in ("token_budget", "update", "bad_in_a_row", "best_mrr", "history"):
        setattr(run, name, state[name])


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
    leaked = [n for n, pair in enumerate(val_pairs, 1) if (pair["query"], pair["pos_doc"]) in key]
    if leaked:
        raise TutorialError(
            f"Rows {leaked[:10]} of the validation set also stand in the training set. Remove them from one."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise TutorialError(
            'device="cuda" and torch.cuda.is_available() is False. Use "cpu", or a torch build with CUDA.'
        )
    if config.precision == "fp16" and device != "cuda":
        raise TutorialError(f'precision="fp16" needs CUDA and this runs on {device}. Use "fp32" or "bf16".')
    if config.precision not in ("fp32", "bf16", "fp16") or config.backward not in ("whole", "gradcache"):
        raise TutorialError(f"Unknown precision {config.precision!r} or backward {config.backward!r}.")
    if config.queue and config.micro_batch:
        raise TutorialError(
            "A queue and a micro_batch together are not supported: set one of them to its default."
        )
    require_run_space(folder, weights_file(base).stat().st_size, config.keep_checkpoints)


def open_run(base, train_pairs, val_pairs, config, folder, device):
    """A run at the place where `folder` left off, or a fresh one; says which. Returns (run, identity)."""
    identity = run_identity(base, train_pairs, val_pairs, config)
    state = load_state(folder) if folder.exists() else None
    run = start_run(base, lambda encoder: tokenize_pairs(encoder, train_pairs), config, device)
    if state and state["identity"] != identity:
        changed = [name for name in identity if state["identity"].get(name) != identity[name]]
        aside = folder.with_name(folder.name + ".previous")
        move_aside(folder, aside)
        print(
            f"The run in {relative(folder)} had other settings ({', '.join(changed)}): moved to {aside.name}."
        )
        state = None
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if state:
        restore_run(run, state)
        print(
            f"Continuing {relative(folder)} after update {run.update}: what is before was not computed again."
        )
    write_json(
        folder / "config.json", {**identity, "train_pairs": len(train_pairs), "val_pairs": len(val_pairs)}
    )
    return run, identity


def close_epoch(run, epoch, val_pairs, folder, identity):
    """Evaluate, write the epoch's checkpoint, keep the best one, then the state and the history."""
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
    save_run(run, folder, identity)


def train(base, train_pairs, val_pairs, config, folder, device="cpu", progress=True, stop_after=None):
    """Fine-tune `base` on pairs and leave the run in `folder`; continues a run that was interrupted.

    stop_after: updates after which to stop dead, as a kill would: what was not saved by then is lost.
    Returns (encoder, history). Raises TutorialError before the first update when something is wrong.
    """
    folder = Path(folder)
    check_before_training(base, train_pairs, val_pairs, config, folder, device)
    run, identity = open_run(base, train_pairs, val_pairs, config, folder, device)
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
    run.optimizer.zero_grad(set_to_none=True)  # a finished model needs no gradients
    return run.encoder.eval(), run.history
