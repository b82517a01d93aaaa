"""Print size and cost of models as a Markdown table.

    python tools/model_table.py
    python tools/model_table.py configs/gmlp_digits.yaml

Multiply-adds are those of one image's forward pass through convolutions and linear layers (the
gates' spatial projections are linear layers); LayerNorm, GELU and sums are left out.
"""

import argparse
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", message="No ccache found")

import paddle  # noqa: E402
from paddle import nn  # noqa: E402

from config import get_config  # noqa: E402
from gmlp import build_gmlp  # noqa: E402

DEFAULT_CONFIGS = [ROOT / "configs" / f"gmlp_{size}_224.yaml" for size in ("ti16", "s16", "b16")]


def count_parameters(model):
    return sum(int(param.size) for param in model.parameters())


@paddle.no_grad()
def count_multiply_adds(model, image_size):
    """Multiply-adds of one image, counted by the layers themselves during a forward pass.

    Args:
        model: takes float32 images [1, channels, image_size, image_size].
        image_size: height and width in pixels.

    Returns:
        int, the sum over every call of a Conv2D or a Linear.
    """
    counts = []

    def count(layer, inputs, output):
        # Each output element is a dot product with one filter, or with one column of a Linear.
        weights = layer.weight.shape[1:] if isinstance(layer, nn.Conv2D) else layer.weight.shape[:1]
        length = 1
        for size in weights:
            length *= size
        outputs = output if isinstance(output, tuple) else [output]
        counts.append(length * sum(int(part.size) for part in outputs))

    layers = [layer for layer in model.sublayers() if isinstance(layer, (nn.Conv2D, nn.Linear))]
    hooks = [layer.register_forward_post_hook(count) for layer in layers]
    channels = next(layer.weight.shape[1] for layer in layers if isinstance(layer, nn.Conv2D))
    try:
        model(paddle.zeros([1, channels, image_size, image_size]))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)


def table_row(path):
    """The Markdown row of the model of one config file."""
    config = get_config(path)
    model = build_gmlp(config)
    model.eval()
    size = config.DATA.IMAGE_SIZE
    cells = [
        config.MODEL.NAME,
        f"{count_parameters(model):,}",
        f"{count_multiply_adds(model, size):,}",
        f"{model.sizes.num_tokens}",
        f"{size}",
    ]
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "configs",
        nargs="*",
        default=DEFAULT_CONFIGS,
        metavar="YAML",
        help="config files (default: the Ti/16, S/16 and B/16 models at 224 pixels)",
    )
    configs = parser.parse_args().configs
    try:
        rows = [table_row(path) for path in configs]
    except ValueError as error:  # ConfigError, and build_gmlp's
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    print("| model | parameters | multiply-adds | tokens | image size |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
