"""Paddle Inference on a CPU: a saved program as a function, a model behind its own call.

    model = CompiledModel(model, image_shape=[3, 224, 224])
    logits = model(images)  # as before: [batch, 3, 224, 224] -> [batch, classes]

It fuses what the layers compute one by one, and uses oneDNN.  Logits are within 1e-4 of the layers'
(in bfloat16 within some percent); docs/performance.md has the speeds.
"""

import contextlib
import errno
import os
import shutil
import tempfile

import paddle

from ranks.host import quiet, threads
from utils import cause

_WORTH_COMPILING = 1000  # images per rank; compiling an S/16 takes the time that it saves on 200


def choose_model(model, config, images, log, on_gpu):
    """What computes an evaluation: the model itself, or on a CPU what CPU_INFERENCE says.

    Args:
        model: a GMLP with its weights.
        config: the merged config.
        images: how many each rank evaluates.
        log: a logging.Logger, or what has its info() and warning().
        on_gpu: whether the model is on a GPU.
    """
    kind = config.CPU_INFERENCE
    if on_gpu or kind == "layers" or (kind == "auto" and images <= _WORTH_COMPILING):
        return model
    if not can_compile():
        if kind != "auto":
            log.warning(f"CPU_INFERENCE {kind} needs Paddle 3: evaluating with the model's layers")
        return model
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    if dtype == "bfloat16" and not paddle.base.core.supports_bfloat16():
        log.warning("CPU_INFERENCE bfloat16: this CPU has no bfloat16 instructions: using float32")
        dtype = "float32"
    log.info(f"Paddle Inference computes the evaluation in {dtype} (CPU_INFERENCE {kind})")
    sizes = model.sizes
    shape = [sizes.in_channels, sizes.image_size, sizes.image_size]
    try:
        return CompiledModel(model, shape, dtype)
    except Exception as error:
        log.warning(
            "evaluating with the model's layers, which takes longer, as Paddle Inference cannot "
            f"start: {explain(error, model)}"
        )
        return model


def explain(error, model):
    """Why a model could not be compiled, with the cure: it takes two folders to write in."""
    path = getattr(error, "filename", None)
    if path and ".cache" in os.fspath(path):  # where paddle.jit keeps the code that it writes
        return f"{path} cannot be made ({cause(error)}): set HOME to a folder that can be written"
    needed = _weights_size(model) + (1 << 20)
    try:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
    except OSError as no_folder:
        return f"{cause(no_folder)}: set TMPDIR to a folder that can be written"
    if free < needed:
        return (
            f"{folder} has {free >> 10:,} KB free and it takes {needed >> 10:,}: set TMPDIR to a "
            "folder with more room"
        )
    return cause(error)


def can_compile():
    """Whether it runs the model with oneDNN here: Paddle 2.6.2's GPU wheel crashes."""
    return paddle.get_device() == "cpu" and not paddle.__version__.startswith("2.")


class CompiledModel:
    """A model in evaluation mode, which Paddle Inference computes.

    Args:
        model: a Layer from images to one Tensor; its weights as they are now.
        image_shape: of one image, without the batch.
        dtype: "float32", or "bfloat16" for the layers that oneDNN has in it.
    """

    def __init__(self, model, image_shape, dtype="float32"):
        model.eval()
        spec = paddle.static.InputSpec([None, *image_shape], "float32", "images")
        with quiet(), tempfile.TemporaryDirectory() as folder:
            self._run = load(save(model, spec, folder, "model"), dtype)
            self(paddle.zeros([1, *image_shape]))  # the first call prepares the program: now

    def __call__(self, images):
        return paddle.to_tensor(self._run(images.numpy()))

    def eval(self):
        """Does nothing: it cannot be in another mode."""


def save(model, spec, folder, name):
    """Writes a model as a program for Paddle Inference and for paddle2onnx.  Returns its path.

    Args:
        model: a Layer of one input and one output.
        spec: a paddle.static.InputSpec of its input.
        folder: where to write; nothing is written elsewhere.
        name: of the files, without their suffixes.

    Raises:
        OSError: there is no room for them.
    """
    path = os.path.join(folder, name)
    with _home_in(folder), _legacy_linear():
        paddle.jit.save(model, path, input_spec=[spec])
    if os.path.getsize(f"{path}.pdiparams") < _weights_size(model):  # Paddle says nothing of it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{path}.pdiparams")
    # Paddle 2.6 has another suffix.
    return next(path + suffix for suffix in (".json", ".pdmodel") if os.path.exists(path + suffix))


def _weights_size(model):
    """Bytes of a model's weights in float32."""
    return 4 * sum(int(param.size) for param in model.parameters())


@contextlib.contextmanager
def _home_in(folder):
    """A HOME in a folder: Paddle writes what it compiles below it, and not everybody has one."""
    before = os.environ.get("HOME")
    os.environ["HOME"] = home = tempfile.mkdtemp(dir=folder)
    try:
        yield
    finally:
        shutil.rmtree(home, ignore_errors=True)
        del os.environ["HOME"]
        if before is not None:
            os.environ["HOME"] = before


@contextlib.contextmanager
def _legacy_linear():
    """F.linear as matmul and add in programs, as a CPU wheel has it.

    A GPU wheel has linear_v2 (Paddle PR 77039), at which paddle2onnx 2.1.0 aborts the process.
    """
    try:
        before = paddle.get_flags("FLAGS_use_legacy_linear")
    except ValueError:  # before Paddle 3.3.1
        before = {}
    try:
        paddle.set_flags(dict.fromkeys(before, True))
        yield
    finally:
        paddle.set_flags(before)


def load(program, dtype="float32"):
    """A function that Paddle Inference computes, from input array to output array.

    Args:
        program: path of a program with one input and one output; its weights are beside it.
        dtype: see CompiledModel.
    """
    from paddle import inference

    options = inference.Config(program, os.path.splitext(program)[0] + ".pdiparams")
    options.disable_gpu()
    options.disable_glog_info()
    if can_compile():
        options.enable_mkldnn()  # oneDNN's former name
        options.set_cpu_math_library_num_threads(threads())
    if dtype == "bfloat16":
        options.enable_mkldnn_bfloat16()
    predictor = inference.create_predictor(options)
    (input_name,), (output_name,) = predictor.get_input_names(), predictor.get_output_names()

    def run(array):
        predictor.get_input_handle(input_name).copy_from_cpu(array)
        predictor.run()
        # run() leaves the process one thread: give Paddle its threads back.
        paddle.base.core.set_num_threads(threads())
        return predictor.get_output_handle(output_name).copy_to_cpu()

    return run
