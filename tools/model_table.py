"""Print size and cost of models as a Markdown table.

    python tools/model_table.py
    python tools/model_table.py configs/gmlp_digits.yaml

Multiply-adds are those of one image's forward pass through convolutions and linear layers (the
gates' spatial projections are linear layers); LayerNorm, GELU and sums are left out.
"""

import collections
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import get_config

# Paddle comes in work(): -h and a wrong flag answer at once.

_CONFIGS = [common.ROOT / "configs" / f"gmlp_{size}_224.yaml" for size in ("ti16", "s16", "b16")]


def build_parser():
    parser = common.Parser(__doc__)
    parser.add_argument(
        "configs",
        nargs="*",
        default=_CONFIGS,
        metavar="YAML",
        help="config files (default: the Ti/16, S/16 and B/16 models at 224 pixels)",
    )
    return parser


def work(args):
    """Prints the table of the models that the arguments name."""
    configs = [get_config(path) for path in args.configs]
    common.import_paddle()
    rows = [table_row(config) for config in configs]
    print("| model | parameters | multiply-adds | tokens | image size |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print("\n".join(rows))


def table_row(config):
    """The Markdown row of one config's model."""
    from training.run import build_model

    model, size = build_model(config), config.DATA.IMAGE_SIZE
    counts = f"{count_parameters(model):,} | {count_multiply_adds(model, size):,}"
    return f"| {config.MODEL.NAME} | {counts} | {model.sizes.num_tokens} | {size} |"


def count_parameters(model):
    return sum(int(param.size) for param in model.parameters())


def matrix_products(model, image_size):
    """The matrix products of one image's forward pass, as the layers themselves do them.

    Args:
        model: takes float32 images [1, channels, image_size, image_size].
        image_size: height and width in pixels.

    Returns:
        A Counter of (rows, inner, columns), [rows, inner] x [inner, columns]: one for every call of
        a Linear, and of a Conv2D, which multiplies patches by filters.
    """
    import paddle
    from paddle import nn

    products = collections.Counter()

    def count(layer, inputs, output):
        if isinstance(layer, nn.Conv2D):
            columns, inner = layer.weight.shape[0], math.prod(layer.weight.shape[1:])
        else:
            inner, columns = layer.weight.shape
        outputs = output if isinstance(output, tuple) else [output]
        products[sum(int(part.size) for part in outputs) // columns, inner, columns] += 1

    layers = [layer for layer in model.sublayers() if isinstance(layer, (nn.Conv2D, nn.Linear))]
    hooks = [layer.register_forward_post_hook(count) for layer in layers]
    channels = next(layer.weight.shape[1] for layer in layers if isinstance(layer, nn.Conv2D))
    try:
        model.eval()
        with paddle.no_grad():
            model(paddle.zeros([1, channels, image_size, image_size]))
    finally:
        for hook in hooks:
            hook.remove()
    return products


def count_multiply_adds(model, image_size):
    """Multiply-adds of one image: those of its matrix_products."""
    products = matrix_products(model, image_size)
    return sum(math.prod(shape) * times for shape, times in products.items())


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
