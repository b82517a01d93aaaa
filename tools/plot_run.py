"""Plot the curves of one or several training runs: loss, accuracy, learning rate, throughput.

    python tools/plot_run.py output/train-20260101-12-00-00 -output curves.png
    python tools/plot_run.py first/metrics.jsonl second/metrics.jsonl -names "lr 1e-3" "lr 2e-3" \\
        -output curves.svg

Reads `metrics.jsonl`, of a run that is still going too.  What a run repeated after it was resumed
counts once, as it was last.  -output is replaced where it exists.  Needs matplotlib.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import ConfigError
from utils import new_file

# Readable on white, and apart from each other for the colour-blind.
_COLOURS = ("#0b62a4", "#d0582b", "#2b8a57", "#8a4fa0", "#b8860b", "#52636e", "#c2387a", "#12919c")
_INK, _FAINT = "#2d333b", "#d8dde3"
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",  # matplotlib brings it
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#9aa4af",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "gmlp",  # the same numbers make the same file
}


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="a run's folder, or its metrics.jsonl")
    add("-output", metavar="FILE", required=True, help="the picture, .png or .svg")
    add("-names", metavar="NAME", nargs="+", help="what the legend calls the runs")
    add(
        "-x",
        choices=["epochs", "steps"],
        default="epochs",
        help="what the curves run over (default: epochs)",
    )
    return parser


def work(args):
    """Plots what the arguments say."""
    signal.signal(signal.SIGTERM, common.leave)  # so that a temporary file goes
    check_output(args.output)
    if args.names and len(args.names) != len(args.runs):
        raise ConfigError(
            f"-names has {len(args.names)} names for {len(args.runs)} runs: give one for each"
        )
    plt = import_pyplot()
    runs = [read_run(path) for path in args.runs]
    names = args.names or run_names(args.runs)
    with plt.rc_context(STYLE):
        save(draw(plt, runs, names, args.x), args.output)
    for run, name in zip(runs, names):
        print(f"{name}: {describe(run)}")
    print(f"curves in {args.output}")


def check_output(path, flag="-output", suffixes=(".png", ".svg")):
    """Refuses a picture's path, in a sentence, before any work."""
    if os.path.splitext(path)[1].lower() not in suffixes:
        raise ConfigError(f"{path}: {flag} must end in {' or '.join(suffixes)}")
    check_place(path, flag)


def check_place(path, flag):
    """Refuses a path at which no file can be written, in a sentence."""
    if os.path.isdir(path):
        raise ConfigError(f"{path}: this is a folder: give {flag} a file")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ConfigError(f"{path}: there is no folder {folder}: make it first")


def import_pyplot():
    """matplotlib.pyplot, drawing into files."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # no display is needed
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError(f"this needs matplotlib ({error}): pip install matplotlib") from None
    return plt


def save(figure, path):
    """Writes a figure in the format of its suffix, whole or not at all."""
    kind = os.path.splitext(path)[1][1:].lower()
    metadata = {"Date": None} if kind == "svg" else None
    with new_file(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=metadata)


def read_run(path):
    """The curves of one run.

    Args:
        path: a run's folder, or the metrics.jsonl in it.

    Returns:
        Names ("loss", "lr", "images_per_second", "model loss", "ema acc1", ...) to lists of points
        (epochs, steps, value); epochs are fractions, or None where no epoch was finished.

    Raises:
        UserError, OSError: as common.read_run.
    """
    return curves(common.read_run(path))


def curves(rows):
    """The curves of the rows of common.read_run; see read_run."""
    reports, ends = {}, {}  # by epoch
    for row in rows:
        if row["kind"] == "train":
            reports.setdefault(row["epoch"], []).append(row)
        elif row["kind"] == "epoch":
            ends[row["epoch"]] = row["step"]
    # The last batch of an epoch is always reported; an epoch without its end is as long as others.
    lengths = {epoch: reports[epoch][-1]["batch"] for epoch in ends if epoch in reports}
    usual = next(reversed(lengths.values()), None)
    points = {}

    def add(name, epochs, steps, value):
        points.setdefault(name, []).append((epochs, steps, value))

    for row in rows:
        epoch = row["epoch"]
        if row["kind"] == "train":
            length = lengths.get(epoch, usual)
            epochs = epoch - 1 + row["batch"] / length if length else None
            for name in ("loss", "lr"):
                add(name, epochs, row["step"], row[name])
            if not is_short(row, reports[epoch]):
                add("images_per_second", epochs, row["step"], row["images_per_second"])
        elif row["kind"] == "epoch":
            speed = mean_speed(reports.get(epoch, []))
            add("epoch images_per_second", epoch, row["step"], speed)
        else:
            for name in ("loss", "acc1"):
                add(f"{row['weights']} {name}", epoch, ends.get(epoch), row[name])
    return points


def batches_of(reports):
    """How many batches each report of an epoch is of."""
    places = [0, *(report["batch"] for report in reports)]
    return [end - start for start, end in zip(places, places[1:])]


def is_short(report, reports):
    """Whether a report is of few batches, such as an epoch's last: its speed is mostly chance."""
    batches = batches_of(reports)
    return 2 * batches[reports.index(report)] < max(batches)


def mean_speed(reports):
    """Images per second over the reports of an epoch, by their time; None where one has none."""
    speeds = [report["images_per_second"] for report in reports]
    if not speeds or not all(speeds):
        return None
    batches = batches_of(reports)
    return sum(batches) / sum(count / speed for count, speed in zip(batches, speeds))


def run_names(paths):
    """Short names for the legend: of each run's folder the shortest ending that no other's has."""
    folders = [p if os.path.isdir(p) else os.path.dirname(os.path.abspath(p)) for p in paths]
    folders = [Path(os.path.abspath(folder)).parts for folder in folders]
    names = []
    for path, parts in zip(paths, folders):
        endings = (parts[-count:] for count in range(1, len(parts) + 1))
        own = (e for e in endings if sum(e == other[-len(e) :] for other in folders) == 1)
        ending = next(own, None)  # None: the run is there twice
        names.append(os.path.join(*ending) if ending else path)
    return names


def describe(run):
    """How far a run is, for the line that the tool prints."""
    epochs, steps, _ = max(
        (point for points in run.values() for point in points), key=lambda point: point[1] or 0
    )
    scores = [f"{name} Acc@1 {best_of(run, name)[0]:.2f}" for name in weights_of(run)]
    place = f"{steps} {'step' if steps == 1 else 'steps'}"
    if epochs is not None:
        place += f", {epochs:.4g} {'epoch' if epochs == 1 else 'epochs'}"
    return ", ".join([place, *(f"best {score}" for score in scores)])


def weights_of(run):
    return [name for name in ("model", "ema") if f"{name} acc1" in run]


def best_of(run, weights):
    """(best Acc@1, its epoch), the first where several are as good."""
    return max((value, -epoch) for epoch, _, value in run[f"{weights} acc1"])


def draw(plt, runs, names, x):
    """The figure of four panels.

    Args:
        plt: matplotlib.pyplot.
        runs: what read_run returns, one or more.
        names: what the legend calls them.
        x: "epochs" or "steps"; where a run has not finished an epoch, it is steps for all.
    """
    if any(point[0] is None for run in runs for points in run.values() for point in points):
        x = "steps"
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), dpi=110, sharex=True, layout="constrained")
    loss, accuracy, rate, speed = axes.flat
    colours = colours_of(plt, len(runs))
    for run, colour in zip(runs, colours):
        line = _Lines(run, x, colour)
        line(loss, "loss", "training", linewidth=1.2, alpha=0.45)
        for weights in weights_of(run):
            style = {"linestyle": "--" if weights == "ema" else "-", "linewidth": 1.9}
            style["marker"] = "o" if len(run[f"{weights} acc1"]) <= 60 else None
            what = "validation" if weights == "model" else "validation, averaged weights (EMA)"
            line(loss, f"{weights} loss", what, **style)
            what = "weights" if weights == "model" else "averaged weights (EMA)"
            line(accuracy, f"{weights} acc1", what, **style)
        line(rate, "lr", "", linewidth=1.7)
        line(speed, "images_per_second", "report", linewidth=1.2, alpha=0.45)
        line(speed, "epoch images_per_second", "epoch's mean", linewidth=1.9)
    titles = ("Loss", "Validation Acc@1, percent", "Learning rate", "Training images per second")
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis in (rate, speed):
        axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch" if x == "epochs" else "optimizer step")
    add_legends(plt, figure, (loss, accuracy, speed), runs, names, colours)
    return figure


def colours_of(plt, count):
    """A colour for each run, no two the same."""
    if count <= len(_COLOURS):
        return _COLOURS[:count]
    return [plt.get_cmap("turbo")(number / (count - 1)) for number in range(count)]


class _Lines:
    """Draws the curves of one run."""

    def __init__(self, run, x, colour):
        self.run, self.x, self.colour = run, x, colour

    def __call__(self, axis, name, label, **style):
        points = [p for p in self.run.get(name, ()) if p[1] is not None or self.x == "epochs"]
        places = [point[0 if self.x == "epochs" else 1] for point in points]
        values = [float("nan") if point[2] is None else point[2] for point in points]
        if len(points) == 1:  # which is no line
            style["marker"] = "o"
        axis.plot(places, values, color=self.colour, label=label, markersize=3.5, **style)


def add_legends(plt, figure, axes, runs, names, colours):
    """What the lines are, in the panels that have several; which run is which, above."""
    for axis in axes:
        lines = {}
        for line in axis.get_lines():
            lines.setdefault(line.get_label(), line)
        if len(lines) > 1:
            legend = axis.legend(lines.values(), lines.keys(), fontsize=9)
            if len(runs) > 1:  # the colour is a run's, the style is what counts here
                for line in legend.get_lines():
                    line.set_color(_INK)
    best = []
    for run, name, colour in zip(runs, names, colours):
        text = name.replace("$", r"\$")  # which begins a formula
        for weights in weights_of(run)[-1:]:  # EMA's are the ones to use
            value, epoch = best_of(run, weights)
            text += f": best Acc@1 {value:.2f} in epoch {-epoch}"
        best.append(plt.Line2D([], [], color=colour, linewidth=3, label=text))
    figure.legend(handles=best, loc="outside upper left", ncols=1 if len(best) < 3 else 2)


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
