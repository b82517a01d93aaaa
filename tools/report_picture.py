"""The picture of a report: charts, and a sheet of mistakes, for evaluate_report.py's -plot."""

from tools.plot_run import STYLE, check_output, import_pyplot
from tools.predict import Choice, Prediction
from tools.sheet import Sheet

_BARS = 20  # of a panel
_COLUMNS = 6  # of mistakes
_SIZE, _DPI = (12.9, 6), 110  # inches, pixels per inch: as wide as the mistakes
_NAME_WIDTH = 120  # pixels
_MAIN, _ACCENT, _FAINT = "#0b62a4", "#d0582b", "#9aa4af"


class Picture:
    """A report as one picture: charts, and below them the most certain mistakes.

    Args:
        path: the file, which is replaced where it exists.
        font: a font's file for names, or None for DejaVu Sans.

    Raises:
        ConfigError: there is no matplotlib, no such folder or format, or the font is none.
    """

    def __init__(self, path, font):
        check_output(path, "-plot", (".png", ".jpg"))
        self._plt = import_pyplot()
        from matplotlib import font_manager

        self._sheet = Sheet(path, font, replace=True)
        self._style = dict(STYLE)
        if font:
            font_manager.fontManager.addfont(font)
            family = font_manager.FontProperties(fname=font).get_name()
            self._style["font.family"] = [family, STYLE["font.family"]]

    def save(self, report, pixels, tally):
        """Draws and writes it.

        Args:
            report: what evaluate_report.py's -json has.
            pixels: uint8 [size, size, 3] of each of the report's mistakes.
            tally: a common.Tally, for characters that the font lacks.
        """
        from PIL import Image

        for mistake, image in zip(report["mistakes"], pixels):
            labels = (mistake["predicted"], "probability"), (mistake["true"], "true_probability")
            choices = [
                Choice(label, report["classes"][label]["name"], None, mistake[key])
                for label, key in labels
            ]
            self._sheet.add([Prediction(mistake["path"], image, choices)])
        with self._plt.rc_context(self._style):
            parts = [self._draw_charts(report)]
        if pixels:
            parts.append(self._sheet.draw(_COLUMNS))
        size = max(part.width for part in parts), sum(part.height for part in parts)
        picture, top = Image.new("RGB", size, "white"), 0
        for part in parts:
            picture.paste(part, (0, top))
            top += part.height
        self._sheet.write(picture, tally)

    def _draw_charts(self, report):
        import numpy as np
        from PIL import Image

        figure = self._plt.figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        classes, pairs, bins = figure.subfigures(1, 3)
        figure.suptitle(
            f"Acc@1 {report['acc1']:.2f}, Acc@5 {report['acc5']:.2f} on {report['images']:,} "
            f"images; expected calibration error {report['calibration']['ece']:.4f}"
        )
        self._draw_classes(classes, report)
        self._draw_pairs(pairs, report)
        _draw_reliability(bins, report)
        text = "The most certain mistakes: taken for (black), and what the list says (grey)"
        text = text if report["mistakes"] else "There are no mistakes"
        figure.supxlabel(text, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.canvas.draw()
        picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        self._plt.close(figure)
        return picture

    def _draw_classes(self, panel, report):
        classes = worst_classes(report)
        shown, count = classes[:_BARS], len(classes)
        which = f"Lowest Acc@1 of {count:,} classes" if count > _BARS else "Acc@1 of each class"
        axis = _only_axis(panel, which, "percent (line: of all images)")
        self._bars(axis, [self._name(each) for each in shown], [each["acc1"] for each in shown])
        axis.set_xlim(0, 100)
        axis.axvline(report["acc1"], color=_ACCENT, linewidth=1.5)

    def _draw_pairs(self, panel, report):
        shown, classes = report["confusions"][:_BARS], report["classes"]
        axis = _only_axis(panel, "Most confused: class > taken for", "images")
        names = [
            " > ".join(self._name(classes[pair[key]]) for key in ("true", "predicted"))
            for pair in shown
        ]
        self._bars(axis, names, [pair["count"] for pair in shown])
        axis.xaxis.get_major_locator().set_params(integer=True)

    def _bars(self, axis, names, values):
        places = list(range(len(names)))
        axis.barh(places, values, color=_MAIN)
        axis.set_yticks(places)
        axis.set_yticklabels(names, fontsize=9)
        axis.set_ylim(max(len(names), _BARS // 2) - 0.4, -0.6)  # from the top
        axis.grid(False, axis="y")

    def _name(self, each):
        name = self._sheet.fit(each["name"], width=_NAME_WIDTH)
        return name.replace("$", r"\$")  # which begins a formula


def worst_classes(report):
    """The classes of a report that have images, those with the lowest accuracy first."""
    classes = [each for each in report["classes"] if each["images"]]
    return sorted(classes, key=lambda each: each["acc1"])


def _title(panel, text):
    """Over the whole width of a panel: beside long names its axis is narrow."""
    panel.suptitle(text, x=0.02, ha="left", fontsize=11, fontweight="bold")


def _only_axis(panel, title, label):
    _title(panel, title)
    axis = panel.subplots()
    axis.set_xlabel(label)
    return axis


def _draw_reliability(panel, report):
    """The reliability diagram, with the share of the images in each bin below it."""
    bins = [each for each in report["calibration"]["bins"] if each["images"]]
    middles = [(each["from"] + each["to"]) / 2 for each in bins]
    widths = [0.9 * (each["to"] - each["from"]) for each in bins]
    _title(panel, "Accuracy by confidence")
    axis, below = panel.subplots(2, height_ratios=[3, 1])
    axis.bar(middles, [each["accuracy"] for each in bins], widths, color=_MAIN)
    axis.plot([0, 1], [0, 1], color=_ACCENT, linewidth=1.5)
    axis.set_ylim(0, 1)
    below.bar(middles, [each["images"] / report["images"] for each in bins], widths, color=_FAINT)
    below.set_ylabel("of all images")
    below.set_xlabel("confidence (line: accuracy equal to it)")
    for each in (axis, below):
        each.set_xlim(0, 1)
