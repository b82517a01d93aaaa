"""The block that the GPU check prints, made of made-up results; and the names that it calls."""

import ast
import contextlib
import functools
from types import SimpleNamespace

import devices
import gpu_report
import paddle
import pytest
from program import ROOT


def report(name, line, outcome="passed", why=None, **numbers):
    """A pytest.TestReport of a test of test_gpu.py."""
    longrepr = None
    if outcome == "skipped":
        longrepr = ("tests/conftest.py", 1, f"Skipped: {why}")
    elif outcome == "failed":
        longrepr = SimpleNamespace(reprcrash=SimpleNamespace(message=f"{why}\nassert 1 < 0"))
    return pytest.TestReport(
        f"tests/test_gpu.py::{name}", ("tests/test_gpu.py", line, name), {}, outcome, longrepr,
        "call", user_properties=list(numbers.items()),
    )  # fmt: skip


RESULTS = [
    report("test_b_is_so[gpu-float16]", 9, "failed", "AssertionError: it is off", gap=2),
    report("test_b_is_so[gpu-float32]", 9, gap=1, of="x"),
    report("test_b_is_so[cpu-float32]", 9, gap=0),
    report("test_a_gpu_works[cpu]", 3),
    report("test_a_gpu_works[gpu]", 3, seconds=5),
    report("test_c_needs_two[gpu-1]", 20, "skipped", "there is one GPU"),
    report("test_c_needs_two[cpu-1]", 20),
    report("test_d_has_types[gpu-bfloat16]", 30, "skipped", "this GPU has no bfloat16"),
    report("test_d_has_types[gpu-float16]", 30),
    report("test_of_no_device", 40),
]


def test_each_claim_has_yes_no_or_why_it_was_not_asked_and_its_numbers():
    assert list(gpu_report.describe_claims(RESULTS, "gpu")) == [
        "yes: a gpu works",
        "    seconds 5",
        "no: b is so",
        "    float16: gap 2; AssertionError: it is off",
        "    float32: gap 1; of x",
        "not asked: c needs two",
        "    1: not asked, as there is one GPU",
        "yes: d has types",
        "    bfloat16: not asked, as this GPU has no bfloat16",
    ]


def test_on_a_cpu_no_claim_is_said_to_be_answered_and_no_number_stands_there():
    failed = report("test_e_fails[cpu]", 50, "failed", "AssertionError: it is off", gap=3)
    skipped = report("test_f_is_left_out[cpu]", 60, "skipped", "this Paddle has none")
    assert list(gpu_report.describe_claims([*RESULTS, failed, skipped], "cpu")) == [
        "not asked (its logic on the CPU: yes): a gpu works",
        "not asked (its logic on the CPU: yes): b is so",
        "not asked (its logic on the CPU: yes): c needs two",
        "not asked (its logic on the CPU: no): e fails",
        "    AssertionError: it is off",
        "not asked (its logic on the CPU: not asked): f is left out",
        "    not asked, as this Paddle has none",
    ]


def printed(results, *args):
    """What the hook prints at the end of a session with these results and arguments."""
    stats, lines = {}, []
    for each in results:
        stats.setdefault(each.outcome, []).append(each)
    reporter = SimpleNamespace(stats=stats, write_line=lines.append)
    gpu_report.print_report(reporter, 0, SimpleNamespace(args=list(args)))
    return "".join(lines)


def test_the_block_comes_where_the_check_is_asked_for_and_not_in_a_whole_suite_on_a_cpu(
    monkeypatch,
):
    monkeypatch.setattr(gpu_report, "describe_machine", lambda device: [f"asked of a {device}"])
    on_cpu = [each for each in RESULTS if "gpu]" not in each.nodeid and "[gpu" not in each.nodeid]
    skipped = report("test_a_gpu_works[gpu]", 3, "skipped", "Paddle finds no GPU")
    assert printed([*on_cpu, skipped], "tests") == printed([], "tests/test_gpu.py") == ""
    block = printed([*on_cpu, skipped], "/x/tests/test_gpu.py::test_a").strip().split("\n")
    assert block[0] == block[-1] == 80 * "-" and block[1] == "asked of a cpu"
    assert block[2] == "not asked (its logic on the CPU: yes): a gpu works"
    assert "asked of a gpu\nyes: a gpu works" in printed(RESULTS, "tests")


def test_the_machine_is_described_without_a_gpu_too(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setattr(gpu_report, "git_revision", lambda: "abc")
    text = "\n".join(gpu_report.describe_machine("cpu"))
    assert "of no GPU: this block need not be sent" in text.split("\n")[0]
    parts = ["revision abc", f"paddle {paddle.__version__}", "CUDA ", "cuDNN ", "NCCL ", "python "]
    parts += ["of a GPU: ", "NCCL_SOCKET_IFNAME=eth7", "NVIDIA_TF32_OVERRIDE=0 (unset in programs)"]
    for part in [*parts, "FLAGS_cudnn_deterministic "]:
        assert part in text


def test_a_gpu_that_does_not_answer_costs_one_line_of_the_block(monkeypatch):
    def fail():
        raise OSError("no answer")

    monkeypatch.setattr(devices, "show_gpus", contextlib.nullcontext)
    monkeypatch.setattr(devices, "GPUS", 2)
    monkeypatch.setattr(paddle.device.cuda, "get_device_properties", fail)
    header, gpus, *_ = gpu_report.describe_machine("gpu")
    assert gpus == "2 GPU(s): no answer" and "on a GPU; revision" in header
    card = SimpleNamespace(name="NVIDIA H100", total_memory=85e9)
    monkeypatch.setattr(paddle.device.cuda, "get_device_properties", lambda: card)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_report, "query", lambda field: ["550.54"] * 2)
    assert list(gpu_report.describe_machine("gpu"))[1] == (
        "2 x NVIDIA H100, compute capability 9.0, 85 GB, driver 550.54"
    )


def test_what_nvidia_smi_does_not_say_is_none(monkeypatch):
    answers = ["512", "[N/A]"]
    monkeypatch.setattr(gpu_report, "_nvidia_smi", lambda *words: answers)
    assert gpu_report.used_memory() is None
    answers[1] = "4"
    assert gpu_report.used_memory() == 516
    answers.clear()
    assert gpu_report.used_memory() is None


def names_of_paddle(path):
    """The names that a file has of Paddle, such as "device.cuda.device_count"."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if names and isinstance(node, ast.Name) and node.id == "paddle":
            yield ".".join(reversed(names))


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="on GPUs Paddle 3 is supported")
def test_paddle_has_all_names_that_a_gpu_may_be_the_first_to_reach():
    paths = [ROOT / "tests" / f"{name}.py" for name in ("test_gpu", "gpu_report", "devices")]
    paths += [*(ROOT / "training").glob("*.py"), *(ROOT / "ranks").glob("*.py")]
    names = {name for path in paths for name in names_of_paddle(path)}
    assert "device.cuda.max_memory_allocated" in names
    missing = object()
    for name in names:
        found = functools.reduce(lambda p, n: getattr(p, n, missing), name.split("."), paddle)
        assert found is not missing, name
