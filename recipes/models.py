"""The models that recipes start from, by name: found, downloaded after an announcement, or made here.

python recipes/models.py bge-m3    # fetches it where it is not there, and prints its folder
"""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from embedding_tutorial import assets
from embedding_tutorial.encoder import LENGTH_FILE, Encoder, describe_pooling, read_pooling, weights_file
from embedding_tutorial.files import ROOT, TutorialError, atomic_folder, read_json
from embedding_tutorial.profiles import device_of_this_machine

KNOWN = {"minilm": assets.pocket_model_path, "bge-m3": assets.bge_m3_path}
ABSENT = {  # of published models in models/: what a line for another machine has to know
    "bge-m3": ("cls", {"hidden_size": 1024, "num_hidden_layers": 24, "vocab_size": 250_002}),
    "bert-base-uncased": (None, {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 30_522})}


def find_model(name):
    """The folder of a model: a path, "minilm", or "bge-m3", also as a path in models/."""
    folder = Path(name).resolve()
    if name in KNOWN or folder.name in KNOWN and folder.parent == ROOT / "models":
        return KNOWN[folder.name]()
    if not folder.is_dir():
        raise TutorialError(
            f"{name} is neither {' nor '.join(KNOWN)} nor a folder. Look at --model; a published one is "
            "fetched by: hf download NAME --local-dir FOLDER")
    weights_file(folder)
    return folder


def described(name, fetch=True):
    """(folder, pooling or None, configuration) of a model; without fetch of one that is not here yet, too."""
    place = ROOT / "models" / name if name in ABSENT else name
    here = name not in ABSENT or (assets.local_bge_m3() if name == "bge-m3" else place.is_dir())
    if not (here or fetch):
        print(f"{name} is not on this machine; the line below looks for it in models/.")
        return place, *ABSENT[name]
    folder = find_model(place)
    pooled = (folder / "1_Pooling" / "config.json").exists()
    return folder, read_pooling(folder) if pooled else None, read_json(folder / "config.json")


def load(folder, max_length=512):
    """An Encoder on this machine's device that reads max_length tokens, or as many as the model can."""
    config = read_json(Path(folder) / "config.json")
    places = config["max_position_embeddings"]
    places -= 0 if config["model_type"] == "bert" else config["pad_token_id"] + 1
    return Encoder(folder, min(max_length, places)).to(device_of_this_machine()).eval()


def small_bert(folder, layers=2, hidden=128, seed=42):
    """A BERT with random weights and MiniLM's tokenizer: no embedding model, and no language model either."""
    base, folder = assets.pocket_model_path(), Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertModel(config)
    with atomic_folder(folder) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        describe_pooling(target, hidden, "mean")
    return folder


def pocket_m3(folder, texts, base=None, seed=42):
    """MiniLM in BGE-M3's layout: its own dense vectors, and two heads with fresh random weights.

    BGE-M3 has trained heads; here the sparse and the ColBERT vectors mean nothing before the recipe has
    trained them. Of the vocabulary only what `texts` use is kept (None: all), with every single character:
    that changes no vector of these texts, and the sparse vectors, one number per vocabulary entry and token
    while training, become several times smaller. FlagEmbedding blanks the weight of an `eos_token`, which
    BERT does not name: its [SEP] takes that place. base: another BERT folder to build on.
    """
    base, folder = Path(base or assets.pocket_model_path()), Path(folder)
    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer, kept = trimmed(tokenizer, texts)
    model.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(
        model.embeddings.word_embeddings.weight.data[kept], freeze=False)
    model.config.vocab_size, hidden = len(kept), model.config.hidden_size
    torch.manual_seed(seed)
    with atomic_folder(folder) as target:
        for name in ("modules.json", LENGTH_FILE, "1_Pooling/config.json"):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(base / name, target / name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        torch.save(torch.nn.Linear(hidden, hidden).state_dict(), target / "colbert_linear.pt")
        torch.save(torch.nn.Linear(hidden, 1).state_dict(), target / "sparse_linear.pt")
    return folder


def trimmed(tokenizer, texts):
    """(a tokenizer with only the entries that `texts` use, or None: all; the old ids of its entries).

    WordPiece takes the longest entry that matches, so these texts are cut as before. The entries up to
    the last special one keep their ids.
    """
    rows = tokenizer(list(texts), truncation=False, padding=False)["input_ids"] if texts is not None else ()
    used = {number for row in rows for number in row} if texts is not None else range(len(tokenizer))
    vocabulary, fixed = tokenizer.get_vocab(), max(tokenizer.all_special_ids)
    single = {number for word, number in vocabulary.items() if len(word.removeprefix("##")) == 1}
    kept = sorted({*range(fixed + 1), *used, *single})
    words = {number: word for word, number in vocabulary.items()}
    plan = json.loads(tokenizer.backend_tokenizer.to_str())
    plan["model"]["vocab"] = {words[old]: new for new, old in enumerate(kept)}
    plan["truncation"] = plan["padding"] = None
    special = {
        f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("unk", "pad", "mask", "cls", "sep")}
    special |= {"bos_token": tokenizer.cls_token, "eos_token": tokenizer.sep_token}
    plain = Tokenizer.from_str(json.dumps(plan))
    return PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=512, **special), kept
