"""What test_gpu.py found, as a block to paste into a report: yes or no to each claim, and numbers.

A claim is a test's name.  It is asked of a device by the tests whose parameters name that device;
their numbers are what they gave to pytest's record_property.
"""

import contextlib
import os
import platform
import subprocess
import time

import devices
import numpy as np
import paddle

from training.run import git_revision

CHECK = "test_gpu.py"
_FLAGS = ("FLAGS_cudnn_deterministic", "FLAGS_use_legacy_linear", "FLAGS_allocator_strategy")


def print_report(terminalreporter, exitstatus, config):
    """pytest's hook pytest_terminal_summary: prints the block where the check was asked for."""
    reports = [
        report
        for kind in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(kind, [])
        if CHECK in report.nodeid
    ]
    device = "gpu" if any(_ran_on(report, "gpu") for report in reports) else "cpu"
    if reports and (device == "gpu" or any(CHECK in str(word) for word in config.args)):
        lines = [*describe_machine(device), *describe_claims(reports, device)]
        terminalreporter.write_line("\n".join(["", "-" * 80, *lines, "-" * 80]))


def describe_claims(reports, device):
    """Lines with yes, no or "not asked" for each claim, in the file's order, and its numbers.

    On a CPU nothing is asked: a line says how the claim's logic went there, without numbers, which
    would be of small models and of stand-ins.

    Args:
        reports: pytest's TestReports.
        device: "cpu" or "gpu", whose tests count.
    """
    claims = {}
    for report in sorted(reports, key=lambda report: report.location[1]):
        name, parameters = _split(report)
        if device in parameters:
            others = ", ".join(word for word in parameters if word != device)
            claims.setdefault(name, []).append((others, report))
    for name, answers in claims.items():
        answer = _answer(answers)
        if device == "cpu":
            answer = f"not asked (its logic on the CPU: {answer})"
        yield f"{answer}: {name.removeprefix('test_').replace('_', ' ')}"
        for others, report in answers:
            numbers = report.user_properties if device == "gpu" else []
            parts = [f"{key} {value}" for key, value in numbers]
            parts += [_reason(report)] if report.outcome != "passed" else []
            if parts:
                yield f"    {others + ': ' if others else ''}{'; '.join(parts)}"


def _answer(answers):
    outcomes = [report.outcome for _, report in answers]
    if "failed" in outcomes:
        return "no"
    return "yes" if "passed" in outcomes else "not asked"


def _reason(report):
    """Why a test was skipped, or the first line of its error."""
    if report.outcome == "skipped":
        reason = report.longrepr[2].removeprefix("Skipped: ")
        return f"not asked, as {reason}"
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip().split("\n")[0][:200]


def _split(report):
    """(a test's name, its parameters' values) as in its id."""
    name, _, parameters = report.nodeid.split("::")[-1].partition("[")
    return name, parameters.rstrip("]").split("-")


def _ran_on(report, device):
    return device in _split(report)[1] and report.outcome != "skipped"


def describe_machine(device):
    """Lines on what the claims were asked of."""
    what = "on a GPU" if device == "gpu" else "of no GPU: this block need not be sent"
    yield f"GPU check of {time.strftime('%Y-%m-%d')}, {what}; revision {git_revision()}"
    if device == "gpu":
        with devices.show_gpus():
            yield _describe_gpu()
    else:
        yield f"nothing was asked of a GPU: {devices.why_no_gpu() or 'its tests were not run'}"
    cuda = paddle.version
    nccl = cuda.nccl() if hasattr(cuda, "nccl") else "unknown"  # Paddle 2.6
    yield (
        f"paddle {paddle.__version__}, CUDA {cuda.cuda()}, cuDNN {cuda.cudnn()} "
        f"(found {paddle.get_cudnn_version()}), NCCL {nccl}"
    )
    yield f"python {platform.python_version()}, numpy {np.__version__}, {platform.platform()}"
    yield "here (programs have the key DETERMINISTIC): " + ", ".join(
        f"{name} {_flag(name)}" for name in _FLAGS
    )
    names = [name for name in sorted(os.environ) if name.startswith(("NCCL_", "CUBLAS_", "FLAGS_"))]
    variables = {name: os.environ[name] for name in names}
    variables["NVIDIA_TF32_OVERRIDE"] = f"{os.environ['NVIDIA_TF32_OVERRIDE']} (unset in programs)"
    yield ", ".join(f"{name}={value}" for name, value in variables.items())


def _describe_gpu():
    try:
        properties = paddle.device.cuda.get_device_properties()
        capability = "{}.{}".format(*paddle.device.cuda.get_device_capability())
    except Exception as error:  # the rest of the block is worth having
        return f"{devices.GPUS} GPU(s): {error}"
    return (
        f"{devices.GPUS} x {properties.name}, compute capability {capability}, "
        f"{properties.total_memory / 1e9:.0f} GB, "
        f"driver {' '.join(query('driver_version')[:1]) or 'unknown'}"
    )


def _flag(name):
    try:
        return paddle.get_flags(name)[name]
    except ValueError:
        return "unknown to this Paddle"


def query(field):
    """What nvidia-smi says of each GPU for a field of --query-gpu; [] where it says nothing."""
    return _nvidia_smi(f"--query-gpu={field}", "--format=csv,noheader,nounits")


def list_gpus():
    """A line for each GPU that nvidia-smi lists."""
    return [line for line in _nvidia_smi("-L") if line.startswith("GPU ")]


def used_memory():
    """MB of all GPUs that are in use, by any process; None where nvidia-smi does not say."""
    with contextlib.suppress(ValueError):  # "[N/A]"
        return sum(int(text) for text in query("memory.used")) or None
    return None


def _nvidia_smi(*words):
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.splitlines()
    return []
