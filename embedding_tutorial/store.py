"""Vectors on disk: shards that are either complete or absent, under a name that no other model can have."""

import hashlib
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .encoder import embed
from .files import atomic_file, remove_leftovers, text_key, write_json

DIGEST = hashlib.sha256().digest_size  # bytes of a shard's checksum


class VectorStore:
    """Shards of embeddings, each its own atomic `.npy` file, under a folder named by `identity`.

    identity: a dict of everything that changes a vector (model fingerprint, prompt, maximum length,
    precision, ...). Two identities never share a folder, so one model cannot read another's vectors;
    mteb's CachedEmbeddingWrapper keys by task and text alone.
    """

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
            vectors = np.load(io.BytesIO(data), allow_pickle=False)
            if vectors.ndim != 2 or len(vectors) != rows:
                raise ValueError(f"it holds {vectors.shape} instead of {rows} rows")
            return vectors
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            print(f"Shard {path.name} is damaged ({error}): encoding it again.")
            path.unlink(missing_ok=True)
            return None

    def save(self, key, vectors):
        """Write a shard atomically: NumPy's format, which np.load reads, then the sha256 of these bytes."""
        np.save(buffer := io.BytesIO(), vectors)
        data = buffer.getvalue()
        with atomic_file(self.folder / f"{key}.npy") as file:
            file.write(data)
            file.write(hashlib.sha256(data).digest())


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

    load: () → Encoder, on its device and in its precision; identity: everything that changes a vector.
    """

    def __init__(self, load, identity, store, token_budget=4096, shard_characters=50_000):
        self.load, self.encoder, self.store = load, None, VectorStore(Path(store) / "vectors", identity)
        self.token_budget, self.shard_characters = token_budget, shard_characters

    def __call__(self, texts, label="encoding"):
        """L2-normalised float32 vectors (n, dims) of n texts, in order."""
        shards = [
            (shard, [texts[i] for i in shard]) for shard in cut_into_shards(texts, self.shard_characters)
        ]
        keys = [text_key(part) for _, part in shards]
        found = {
            n: vectors
            for n, key in enumerate(keys)
            if (vectors := self.store.load(key, len(shards[n][0]))) is not None
        }
        if found:
            print(
                f"{label}: {len(found)} of {len(shards)} shards were encoded earlier and are read from disk."
            )
        missing = [n for n in range(len(shards)) if n not in found]
        for n, vectors in self._encode(missing, shards, label) if missing else ():
            self.store.save(keys[n], vectors)
            found[n] = vectors
        result = np.empty((len(texts), found[0].shape[1]), dtype=np.float32)
        for n, (shard, _) in enumerate(shards):
            result[shard] = found.pop(n)
        return result

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
            ahead = pool.submit(self.encoder.tokenize, shards[missing[0]][1])
            for place, n in enumerate(missing):
                rows = ahead.result()
                if place + 1 < len(missing):
                    ahead = pool.submit(self.encoder.tokenize, shards[missing[place + 1]][1])
                yield n, embed(self.encoder, rows, self.token_budget).float().cpu().numpy()
                bar.update(sum(map(len, shards[n][1])))
