"""The pages: links, code blocks, the two READMEs side by side, and the numbers that they take from files."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from urllib.parse import unquote

import click
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from embedding_tutorial import (
    assets,
    finetune,
    more_pairs,
    own_data,
    pairs,
    pocket_task,
    profiles,
    run_notebooks,
)
from embedding_tutorial.__main__ import main
from embedding_tutorial.files import ROOT, read_json

NOTEBOOKS = [ROOT / name for name in run_notebooks.NAMES]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")})
BENCHMARKS = ROOT / "benchmarks" / "README.md"
DATA, POCKET = ROOT / "data", ROOT / "data" / "pocket_mbpp.json"
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
# tests/test_serving.py runs recipes/serving.md; README.zh-CN.md has README.md's lines, as a test below holds.
WITH_CODE = [ENGLISH, ROOT / "CONTRIBUTING.md", ROOT / "TROUBLESHOOTING.md"]
WITH_CODE += [ROOT / f / "README.md" for f in ("benchmarks", "c_mteb_results", "data", "models")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def read(path):
    return path.read_text(encoding="utf-8")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """The Markdown of a page or of a notebook's cells, without code."""
    text = read(path)
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return FENCE.sub("", text)


def headings(path):
    """[(level, text)] in order."""
    found = re.findall(r"^(#{1,6}) +(.+?) *$", prose(path), re.M)
    return [(len(marks), re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)) for marks, text in found]


# ---------------------------------------------------------------- links


def github_anchors(titles):
    """GitHub's rule: lower case, letters, digits, _, - and spaces as -, and a number where it is repeated."""
    anchors, seen = [], Counter()
    for title in titles:
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        anchors.append(slug + (f"-{seen[slug]}" if seen[slug] else ""))
        seen[slug] += 1
    return anchors


def anchors(path):
    titles = [title for _, title in headings(path)]
    if path.suffix == ".ipynb":  # Jupyter keeps every letter
        return {title.replace(" ", "-") for title in titles}
    return set(github_anchors(titles))


def missing(page, targets):
    """The targets that lead nowhere."""
    wrong = []
    for target in targets:
        if target.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = unquote(target).partition("#")
        path = (page.parent / name).resolve() if name else page
        inside = path.is_relative_to(ROOT) and path.exists()
        if not inside or anchor and (path.is_dir() or anchor not in anchors(path)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name_of)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    assert not missing(page, targets)


def test_a_wrong_link_is_found():
    assert github_anchors(["BGE-M3: what you need", "`a_b`, c", "目录与参与", "A", "a"]) == [
        "bge-m3-what-you-need", "a_b-c", "目录与参与", "a", "a-1"]  # fmt: skip
    name = NOTEBOOKS[0].name
    good = ["#start", "data/README.md#known-limits", f"{name}#Glossary", "exercises", "https://x"]
    bad = ["#begin", "data/NONE.md", f"{name}#glossary", "exercises#a", "../x", "http://x"]
    assert missing(ENGLISH, good + bad) == bad


# ---------------------------------------------------------------- code blocks


def without_comment(line):
    return re.sub(r"(^|\s+)# .*$", "", line).rstrip()


def fenced(path):
    """[(language, lines without comments and empty ones, text)] of the blocks of a page."""
    return [
        (language, [line for line in map(without_comment, text.splitlines()) if line], text)
        for language, text in FENCE.findall(read(path))
    ]


def pinned(package):
    return re.search(rf"^{package}==(.+)$", read(ROOT / "requirements.txt"), re.M)[1]


def make(target, setting=""):
    makefile = read(ROOT / "Makefile")
    assert target in re.search(r"^\.PHONY: (.+)$", makefile, re.M)[1].split()
    assert not setting or re.search(rf"^{setting} \?=", makefile, re.M)


def profile(name):
    assert name in profiles.PROFILES


def is_file(name):
    assert (ROOT / name).is_file()


def torch_of(version):
    assert version == pinned("torch")


def option_of(script, option=""):
    assert f'"{option}"' in read(ROOT / script) if option else (ROOT / script).is_file()


def hub_line(line):
    """The hub's own parser reads the line, and the tutorial finds what it downloads."""
    from huggingface_hub.cli.hf import app

    name, command, words = app.resolve_command(click.Context(app), shlex.split(line)[1:])
    got = command.make_context(name, words).params
    kind = getattr(got["repo_type"], "value", got["repo_type"])
    wanted = {
        assets.BGE_M3_REPO: (assets.BGE_M3_REVISION, "models/bge-m3", None, {"onnx/*", "imgs/*"}),
        assets.T2_REPO: (assets.T2_REVISION, f"data/{assets.T2_FOLDER}", "dataset", set()),
    }
    left_out = set(got["exclude"] or ())
    assert (got["revision"], got["local_dir"], kind, left_out) == wanted[got["repo_id"]]
    needed = (*assets.BGE_M3_FILES, *assets.BGE_M3_WEIGHTS, *assets.BGE_M3_EXTRAS)
    assert not [name for name in needed for pattern in left_out if fnmatch.fnmatch(name, pattern)]


CLONE = r"git clone <this repository's URL> tutorial"
INDEX = r"https://download\.pytorch\.org/whl/cuNNN"
# A line of a shell block, and what is checked of its parts. A line that matches none of them fails.
LINES = {
    CLONE: lambda: None,
    r"[%]?cd tutorial": lambda: None,
    rf"!{CLONE} && pip install -r tutorial/(\S+)": is_file,
    r"make (\w+)": make,
    rf"make (\w+) (TORCH_INDEX)={INDEX}": make,
    r"TUTORIAL_PROFILE=(\w+) make run": profile,
    r"pip install -r (\S+)": is_file,
    rf"pip install torch==(\S+) --index-url {INDEX}": torch_of,
    r"pip install pre-commit": lambda: is_file(".pre-commit-config.yaml"),
    r"pre-commit install": lambda: None,
    r"jupyter lab (\S+)": is_file,
    r"\.venv/bin/python -m pytest (\S+)": is_file,
    r"python (benchmarks/\w+\.py)(?: (--\w+))?": option_of,
    r"\.venv/bin/(hf download .+)": hub_line,
}


def shell(lines, **_):
    for line in lines:
        found = [(check, match) for rule, check in LINES.items() if (match := re.fullmatch(rule, line))]
        assert len(found) == 1, f"no rule, or more than one, knows the line: {line}"
        check, match = found[0]
        check(*(part for part in match.groups() if part))


def own_environment(lines, text, tmp_path, **_):
    """The first line makes what the second opens, on this system and, by its layout, on the other."""
    program, *words = shlex.split(lines[0])
    subprocess.run([sys.executable, *words, "--without-pip"], cwd=tmp_path, check=True)
    posix = re.search(r"source (\S+)", text)[1]
    places = {lines[1].replace("\\", "/"), posix}
    assert places == {".venv/Scripts/activate", ".venv/bin/activate"}
    assert any((tmp_path / place).is_file() for place in places)
    shell(lines[2:])


def said_by(lines, python, tmp_path, monkeypatch, model):
    """What each line says, run as it stands on 24 pairs in my_pairs.csv, with `model` in MiniLM's place."""
    rows = [(row["query"], row["pos_doc"]) for row in pairs.read_mbpp(POCKET)[:24]]
    pd.DataFrame(rows, columns=["question", "answer"]).to_csv(tmp_path / "my_pairs.csv", index=False)
    monkeypatch.setattr(profiles, "model_path", lambda profile: model)
    monkeypatch.setenv("TUTORIAL_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    said = []
    for line in lines:
        program, *words = shlex.split(line)
        assert (program, words[:2]) == (python, ["-m", "embedding_tutorial"])
        result = CliRunner().invoke(main, words[2:])
        assert result.exit_code == 0, (line, result.output, result.exception)
        said.append(result.output)
    return said


def own_pairs(lines, tmp_path, monkeypatch, tiny_bert, **_):
    """Every line; the notebooks are not run."""
    ran = []
    monkeypatch.setattr(run_notebooks, "main", ran.append)
    monkeypatch.setenv("TUTORIAL_PAIRS", "")  # put back after the last line has set it
    said = said_by(lines, ".venv/bin/python", tmp_path, monkeypatch, tiny_bert)
    assert "pairs: 24" in said[0] and (tmp_path / "models" / "mine" / "model.safetensors").is_file()
    assert said[2].count("def ") >= 3 and ran == [run_notebooks.NOTEBOOKS]
    assert own_data.chosen_files()[0] == tmp_path / "my_pairs.csv"


def more_pairs_of_ones_own(lines, tmp_path, monkeypatch, tiny_bert, **_):
    """Every line, with one answer as if a language model had written it."""
    answer = {
        "text": json.dumps([{"query": "Count the sheep", "passage": "def sheep(herd): return len(herd)"}])
    }
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer), encoding="utf-8")
    monkeypatch.setattr(more_pairs, "NEAR", 1.1)  # to a model without training all texts are alike
    said = said_by(lines, "python", tmp_path, monkeypatch, tiny_bert)
    assert "20 requests" in said[1] and "1  kept" in said[2] and "20 pairs to train on" in said[3]
    assert "19  MRR" in said[0] and (tmp_path / "models" / "mine-curve.png").is_file()


def keys_of(record):
    """Each record that is shown has the keys of record(the file's name behind it)."""

    def check(lines, **_):
        for line in lines:
            shown, end = json.JSONDecoder().raw_decode(line)
            assert shown.keys() == record(line[end:].strip()).keys()

    return check


def first_row(name):
    return json.loads(read(DATA / "pocket_t2" / "zh" / name).splitlines()[0])


def a_pair(lines, tmp_path, **_):
    (tmp_path / "pairs.jsonl").write_text(lines[0], encoding="utf-8")
    read_back = pairs.read_pairs(tmp_path / "pairs.jsonl")[0]
    assert {name: read_back[name] for name in ("query", "pos_doc", "neg")} == json.loads(lines[0])


def own_test(lines, text, tmp_path, monkeypatch, **_):
    shutil.copytree(pocket_task.DATA, tmp_path / "data" / "my_test")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(text, "data/README.md", "exec"), names)
    names["task"].load_data()
    assert set(names["task"].dataset) == set(pocket_task.LANGUAGES)


# Each block by how its first line begins, and how it is tried. A block that is not here fails.
BLOCKS = {
    "git clone": shell,
    "python -m venv": own_environment,
    "make ": shell,
    "!git clone": shell,
    ".venv/bin/python -m embedding_tutorial": own_pairs,
    "python -m embedding_tutorial train": more_pairs_of_ones_own,
    "TUTORIAL_PROFILE=": shell,
    ".venv/bin/python -m pytest": shell,
    "pip install pre-commit": shell,
    "python benchmarks/": shell,
    '{"task_id": 1, "prompt"': keys_of(lambda name: read_json(POCKET)[0]),
    '{"task_id": 1, "prompts"': keys_of(lambda name: read_json(DATA / "pocket_mbpp_rewrites.json")[0]),
    '{"_id"': keys_of(first_row),
    '{"query"': a_pair,
    "from embedding_tutorial.pocket_task import": own_test,
}
CASES = [
    pytest.param(block, id=f"{name_of(page)}-{number}")
    for page in WITH_CODE
    for number, block in enumerate(fenced(page), 1)
]


@pytest.mark.parametrize("block", CASES)
def test_a_code_block_does_what_it_says(block, tmp_path, monkeypatch, tiny_bert):
    _, lines, text = block
    found = [check for start, check in BLOCKS.items() if lines[0].startswith(start)]
    assert len(found) == 1, f"BLOCKS does not know, or knows twice, the block that begins: {lines[0]}"
    found[0](lines=lines, text=text, tmp_path=tmp_path, monkeypatch=monkeypatch, tiny_bert=tiny_bert)


def test_a_wrong_line_is_found():
    index = INDEX.replace("\\", "")
    for line in (
        "make all",
        f"make run CUDA_INDEX={index}",
        "pip install -r reqs.txt",
        "rm -r models",
        "TUTORIAL_PROFILE=huge make run",
        f"pip install torch==1.0 --index-url {index}",
    ):
        with pytest.raises(AssertionError):
            shell([line])
    for words in ("--revision main --local-dir models/bge-m3", "--local-dir models/bge-m3"):
        with pytest.raises(AssertionError):
            hub_line(f"hf download {assets.BGE_M3_REPO} {words}")


def test_the_makefile_and_the_pages_name_the_same_targets():
    targets = set(re.search(r"^\.PHONY: (.+)$", read(ROOT / "Makefile"), re.M)[1].split())
    text = read(ENGLISH) + read(ROOT / "CONTRIBUTING.md")
    named = set(re.findall(r"^make (\w+)", text, re.M))
    assert named == targets - {"python-version"}


# ---------------------------------------------------------------- the two READMEs


def test_a_newcomer_finishes_the_readme():
    """At most 150 lines and 900 words. A word is what `wc -w` counts: tables, commands and marks included."""
    text = read(ENGLISH)
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 900
    body = read(CHINESE).split("\n## 术语表\n")
    assert len(body) == 2 and len(body[0].splitlines()) <= 150


def without_glossary(path):
    """The text of a README; its table of terms, which the English one has in notebook 01, is left out."""
    return re.sub(r"^\| 中文 \|.*\n(?:\|.*\n)*", "", read(path), flags=re.M)


def numbers(path):
    """Every number of the prose with how often it occurs; not those within a name, an address or code."""
    text = re.sub(r"\]\([^)]*\)", "]", FENCE.sub("", without_glossary(path)))
    return Counter(re.findall(r"(?<![A-Za-z\d.])\d+(?:[.,]\d+)*", text))


def targets(path):
    """Every link and image with how often it occurs; the two READMEs' links to each other left out."""
    return Counter(t for t in re.findall(r"\]\(([^)\s]+)\)", read(path)) if not t.startswith("README"))


def test_the_two_readmes_say_the_same():
    assert [level for level, _ in headings(ENGLISH)] == [level for level, _ in headings(CHINESE)]
    assert [lines for _, lines, _ in fenced(ENGLISH)] == [lines for _, lines, _ in fenced(CHINESE)]
    assert numbers(ENGLISH) == numbers(CHINESE) and len(numbers(ENGLISH)) > 30
    images = [re.findall(r"!\[[^]]+\]\(([^)]+)\)", read(path)) for path in (ENGLISH, CHINESE)]
    assert images[0] == images[1] and images[0]
    assert targets(ENGLISH) == targets(CHINESE)
    sections = [FENCE.sub("", without_glossary(path)).split("\n## ") for path in (ENGLISH, CHINESE)]
    for ours, theirs in zip(*sections, strict=True):  # table by table, list by list, link by link
        for mark in (r"^\|", r"^- ", r"\]\("):
            found = [len(re.findall(mark, text, re.M)) for text in (ours, theirs)]
            assert found[0] == found[1], (theirs.splitlines()[0], mark)
    problems = f"{assets.GITHUB_RAW}{assets.MBPP_GITHUB_PATH}"
    assert (
        problems in targets(ENGLISH)
        and "](README.zh-CN.md)" in read(ENGLISH)
        and "](README.md)" in read(CHINESE)
    )


def test_the_chinese_glossary_has_every_term_of_notebook_01():
    def table(text, head):
        return re.findall(r"^\| ([^|]+) \| ([^|]+) \|", text.split(head)[1], re.M)[1:]  # without | --- |

    terms = table(prose(NOTEBOOKS[0]), "| term | 中文 |")
    rows = table(read(CHINESE), "| 中文 | 英文 |")
    assert [english for _, english in rows] == [term for term, _ in terms] and len(rows) > 50
    for (zh, _), (term, theirs) in zip(rows, terms, strict=True):
        assert re.split("[（(]", theirs)[0].strip() in zh, f"{term}: the notebook says {theirs}"


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=name_of)
def test_the_query_before_and_after_is_the_saved_runs(page):
    question, before, after = re.findall(r"^\| [^|]+ \| (.+?) \|$", read(page), re.M)[1:4]
    cells = [c for c in read_json(NOTEBOOKS[0])["cells"] if c["cell_type"] == "code"]
    searches = [
        "".join("".join(o.get("text", "")) for o in c["outputs"])
        for c in cells
        if "search(val_pairs[HARD]" in "".join(c["source"])
    ]
    query = question.split("（")[0]
    assert query in searches[0] and len(searches) >= 2
    first = [re.search(r"^\d\.\d{3}\n\s+def (\w+)", text, re.M)[1] for text in searches]
    named = [re.match(r"`(\w+)\((\w+)\)`", text).groups() for text in (before, after)]
    assert [named[0][0], named[1][0]] == [first[0], first[-1]]
    right = next(pair["pos_doc"] for pair in pairs.read_mbpp(POCKET) if pair["query"] == query)
    assert f"def {first[-1]}({named[1][1]})" in right and f"def {first[0]}(" not in right
    assert "427 pairs in pocket_mbpp.json" in "".join(str(c["outputs"]) for c in cells)


# ---------------------------------------------------------------- numbers that come from a file


def found(name):
    return read_json(ROOT / "benchmarks" / "results" / name)


def study_rows():
    return {(row["recipe"], row["readout"]): row for row in found("study.json")["summary"]["rows"]}


def test_the_readmes_table_is_the_studys():
    for place in (("base", "last"), ("original", "last"), ("default", "halfway")):
        row = study_rows()[place]
        cells = f"| {row['recall@1'][0]:.3f} | {row['mrr'][0]:.3f} | {row['general']:.3f} |"
        assert all(cells in read(page) for page in (ENGLISH, CHINESE, BENCHMARKS)), place
    rows = study_rows()
    assert rows["default", "halfway"]["mrr - base"][1] > 0  # "ahead of the base"


def reciprocal_ranks(recipe, readout):
    """Of the study: seeds × queries."""
    cells, seeds = found("study.json")["recipes"][recipe]["cells"], {}
    for name, cell in cells.items():
        ranks = dict(
            zip(map(int, cell["queries"].split()), map(int, cell["ranks"][readout].split()), strict=True)
        )
        seeds.setdefault(name.split("-")[0], {}).update(ranks)
    return 1 / pd.DataFrame(seeds).T.sort_index(axis=1)


def test_what_the_first_page_says_of_the_recipes():
    """tests/test_study.py holds the other figures of the study."""
    page = read(BENCHMARKS)
    gap = reciprocal_ranks("default", "halfway") - reciprocal_ranks("original", "halfway")
    shown = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*finetune.bootstrap_interval(gap.mean()))
    assert gap.shape == (3, 427) and f"halfway back as well: {shown} MRR" in page
    printed = tables = ""
    for output in (o for cell in read_json(NOTEBOOKS[0])["cells"] for o in cell.get("outputs", ())):
        printed += "".join(output.get("text", ""))
        tables += re.sub(
            r"(?s)<style.*?</style>|<[^>]+>|\s+", " ", "".join(output.get("data", {}).get("text/html", ""))
        )
    before, after, gain = re.search(r"MRR (\S+) → (\S+), difference (\S+ \[\S+ \S+\]);", page).groups()
    assert f"     MRR: {gain}, p" in printed
    for name, score in (("base", before), ("merged", after)):
        assert re.search(rf" {name} +\S+ +{score} ", tables), name


def test_bge_m3s_needs_are_the_measured_and_counted_ones():
    full, page = found("full_size.json"), read(BENCHMARKS)
    counted = {rung["rung"]: rung["gb"] for rung in full["ladder"]}
    peak = {name: stage["peak_gb"] for name, stage in full["stages"].items()}
    gpu = [counted["only the word rows that occur"], counted["each layer computed again"]]
    minutes, disk = full["epoch"]["seconds"] / 60, profiles.PROFILES["full"].disk_gb
    for text in (read(ENGLISH), read(CHINESE)):
        section = text.split("\n## BGE-M3")[1].split("\n## ")[0]
        shown = [f"{gpu[0]:.1f} GB", f"{gpu[1]:.1f} GB", f"{peak['uninterrupted']:.1f} GB", f"{disk:.0f} GB"]
        assert not [value for value in [*shown, f"{minutes:.1f} "] if value not in section]
        assert f"{profiles.PROFILES['full'].ram_gb:.0f} GB" in section
        whole = max(row["gb"] for row in found("full_notebooks.json")["notebooks"].values())
        assert f"{whole:.1f} GB" in section and whole < profiles.PROFILES["full"].ram_gb
    row = next(line for line in page.splitlines() if line.startswith("| 5 | a CPU"))
    assert f"{peak['uninterrupted']:.1f} GB measured ({peak['whole']:.1f} with the whole" in row
    assert f"{peak['again']:.1f} with `checkpointing" in row and f"{peak['lora']:.1f} with GradCache" in row
    assert f"{minutes:.1f} minutes an epoch" in row and peak["uninterrupted"] < 8  # "in less than 8 GB"
    assert f"{gpu[0]:.1f} GB counted" in page and f"{gpu[1]:.1f} GB with `checkpointing=True`" in page
    assert f"`full` {disk:.0f} GB, `pocket` {profiles.PROFILES['pocket'].disk_gb:.0f} GB" in page


def test_seconds_and_gigabytes_are_the_benchmarks():
    runs, page = found("training_mbpp.json")["contenders"], read(BENCHMARKS)
    runs = {(r["contender"], r["dropout"], r["precision"]): r for r in runs.values()}
    plain, dropout = (runs["predecessor's loop", share, "fp32"] for share in ("0", "0.1"))
    ours, ours_dropout, fast = (runs["ours", *way] for way in (("0", "fp32"), ("0.1", "fp32"), ("0", "bf16")))
    for text, unit in ((read(ENGLISH), "s"), (read(CHINESE), "秒")):
        assert f"{ours['seconds']:.1f} {unit}" in text and f"{plain['seconds']:.1f}" in text
    assert f"{plain['seconds']:.1f} → {ours['seconds']:.1f} s per epoch without dropout" in page
    assert f"{dropout['seconds']:.1f} → {ours_dropout['seconds']:.1f} s with it" in page
    assert f"{fast['seconds']:.1f} s, and {dropout['memory_gb']:.1f} → {fast['memory_gb']:.1f} GB" in page
    assert 0.2 < ours["seconds"] / plain["seconds"] < 0.3  # "a quarter"
    search = found("search.json")
    theirs, mine = search["contenders"]
    assert f"{theirs['seconds']:.0f} → {mine['seconds']:.0f} s" in page and search["identical"]
    memory = f"{theirs['memory_gb']:.1f} → {mine['memory_gb']:.1f} GB"
    assert f"{memory} on 2 cores, all {search['metrics']} metrics identical" in page
    assert 0.5 < mine["seconds"] / theirs["seconds"] < 0.65  # "little more than half"
    trainer = "sentence-transformers, our settings"
    last, halfway = (study_rows()[trainer, way]["mrr"][0] for way in ("last", "halfway"))
    assert f"MRR {last:.3f}, and {halfway:.3f} halfway back" in page


def test_each_number_of_the_first_page_has_a_command():
    page = read(BENCHMARKS).split("<!-- ")[0]
    rows = re.findall(r"^\| (?:\d|–) \| (.+) \| (.+) \|$", page, re.M)
    assert len(rows) > 10 and len(re.findall(r"^\d\. \*\*", page, re.M)) == 5
    for _, command in rows:
        for line in re.findall(r"`([^`]+)`", command):
            target = re.match(r"make (\w+)$|python (benchmarks/\w+\.py)", line)
            make(target[1]) if target[1] else is_file(target[2])


# ---------------------------------------------------------------- the habits of the project


def strings(tree):
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [text for part in parts for text in strings(part)] + [tree] * isinstance(tree, str)


def test_the_workflow_names_what_exists():
    jobs = yaml.safe_load(read(ROOT / ".github" / "workflows" / "ci.yml"))["jobs"]
    systems = {*jobs["make"]["strategy"]["matrix"]["os"], jobs["windows"]["runs-on"]}
    assert systems == {"ubuntu-latest", "macos-latest", "windows-latest"}
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    for command in commands:
        if command.startswith("make"):
            make(*re.fullmatch(r"make (\w+) PYTHON=python", command).groups())
    everything = " ".join(commands)
    torch_of(re.search(r"torch==(\S+)", everything)[1])
    address = re.search(r"--index-url (\S+)", everything)[1]
    assert address in read(ROOT / "Makefile")
    files = re.findall(r"tests/\w+\.py|requirements\S*\.txt", everything)
    assert len(files) > 5 and all((ROOT / file).is_file() for file in files)
    caches = [step["with"] for step in steps if "setup-python" in step.get("uses", "")]
    assert [(cache["cache"], cache["python-version"]) for cache in caches] == [("pip", "3.11")] * 2
    # Windows has no `resource`, and tests/helpers.py imports it
    needs_posix = re.compile(r"^(?:import|from) (?:resource|fcntl|helpers|common)\b", re.M)
    for file in files:
        assert not needs_posix.search(read(ROOT / file)), file


def test_the_issue_forms_ask_for_what_is_needed():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    for name in ("bug.yml", "question.yml"):
        form = yaml.safe_load(read(folder / name))
        assert form["name"] and form["description"] and len(form["body"]) <= 4
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert all(field["validations"]["required"] and field["attributes"]["label"] for field in fields)
    for text in strings(yaml.safe_load(read(folder / "bug.yml"))):
        assert all((ROOT / page).is_file() for page in re.findall(r"\w+\.md", text))


def test_the_hooks_are_those_of_the_tests():
    hooks = yaml.safe_load(read(ROOT / ".pre-commit-config.yaml"))["repos"][0]["hooks"]
    ruff = next(hook for hook in hooks if hook["id"] == "ruff")
    assert ruff["additional_dependencies"][0] in read(ROOT / "requirements-dev.txt").split()
    for hook in hooks:
        named = re.findall(r"tests/\w+\.py", hook["entry"])
        assert hook["id"] == "ruff" or len(named) == 1 and (ROOT / named[0]).is_file()
        words = shlex.split(hook["entry"])
        for word in words[words.index("-k") + 1].split(" or ") if "-k" in words else ():
            assert re.search(rf"^def test_\w*{word}", read(ROOT / named[0]), re.M), word
        matched = [path for path in [*NOTEBOOKS, ENGLISH, ROOT / "embedding_tutorial" / "finetune.py"]
                   if re.search(hook.get("files", ""), name_of(path))]  # fmt: skip
        assert matched


def test_the_citation_names_the_works():
    cited = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert cited["cff-version"] == "1.2.0" and cited["title"] == headings(ENGLISH)[0][1]
    assert cited["license"] in read(ROOT / "LICENSE")
    assert all(work["title"] and work["authors"] and work["type"] for work in [cited, *cited["references"]])
    numbers = {re.search(r"[\d.]+$", work["url"])[0] for work in cited["references"][1:]}
    lessons = "".join(map(prose, NOTEBOOKS))
    elsewhere = {number for number in numbers if f"arXiv {number}" not in lessons}
    assert len(numbers) == 13 and elsewhere == {"2210.07316", "2002.10957"}  # used, not cited: MTEB, MiniLM


def test_changes_are_dated_and_newest_first():
    dates = [title for level, title in headings(ROOT / "CHANGELOG.md") if level == 2]
    assert dates == sorted(dates, reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
