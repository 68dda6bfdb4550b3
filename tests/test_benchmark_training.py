"""benchmarks/training.py on a tiny model: every contender does the same work, and the JSON has its shape."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import training  # noqa: E402

ALL_JOBS = [*training.CONTENDERS, *training.METHODS]
CONTENDER_IDS = [job.id for job in training.CONTENDERS]


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """What the command line would hand over: 12 training pairs in batches of 4, a tiny model, one step."""
    folder = tmp_path_factory.mktemp("bench")
    rows = json.loads(training.POCKET_PAIRS.read_text(encoding="utf-8"))[:15]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    training.tiny_bert(folder / "tiny", training.pocket_model_path())
    options = {"data": folder / "pairs.json", "model": folder / "tiny", "out": folder / "training.json"}
    sizes = {"steps": 1, "repeats": 2, "batch_size": 4, "token_budget": 128, "limit_gb": 0}
    flags = {"fresh": False, "only": None, "cuda": False, "cuda_smoke": False}
    return Namespace(**options, **sizes, **flags)


@pytest.fixture(scope="module")
def results(args):
    """{job id: result} of every job, in this process: a process each is what the benchmark itself does."""
    found = {}
    for job in ALL_JOBS:
        work, recorder = training.open_work(args, job), training.Recorder()
        training.RUNNERS[job.runner](work, recorder, **job.options)
        found[job.id] = recorder.result(work.warmup)
    return found


def test_every_contender_computes_the_same_loss_on_the_same_texts(results):
    reference = results["predecessor"]
    for name in CONTENDER_IDS:
        found = results[name]
        # The tiny model has no dropout, ours-dropout included: None stands for the model's own.
        assert found["losses"][0] == pytest.approx(reference["losses"][0], rel=2e-3), name
        assert found["pairs"] == [4], name
        assert found["real_tokens"] == reference["real_tokens"] > 0, name
        assert len(found["seconds"]) == len(found["warmup_seconds"]) == 1, name
        assert 0.05 < found["peak_gb"] < 20, name


def test_tokens_computed(results):
    for name in CONTENDER_IDS:
        padding = results[name]["padded_tokens"] - results[name]["real_tokens"]
        assert padding == 0 if name.startswith("ours") else padding > 0, name


def test_bf16_is_the_only_one_that_rounds_more(results):
    exact = results["predecessor"]["losses"][0]
    for name in CONTENDER_IDS:
        if not name.endswith("bf16"):
            assert results[name]["losses"][0] == pytest.approx(exact, rel=1e-5), name


def test_methods_measure_full_batches_and_fill_the_queue(results):
    assert results["method-all"]["pairs"] == [12]
    queue = results["method-queue"]
    assert len(queue["warmup_seconds"]) == 1 + 160 // 4
    assert queue["losses"][-1] > results["method-whole"]["losses"][0]  # more negatives, a larger loss


@pytest.fixture
def in_this_process(results, monkeypatch):
    """Replaces the fresh processes by the results above; returns the list of jobs asked for."""
    asked = []

    def run_job(args, job_id, **options):
        asked.append(job_id)
        if job_id == "equality":
            way = {"loss": 0.0, "gradient": 1e-15}
            return {"small random model, float64": {"pairs": 4, "ways": {"whole batch": way}}}
        return results[job_id]

    monkeypatch.setattr(training, "run_job", run_job)
    return asked


def test_result_has_the_shape_that_notebook_01_reads(args, in_this_process, tmp_path):
    args.out = tmp_path / "training.json"
    training.measure(args)
    result = json.loads(args.out.read_text(encoding="utf-8"))
    assert list(result) == [
        "machine",
        "command",
        "date",
        "settings",
        "contenders",
        "methods",
        "ratios",
        "equality",
    ]
    assert isinstance(result["machine"]["summary"], str) and "\n" not in result["machine"]["summary"]
    assert str(ROOT) not in json.dumps(result)
    for row in result["contenders"]:
        assert {
            "name",
            "seconds",
            "memory_gb",
            "ours",
            "padded_tokens",
            "real_tokens",
            "repeats",
            "dropout",
        } <= set(row)
        assert len(row["repeats"]) == 2
    assert [row["ours"] for row in result["contenders"]].count(True) == 5
    columns = ["method", "pairs per update", "negatives per query", "seconds per update", "peak memory GB"]
    assert all(list(row) == columns for row in result["methods"])
    negatives = {row["method"]: row["negatives per query"] for row in result["methods"]}
    assert negatives["whole batch + queue of 160"] == 3 + 160 and negatives["GradCache, all pairs"] == 11
    cached = next(row for row in result["contenders"] if "tried" in row)
    assert len(cached["tried"]) == 3 and cached["setting"] in cached["tried"]
    # The losing settings of the cached loss are measured once only.
    assert sum(job.startswith("st-cached") for job in in_this_process) == 3 + 1

    text = training.readme_text(result)
    assert text.count("| **ours") == 5 and "None" not in text


def test_rerun_goes_on_where_it_was_interrupted(args, in_this_process, tmp_path, monkeypatch):
    args.out = tmp_path / "training.json"
    run_job = training.run_job

    def interrupted(args, job_id, **options):
        if len(in_this_process) == 5:
            raise KeyboardInterrupt
        return run_job(args, job_id, **options)

    monkeypatch.setattr(training, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.measure(args)
    assert not args.out.exists()
    monkeypatch.setattr(training, "run_job", run_job)
    training.measure(args)
    total = 1 + 2 * len(ALL_JOBS) - 2  # equality, two rounds, two losers only once
    assert len(in_this_process) == total and in_this_process.count("equality") == 1
    assert not args.out.with_name("training.json.tmp").exists()


def test_interrupted_run_of_other_settings_is_not_mixed_in(args, in_this_process, tmp_path, capsys):
    args.out = tmp_path / "training.json"
    partial = {"settings": {}, "machine": {}, "runs": {"ours": [{"seconds": [0.0]}]}}
    args.out.with_name("training.json.tmp").write_text(json.dumps(partial), encoding="utf-8")
    training.measure(args)
    assert "starting afresh" in capsys.readouterr().out
    assert in_this_process.count("ours") == 2


def test_fresh_process(args):
    result = training.run_job(args, "ours", batch_size=4)
    assert len(result["seconds"]) == 1 and result["peak_gb"] > 0.05


def test_failing_worker_is_named_with_its_output(args):
    with pytest.raises(RuntimeError, match="no-such-job.*ended with status"):
        training.run_job(args, "no-such-job", batch_size=4)


def test_equality(args):
    table = training.equality(args.model, training.train_pairs(args.data), 8)
    small, real = (block["ways"] for block in table.values())
    assert all(way["loss"] < 1e-6 and way["gradient"] < 1e-6 for way in small.values())
    assert all(way["loss"] < 1e-3 and way["gradient"] < 1e-3 for way in real.values())
    assert len(small) == len(real) == 4


@pytest.mark.parametrize("way", training.CUDA_WAYS)
def test_cuda_code_path_on_the_cpu(args, way, tmp_path):
    training.random_xlm_roberta(tmp_path, training.SMOKE_SHAPE)
    options = {**vars(args), "model": tmp_path, "worker": f"smoke-{way}-bf16-4"}
    row = training.cuda_worker(Namespace(**options))
    assert row["seconds per update"] > 0 and not row["out of memory"]
    assert (row["tokens computed"] > row["real tokens"]) == (way == "padded")
    assert 0 < row["utilisation"] < 1


def test_model_flop_counts_bge_m3():
    """24 layers of 12.6 M weights: 302 M. At 512 tokens attention adds 12 · 24 · 1024 · 512² per text."""
    flop = training.model_flop(training.BGE_M3_SHAPE, [512])
    assert flop == pytest.approx(6 * 301_989_888 * 512 + 12 * 24 * 1024 * 512**2)


def test_readme_markers(tmp_path):
    path = tmp_path / "README.md"
    common.put_into_readme("training", "first", path)
    path.write_text(path.read_text(encoding="utf-8") + "\nby hand\n", encoding="utf-8")
    common.put_into_readme("training", "second", path)
    text = path.read_text(encoding="utf-8")
    assert "second" in text and "first" not in text and text.rstrip().endswith("by hand")
    path.write_text("<!-- training:start -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="training:end"):
        common.put_into_readme("training", "third", path)


def test_readme_says_when_the_machine_was_busy(args, results, in_this_process, tmp_path):
    args.out = tmp_path / "training.json"
    result = training.measure(args)
    result["ratios"]["spread"] = 1.1
    assert "busy" not in training.readme_text(result)
    result["ratios"]["spread"] = 3.6
    assert "busy machine" in training.readme_text(result)
    assert result["ratios"]["cpu time, times ours"]["predecessor's loop"] > 0
