"""What several test files use: small vectors and pairs, gradients, folders as dicts, full disks and kills."""

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from embedding_tutorial.files import ROOT, atomic_folder


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def as_pair(query, code, **more):
    return {"query": query, "pos_doc": code, **more}


def relative_difference(gradient, reference):
    """Norm of the difference of two {name: gradient} over the norm of the second; both without None."""
    assert gradient.keys() == reference.keys() and reference
    gap = sum((gradient[name].double() - reference[name].double()).square().sum() for name in reference)
    return (gap / sum(g.double().square().sum() for g in reference.values())).sqrt().item()


def gradients(module):
    return {name: w.grad.clone() for name, w in module.named_parameters() if w.grad is not None}


class Spy:
    """A function that keeps the arguments of its calls."""

    def __init__(self, real):
        self.real, self.calls = real, []

    def __call__(self, *args, **kwargs):
        self.calls.append(args)
        return self.real(*args, **kwargs)


def tree(folder):
    """{relative path: bytes, or None for a folder} of everything below, hidden names included."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


@contextmanager
def largest_file(size):
    """The kernel refuses to let a file grow beyond `size` bytes, as it does on a full disk."""
    import resource  # not on Windows

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def little_space(monkeypatch, free):
    """Every disk has `free` bytes left."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1e12, 1e12 - free, free))


def die(code, *args):
    """Run `code` in a process that kills itself in it (`die()`); its exit must be that kill."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom embedding_tutorial import files\n"
        "def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n" + code
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program, *map(str, args)], env=environment).returncode == -9


def make_folder(path, text):
    """Write `path/sub/file` with `text`, atomically."""
    with atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)


class Command:
    """A pickle that makes a folder when it is loaded: what must not happen to a file that is only data."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
