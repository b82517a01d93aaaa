"""Plot what the spatial gating units have learned: their filters over the image.

    python tools/plot_gates.py -cfg configs/gmlp_s16_224.yaml -pretrained gmlp_s16_224.pdparams \\
        -output gates.png
    python tools/plot_gates.py -cfg configs/gmlp_s16_224.yaml -pretrained gmlp_s16_224.pdparams \\
        -layers 0,14,29 -tokens 0,97,195 -output gates.svg

One map is one token's filter: the weights with which a block's spatial projection adds up all
tokens of the image for this one, in their places; a ring marks the token itself.  Colours are
symmetric about 0, each map to its own largest weight.  Blocks and tokens count from 0, tokens in
rows; image size and classes are those of the weights.  -output is replaced where it exists.  Needs
matplotlib.
"""

import math
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import ConfigError, get_config, require_model, update_config
from tools.plot_run import check_output, import_pyplot, save
from weights import load_weights

_MAPS = 600  # more take minutes and cannot be seen
_INK, _EDGE, _COLOURS = "#2d333b", "#c3cad1", "RdBu_r"
_CAPTION = (
    "A map has the weights with which its block adds up all tokens, in their places, for one "
    "token, the ring. Colours go to each map's own largest weight."
)


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("-cfg", metavar="YAML", help="the model (default: the run's whose weights these are)")
    add("-pretrained", metavar="FILE", required=True, help="weights, or a run's folder")
    add("-layers", metavar="N,N", help="blocks to show (default: 6 from the first to the last)")
    add("-tokens", metavar="N,N", help="tokens to show (default: -count of them)")
    add("-count", metavar="N", type=int, help="tokens from all over the image (default 10)")
    add("-output", metavar="FILE", required=True, help="the picture, .png or .svg")
    return parser


def work(args):
    """Plots what the arguments say."""
    check_output(args.output)
    layers, tokens = numbers(args.layers, "layers"), numbers(args.tokens, "tokens")
    if args.count is not None and tokens is not None:
        raise ConfigError("-tokens says which tokens, and -count how many: give one of the two")
    count = 10 if args.count is None else args.count
    if count < 1:
        raise ConfigError(f"-count is {count}, it must be at least 1")
    config = update_config(get_config(), args)
    require_model(args)
    plt = import_pyplot()
    path = config.MODEL.PRETRAINED
    filters = read_filters(config, path)
    side = filters[0].shape[-1]
    if layers is None:
        layers = spread(len(filters), 6)
    if tokens is None:
        tokens = all_over(side, count)
    check_range(layers, len(filters), "-layers", f"{path} has blocks")
    check_range(tokens, side * side, "-tokens", f"{path} has tokens")
    if len(layers) * len(tokens) > _MAPS:
        raise ConfigError(
            f"{len(layers)} blocks with {len(tokens)} tokens are more than {_MAPS} maps: take "
            "fewer -layers, or fewer -tokens (-count)"
        )
    name = config.MODEL.NAME
    save(draw(plt, filters, layers, tokens, name), args.output)
    print(
        f"{args.output}: {name}, blocks {', '.join(map(str, layers))} of {len(filters)}, "
        f"{len(tokens)} of {side} x {side} tokens"
    )


def numbers(text, flag):
    """Reads a flag such as 0,7,15 as a list; None for None."""
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"-{flag} is {text!r}, it must be numbers such as 0,7,15") from None


def check_range(chosen, count, flag, what):
    wrong = [number for number in chosen if not 0 <= number < count]
    if wrong:
        raise ConfigError(f"{flag}: {what} 0 to {count - 1}, there is no {wrong[0]}")


def spread(count, wanted):
    """`wanted` of 0 .. count - 1 at equal distances, with both ends; all where there are fewer."""
    if count <= wanted or wanted == 1:
        return list(range(min(count, wanted)))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def all_over(side, wanted):
    """`wanted` tokens of a grid of side x side, from all over it, in rows."""
    wanted = min(wanted, side * side)
    rows = max(math.isqrt(wanted), -(-wanted // side))
    tokens = []
    for row in range(rows):
        in_row = wanted * (row + 1) // rows - wanted * row // rows
        y = int((row + 0.5) * side / rows)
        tokens += [y * side + int((i + 0.5) * side / in_row) for i in range(in_row)]
    return tokens


def read_filters(config, path):
    """The spatial projections of a weight file that fits a config, as filters over the image.

    Returns:
        A float array [n x n output tokens, n, n source tokens] of each block.

    Raises:
        ConfigError, WeightsError: the file or the config cannot be used, or they do not fit.
    """
    common.import_paddle()
    from training.run import build_model
    from weights.checkpoint import check_weights

    weights = load_weights(path)
    found = common.sizes_of(weights, path)
    config.MODEL.NUM_CLASSES = found.num_classes
    config.DATA.IMAGE_SIZE = math.isqrt(found.num_tokens) * config.MODEL.MIXER.PATCH_SIZE
    model = build_model(config)
    check_weights(model, weights, path)
    names = (f"{model.blocks_name}.{i}.{model.gate_name}.weight" for i in range(model.sizes.depth))
    return [to_filters(weights[name]) for name in names]


def to_filters(weight):
    """A Linear's weight [source tokens, output tokens] as [output tokens, n, n source tokens]."""
    tokens = weight.shape[1]
    side = math.isqrt(tokens)
    return weight.T.reshape(tokens, side, side)


def draw(plt, filters, layers, tokens, name):
    """The figure: a row for each layer, a map for each token.

    Args:
        plt: matplotlib.pyplot.
        filters: what read_filters returns.
        layers, tokens: which to show, in this order.
        name: of the model, for the title.
    """
    side = filters[0].shape[-1]
    rows, columns = len(layers), len(tokens)
    width = max(0.9 * columns + 1.9, 5.0)  # inches, for the words above and below
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, 0.9 * rows + 1.4),
        dpi=110,
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    title = f"{name}: filters of tokens (row, column) of {side} x {side}"
    figure.suptitle(fold(title, 10 * width), fontsize=11, color=_INK)
    figure.supxlabel(fold(_CAPTION, 15 * width), fontsize=8, color=_INK)
    colours = plt.cm.ScalarMappable(plt.Normalize(-1, 1), _COLOURS)
    bar = figure.colorbar(colours, ax=axes, ticks=[-1, 0, 1], aspect=12 * rows, shrink=0.9)
    bar.ax.set_yticklabels(["-largest", "0", "+largest"], fontsize=8, color=_INK)
    bar.outline.set_edgecolor(_EDGE)
    for row, layer in enumerate(layers):
        for column, token in enumerate(tokens):
            axis = axes[row][column]
            draw_map(axis, filters[layer][token], divmod(token, side))
            if row == 0:
                y, x = divmod(token, side)
                axis.set_title(f"({y}, {x})", fontsize=8, color=_INK)
        axes[row][0].set_ylabel(
            f"block {layer}", rotation=0, ha="right", va="center", fontsize=9, color=_INK
        )
    return figure


def fold(text, width):
    """A text in lines of at most so many characters, with no formula in it."""
    return "\n".join(textwrap.wrap(text.replace("$", r"\$"), int(width)))


def draw_map(axis, values, place):
    """One filter, with a ring around the token (y, x) that it is for."""
    largest = float(abs(values).max()) or 1.0
    axis.imshow(values, cmap=_COLOURS, vmin=-largest, vmax=largest, interpolation="nearest")
    y, x = place
    for colour, width in (("white", 2.4), (_INK, 1.1)):  # seen on light and on dark squares
        axis.plot(x, y, "o", fillstyle="none", color=colour, markersize=5, markeredgewidth=width)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(_EDGE)


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
