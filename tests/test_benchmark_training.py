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
import training_cuda  # noqa: E402

CONTENDER_IDS = [job.id for job in training.CONTENDERS]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """What the command line would hand over: 12 training pairs in batches of 4, a tiny model, one step."""
    folder = tmp_path_factory.mktemp("bench")
    rows = json.loads(common.POCKET_PAIRS.read_text(encoding="utf-8"))[:15]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    model = common.random_m3(folder / "tiny", common.SMOKE_SHAPE | NO_DROPOUT)
    sizes = {"steps": 1, "repeats": 2, "batch_size": 4}
    return Namespace(data=folder / "pairs.json", model=model, out=folder / "training.json", **sizes)


@pytest.fixture(scope="module")
def results(args):
    """{job id: result} of every job, in this process: a process each is what the benchmark itself does."""
    return {name: training.worker(Namespace(**vars(args), worker=name)) for name in training.JOBS}


def first_loss(result):
    return result["updates"][0]["loss"]


def test_every_contender_computes_the_same_loss_on_the_same_texts(results):
    reference = results["predecessor"]
    for name in CONTENDER_IDS:
        found = results[name]
        # The tiny model has no dropout, ours-dropout included: None stands for the model's own.
        # bf16 is the only one that rounds more.
        rel = 5e-3 if name.endswith("bf16") else 1e-5
        assert first_loss(found) == pytest.approx(first_loss(reference), rel=rel), name
        assert found["pairs"] == 4, name
        assert found["real_tokens"] == reference["real_tokens"] > 0, name
        assert (found["warmup"], len(found["updates"])) == (1, 2), name
        assert found["seconds"] == found["updates"][1]["seconds"] > 0, name
        assert 0.05 < found["peak_gb"] < 20, name


def test_tokens_computed(results):
    for name in CONTENDER_IDS:
        padding = results[name]["padded_tokens"] - results[name]["real_tokens"]
        if name.startswith("ours") and name.endswith("bf16"):  # its rows are filled up
            assert padding > 0 and results[name]["padded_tokens"] % 64 == 0
        else:
            assert padding == 0 if name.startswith("ours") else padding > 0, name


def test_methods_measure_full_batches_and_fill_the_queue(results):
    assert results["method-all"]["pairs"] == 12
    queue = results["method-queue"]
    assert queue["warmup"] == 1 + 160 // 4 and len(queue["updates"]) == queue["warmup"] + 1
    more = queue["updates"][-1]["loss"]
    assert more > results["method-whole"]["updates"][0]["loss"]  # more negatives, a larger loss


@pytest.mark.parametrize(
    ("whole", "settled"),
    [([1.0] * 5, True), ([1.0, 1.0, 3.0, 3.0, 1.0, 3.0], False)],  # medians after 4, 5, 6 rounds: 2, 1, 2
)
def test_methods_are_repeated_until_their_order_is_settled(args, monkeypatch, whole, settled):
    clock, left = [0.0], iter(whole)
    others = {"micro_batch": 1.5, "queue": 4.0, "batch_size": 8.0, "backward": 1.75}

    def update(run):  # moves the clock that `time_methods` reads
        kind = next((name for name in others if name in run.options), None)
        clock[0] += others[kind] if kind else next(left)

    monkeypatch.setattr(training, "MOST_ROUNDS", 6)
    monkeypatch.setattr(training, "ours", lambda work, recorder, **options: Namespace(options=options))
    monkeypatch.setattr(training.engine, "one_update", update)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    found = training.time_methods(args)
    assert found["settled"] == settled and found["seconds"]["method-whole"] == whole
    assert found["seconds"]["method-queue"] == [4.0] * len(whole)
    assert found["order"].index("method-whole") == (0 if settled else 2) and len(found["order"]) == 4


@pytest.fixture
def in_this_process(results, monkeypatch):
    """Replaces the fresh processes by the results above; returns the list of jobs asked for."""
    asked = []
    seconds = {job.id: [1.0, 2.0, 4.0] for job in training.METHODS} | {"method-gradcache": [2.0, 5.0, 12.0]}
    made_up = {
        "equality": {"small": {"pairs": 4, "ways": {"whole batch": {"loss": 0.0, "gradient": 1e-15}}}},
        "methods": {"seconds": seconds, "order": training.RANKED, "settled": True},
    }

    def run_job(args, job_id):
        asked.append(job_id)
        return made_up.get(job_id) or results[job_id]

    monkeypatch.setattr(training, "run_job", run_job)
    return asked


def test_the_result_and_its_text(args, in_this_process, tmp_path):
    args.out = tmp_path / "training.json"
    training.measure(args)
    result = json.loads(args.out.read_text(encoding="utf-8"))
    assert "\n" not in result["machine"]["summary"]
    assert str(ROOT) not in json.dumps(result)
    contenders = result["contenders"]
    assert all(len(row["repeats"]) == 2 for row in contenders.values())
    assert [row["ours"] for row in contenders.values()].count(True) == 5
    assert len({row["name"] for row in contenders.values()}) == len(contenders) == 11
    # The losing settings of the cached loss are measured once only.
    assert sum(job.startswith("st-cached") for job in in_this_process) == 3 + 1

    rows = {row["method"]: row for row in result["methods"]}
    assert rows["whole batch + queue of 160"]["negatives per query"] == 3 + 160
    assert rows["GradCache, all pairs"]["negatives per query"] == 11
    # Ratios round by round (2, 2.5, 3), and the quartiles of [2, 5, 12].
    cached = rows["GradCache"]
    assert cached["seconds per update"] == 5.0 and cached["seconds per update, 25–75 %"] == "3.50–8.50"
    assert cached[training.COST] == 2.5 and cached[f"{training.COST}, 25–75 %"] == "2.25–2.75"

    for peer, own in (("predecessor-dropout-0", "ours"), ("predecessor", "ours-dropout")):
        peer, own = contenders[peer], contenders[own]
        assert own["dropout"] == peer["dropout"] and own["precision"] == "fp32"
        assert peer["times ours"] == pytest.approx(peer["seconds"] / own["seconds"], abs=0.01)
    assert not any("times ours" in row for row in contenders.values() if row["ours"])

    contenders["st"]["repeats"] = [1.0, 36.0]
    text = training.readme_text(result, "title", "../images/x.png")
    assert text.count("| **ours") == 5 and "None" not in text and "2.50 (2.25–2.75) times" in text
    assert "at most 36.00 times the fastest" in text and "![title](../images/x.png)" in text


def test_rerun_goes_on_where_it_was_interrupted(args, in_this_process, tmp_path, monkeypatch):
    args.out = tmp_path / "training.json"
    run_job = training.run_job

    def interrupted(args, job_id):
        if len(in_this_process) == 5:
            raise KeyboardInterrupt
        return run_job(args, job_id)

    monkeypatch.setattr(training, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.measure(args)
    assert not args.out.exists()
    monkeypatch.setattr(training, "run_job", run_job)
    training.measure(args)
    total = 2 + 2 * len(training.CONTENDERS) - 2 + len(training.METHODS)  # two losers only once
    assert len(in_this_process) == total and in_this_process.count("equality") == 1
    assert not args.out.with_name("training.json.tmp").exists()


def test_interrupted_run_of_other_settings_is_not_mixed_in(args, in_this_process, tmp_path):
    args.out = tmp_path / "training.json"
    partial = {"settings": {}, "runs": {"ours": [{"seconds": 0.0}]}}
    args.out.with_name("training.json.tmp").write_text(json.dumps(partial), encoding="utf-8")
    training.measure(args)
    assert in_this_process.count("ours") == 2


def test_fresh_process_and_a_failing_one_that_is_named_with_its_output(args):
    result = training.run_job(args, "ours")
    assert len(result["updates"]) == 2 and result["peak_gb"] > 0.05
    with pytest.raises(RuntimeError, match="no-such-job.*ended with status"):
        training.run_job(args, "no-such-job")


def test_equality(args):
    table = training.equality(args.model, common.train_pairs(args.data), 8)
    small, real = (block["ways"] for block in table.values())
    assert all(way["loss"] < 1e-6 and way["gradient"] < 1e-6 for way in small.values())
    assert all(way["loss"] < 1e-3 and way["gradient"] < 1e-3 for way in real.values())
    assert len(small) == len(real) == 4


@pytest.mark.parametrize("way", training_cuda.WAYS)
def test_cuda_code_path_on_the_cpu(args, way, monkeypatch):
    real = training_cuda.engine.compute_gradients  # the padded way replaces it, in its own process
    monkeypatch.setattr(training_cuda.engine, "compute_gradients", real)
    row = training_cuda.worker(Namespace(**vars(args), smoke=True, limit_gb=None, worker=f"{way}-bf16-4"))
    assert row["seconds per update"] > 0 and not row["out of memory"]
    assert (row["tokens computed"] > row["real tokens"]) == (way == "padded")
    assert 0 < row["utilisation"] < 1


def test_model_flop_counts_bge_m3():
    """24 layers of 12.6 M weights: 302 M. At 512 tokens attention adds 12 · 24 · 1024 · 512² per text."""
    flop = common.model_flop(common.BGE_M3_SHAPE, [512])
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
