"""The faults that TROUBLESHOOTING.md describes, produced on purpose; and that all it names exists."""

import ast
import math
import re
import shutil
from urllib.parse import unquote

import pytest
import torch
import torch.nn.functional as F
from helpers import unit

from embedding_tutorial.encoder import Encoder, embed
from embedding_tutorial.files import ROOT, read_json
from embedding_tutorial.finetune import in_batch_accuracy, info_nce

PAGE = ROOT / "TROUBLESHOOTING.md"


def test_a_batch_of_one_has_loss_0():
    q, p = unit(1, 8, seed=1), unit(1, 8, seed=2)
    assert info_nce(q, p, 0.05) == 0 and in_batch_accuracy(q, p) == 1
    masked = ~torch.eye(3, dtype=torch.bool)  # every other passage is a duplicate
    assert info_nce(unit(3, 8), unit(3, 8, seed=1), 0.05, masked) == 0


def test_equal_vectors_and_a_high_temperature_give_ln_n():
    collapsed = unit(1, 8).expand(80, 8)
    assert info_nce(collapsed, collapsed, 0.05).item() == pytest.approx(math.log(80))
    assert f"{math.log(80):.2f} for 80" in PAGE.read_text(encoding="utf-8")
    q, p = unit(80, 64), unit(80, 64)  # equal pairs: nothing is easier
    assert info_nce(q, p, 0.05) < 0.1 and info_nce(q, p, 20).item() == pytest.approx(math.log(80), abs=0.06)


def test_accuracy_rises_as_the_batch_shrinks():
    p = unit(400, 16, seed=1)
    q = F.normalize(p + 1.2 * unit(400, 16, seed=2), dim=-1)

    def accuracy(size):
        return (
            sum(in_batch_accuracy(a, b) for a, b in zip(q.split(size), p.split(size), strict=True))
            * size
            / 400
        )

    assert accuracy(400) < accuracy(80) - 0.1 and accuracy(80) < accuracy(4) - 0.1 and accuracy(4) > 0.9


def test_a_common_direction_lifts_all_scores_and_keeps_the_order():
    q, p = unit(20, 16, seed=1), unit(50, 16, seed=2)
    shared = torch.full((1, 1), 3.0, dtype=q.dtype)  # a direction that every text has in common
    lifted_q = F.normalize(torch.cat([q, shared.expand(20, 1)], dim=1), dim=1)
    lifted_p = F.normalize(torch.cat([p, shared.expand(50, 1)], dim=1), dim=1)
    plain, lifted = q @ p.T, lifted_q @ lifted_p.T
    assert plain.min() < 0 and lifted.min() > 0.8
    assert (plain.argsort(dim=1) == lifted.argsort(dim=1)).all()


def test_a_cls_model_without_modules_json_gives_other_vectors(tiny_m3, texts, tmp_path):
    from sentence_transformers import SentenceTransformer

    def lowest_cosine(folder):
        found = SentenceTransformer(str(folder), device="cpu").encode(texts[:5], normalize_embeddings=True)
        return (found * expected).sum(axis=1).min()

    expected = embed(Encoder(tiny_m3).eval(), texts[:5]).detach().numpy()
    folder = shutil.copytree(tiny_m3, tmp_path / "copy")
    assert lowest_cosine(folder) > 0.9999
    (folder / "modules.json").unlink()
    assert lowest_cosine(folder) < 0.99


# ---------------------------------------------------------------- what the pages name


def anchors(path):
    """The anchors of a Markdown page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", ["TROUBLESHOOTING.md", "recipes/serving.md"])
def test_every_file_and_anchor_that_is_linked_exists(page):
    page, missing = ROOT / page, []
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = unquote(target).partition("#")
        path = page.parent / name if name else page
        if not path.exists() or anchor and anchor not in anchors(path):
            missing.append(target)
    assert not missing


def test_every_test_and_section_that_is_named_exists():
    text, notebooks = PAGE.read_text(encoding="utf-8"), {}
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(named) >= 15
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            f"{file}::{test}"
        )
    for path in ROOT.glob("0?-*.ipynb"):
        cells = [cell for cell in read_json(path)["cells"] if cell["cell_type"] == "markdown"]
        titles = re.findall(r"^#+ ([\d.]+) · ", "\n".join("".join(c["source"]) for c in cells), re.MULTILINE)
        notebooks[path.name[:2]] = set(titles)
    sections = re.findall(r"\b(0[12]), section ([\d.]*\d)", text)
    assert len(sections) >= 10 and all(number in notebooks[book] for book, number in sections)


def test_the_page_stays_short_and_its_entries_have_four_parts():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for entry in text.split("\n## ")[1:-1]:  # the last one is a list of its own
        for part in ("- **See**", "- **Cause**", "- **Mend**", "- **On purpose**"):
            assert entry.count(part) == 1, f"{entry[:30]}: {part}"
