"""Loss and gradient of several processes against one with the whole batch; run by test_recipes_torchrun.py.

    python tests/gathered_worker.py DENSE_MODEL M3_MODEL FOLDER

Prints {"MODE, N processes": [difference of the loss, largest difference of a gradient, largest gradient]}.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes.checked_run import mend, part_of  # noqa: E402

QUERIES, GROUP, LENGTH = 12, 2, 12  # 12 = 2 × 6 = 3 × 4
TEACHER = torch.arange(QUERIES * GROUP).remainder(5).float().view(QUERIES, GROUP)


def model_of(mode, folder, gathered, mended=True):
    """FlagEmbedding's model, as its runner makes it."""
    runner = part_of("base" if mode.startswith("dense") else "m3", "Runner")
    options = {
        "negatives_cross_device": gathered,
        "temperature": 0.05,
        "kd_loss_type": "kl_div",
        "sentence_pooling_method": "mean" if mode.startswith("dense") else "cls",
        "normalize_embeddings": True,
    }
    module = sys.modules[runner.__module__]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if mode.startswith("dense"):
        model = module.BiEncoderOnlyEmbedderModel(AutoModel.from_pretrained(folder), tokenizer, **options)
    else:
        model = module.EncoderOnlyEmbedderM3Model(
            runner.get_model(folder), tokenizer, unified_finetuning=True, use_self_distill=True, **options
        )
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    if mended:
        mend(model)
    return model.train()


def inputs(seed, texts, vocabulary):
    ids = torch.randint(5, vocabulary, (texts, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def share(batch, rank, processes):
    """The queries, passages and teacher's scores of one process."""
    queries, passages, scores = batch
    q, p = QUERIES // processes, QUERIES * GROUP // processes
    return (
        {name: values[rank * q : (rank + 1) * q] for name, values in queries.items()},
        {name: values[rank * p : (rank + 1) * p] for name, values in passages.items()},
        scores and scores[rank * p : (rank + 1) * p],
    )


def train_one(mode, folder, batch, rank, processes, place, mended):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}/store", rank=rank, world_size=processes
    )
    model = DistributedDataParallel(model_of(mode, folder, True, mended), find_unused_parameters=True)
    loss = model(*share(batch, rank, processes)).loss
    loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    if rank == 0:
        grads = {n: w.grad for n, w in model.module.named_parameters() if w.grad is not None}
        torch.save({"loss": total / processes, "grads": grads}, place / "found.pt")
    os._exit(0)  # a forked process may hang while it takes its group apart


def in_one(mode, folder, batch, processes):
    """The whole batch in one process. Unified: the dense term over all, the others within each share."""
    model = model_of(mode, folder, False)
    if mode.startswith("dense"):
        loss = model(*batch).loss
    else:
        dense = [model.encode(side)[0] for side in batch[:2]]
        term = {"compute_score_func": model.compute_dense_score}
        loss = model._compute_in_batch_neg_loss(*dense, **term)[1] / 8  # (… / 4 + distillation) / 2
        for rank in range(processes):
            part = share(batch, rank, processes)
            own = model._compute_in_batch_neg_loss(*(model.encode(side)[0] for side in part[:2]), **term)[1]
            loss = loss + (model(*part).loss - own / 8) / processes
    loss.backward()
    return loss.detach(), {n: w.grad for n, w in model.named_parameters() if w.grad is not None}


def several(mode, folder, batch, processes, place, mended=True):
    place.mkdir()
    children = []
    for rank in range(processes):
        if not (child := os.fork()):
            try:
                train_one(mode, folder, batch, rank, processes, place, mended)
            except BaseException:
                traceback.print_exc()  # the parent sees the status alone
                os._exit(1)
        children.append(child)
    assert not any([os.waitpid(child, 0)[1] for child in children])
    return torch.load(place / "found.pt", weights_only=True)


def main(dense, m3, folder):
    torch.set_num_threads(1)
    for engine in ("base", "m3"):
        part_of(engine, "Runner")  # imported once, not in every process
    found = {}
    modes = {"dense": dense, "dense, taught": dense, "unified": m3, "unmended": dense}
    for mode, model in modes.items():
        vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        scores = TEACHER.flatten().tolist() if mode == "dense, taught" else None
        batch = inputs(1, QUERIES, vocabulary), inputs(2, QUERIES * GROUP, vocabulary), scores
        kind, mended = (mode, True) if mode != "unmended" else ("dense", False)
        for processes in (2, 3) if mended else (3,):  # before anything is computed here: a fork might hang
            place = Path(folder) / f"{mode}-{processes}"
            found[mode, processes] = several(kind, model, batch, processes, place, mended), kind, model, batch
    result = {}
    for (mode, processes), (theirs, kind, model, batch) in found.items():
        loss, grads = in_one(kind, model, batch, processes)
        assert grads.keys() == theirs["grads"].keys()
        differences = [(grads[name] - theirs["grads"][name]).abs().max().item() for name in grads]
        largest = max(grad.abs().max().item() for grad in grads.values())
        result[f"{mode}, {processes} processes"] = [
            (loss - theirs["loss"]).abs().item(),
            max(differences),
            largest,
        ]
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
