"""What `make` installs: which torch, from where."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_BUILDS = "--index-url https://download.pytorch.org/whl/cpu torch=="
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def commands(path, *settings):
    """What `make` would run to install, with the programs of the folder `path` in front of PATH."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_INDEX"}
    environment["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "-n", "-B", ".venv/.run", *settings]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(
    os.name != "posix" or os.uname().sysname != "Linux", reason="the usual torch is small there"
)
def test_torch_for_cpus_where_no_gpu_is_seen(tmp_path):
    found = commands(tmp_path)
    assert CPU_BUILDS in found or shutil.which("nvidia-smi")
    assert found.index(CPU_BUILDS) < found.index("-r requirements.txt")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "--index-url" not in commands(tmp_path)


def test_the_reader_decides(tmp_path):
    assert "--index-url" not in commands(tmp_path, "TORCH_INDEX=")
    assert "--index-url https://example.org/cu130 torch==" in commands(
        tmp_path, "TORCH_INDEX=https://example.org/cu130"
    )


def test_an_index_that_does_not_answer_is_said(tmp_path):
    """The shell goes on to pip's usual index, with a sentence."""
    line = next(
        line for line in commands(tmp_path, "TORCH_INDEX=http://127.0.0.1:9").splitlines() if "127" in line
    )
    done = subprocess.run(
        ["sh", "-c", line.replace(".venv/bin/pip", "false")], capture_output=True, text=True, check=True
    )
    assert "http://127.0.0.1:9 did not give this torch" in done.stdout
