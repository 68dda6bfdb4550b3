"""Vectors on disk: shards that are either complete or absent, under a name that no other model can have.

Token ids of large shards lie beside them, for the next model with the same tokenizer.
"""

import functools
import hashlib
import io
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .encoder import embed
from .files import atomic_file, disk_errors_named, only_process, remove_leftovers, text_key, write_json

DIGEST = hashlib.sha256().digest_size  # bytes of a shard's checksum


class VectorStore:
    """Shards of embeddings, each its own atomic `.npy` file, under a folder named by `identity`.

    identity: a dict of everything that changes a vector (model fingerprint, prompt, maximum length,
    precision, ...). Two identities never share a folder, so one model cannot read another's vectors;
    mteb's CachedEmbeddingWrapper keys by task and text alone.
    """

    again = "encoding"  # what follows when a shard is damaged

    def __init__(self, root, identity):
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        self.folder = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (self.folder / "identity.json").exists():
            write_json(self.folder / "identity.json", identity)
        remove_leftovers(self.folder)

    def load(self, key, rows):
        """The shard `key` as a float32 array of `rows` rows, or None if absent or damaged.

        A damaged shard (truncated, wrong shape, wrong checksum) is deleted and reported: it is encoded
        again, and only it.
        """
        path = self.folder / f"{key}.npy"
        try:
            content = path.read_bytes()
            data, checksum = content[:-DIGEST], content[-DIGEST:]
            if hashlib.sha256(data).digest() != checksum:
                raise ValueError("its checksum differs")
            return self.checked(np.load(io.BytesIO(data), allow_pickle=False), rows)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            print(f"Shard {path.name} is damaged ({error}): {self.again} it again.")
            with disk_errors_named(path):
                path.unlink(missing_ok=True)
            return None

    @staticmethod
    def checked(vectors, rows):
        """The array of a shard, if it holds vectors of `rows` texts; ValueError otherwise."""
        if vectors.ndim != 2 or len(vectors) != rows:
            raise ValueError(f"it holds {vectors.shape} instead of {rows} rows")
        return vectors

    def save(self, key, vectors):
        """Write a shard atomically: NumPy's format, which np.load reads, then the sha256 of these bytes."""
        np.save(buffer := io.BytesIO(), vectors)
        data = buffer.getvalue()
        with atomic_file(self.folder / f"{key}.npy") as file:
            file.write(data)
            file.write(hashlib.sha256(data).digest())


class TokenStore(VectorStore):
    """Token ids of n texts in the same kind of shard: one flat int32 array, n lengths and then all ids."""

    again = "tokenising"

    @staticmethod
    def checked(flat, rows):
        """The ids as a list of `rows` lists; ValueError where lengths and ids don't fit together."""
        if flat.dtype != np.int32 or flat.ndim != 1 or len(flat) < rows:
            raise ValueError(f"it holds {flat.dtype} {flat.shape} instead of the token ids of {rows} texts")
        lengths = flat[:rows]
        if lengths.min(initial=0) < 0 or rows + lengths.sum() != len(flat):
            raise ValueError(f"it holds {len(flat) - rows} token ids instead of {lengths.sum()}")
        return [ids.tolist() for ids in np.split(flat[rows:], lengths.cumsum()[:-1])]

    def save(self, key, token_rows):
        lengths = [len(row) for row in token_rows]
        super().save(key, np.array([*lengths, *itertools.chain.from_iterable(token_rows)], dtype=np.int32))


def cut_into_shards(texts, shard_characters):
    """Indices of the texts, shortest first, in shards of about `shard_characters` characters."""
    shards, used = [[]], 0
    for i in sorted(range(len(texts)), key=lambda i: (len(texts[i]), i)):
        if shards[-1] and used + len(texts[i]) > shard_characters:
            shards.append([])
            used = 0
        shards[-1].append(i)
        used += len(texts[i])
    return [shard for shard in shards if shard]


class StoredEncoder:
    """Texts to vectors, in shards under `store`/vectors/<hash>. The model is loaded when a shard is missing.

    load: () → Encoder, on its device and in its precision; identity: everything that changes a vector;
    tokens: everything that changes a token id, or None: then no token ids are kept under `store`/tokens.
    """

    tokens_from = 200_000  # characters of a shard from which they are: it pays where a GPU encodes

    def __init__(self, load, identity, store, token_budget=4096, shard_characters=50_000, tokens=None):
        self.load, self.encoder, self.store = load, None, VectorStore(Path(store) / "vectors", identity)
        self.token_folder, self.token_identity = Path(store) / "tokens", tokens
        self.token_budget, self.shard_characters = token_budget, shard_characters

    def __call__(self, texts, label="encoding"):
        """L2-normalised float32 vectors (n, dims) of n texts, in order."""
        cut = cut_into_shards(texts, self.shard_characters)
        parts = [[texts[i] for i in shard] for shard in cut]
        shards = [(text_key(part), part) for part in parts]
        found = self._found(range(len(shards)), shards)
        if found:
            print(
                f"{label}: {len(found)} of {len(shards)} shards were encoded earlier and are read from disk."
            )
        if len(found) < len(shards):
            with only_process(self.store.folder):
                self._complete(found, shards, label)
        result = np.empty((len(texts), found[0].shape[1]), dtype=np.float32)
        for n, shard in enumerate(cut):
            result[shard] = found.pop(n)
        return result

    def _found(self, numbers, shards):
        """{shard number: vectors} of those that are on disk."""
        loaded = ((n, self.store.load(shards[n][0], len(shards[n][1]))) for n in numbers)
        return {n: vectors for n, vectors in loaded if vectors is not None}

    def _complete(self, found, shards, label):
        """Encode and save what is not in `found`: as no other process does now, and none did meanwhile."""
        found |= self._found([n for n in range(len(shards)) if n not in found], shards)
        missing = [n for n in range(len(shards)) if n not in found]
        for n, vectors in self._encode(missing, shards, label) if missing else ():
            self.store.save(shards[n][0], vectors)
            found[n] = vectors

    def _encode(self, missing, shards, label):
        """Yield (shard number, vectors), tokenising the next shard while the model works on this one."""
        self.encoder = self.encoder or self.load()
        with (
            ThreadPoolExecutor(1) as pool,
            torch.inference_mode(),
            tqdm(
                total=sum(len(t) for n in missing for t in shards[n][1]),
                unit="char",
                unit_scale=True,
                desc=label,
                file=sys.stdout,
                delay=2,
            ) as bar,
        ):  # no bar for work of two seconds
            ahead = pool.submit(self._tokenize, *shards[missing[0]])
            for place, n in enumerate(missing):
                rows = ahead.result()
                if place + 1 < len(missing):
                    ahead = pool.submit(self._tokenize, *shards[missing[place + 1]])
                yield n, embed(self.encoder, rows, self.token_budget).float().cpu().numpy()
                bar.update(sum(map(len, shards[n][1])))

    @functools.cached_property
    def tokens(self):
        """The TokenStore: made for the first large shard, so that small runs leave no folder."""
        return TokenStore(self.token_folder, self.token_identity)

    def _tokenize(self, key, texts):
        """Token ids of a shard; of a large one those that a model with the same tokenizer has left."""
        if self.token_identity is None or sum(map(len, texts)) < self.tokens_from:
            return self.encoder.tokenize(texts)
        if (rows := self.tokens.load(key, len(texts))) is None:
            self.tokens.save(key, rows := self.encoder.tokenize(texts))
        return rows
