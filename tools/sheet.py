"""A picture of images with their classes and files below them, for the tools' -plot."""

import io
import math
import os

from config import ConfigError
from utils import new_file, show

_PLOT_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
PLOT_IMAGES = 64
_PLOT_COLUMNS = 8
_PLOT_LINES = 3  # classes below an image
_SIDE, _GAP = 224, 12  # pixels of an image in the picture, and around it
_FONT_SIZE = 15
_PATH_COLOR = "#2b6cb0"
_NO_CHARACTER = "\U0010ffff"  # which no font has: the box in its place


class Sheet:
    """A picture of images with their classes, and the ends of their paths, below them.

    Args:
        path: the new file.
        font: a font's file, or None for DejaVu Sans, which matplotlib brings; without matplotlib it
            is Pillow's own, which has ASCII.
        replace: whether a file that is there already may go.

    Raises:
        ConfigError: there is a file already, its suffix is of no known format, the font is none.
    """

    def __init__(self, path, font, replace=False):
        from PIL import Image, ImageDraw, ImageFont

        self.path, self.predictions, self.left_out, self.missing = path, [], 0, set()
        self._known = {}  # characters, to whether the font has them
        self._ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        self.format = _PLOT_FORMATS.get(os.path.splitext(path)[1].lower())
        if not self.format:
            raise ConfigError(f"{path}: -plot takes a name that ends in {', '.join(_PLOT_FORMATS)}")
        if os.path.lexists(path) and not replace:
            raise ConfigError(f"{path}: is there already: give -plot another name, or remove it")
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise ConfigError(f"{path}: there is no such folder to write to")
        font = font or find_dejavu()
        self._or = "" if font else ", or install matplotlib, which brings DejaVu Sans"
        try:
            self.font = ImageFont.truetype(font, _FONT_SIZE) if font else _pillows_own(ImageFont)
        except OSError as error:
            raise ConfigError(f"{font}: -font cannot be read as a font: {error}") from error

    def add(self, predictions):
        """Takes the first images, and counts the others."""
        free = PLOT_IMAGES - len(self.predictions)
        self.predictions += predictions[:free]
        self.left_out += len(predictions[free:])

    def save(self, tally):
        """Draws and writes the picture.  Raises OSError with its path."""
        if not self.predictions:
            tally.add("problems", f"{self.path}: is not written, as no image could be read")
            return
        if self.left_out:
            tally.say(
                f"{self.path}: shows the first {PLOT_IMAGES} images; {self.left_out:,} more are "
                "left out"
            )
        self.write(self.draw(), tally)

    def write(self, picture, tally):
        """Writes a PIL image, and says what the font lacks.  Raises OSError with the path."""
        data = io.BytesIO()
        picture.save(data, self.format)
        if self.missing:
            some, rest = " ".join(sorted(self.missing)[:10]), len(self.missing) - 10
            more = f" and {rest:,} more characters" if rest > 0 else ""
            tally.say(
                f"{self.path}: its font has no {show(some)}{more}: give one that has by -font "
                f"FILE, a .ttf or .otf{self._or}"
            )
        with new_file(self.path) as temporary, open(temporary, "wb") as file:
            file.write(data.getvalue())

    def draw(self, columns=None):
        """The picture, a PIL image; `columns` is how many images are beside each other."""
        from PIL import Image, ImageDraw

        lines = min(_PLOT_LINES, len(self.predictions[0].choices))
        columns = columns or min(_PLOT_COLUMNS, math.ceil(math.sqrt(len(self.predictions))))
        rows = math.ceil(len(self.predictions) / columns)
        line_height = math.ceil(1.3 * _FONT_SIZE)
        width, height = _SIDE + _GAP, _SIDE + (lines + 1) * line_height + 2 * _GAP
        sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
        draw = ImageDraw.Draw(sheet)
        for number, (path, pixels, choices) in enumerate(self.predictions):
            x, y = number % columns * width + _GAP, number // columns * height + _GAP
            small = len(pixels) < _SIDE  # whose pixels are to be seen
            method = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
            sheet.paste(Image.fromarray(pixels).resize((_SIDE, _SIDE), method), (x, y))
            y += _SIDE + _GAP // 2
            for line, choice in enumerate(choices[:lines]):
                text = self.fit(f"{100 * choice.probability:.1f}%  {choice.name}")
                color = "gray" if line else "black"
                draw.text((x, y + line * line_height), text, color, self.font)
            text = self.fit(path, from_end=True)
            draw.text((x, y + lines * line_height), text, _PATH_COLOR, self.font)
        return sheet

    def fit(self, text, from_end=False, width=_SIDE):
        """A text, its start or its end, that is at most `width` pixels wide; "?" is what lacks."""
        self.missing.update(c for c in text if c.isprintable() and not self._has(c))
        text = "".join(c if c.isprintable() and self._has(c) else "?" for c in text)
        short = text
        while self._ruler.textlength(short, self.font) > width:
            text = text[1:] if from_end else text[:-1]
            short = "..." + text if from_end else text + "..."
        return short

    def _has(self, character):
        """Whether the font has a character; otherwise it would draw a box, or fail."""
        from PIL import ImageFont

        if not isinstance(self.font, ImageFont.FreeTypeFont):
            return ord(character) < 256
        if character not in self._known:
            drawn, box = (bytes(self.font.getmask(c)) for c in (character, _NO_CHARACTER))
            self._known[character] = drawn != box
        return self._known[character]


def find_dejavu():
    """The file of DejaVu Sans (Latin, Greek, Cyrillic, ...), or None where matplotlib is not."""
    try:
        import matplotlib
    except ImportError:
        return None
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def _pillows_own(fonts):
    try:
        return fonts.load_default(_FONT_SIZE)
    except TypeError:  # Pillow before 10.1: one of a fixed size
        return fonts.load_default()
