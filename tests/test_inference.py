"""Evaluation by Paddle Inference: the model's numbers, and when it is used."""

import contextlib
import ctypes
import json
import os
import types
from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import paddle
import pytest
from program import CONFIG, SMALL, flatten, run_as_rank, run_program

from training import inference
from training.inference import CompiledModel, can_compile

IS_PADDLE_3 = paddle.__version__.startswith("3.")
needs_engine = pytest.mark.skipif(not IS_PADDLE_3, reason="Paddle 2.6 cannot")


def test_paddle_3_can_do_it_on_a_cpu():
    assert can_compile() == IS_PADDLE_3


@needs_engine
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_compiled_model_gives_timms_logits_for_any_batch(dtype, tolerance):
    expected = golden.load("tiny")["logits_float64"]
    images = golden.draw_images(32)
    compiled = CompiledModel(golden.build("tiny"), [3, 32, 32], dtype)
    compiled.eval()
    for count in (2, 1, 2):
        logits = compiled(paddle.to_tensor(images[:count]))
        assert isinstance(logits, paddle.Tensor) and logits.dtype == paddle.float32
        assert np.abs(logits.numpy() - expected[:count]).max() < tolerance * np.abs(expected).max()


@needs_engine
def test_it_keeps_the_weights_that_it_was_made_with():
    model, images = golden.build("tiny"), paddle.to_tensor(golden.draw_images(32))
    compiled = CompiledModel(model, [3, 32, 32])
    before = compiled(images).numpy()
    model.head.weight.set_value(model.head.weight * 0)
    assert np.array_equal(compiled(images).numpy(), before)


@needs_engine
@pytest.mark.parametrize("legacy", [True, False])
def test_a_gpus_wheel_gives_timms_logits_too(legacy, gpu_wheel, tmp_path, monkeypatch):
    if not legacy:  # a program that others have saved, with linear_v2
        monkeypatch.setattr(inference, "_legacy_linear", contextlib.nullcontext)
    spec = paddle.static.InputSpec([None, 3, 32, 32], "float32", "images")
    program = inference.save(golden.build("tiny"), spec, str(tmp_path), "model")
    assert ("linear_v2" in Path(program).read_text()) != legacy
    for count in (2, 1):
        logits = inference.load(program)(golden.draw_images(32)[:count])
        assert np.abs(logits - golden.load("tiny")["logits_float64"][:count]).max() < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.pdiparams"]
    assert not any(paddle.get_flags("FLAGS_use_legacy_linear").values())


@needs_engine
def test_it_leaves_the_process_its_threads(monkeypatch):
    (library,) = Path(paddle.__file__).parent.glob("libs/libiomp5*")
    threads_of = ctypes.CDLL(str(library)).omp_get_max_threads
    before = threads_of()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    try:
        compiled = CompiledModel(golden.build("tiny"), [3, 32, 32])
        compiled(paddle.to_tensor(golden.draw_images(32)))
        assert threads_of() == 3
    finally:
        paddle.base.core.set_num_threads(before)
    assert threads_of() == before


@pytest.mark.parametrize("more, compiles", [(0, False), (1, True)])
def test_it_is_worth_it_by_the_images_of_a_rank(monkeypatch, more, compiles):
    monkeypatch.setattr(inference, "can_compile", lambda: True)
    monkeypatch.setattr(inference, "CompiledModel", lambda *args: "compiled")
    config = SimpleNamespace(CPU_INFERENCE="auto")
    images, log = 1000 + more, SimpleNamespace(info=lambda text: None)
    model = golden.build("tiny")
    for on_gpu in (False, True):
        chosen = inference.choose_model(model, config, images, log, on_gpu)
        assert chosen == ("compiled" if compiles and not on_gpu else model)


def scores_of(output):
    (path,) = output.glob("eval-*/eval.json")
    return json.loads(path.read_text())


def evaluate(data, weights, output, kind, ranks=1):
    return run_program(
        "-data_path", data, "-output", output, "-eval", "-pretrained", weights, "-nprocs", ranks,
        opts={**SMALL, "CPU_INFERENCE": kind},
    ).check()  # fmt: skip


@needs_engine
@pytest.mark.parametrize("kind, ranks, tolerance", [("float32", 2, 1e-6), ("bfloat16", 1, 2e-2)])
def test_evaluation_gives_the_layers_scores(trained, few_digits, tmp_path, kind, ranks, tolerance):
    weights, scores = trained / "best_weights.pdparams", {}
    for each in ("layers", kind):
        result = evaluate(few_digits, weights, tmp_path / each, each, ranks)
        said = f"Paddle Inference computes the evaluation in {kind}" in result.out
        assert said == (each == kind)
        assert "OneDNN" not in result.out  # what C++ code prints for its developers
        scores[each] = scores_of(tmp_path / each)
    first, second = scores.values()
    assert first["images"] == second["images"] == 101
    assert second["loss"] == pytest.approx(first["loss"], abs=tolerance)
    if kind == "float32":
        assert (first["acc1"], first["acc5"]) == (second["acc1"], second["acc5"])


@pytest.mark.parametrize(
    "kind, worth, possible, words",
    [
        ("auto", 100, True, "computes the evaluation in float32 (CPU_INFERENCE auto)"),
        ("auto", 101, True, None),
        ("auto", 0, False, None),
        ("layers", 0, True, None),
        ("float32", 1000, True, "computes the evaluation in float32 (CPU_INFERENCE float32)"),
        (
            "bfloat16",
            0,
            False,
            "CPU_INFERENCE bfloat16 needs Paddle 3: evaluating with the model's layers",
        ),
    ],
)
def test_it_is_used_where_asked_for_or_worth_it(
    trained, few_digits, tmp_path, monkeypatch, kind, worth, possible, words
):
    made = []
    monkeypatch.setattr(inference, "_WORTH_COMPILING", worth)
    monkeypatch.setattr(inference, "can_compile", lambda: possible)
    monkeypatch.setattr(inference, "CompiledModel", lambda model, *args: made.append(args) or model)
    result = run_as_rank(
        "-data_path", few_digits, "-output", tmp_path, "-eval", "-cfg", CONFIG,
        "-pretrained", trained / "best_weights.pdparams",
        "-opts", *flatten({**SMALL, "CPU_INFERENCE": kind}),
    )  # fmt: skip
    assert result.status == 0 and scores_of(tmp_path)["images"] == 101
    assert len(made) == (words is not None and possible)
    log = "".join(path.read_text() for path in tmp_path.glob("eval-*/log.txt"))
    assert words in log if words else "Paddle Inference" not in log


@needs_engine
@pytest.mark.parametrize(
    "error, free, parts",
    [
        (PermissionError(13, "Permission denied", "/.cache"), 1 << 40, ["/.cache", "set HOME"]),
        (RuntimeError("Cannot read tensor desc size"), 65536, ["64 KB free", "set TMPDIR"]),
        (RuntimeError("another reason"), 1 << 40, ["another reason"]),
    ],
)
@pytest.mark.parametrize("kind", ["auto", "float32"])
def test_where_it_cannot_start_the_layers_evaluate_with_a_word(
    trained, few_digits, tmp_path, monkeypatch, error, free, parts, kind
):
    def fail(*args):
        raise error

    usage = types.SimpleNamespace(free=free)
    monkeypatch.setattr(inference, "_WORTH_COMPILING", 0)
    monkeypatch.setattr(inference.paddle.jit, "save", lambda *args, **kwargs: fail())
    monkeypatch.setattr(inference.shutil, "disk_usage", lambda path: usage)
    result = run_as_rank(
        "-data_path", few_digits, "-output", tmp_path, "-eval",
        "-pretrained", trained / "best_weights.pdparams",
        "-opts", *flatten({**SMALL, "CPU_INFERENCE": kind}),
    ).check()  # fmt: skip
    assert scores_of(tmp_path)["images"] == 101
    for part in ("evaluating with the model's layers", *parts):
        assert part in result.out


def test_a_program_that_does_not_fit_on_the_disk_is_told(tmp_path, monkeypatch):
    def cut_off(model, path, input_spec):
        save(model, path, input_spec)
        weights = f"{path}.pdiparams"
        os.truncate(weights, os.path.getsize(weights) // 2)

    save = paddle.jit.save
    monkeypatch.setattr(paddle.jit, "save", cut_off)
    spec = paddle.static.InputSpec([None, 4])
    with pytest.raises(OSError, match="No space left on device"):
        inference.save(paddle.nn.Linear(4, 100), spec, str(tmp_path), "model")
