"""The models that recipes start from, by name: found, downloaded after an announcement, or made here."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from embedding_tutorial import assets
from embedding_tutorial.encoder import weights_file
from embedding_tutorial.files import ROOT, TutorialError, atomic_folder, relative, require_disk, write_json
from embedding_tutorial.network import hub_offline

BERT_REPO = "google-bert/bert-base-uncased"
BERT_REVISION = "86b5e0934494bd15c9632b12f734a8a67f723594"
BERT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def find_model(name):
    """The folder of a model: "minilm", "bge-m3", "bert-base-uncased", or a path. TutorialError if none."""
    if name == "minilm":
        return assets.pocket_model_path()
    if name == "bge-m3":
        return assets.bge_m3_path()
    if name == "bert-base-uncased":
        return bert_base()
    folder = Path(name).resolve()
    if not folder.is_dir():
        raise TutorialError(
            f"{name} is neither minilm, bge-m3, bert-base-uncased nor a folder. Look at --model."
        )
    weights_file(folder)
    return folder


def bert_base(folder=ROOT / "models" / "bert-base-uncased"):
    """bert-base-uncased (0.44 GB), downloaded once to `models/`."""
    if all((folder / name).exists() for name in BERT_FILES):
        return folder
    if hub_offline():
        raise TutorialError(
            f"{relative(folder)} is not there and HF_HUB_OFFLINE forbids a download. Use --start small."
        )
    from huggingface_hub import snapshot_download

    require_disk(folder.parent, 0.5, BERT_REPO)
    print(f"Downloading {BERT_REPO} (0.44 GB) into {relative(folder)}")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        snapshot_download(
            BERT_REPO, revision=BERT_REVISION, allow_patterns=list(BERT_FILES), local_dir=partial
        )
    except Exception as error:  # the hub raises many types; all mean that the model is out of reach
        raise TutorialError(f"{BERT_REPO} could not be downloaded ({error}). Use --start small.") from error
    describe_pooling(partial, 768, "mean")
    partial.rename(folder)
    return folder


def small_bert(folder, layers=2, hidden=128, seed=42):
    """A BERT with random weights and MiniLM's tokenizer: no embedding model, and no language model either."""
    base, folder = assets.pocket_model_path(), Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            intermediate_size=4 * hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    with atomic_folder(folder) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        describe_pooling(target, hidden, "mean")
    return folder


def describe_pooling(folder, dims, pooling):
    """Write the files by which SentenceTransformer and `Encoder` know how a vector is made."""
    parts = (("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize"))
    write_json(
        folder / "modules.json",
        [
            {"idx": int(number), "name": number, "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, path, kind in parts
        ],
    )
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": dims,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    (folder / "2_Normalize").mkdir(exist_ok=True)
    if not (folder / "sentence_bert_config.json").exists():
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})


def pocket_m3(folder, texts, base=None, seed=42):
    """MiniLM in BGE-M3's layout: its own dense vectors, and two heads with fresh random weights.

    BGE-M3 has trained heads; here the sparse and the ColBERT vectors mean nothing before the recipe has
    trained them. Of the vocabulary only what `texts` use is kept, with every single character: that
    changes no vector of these texts, and the sparse vectors, one number per vocabulary entry and token
    while training, become several times smaller. FlagEmbedding blanks the weight of an `eos_token`, which
    BERT does not name: its [SEP] takes that place. base: another BERT folder to build on.
    """
    base, folder = Path(base or assets.pocket_model_path()), Path(folder)
    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer, kept = trimmed(tokenizer, texts)
    model.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(
        model.embeddings.word_embeddings.weight.data[kept], freeze=False
    )
    model.config.vocab_size, hidden = len(kept), model.config.hidden_size
    torch.manual_seed(seed)
    with atomic_folder(folder) as target:
        for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(base / name, target / name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        torch.save(torch.nn.Linear(hidden, hidden).state_dict(), target / "colbert_linear.pt")
        torch.save(torch.nn.Linear(hidden, 1).state_dict(), target / "sparse_linear.pt")
    return folder


def trimmed(tokenizer, texts):
    """(a tokenizer with only the entries that `texts` use, the old ids of its entries).

    WordPiece takes the longest entry that matches, so these texts are cut as before. The entries up to
    the last special one keep their ids.
    """
    used = {
        number
        for row in tokenizer(list(texts), truncation=False, padding=False)["input_ids"]
        for number in row
    }
    vocabulary, fixed = tokenizer.get_vocab(), max(tokenizer.all_special_ids)
    kept = sorted(
        number
        for word, number in vocabulary.items()
        if number <= fixed or number in used or len(word.removeprefix("##")) == 1
    )
    words = {number: word for word, number in vocabulary.items()}
    plan = json.loads(tokenizer.backend_tokenizer.to_str())
    plan["model"]["vocab"] = {words[old]: new for new, old in enumerate(kept)}
    plan["truncation"] = plan["padding"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plan)),
        model_max_length=512,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        mask_token=tokenizer.mask_token,
        cls_token=tokenizer.cls_token,
        sep_token=tokenizer.sep_token,
        bos_token=tokenizer.cls_token,
        eos_token=tokenizer.sep_token,
    ), kept
