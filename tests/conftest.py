"""Fixtures and paths that several test files use."""

import contextlib
import errno
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from program import SMALL, run_program  # noqa: E402

from ranks.host import prepare_cpu  # noqa: E402
from ranks.report import REPORT_PIPE  # noqa: E402

prepare_cpu(ranks=int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))  # before Paddle's import

import devices  # noqa: E402, which imports Paddle
import gpu_report  # noqa: E402
import paddle  # noqa: E402

devices.hide_gpus()
pytest_terminal_summary = gpu_report.print_report


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The demo's data set: 4,000 real digits to train, 1,000 to validate."""
    from demo.make_digits import make_digits

    root = tmp_path_factory.mktemp("data") / "all digits"  # a space, as users' folders have
    make_digits(root)
    return root


@pytest.fixture(scope="session")
def few_digits(digits, tmp_path_factory):
    """A part of the digits: 203 to train, 101 to validate (no multiples of any batch size)."""
    root = tmp_path_factory.mktemp("data") / "few digits"
    root.mkdir()
    for name, count in (("train", 203), ("val", 101)):
        (root / name).symlink_to(digits / name)
        lines = (digits / f"{name}_list.txt").read_text().splitlines(keepends=True)
        every = len(lines) // count
        (root / f"{name}_list.txt").write_text("".join(lines[: every * count : every]))
    return root


@pytest.fixture(scope="session")
def trained(few_digits, tmp_path_factory):
    """The folder of one finished two-rank run of two epochs, with all randomness and EMA on."""
    output = tmp_path_factory.mktemp("trained")
    run_program("-data_path", few_digits, "-output", output, "-nprocs", 2, opts=SMALL).check()
    (folder,) = output.glob("train-*")
    return folder


@pytest.fixture(params=["cpu", "gpu"])
def device(request):
    """A devices.Device, on which this process computes; without a GPU that one is skipped."""
    if request.param == "cpu":
        if devices.GPUS:
            pytest.skip("the GPU is asked instead")
        yield devices.CPU
    elif devices.why_no_gpu():
        pytest.skip(devices.why_no_gpu())
    else:
        with devices.show_gpus():
            yield devices.GPU


@pytest.fixture
def gpu_wheel(monkeypatch):
    """Has Paddle take the operators of a wheel with CUDA, on the CPU (F.linear is linear_v2)."""
    try:
        paddle.get_flags("FLAGS_use_legacy_linear")
    except ValueError:
        pytest.skip("this Paddle has one F.linear for all devices")
    with contextlib.suppress(ImportError, ValueError):
        import paddle2onnx  # noqa: F401, which looks for another wheel's name under CUDA
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    # Pinned memory is what a CPU wheel cannot even name.
    program_translator = sys.modules["paddle.jit.dy2static.program_translator"]
    name = "cuda_pinned_tensors_move_to_excepted_place"
    monkeypatch.setattr(program_translator, name, lambda inputs: None)


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; those of a launcher and CUDA_VISIBLE_DEVICES are unset before."""
    for name in list(os.environ):
        if name.startswith("PADDLE_") or name in ("CUDA_VISIBLE_DEVICES", REPORT_PIPE):
            monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.fixture
def unreadable(monkeypatch):
    """Has a folder refuse to be read, by root too."""
    scandir, refused = os.scandir, {}

    def refuse(path="."):
        if str(path) in refused:
            number = refused[str(path)]
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return lambda path, number=errno.EACCES: refused.update({str(path): number})
