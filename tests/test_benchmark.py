"""tools/benchmark: what it asks, in which order, and what it makes of the answers; no timing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest
from paddle.amp.amp_lists import white_list
from PIL import Image
from program import CONFIG, ROOT, run, run_tool

from config import get_config
from tools.benchmark import __main__ as benchmark
from tools.benchmark import plan as planner
from tools.benchmark import worker
from tools.benchmark.images import make_images
from tools.benchmark.plan import Device, exchange_seconds, facts, step_seconds
from tools.benchmark.turns import Bench, Row, Worker, summarize
from tools.common import Failed
from training.optim import Amp
from utils import UserError

TOOL = ROOT / "tools" / "benchmark"
S16_CONFIG = str(ROOT / "configs" / "gmlp_s16_224.yaml")
# What facts() counts for S/16 and B/16 in mixed precision with LayerNorm in float32, and for S/16
# with it in bfloat16; without stochastic depth.
S16 = {
    "multiply_adds": 4_392_060_928, "parameters": 19_422_656, "kept_bytes": 84_797_952,
    "forward_bytes": 286_008_272, "backward_bytes": 441_658_736,
}  # fmt: skip
S16_NORM = {
    **S16, "kept_bytes": 69_644_800, "forward_bytes": 199_103_440, "backward_bytes": 333_579_632
}  # fmt: skip
B16 = {
    "multiply_adds": 15_720_452_096, "parameters": 73_075_392, "kept_bytes": 169_294_848,
    "forward_bytes": 570_810_320, "backward_bytes": 883_010_416,
}  # fmt: skip
RTX_3090 = Device(71, 24, 936, 32, 1, 1, 16)


def answers(*seconds, images=None):
    """What a row answers, turn by turn."""
    return [{"seconds": each, "images": images} for each in seconds]


def test_help_and_wrong_flags_answer_without_paddle(tmp_path):
    (tmp_path / "paddle.py").write_text("raise SystemExit('paddle was imported')")
    result = run([sys.executable, TOOL, "eval", "-h"], PYTHONPATH=str(tmp_path)).check()
    assert "-peer PYTHON" in result.out
    for args, part in (
        (["eval", "-repetitions", "0"], "0 is not between 1 and 1,000,000,000"),
        (["eval", "-batch_size", "many"], "invalid whole number value"),
        (["plan", "-device", "tpu"], "invalid choice: 'tpu'"),
        (["plan", "-cores", "0"], "0 is not between 0.001 and 1,000,000,000"),
        (["plan", "-link", "nan"], "nan is not between"),
        (["plan", "-loader_rate", "inf"], "inf is not between"),
        (["plan", "-peak", "fast"], "invalid number value"),
        (["loader", "-imagse", "3"], "unrecognized arguments"),
        ([], "COMMAND"),
    ):
        run_tool(benchmark, *args).refused(2, part)


@pytest.mark.parametrize(
    ("args", "status", "part"),
    [
        (["eval", "-cfg", "/gone.yaml"], 2, "/gone.yaml: cannot read"),
        (["loader", "-data_path", "/gone"], 2, "/gone/val_list.txt: cannot read this image list"),
        (["start", "-json", "/gone/file"], 2, "/gone/file: cannot be written"),
        (["start", "-peer", "/gone/python"], 2, "/gone/python cannot be started: "),
        (["start", "-peer", "/bin/true"], 1, "peer has ended (exit status 0)"),
        (["memory", "-lines", "100"], 2, "-lines 100 is too few to see 2 workers grow: take at"),
        (["plan", "-check", "-devices", "4"], 2, "-check predicts for this CPU: it takes no -dev"),
    ],
)
def test_what_was_asked_wrongly_is_one_sentence(args, status, part):
    run_tool(benchmark, *args).refused(status, part)


def test_an_image_of_the_users_that_is_broken_is_named_with_its_line(tmp_path):
    make_images(tmp_path, 1)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:1000])
    (tmp_path / "val_list.txt").write_text("0.jpg 0\n\nbroken.jpg 1\n")
    result = run_tool(benchmark, "eval", "-data_path", tmp_path)
    result.refused(2, f"{tmp_path}/val_list.txt:3: cannot read {tmp_path}/broken.jpg")


def test_rows_take_turns_and_the_warmup_does_not_count(tmp_path, monkeypatch):
    order = []

    def row(name, seconds):
        def measure():
            order.append(name)
            return {"seconds": seconds * (100 if len(order) <= 2 else 1), "images": 10}

        return Row(name, measure)

    def fake(bench):
        """A subcommand."""
        bench.measure("a title", [row("ours", 2.0), None, row("timm", 3.0)])

    monkeypatch.setitem(benchmark.COMMANDS, "start", (fake, benchmark.TURNS))
    path = tmp_path / "result.json"
    args = ["start", "-repetitions", "3", "-warmup", "1", "-json", path]
    result = run_tool(benchmark, *args).check()
    assert order == ["ours", "timm"] * 4
    data = json.loads(path.read_text())
    assert set(data) == {"command", "machine", "versions", "results"}
    assert set(data["machine"]) == {"cpu", "cores", "load before"}
    (table,) = data["results"]
    ours, timm = table["rows"]
    assert ours["seconds"] == [2.0] * 3 and timm["seconds"] == [3.0] * 3
    assert timm["ratio"] == pytest.approx(1.5)
    assert (timm["lowest"], timm["highest"], timm["median"]) == (3.0, 3.0, 3.0)
    assert ours["images_per_second"] == pytest.approx(5)
    lines = result.out.splitlines()
    assert lines[2] == "a title"
    assert lines[4].split() == ["ours", "2.000", "2.000", "to", "2.000", "5.0"]
    assert lines[5].split() == ["timm", "3.000", "3.000", "to", "3.000", "3.3", "1.50"]


def test_a_result_that_failed_leaves_the_old_file(tmp_path, monkeypatch):
    def fails(bench):
        """A subcommand."""
        raise Failed("it broke")

    monkeypatch.setitem(benchmark.COMMANDS, "start", (fails, {}))
    path = tmp_path / "result.json"
    path.write_text("old")
    run_tool(benchmark, "start", "-json", path).refused(1, "it broke")
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_ratios_are_of_the_same_turn_and_of_images():
    # The machine is twice as slow in the second turn, which a ratio of medians would see.
    ours = answers(1.0, 2.0, 1.0, images=10)
    timm = summarize("timm", answers(2.0, 4.0, 4.0, images=20), ours)
    assert timm["ratio"] == 1  # of 1, 1 and 2
    assert timm["images_per_second"] == pytest.approx(5)
    assert summarize("ours", ours, ours)["ratio"] == 1


def test_a_row_without_images_has_seconds_alone():
    limit = summarize("limit", answers(0.25), answers(0.5))
    assert (limit["images_per_second"], limit["ratio"]) == (None, 0.5)


@pytest.fixture
def start_worker(tmp_path):
    """Starts a worker of one case, whose work answers as the job's `result` says."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        from types import SimpleNamespace
        sys.path.insert(0, {str(ROOT)!r})
        from tools.benchmark import worker

        def case(job):
            print("a library's remark")
            def work():
                if job.result == "wrong":
                    raise ValueError("no such\\nluck")
                return job.result and vars(job.result)
            return work, 5

        worker.serve(SimpleNamespace(VERSIONS={{"library": "7"}}, case=case))
        """)
    )
    started = []

    def start(**job):
        started.append(Worker("ours", [sys.executable, str(script)], os.environ))
        return started[-1], started[-1].ask(case="case", added_memory=False, **job)

    yield start
    for each in started:
        each.close()


def test_a_worker_tells_its_versions_then_how_long_its_work_took(start_worker):
    one, versions = start_worker(result=None)
    assert versions["library"] == "7" and set(versions) == {"python", "library"}
    answer = one.ask()
    assert set(answer) == {"seconds", "images"} and answer["images"] == 5
    assert 0 < answer["seconds"] < 1
    one, _ = start_worker(result={"seconds": 8.0, "added": 9})
    assert one.ask() == one.ask() == {"seconds": 8.0, "images": 5, "added": 9}


def test_what_goes_wrong_in_a_worker_is_one_sentence(start_worker):
    one, _ = start_worker(result="wrong")
    for _ in range(2):
        with pytest.raises(Failed, match="ours: ValueError: no such luck"):
            one.ask()


def test_a_worker_does_not_see_what_importing_paddle_sets_here(tmp_path, monkeypatch):
    peer = tmp_path / "peer"
    peer.write_text(
        f"#!/bin/sh\necho ${{KMP_BLOCKTIME-unset}} $OMP_NUM_THREADS > {tmp_path}/seen\n"
    )
    peer.chmod(0o755)
    monkeypatch.delenv("KMP_BLOCKTIME", raising=False)
    bench = Bench(SimpleNamespace(peer=str(peer), threads=3), str(tmp_path))
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    with contextlib.closing(bench), pytest.raises(Failed, match="peer has ended"):
        bench.peer("timm", None)
    assert (tmp_path / "seen").read_text() == "unset 3\n"


def test_training_has_three_times_the_products_of_a_forward_pass():
    class Matrix(SimpleNamespace):
        def __matmul__(self, other):
            assert self.columns == other.rows
            done.append(self.rows * self.columns * other.columns)

    products = [[3, 5, 7, 2], [2, 3, 5, 1]]  # of an image
    for train, passes in ((False, 1), (True, 3)):
        done = []
        job = SimpleNamespace(products=products, batch_size=4, batches=6, lead=0, train=train)
        work, images = worker.products(job, lambda m, n: Matrix(rows=m, columns=n))
        work()
        assert images == 4 and sum(done) == 24 * passes * (2 * 3 * 5 * 7 + 2 * 3 * 5)


def test_a_turn_is_the_mean_of_steps_in_a_row_after_those_that_do_not_count(monkeypatch):
    seconds = [9.0, 8.0, 1.0, 2.0, 6.0]  # of each step
    done = []
    monkeypatch.setattr(worker.time, "perf_counter", lambda: sum(seconds[: len(done)]))
    work, images = worker.in_a_row(SimpleNamespace(lead=2, batches=3, batch_size=4), done.append)
    assert work() == {"seconds": 3.0} and images == 4 and done == [0, 1, 2, 3, 4]


def test_a_peer_that_ends_or_is_no_program_is_one_sentence():
    with pytest.raises(Failed, match=r"peer has ended \(exit status 3\)"):
        Worker("peer", [sys.executable, "-c", "import sys; sys.exit(3)"], os.environ).ask()
    with pytest.raises(UserError, match="/gone/python cannot be started: No such file"):
        Worker("peer", ["/gone/python"], os.environ)


def test_images_are_parts_of_real_photographs(tmp_path):
    paths = make_images(tmp_path, 4)
    pixels = [np.asarray(Image.open(path)) for path in paths]
    assert all(image.shape == (375, 500, 3) for image in pixels)
    assert all(Image.open(path).format == "JPEG" for path in paths)
    assert len({image.tobytes() for image in pixels}) == 4
    assert min(image.std() for image in pixels) > 20  # neither noise's lack nor a blank


def test_starts_are_measured_for_real(tmp_path):
    path = tmp_path / "start.json"
    run_tool(benchmark, "start", "-repetitions", "1", "-warmup", "0", "-json", path).check()
    (table,) = json.loads(path.read_text())["results"]
    rows = {row["name"]: row for row in table["rows"]}
    assert next(iter(rows)) == "main_multi_gpu.py -eval -h"
    assert all(len(row["seconds"]) == 1 for row in rows.values())
    assert set(rows) >= {"import gmlp, with Paddle", "limit: Python alone"}


ONE, TWO = (f"ours, {ranks} rank(s) of 1 thread(s)" for ranks in (1, 2))
PRODUCTS = "limit: matrix products, Paddle"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "tables"),
    [
        (
            ["loader", "-images", 4, "-num_workers", 1, "-batches", 1],
            [["ours", "limit: JPEG decoder"], ["ours"]] * 2,
        ),
        (
            ["eval", "-engines", "bfloat16", "layers", "float32"],
            [["ours, layers", "ours, float32", PRODUCTS], ["ours, bfloat16"]],
        ),
        (["train", "-threads", 2, "-ranks", 1], [["ours, 1 rank(s) of 2 thread(s)", PRODUCTS]]),
        (["train", "-threads", 1, "-ranks", 2, 1, 2], [[ONE, TWO, PRODUCTS], [ONE, TWO]]),
        (
            ["train", "-threads", 4],
            [
                ["ours, 1 rank(s) of 4 thread(s)", "ours, 2 rank(s) of 2 thread(s)", PRODUCTS],
                [ONE, TWO],
            ],
        ),
    ],
)
def test_every_part_runs_on_the_digits_model(args, tables, tmp_path):
    path = tmp_path / "result.json"
    turns = ["-repetitions", "1", "-warmup", "0", "-batch_size", "2", "-cfg", CONFIG]
    run_tool(benchmark, *args, *turns, "-json", path).check()
    results = json.loads(path.read_text())["results"]
    assert [[row["name"] for row in table["rows"]] for table in results] == tables
    assert all(row["images_per_second"] > 0 for table in results for row in table["rows"])


@pytest.mark.slow
def test_memory_is_that_of_the_list_and_of_a_step(tmp_path):
    path = tmp_path / "result.json"
    lines = 10 * 1024
    args = ["memory", "-cfg", CONFIG, "-batch_size", 2, "-lines", lines, "-num_workers", 1]
    run_tool(benchmark, *args, "-json", path).check()
    (listed,), steps = (table["rows"] for table in json.loads(path.read_text())["results"])
    # 40 to 45 bytes of path, and three numbers, a line; the system counts in pages.
    assert 40 * lines < listed["added"] < 1000 * lines
    assert listed["late_growth"] <= listed["growth"] < 50e6
    names = ["ours", "ours, not keeping it", "ours, recomputing"]
    assert [row["name"] for row in steps] == names
    assert all(row["added"] > 0 for row in steps)


@pytest.mark.slow
def test_a_plan_counts_the_model_and_is_checked_on_this_cpu(tmp_path):
    path = tmp_path / "result.json"
    options = ["-loader_rate", 300, "-devices", 1, 9, "-cfg", CONFIG, "-json", path]
    result = run_tool(benchmark, "plan", *options).check()
    one, nine = json.loads(path.read_text())["results"][0]["rows"]
    assert (one["batch_size"], one["accum_iter"], nine["batch_size"]) == (32, 2, 7)
    assert "9" in result.out and "63" in result.out.split()  # 9 x 7 images a step, not 64
    check = ["-check", "-cfg", CONFIG, "-repetitions", 1, "-json", path]
    result = run_tool(benchmark, "plan", *check).check()
    rows = json.loads(path.read_text())["results"][0]["rows"]
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert [row["ranks"] for row in rows] == [1, 2] and "beside another rank" in result.out


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_too(tmp_path):
    path = tmp_path / "result.json"
    args = ["eval", "-cfg", CONFIG, "-repetitions", "100000", "-batch_size", "2", "-json", path]
    process = subprocess.Popen(
        [sys.executable, TOOL, *map(str, args)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("cpu ")
    deadline = time.monotonic() + 60
    while not (children := _children(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert not any(os.path.exists(f"/proc/{child}") for child in children)
    assert os.listdir(tmp_path) == []


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


@pytest.mark.parametrize(
    ("model", "images", "device", "measured", "ratio"),
    [
        (S16, 256, planner.DEVICES["h100"], 1760, 0.92),  # docs/performance.md's table
        (S16_NORM, 256, planner.DEVICES["h100"], 2043, 1.07),
        (S16, 192, RTX_3090, 657.63, 0.61),  # timm's formulation, as published
        (B16, 96, RTX_3090, 275.97, 0.65),
    ],
)
def test_the_plan_is_near_what_was_measured_on_an_h100_and_slower_than_an_rtx_3090(
    model, images, device, measured, ratio
):
    seconds = sum(step_seconds(model, device, 1, images).values())
    assert images / seconds / measured == pytest.approx(ratio, abs=0.005)


def test_an_exchange_is_a_ring_in_each_host_then_one_between_hosts():
    device = Device(1, 1, 1, link=10, in_host=4, network=2, cores=8)
    assert exchange_seconds(1e9, 1, device) == 0
    assert exchange_seconds(1e9, 2, device) == pytest.approx(2 * (1 / 2) * 1 / 10)
    assert exchange_seconds(1e9, 4, device) == pytest.approx(2 * (3 / 4) * 1 / 10)
    assert exchange_seconds(1e9, 8, device) == pytest.approx(2 * (3 / 4) / 10 + 2 * (1 / 2) / 2)


def planned(devices, loader_rate=250, device="a100", **changes):
    """The plan of the S/16 recipe: 300 epochs, 4,096 images a step, 256 on a device."""
    model, config = {**S16, **changes}, get_config(S16_CONFIG)
    one = planner.plan(model, config, planner.DEVICES[device], devices, loader_rate, 1_281_167)
    return SimpleNamespace(**one)


def test_a_plan_keeps_the_recipes_batch_on_any_number_of_devices():
    for devices, batch in ((1, (256, 16)), (8, (256, 2)), (64, (64, 1)), (512, (8, 1))):
        one = planned(devices)
        assert (one.batch_size, one.accum_iter) == batch
        hours = 300 * 1_281_167 / one.images_per_second / 3600
        assert one.hours == pytest.approx(hours)
    assert planned(8).images_per_second == pytest.approx(8 * planned(1).images_per_second, rel=0.01)


def test_a_plan_names_the_bottleneck():
    assert planned(8).bottleneck == "memory traffic"
    slow = planned(8, loader_rate=10)
    assert slow.bottleneck == "loader"
    assert slow.images_per_second == pytest.approx(128 * 10)  # the host's cores
    assert slow.cores == pytest.approx(25 * planned(8).cores)  # what a device would need
    assert planned(512, device="rtx4090").bottleneck == "links"
    heavy = planned(1, multiply_adds=100 * S16["multiply_adds"])
    assert heavy.bottleneck == "matrix products"


def test_memory_is_state_and_what_passes_keep():
    model = {**S16, "kept_bytes_recompute": 15e6}
    state = 16 * S16["parameters"]
    memory = planner.memory_bytes
    assert memory(model, 0) == state
    assert memory(model, 10) == state + 10 * S16["kept_bytes"]
    assert memory(model, 10, recompute=True) == state + 10 * 15e6
    assert memory(model, 0, ema=True) == 20 * S16["parameters"]


def test_a_batch_that_devices_cannot_share_evenly_is_the_nearest():
    for devices, images in ((9, 9 * 228 * 2), (5000, 5000), (4096, 4096)):
        one = planned(devices)
        assert one.images_per_step == one.devices * one.batch_size * one.accum_iter == images


def test_a_measured_step_tells_the_bandwidth():
    for devices in (1, 4):
        seconds = sum(step_seconds(S16, RTX_3090, devices, 8).values())
        device = RTX_3090._replace(bandwidth=5)
        device = planner.with_bandwidth(device, S16, devices, 8, seconds)
        assert device.bandwidth == pytest.approx(RTX_3090.bandwidth)


def test_recomputation_repeats_the_forward_pass():
    plain, again = (planner.traffic_bytes(S16, 10, recompute) for recompute in (False, True))
    assert again - plain == 10 * S16["forward_bytes"]
    plain, again = (step_seconds(S16, RTX_3090, 1, 10, recompute) for recompute in (False, True))
    assert again["matrix products"] == pytest.approx(4 / 3 * plain["matrix products"])


@pytest.mark.parametrize(
    ("device", "keys", "amp"),
    [
        ("a100", {}, ("bfloat16", True)),
        ("v100", {}, ("float16", False)),
        ("a100", {"AMP_DTYPE": "float16", "AMP_LAYER_NORM": "amp"}, ("float16", True)),
        ("a100", {"AMP_LAYER_NORM": "float32"}, ("bfloat16", False)),
    ],
)
def test_a_plan_is_of_the_recipes_mixed_precision_on_the_device(device, keys, amp):
    config = get_config(S16_CONFIG)
    for key, value in keys.items():
        setattr(config, key, value)
    assert planner.recipe_amp(config, planner.DEVICES[device]) == amp


@pytest.mark.skipif(
    "linear_v2" not in white_list()["bfloat16"]["O1"],
    reason="this Paddle's nn.Linear has other rules under AMP",
)
def test_the_counted_facts_fit_together():
    config = get_config(S16_CONFIG)
    config.MODEL.DROPPATH = 0.0
    counted = facts(config, Amp("bfloat16", layer_norm=True))
    assert {key: counted[key] for key in S16} == S16_NORM
    assert len(counted["products"]) < 10  # of as many kinds; blocks are alike
    products = sum(m * k * n * times for m, k, n, times in counted["products"])
    assert products == counted["multiply_adds"]
    # What recomputation keeps: what is outside of blocks, all their inputs, and one block.
    config.MODEL.MIXER.DEPTH = 1
    one = facts(config, Amp("bfloat16", layer_norm=True))
    block_inputs = 30 * 4 * 196 * 256
    assert counted["kept_bytes_recompute"] == one["kept_bytes"] + block_inputs
