"""What the benchmarks share: the machine in words, fresh processes and their peak memory, the README, and
the predecessor's padded loss, a random BGE-M3, and how much of a device's speed a model uses.

Every script imports this first: it puts the repository on the path and keeps the libraries off the hub.
"""

import contextlib
import io
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that might ask the hub something
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from embedding_tutorial.assets import pocket_model_path  # noqa: E402
from embedding_tutorial.encoder import companions  # noqa: E402
from embedding_tutorial.files import markdown_table, write_json  # noqa: E402, F401
from embedding_tutorial.finetune import TrainConfig, split_pairs  # noqa: E402
from embedding_tutorial.pairs import read_mbpp  # noqa: E402

POCKET_PAIRS = ROOT / "data" / "pocket_mbpp.json"
RECIPE = TrainConfig()  # the tutorial's own: temperature, lengths, learning rate, seed
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"

# The settings of the recipe this tutorial follows, as fields of TrainConfig: batches of 80, two accumulated.
ORIGINAL = {
    "learning_rate": 2e-4,
    "temperature": 0.02,
    "epochs": 10,
    "batch_size": 160,
    "micro_batch": 80,
    "dropout": None,
}

README_START = """# Benchmarks

Each script measures this project and its peers in one run on one machine, writes `results/*.json` and the
table below that belongs to it.
"""


def processor():
    """The CPU's name, without frequencies or host names."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def instructions():
    """The instruction sets that decide how fast this CPU multiplies matrices, the strongest first."""
    can = torch.cpu.get_capabilities()
    names = {"amx_bf16": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512_f": "avx512f", "avx2": "avx2"}
    return [shown for name, shown in names.items() if can.get(name)]


def machine(packages, device="cpu"):
    """{"summary": one line, "cpu", "instructions", "cores", "memory_gb", "system", "versions"}, with
    device="cuda" also {"gpu", "cuda"}; no host name, no path."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    shown = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    cpu = f"{processor()} ({', '.join(instructions()) or 'no AVX2'})"
    found = {
        "summary": f"{cpu}, {cores} cores, {memory:.0f} GB RAM, {platform.system()}; {shown}",
        "cpu": processor(),
        "instructions": instructions(),
        "cores": cores,
        "memory_gb": round(memory, 1),
        "system": platform.system(),
        "versions": versions,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_name()
        found |= {"gpu": gpu, "cuda": torch.version.cuda, "summary": f"{gpu}; {found['summary']}"}
    return found


def peak_memory_gb():
    """Largest resident memory that this process has had, in GB (1e9 bytes).

    Linux's ru_maxrss starts from the peak of the process that started this one, so a small worker of a
    large driver would report the driver's. VmHWM counts from this program's own start.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def disk_gb(folder):
    """Disk space of a folder in GB (1e9 bytes), each file once however many names it has."""
    files = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a temporary one
                status = os.lstat(os.path.join(place, name))
                files[status.st_ino] = 512 * status.st_blocks
    return sum(files.values()) / 1e9


def run_worker(script, arguments, **environment):
    """Run `script` with `arguments` in a fresh process; returns the JSON that it writes to its --out FILE.

    Raises RuntimeError with the end of its output when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(script), *map(str, arguments), "--out", str(out)]
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            command, env={**os.environ, **quiet, **environment}, capture_output=True, text=True, check=False
        )
        if done.returncode or not out.is_file():
            end = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise RuntimeError(f"{' '.join(map(str, arguments))} ended with status {done.returncode}:\n{end}")
        return json.loads(out.read_text(encoding="utf-8"))


def flagembedding_runner(model, pooling, pairs, folder, options):
    """FlagEmbedding's dense trainer over pairs, on the CPU and silent; runner.trainer.train() trains.

    options: command-line words of its own, after which its defaults hold.
    """
    from FlagEmbedding.finetune.embedder.encoder_only import base
    from transformers import HfArgumentParser

    logging.getLogger("FlagEmbedding").setLevel(logging.ERROR)  # it logs all its settings, 200 lines a run
    data = Path(folder) / "pairs.jsonl"
    rows = [{"query": pair["query"], "pos": [pair["pos_doc"]], "neg": []} for pair in pairs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = f"""--model_name_or_path {model} --train_data {data} --cache_path {folder}/cache
        --output_dir {folder}/run --train_group_size 1 --sentence_pooling_method {pooling} --use_cpu
        --save_strategy no --logging_strategy no --report_to none --disable_tqdm True""".split()
    kinds = (
        base.EncoderOnlyEmbedderModelArguments,
        base.EncoderOnlyEmbedderDataArguments,
        base.EncoderOnlyEmbedderTrainingArguments,
    )
    return base.EncoderOnlyEmbedderRunner(
        *HfArgumentParser(kinds).parse_args_into_dataclasses([*words, *options])
    )


def put_into_readme(name, text, path=README):
    """Replace what stands between `<!-- name:start -->` and `<!-- name:end -->`; append both where absent."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    path = Path(path)
    old = path.read_text(encoding="utf-8") if path.is_file() else README_START
    if start not in old:
        old = f"{old.rstrip()}\n\n{start}\n{end}\n"
    if end not in old.split(start, 1)[1]:
        raise ValueError(f"{path.name} has {start} without {end} after it. Put the second marker back.")
    before, rest = old.split(start, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def shown(value, digits=1):
    """A number as a table shows it; "–" where nothing was measured."""
    return "–" if value is None else f"{value:,.{digits}f}"


# ---------------------------------------------------------------- models, the padded loss, speeds


BGE_M3_SHAPE = {
    "vocab_size": 250002, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "max_position_embeddings": 8194, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
# The weights are drawn so wide that the vectors of a random model differ from one another.
SMOKE_SHAPE = BGE_M3_SHAPE | {
    "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "initializer_range": 0.3,
}  # fmt: skip


def train_pairs(path):
    """The training part of MBPP's format, split as notebook 01 splits it."""
    return split_pairs(read_mbpp(path), RECIPE.seed)[0]


def padded_loss(encoder, queries, passages):
    """The loss as the predecessor computes it: queries and passages (token ids) padded to their longest.

    encoder: an Encoder whose attention has been set to transformers' "sdpa".
    """

    def vectors(rows):
        longest, device, padding = max(map(len, rows)), encoder.device, encoder.backbone.config.pad_token_id
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=device)
        mask = (torch.arange(longest)[None] < torch.tensor([len(row) for row in rows])[:, None]).to(device)
        hidden = encoder.backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        pooled = hidden[:, 0] if encoder.pooling == "cls" else (hidden * weight).sum(1) / weight.sum(1)
        return F.normalize(pooled, dim=-1)

    S = vectors(queries) @ vectors(passages).T / RECIPE.temperature
    return F.cross_entropy(S, torch.arange(len(S), device=S.device))


def random_m3(folder, shape):
    """Write BGE-M3's layout (CLS pooling, two heads) with random weights of `shape` and the pocket model's
    tokenizer; returns the folder."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    folder, like, hidden = Path(folder), pocket_model_path(), shape["hidden_size"]
    for name in companions(like):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(like / name, folder / name)
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_cls_token": True}
    write_json(folder / "1_Pooling" / "config.json", pooling | {"pooling_mode_mean_tokens": False})
    torch.manual_seed(0)
    XLMRobertaModel(XLMRobertaConfig(**shape, pad_token_id=0)).save_pretrained(folder)
    for name, size in (("colbert_linear.pt", hidden), ("sparse_linear.pt", 1)):
        torch.save(torch.nn.Linear(hidden, size).state_dict(), folder / name)
    return folder


def model_flop(shape, lengths):
    """FLOP of forward and backward on real tokens: 6 per matrix weight and token, and the attention itself.

    Padding and GradCache's second forward are work, but no work of the model: they lower the utilisation.
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    weights = layers * (4 * hidden**2 + 2 * hidden * shape["intermediate_size"])
    return 6 * weights * sum(lengths) + 12 * layers * hidden * sum(n * n for n in lengths)


def now(device):
    """Seconds of a clock, read when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_ceiling(device, dtype, size, repeats=20):
    """FLOP per second of a large square matrix product: what this device can reach at this precision."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        begin = now(device)
        for _ in range(4):
            a @ b
        seconds.append(now(device) - begin)
    return 4 * 2 * size**3 / min(seconds)


# ---------------------------------------------------------------- BGE-M3's files, with random weights

LEARNT_PIECES = 6000  # of the tokenizer's 250,002: a pair of sanitized MBPP then has 90 tokens
SPECIAL = {
    "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip


def own_texts():
    """All queries and passages that this project has written itself, in English, Chinese and Python."""
    from embedding_tutorial.pocket_task import DATA, LANGUAGES, read_language

    texts = [pair[side] for pair in read_mbpp(POCKET_PAIRS) for side in ("query", "pos_doc")]
    for language in LANGUAGES:
        passages, queries, _ = read_language(DATA / language)
        texts += [row["text"] for row in [*passages, *queries]]
    return texts


def m3_tokenizer(folder, size):
    """Write an XLM-RoBERTa tokenizer of `size` entries: what sentencepiece learns from our own texts, and
    pieces that no text holds."""
    import sentencepiece
    import tokenizers

    learnt = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in own_texts() for line in text.splitlines()]),
        model_writer=learnt, vocab_size=LEARNT_PIECES, character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (folder / "sentencepiece.bpe.model").write_bytes(learnt.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=learnt.getvalue())
    # fairseq's order: four special tokens, the pieces without sentencepiece's own three, the mask
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [(name, 0.0) for name in names]
    vocab += [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, pieces.get_piece_size())]
    vocab += [(f"▁unused{i}", -100.0) for i in range(size - 1 - len(vocab))] + [("<mask>", 0.0)]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=3))
    unigram.normalizer = tokenizers.normalizers.NFKC()
    splits = [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splits)
    unigram.decoder = tokenizers.decoders.Metaspace()
    unigram.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names.append("<mask>")
    marks = [tokenizers.AddedToken(name, special=True, lstrip=name == "<mask>") for name in names]
    unigram.add_special_tokens(marks)
    unigram.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 8192}
    write_json(folder / "tokenizer_config.json", SPECIAL | kind)
    write_json(folder / "special_tokens_map.json", SPECIAL)


def published_m3(folder, shape):
    """Write every file of BAAI/bge-m3 with random weights of `shape`; returns the folder."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    folder, hidden = Path(folder), shape["hidden_size"]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    m3_tokenizer(folder, shape["vocab_size"])
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling = {f"pooling_mode_{mode}": mode == "cls_token" for mode in modes}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden} | pooling)
    kinds = enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in kinds
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 8192, "do_lower_case": False})
    versions = {"__version__": {"sentence_transformers": "2.2.2"}}
    write_json(folder / "config_sentence_transformers.json", versions)
    numbers = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = XLMRobertaConfig(**shape, **numbers, architectures=["XLMRobertaModel"])
    config.save_pretrained(folder)
    torch.manual_seed(0)
    for name, size in (("colbert_linear.pt", hidden), ("sparse_linear.pt", 1)):
        torch.save(torch.nn.Linear(hidden, size).state_dict(), folder / name)
    torch.save(XLMRobertaModel(config).state_dict(), folder / "pytorch_model.bin")
    return folder
