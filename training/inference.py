"""Paddle Inference on a CPU: a saved program as a function, a model behind its own call.

    model = CompiledModel(model, image_shape=[3, 224, 224])
    logits = model(images)  # as before: [batch, 3, 224, 224] -> [batch, classes]

It fuses what the layers compute one by one, and uses oneDNN.  Logits are within 1e-4 of the layers'
(in bfloat16 within some percent); docs/performance.md has the speeds.
"""

import os
import tempfile

import paddle

from ranks.host import quiet, threads

_WORTH_COMPILING = 1000  # images per rank; compiling an S/16 takes the time that it saves on 200


def choose_model(run):
    """What computes an evaluation: the run's model, or on a CPU what CPU_INFERENCE says."""
    kind, images = run.config.CPU_INFERENCE, len(run.val_data) // run.world_size
    if run.on_gpu or kind == "layers" or (kind == "auto" and images <= _WORTH_COMPILING):
        return run.model
    if not can_compile():
        if kind != "auto":
            run.log.warning(
                f"CPU_INFERENCE {kind} needs Paddle 3: evaluating with the model's layers"
            )
        return run.model
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    if dtype == "bfloat16" and not paddle.base.core.supports_bfloat16():
        run.log.warning(
            "CPU_INFERENCE bfloat16: this CPU has no bfloat16 instructions: using float32"
        )
        dtype = "float32"
    run.log.info(f"Paddle Inference computes the evaluation in {dtype} (CPU_INFERENCE {kind})")
    sizes = run.model.sizes
    return CompiledModel(run.model, [sizes.in_channels, sizes.image_size, sizes.image_size], dtype)


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
            paddle.jit.save(model, os.path.join(folder, "model"), input_spec=[spec])
            self._run = load(program_in(folder, "model"), dtype)
            self(paddle.zeros([1, *image_shape]))  # the first call prepares the program: now

    def __call__(self, images):
        return paddle.to_tensor(self._run(images.numpy()))

    def eval(self):
        """Does nothing: it cannot be in another mode."""


def program_in(folder, name):
    """The path of a program that paddle.jit.save has written; Paddle 2.6 has another suffix."""
    path = os.path.join(folder, name)
    return next(path + suffix for suffix in (".json", ".pdmodel") if os.path.exists(path + suffix))


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
