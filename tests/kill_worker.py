"""Tiny models, and a small training run to be killed; a program of its own, so that `kill -9` is real.

python kill_worker.py model BASE                  write a tiny random BERT to BASE
python kill_worker.py train BASE RUN [EPOCHS]     train it in RUN, or continue there; prints each "update N"
                                                  as soon as it is computed, and at the end "done SECONDS"
python kill_worker.py compare RUN OTHER           print as JSON what differs between two runs
python kill_worker.py random BASE DIR             train DIR/reference, kill DIR/run at three random moments
                                                  and continue it; prints the moments
python kill_worker.py sweep BASE DIR              kill a run before each of its renames in turn (RUN = DIR/N)
                                                  and continue it; prints the number of kills
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sentencepiece  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import BertConfig, BertModel, BertTokenizer, XLMRobertaConfig, XLMRobertaModel  # noqa: E402

from embedding_tutorial import finetune, training  # noqa: E402
from embedding_tutorial.pairs import read_mbpp  # noqa: E402

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}  # large, so that the vectors of a random model differ from one another
# Everything that has to survive a kill is in use: dropout's random state, the queue, AdamW's moments.
CONFIG = finetune.TrainConfig(
    epochs=3,
    batch_size=4,
    queue=8,
    dropout=0.1,
    learning_rate=1e-3,
    save_every=1,
    max_length=96,
    token_budget=256,
    keep_checkpoints=1,
)
SWEEP = dataclasses.replace(CONFIG, epochs=2, batch_size=10)
PAIRS, VALIDATION = 20, 12


# ---------------------------------------------------------------- tiny models


def tiny_bert_model(folder, texts):
    """Write a random BERT (32 dims, mean pooling) in all-MiniLM-L6-v2's layout; returns the folder."""
    _write(
        folder,
        {
            "modules.json": _modules(),
            "1_Pooling/config.json": _pooling("mean"),
            "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
        },
    )
    # By count, then by alphabet: tokenizers' own trainer gives another vocabulary in each process.
    splits = tokenizers.pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splits.pre_tokenize_str(text.lower()))
    letters = sorted({letter for word in counts for letter in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))[:400]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=512)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **SIZE))
    model.config.save_pretrained(folder)
    save_file(
        {name: w.contiguous() for name, w in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def tiny_m3_model(folder, texts):
    """Write a random XLM-RoBERTa (32 dims, CLS pooling, two heads) in BGE-M3's layout; returns the folder."""
    special = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": {
            "content": "<mask>",
            "lstrip": True,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        },
    }
    _write(
        folder,
        {
            "modules.json": _modules(),
            "1_Pooling/config.json": _pooling("cls"),
            "sentence_bert_config.json": {"max_seq_length": 8192, "do_lower_case": False},
            "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.2.2"}},
            "special_tokens_map.json": special,
            "tokenizer_config.json": {
                **special,
                "mask_token": "<mask>",
                "model_max_length": 8192,
                "clean_up_tokenization_spaces": True,
                "tokenizer_class": "XLMRobertaTokenizer",
            },
        },
    )
    (folder / "corpus.tmp").write_text("\n".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.tmp"),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=500,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "corpus.tmp").unlink()
    (folder / "sentencepiece.bpe.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    # fairseq's order: four special tokens, the pieces without sentencepiece's own three, the mask
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, pieces.get_piece_size())]
    vocab += [("<mask>", 0.0)]
    space = tokenizers.pre_tokenizers.Metaspace()
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=3))
    unigram.normalizer = tokenizers.normalizers.NFKC()
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), space]
    )
    unigram.decoder = tokenizers.decoders.Metaspace()
    unigram.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    unigram.add_special_tokens(
        [
            tokenizers.AddedToken(text, special=True, lstrip=text == "<mask>")
            for text in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
        ]
    )
    unigram.save(str(folder / "tokenizer.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = XLMRobertaModel(
            XLMRobertaConfig(
                vocab_size=len(vocab),
                max_position_embeddings=8194,
                type_vocab_size=1,
                layer_norm_eps=1e-5,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
                **SIZE,
            )
        )
        colbert, sparse = torch.nn.Linear(32, 32), torch.nn.Linear(32, 1)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(colbert.state_dict(), folder / "colbert_linear.pt")
    torch.save(sparse.state_dict(), folder / "sparse_linear.pt")
    return folder


def _write(folder, files):
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


def _modules():
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]


def _pooling(wanted):
    modes = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "sqrt"}
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{k}": v == wanted for k, v in modes.items()}}


# ---------------------------------------------------------------- a run to be killed


def run_pairs():
    """(training pairs, validation pairs) of the run."""
    pairs = read_mbpp(ROOT / "data" / "pocket_mbpp.json")
    return pairs[:PAIRS], pairs[PAIRS : PAIRS + VALIDATION]


def train(base, folder, config=CONFIG):
    training.train(base, *run_pairs(), config, folder, progress=False)


def announced_training(base, folder, config):
    """`train` that prints "update N" as soon as update N is computed, and "update 0" at its beginning."""
    print("update 0", flush=True)
    real = training.one_update

    def announced(run):
        real(run)
        print(f"update {run.update}", flush=True)

    training.one_update = announced
    train(base, folder, config)


def contents(folder):
    """{relative path: bytes} of everything a run leaves behind, without resume.pt (a zip of pickles)."""
    files = {
        str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }
    return {name: path.read_bytes() for name, path in files.items() if name != "resume.pt"}


def same_state(a, b):
    """Whether two values of a saved state are bit-identical."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def differences(run, reference):
    """What of a run differs from an uninterrupted one: file names, [] where everything is bit-identical."""
    a, b = contents(run), contents(reference)
    wrong = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    states = [torch.load(Path(folder) / "resume.pt", weights_only=True) for folder in (run, reference)]
    return wrong + ([] if same_state(*states) else ["resume.pt"])


def start(*args):
    """This program with `args` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_update(process, number):
    """Read a training process's output until it has computed update `number`, or ended."""
    while text := process.stdout.readline():
        if text.startswith("update ") and int(text.split()[1]) >= number:
            return


def kill_at_rename(number):
    """From here on, the process kills itself immediately before its rename of that number (1, 2, ...)."""
    count = 0

    def counted(real):
        def rename(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return rename

    os.rename, os.replace = counted(os.rename), counted(os.replace)


def at_random(base, folder):
    """Train in `folder`/reference, and in `folder`/run with three kills; returns when each of them came.

    Each try is a forked process: it shares no more with the one before than a new program would, but does
    not import torch again.
    """
    run, moments, draw = Path(folder) / "run", [], random.Random()
    if in_child(lambda: train(base, Path(folder) / "reference")) != 0:
        raise SystemExit("the reference run failed")
    for third in range(3):
        number, pause = draw.randrange(5 * third, 5 * third + 5), draw.random() * 0.1  # longer than an update
        status = kill_child(lambda: announced_training(base, run, CONFIG), "update", number, pause)[0]
        moments.append(f"{pause:.4f} s after update {number}: {status}")
    if in_child(lambda: train(base, run)) != 0:
        raise SystemExit(f"could not be continued after {moments}")
    return moments


def kill_child(work, word, number, pause):
    """Fork; kill the child `pause` seconds after its `work` has printed "`word` N" with N >= `number`.

    Returns (exit status, the last N that it printed).
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        run_and_exit(work)
    os.close(write)
    with os.fdopen(read) as output:
        last = -1
        while last < number and (line := output.readline()):
            last = int(line.split()[1]) if line.startswith(word) else last
        time.sleep(pause)
        os.kill(pid, signal.SIGKILL)
        rest = [int(line.split()[1]) for line in output if line.startswith(word)]
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), max([last, *rest])


def run_and_exit(work):
    """End a forked process with `work`, without what its parent would do at exit."""
    try:
        work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def in_child(work):
    """Run `work` in a forked process; returns its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        run_and_exit(work)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sweep(base, folder):
    """A run for every rename it makes, killed there and started again; returns the number of kills."""
    number = 0
    while True:
        number += 1
        run = Path(folder) / str(number)

        def killed(run=run, number=number):
            kill_at_rename(number)
            train(base, run, SWEEP)

        status = in_child(killed)
        if status == 0:  # it made fewer renames: this one is the uninterrupted reference
            return number - 1
        if status != -signal.SIGKILL or in_child(lambda run=run: train(base, run, SWEEP)) != 0:
            raise SystemExit(f"run {number} ended with {status}, or could not be continued")


def main(action, base, folder=None, epochs=CONFIG.epochs):
    torch.set_num_threads(1)  # nothing has computed yet: `sweep` may fork
    if action == "model":
        texts = [text for pair in run_pairs()[0] for text in (pair["query"], pair["pos_doc"])]
        Path(base).mkdir(parents=True, exist_ok=True)
        tiny_bert_model(Path(base), texts)
    elif action == "train":
        begin = time.perf_counter()
        announced_training(base, folder, dataclasses.replace(CONFIG, epochs=int(epochs)))
        print(f"done {time.perf_counter() - begin:.3f}", flush=True)
    elif action == "compare":
        print(json.dumps(differences(base, folder)))
    elif action == "random":
        print(*at_random(base, folder), sep="; ", flush=True)
    elif action == "sweep":
        print(sweep(base, folder), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
