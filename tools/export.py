"""Export a model for Paddle Inference, and for ONNX Runtime, with any number of images per batch.

    python tools/export.py -cfg configs/gmlp_s16_224.yaml -pretrained gmlp_s16_224.pdparams \\
        -output exported -onnx photos/
    python tools/export.py -cfg configs/gmlp_digits.yaml -pretrained best_weights.pdparams \\
        -output exported -preprocess data/digits/val/5

The exported model gives probabilities.  It takes normalized float32 images [batch, 3, size, size];
with -preprocess uint8 images [batch, size, size, 3], as decoded, and normalizes them itself.
Resizing and cropping stay outside: no operator of ONNX has Pillow's filter, with which accuracy is
measured; signature.json says what to do.  -output is a new folder, whole or not there at all:

    inference.json (Paddle 2.6: inference.pdmodel), inference.pdiparams    for Paddle Inference
    model.onnx                                                             with -onnx
    signature.json   names, types, shapes and meaning of input and output, what to do before, the
                     classes' names, what was measured, versions, and the files' SHA-256

Every export is run on the images at the PATHs, in its own engine, in batches of one and of several,
and compared with the live model: where a probability is more than 1e-4 apart it fails.

Exit status: 0; 1 for a difference or what else failed while running; 2 for what was asked wrongly.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import ConfigError, get_config, require_model, update_config
from ranks import host
from tools.predict import classes_of, find_paths, load_with_digest, read_batches
from utils import progress_bar, show_path, write_text
from weights.pdparams import sha256

# Paddle comes in work(): -h and a wrong flag answer at once.

_TOLERANCE = 1e-4
_OPSET = 17  # the first with LayerNormalization
_INPUT, _OUTPUT = "images", "probabilities"


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("-cfg", metavar="YAML", help="the model (default: the run's whose weights these are)")
    add("-pretrained", metavar="FILE", required=True, help="weights, or a run's folder")
    add("-output", metavar="DIR", required=True, help="the new folder")
    add("-onnx", action="store_true", help="ONNX too (needs paddle2onnx and onnxruntime)")
    add("-preprocess", action="store_true", help="take uint8 images, and normalize them inside")
    add("-names", metavar="FILE", help="a line per class, as for predict.py, for signature.json")
    add("-batch_size", metavar="N", type=int, help="images per batch of the comparison (32)")
    add("-num_classes", metavar="N", type=int, help="classes of the model (default: as -cfg says)")
    add("-image_size", metavar="N", type=int, help="pixels (default: as -cfg says)")
    add("paths", metavar="PATH", nargs="+", help="images to compare with: as for predict.py")
    return parser


def work(args):
    """Exports what the arguments say.  Returns the exit status."""
    args.batch_size = 32 if args.batch_size is None else args.batch_size
    config = update_config(get_config(), args)
    require_model(args)
    if os.path.lexists(args.output):
        raise ConfigError(f"{show_path(args.output)}: is there already: give -output a new name")
    if args.onnx:
        import_onnx()
    tally = common.Tally("export.py: ")
    paths = find_paths(args.paths, tally)
    paddle = common.import_paddle()
    if args.onnx:
        import_paddle2onnx()
    from training import inference

    live, digest = load_with_digest(config, config.MODEL.PRETRAINED, tally.say)
    # After the weights: another number of names may only mean a wrong -cfg.
    names = [each.name for each in classes_of(args, config)]
    live.to(device=paddle.set_device("cpu"))  # as the engines: a GPU's TF32 is another function
    model = with_probabilities(live, config, args.preprocess)
    with common.new_folder(args.output) as folder:
        program = export_paddle(model, config, args.preprocess, folder)
        engines = {"Paddle Inference": inference.load(program)}
        if args.onnx:
            with host.quiet():
                path = export_onnx(program)
            engines["ONNX Runtime"] = onnx_engine(path)
        with host.quiet():
            count, gaps = compare(model, engines, config, args.preprocess, paths, tally)
        for name, gap in gaps.items():
            print(f"{name}: largest difference of a probability {gap:.1e}, on {count} images")
        if not all(gap <= _TOLERANCE for gap in gaps.values()):  # so that a NaN fails
            raise common.Failed(f"an export is more than {_TOLERANCE} off: nothing is written")
        signature = describe(config, args, names, digest, folder)
        signature["compared"] = {"images": count, "largest_difference": gaps}
        text = json.dumps(signature, indent=2, ensure_ascii=False) + "\n"
        write_text(os.path.join(folder, "signature.json"), text)
    print(f"{show_path(args.output)}: {', '.join(sorted(os.listdir(args.output)))}")
    return 1 if tally.counts["problems"] else 0


def describe(config, args, names, digest, folder):
    """What a program in any language has to know of the exported model, as a dict for JSON."""
    import paddle

    from transforms import build_transform

    shape, dtype = input_of(config, args.preprocess)
    short, size = build_transform(config, train=False).short_side, config.DATA.IMAGE_SIZE
    normalization = {"mean": config.DATA.IMAGENET_MEAN, "std": config.DATA.IMAGENET_STD}
    values = "0 to 255" if args.preprocess else "(value / 255 - mean) / std"
    packages = ["paddle2onnx", "onnxruntime"] if args.onnx else []
    return {
        "model": config.MODEL.NAME,
        "input": {
            "name": _INPUT,
            "type": dtype,
            "shape": ["batch", *shape[1:]],
            "axes": "batch, height, width, RGB" if args.preprocess else "batch, RGB, height, width",
            "values": values,
        },
        "before": {
            "colours": "RGB of 8 bits, as Pillow's convert('RGB'): the first frame, without "
            "transparency; of 16 bits the high 8; EXIF's orientation is ignored",
            "cut_ends": "of an image more than 64 times as long as wide (side - 64 * short) // 2 "
            "pixels off both ends, before all else",
            "resize_short_side": short,
            "resized_width": f"floor({short} * width / min(width, height))",
            "resized_height": f"floor({short} * height / min(width, height))",
            "interpolation": "bicubic, antialiased: Pillow's resize((resized_width, "
            "resized_height), BICUBIC) of the whole image",
            "center_crop": size,
            "crop_left": f"round((resized_width - {size}) / 2)",
            "crop_top": f"round((resized_height - {size}) / 2)",
            "round": "halves to the even number, as Python: 0.5 to 0, 1.5 to 2",
            **({} if args.preprocess else {"normalize": normalization}),
        },
        "inside": {"normalize": normalization} if args.preprocess else {},
        "output": {
            "name": _OUTPUT,
            "note": "Paddle Inference gives this output, its only one, a generated name",
            "type": "float32",
            "shape": ["batch", config.MODEL.NUM_CLASSES],
            "values": "probabilities of the classes, in the order of `classes`",
        },
        "classes": names,
        "weights_sha256": digest,
        "files_sha256": {n: sha256(os.path.join(folder, n)) for n in sorted(os.listdir(folder))},
        "versions": {
            "paddle": paddle.__version__,
            **{name: importlib.import_module(name).__version__ for name in packages},
        },
    }


def with_probabilities(live, config, preprocess):
    """A Layer from what the exported model takes to probabilities [batch, classes]."""
    import paddle

    from transforms import normalize

    class Exported(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.live = live
            self.register_buffer("mean", paddle.to_tensor(config.DATA.IMAGENET_MEAN))
            self.register_buffer("std", paddle.to_tensor(config.DATA.IMAGENET_STD))
            # Not from around the class, where Paddle 2.6's converter does not look.
            self.prepare = normalize if preprocess else lambda images, mean, std: images
            self.softmax = paddle.nn.Softmax()

        def forward(self, images):
            return self.softmax(self.live(self.prepare(images, self.mean, self.std)))

    model = Exported()
    model.eval()
    return model


def export_paddle(model, config, preprocess, folder):
    """Writes a model for Paddle Inference.  Returns its program's path."""
    import paddle

    from training import inference

    shape, dtype = input_of(config, preprocess)
    return inference.save(model, paddle.static.InputSpec(shape, dtype, _INPUT), folder, "inference")


def input_of(config, preprocess):
    """(shape, type) of the exported model's input; None is the batch."""
    size = config.DATA.IMAGE_SIZE
    return ([None, size, size, 3], "uint8") if preprocess else ([None, 3, size, size], "float32")


def import_onnx():
    """Raises ConfigError, with the cure, where a package that -onnx needs cannot be imported."""
    for name in ("paddle2onnx", "onnx", "onnxruntime"):
        try:
            # paddle2onnx imports Paddle, which must not be before common.import_paddle().
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        if not found:
            raise ConfigError(
                f"-onnx needs the package {name}: pip install paddle2onnx==2.1.0 onnxruntime"
            )


def import_paddle2onnx():
    """Raises ConfigError where it does not work with this Paddle (it needs Paddle 3)."""
    try:
        import paddle2onnx
    except Exception as error:  # ValueError, for another Paddle than it wants
        reason = str(error).split(". ")[0]
        raise ConfigError(f"-onnx: paddle2onnx cannot be used: {reason}") from None
    return paddle2onnx


def export_onnx(program):
    """Converts a program to model.onnx beside it, and names its parts.  Returns the path.

    Raises:
        Failed: paddle2onnx cannot do it.
    """
    import onnx

    try:
        # Not its own optimizer, polygraphy, which installs packages while it runs.
        data = import_paddle2onnx().export(
            program,
            os.path.splitext(program)[0] + ".pdiparams",
            opset_version=_OPSET,
            optimize_tool=None,
        )
        graph = onnx.load_from_string(data)
        (output,) = graph.graph.output
        for node in graph.graph.node:
            node.output[:] = [_OUTPUT if name == output.name else name for name in node.output]
        output.name = _OUTPUT
        for value in (*graph.graph.input, output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        onnx.checker.check_model(graph)
    except Exception as error:  # of many types
        raise common.Failed(f"paddle2onnx cannot convert this model: {error}") from error
    path = os.path.join(os.path.dirname(program), "model.onnx")
    with open(path, "wb") as file:
        file.write(graph.SerializeToString())
    return path


def onnx_engine(path):
    """A function from input to output array, which ONNX Runtime computes on the CPU."""
    # For telemetry it would write below HOME, and warn where there is none.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of each constant that it folds
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run([_OUTPUT], {_INPUT: images})[0]


def compare(model, engines, config, preprocess, paths, tally):
    """Runs exported models and the live one on images, one by one and in batches.

    Args:
        model: the live Layer, which takes what the exported ones take.
        engines: names to functions, from input array to output array.

    Returns:
        (number of images, names to the largest difference of a probability).

    Raises:
        Failed: no image could be read.
    """
    import numpy as np
    import paddle

    from transforms import BatchTransform

    transform = BatchTransform(config, train=False)
    count, gaps = 0, dict.fromkeys(engines, 0.0)
    bar = progress_bar(None, len(paths), unit="image")
    with bar, contextlib.closing(read_batches(config, paths, tally)) as batches:
        for tried, names, pixels in batches:
            bar.update(tried)
            if not names:
                continue
            images = pixels if preprocess else transform(pixels, None)[0]
            with paddle.no_grad():
                expected = model(images).numpy()
            for name, run in engines.items():
                parts = [(images.numpy(), expected)]
                if not count:  # a batch of one too
                    parts.append((images.numpy()[:1], expected[:1]))
                for part, wanted in parts:
                    gaps[name] = np.maximum(gaps[name], np.abs(run(part) - wanted).max())
            count += len(names)
    if not count:
        raise common.Failed("no image could be read: there is nothing to compare with")
    return count, {name: float(gap) for name, gap in gaps.items()}


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
