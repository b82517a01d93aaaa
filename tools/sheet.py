"""A picture of images with their classes below them, for predict.py's -plot."""

import io
import math
import os

from config import ConfigError
from utils import new_file

_PLOT_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
PLOT_IMAGES = 64
_PLOT_COLUMNS = 8
_PLOT_LINES = 3  # classes below an image
_SIDE, _GAP = 224, 12  # pixels of an image in the picture, and around it
_FONT_SIZE = 15


class Sheet:
    """A picture of images with their classes below them.

    Args:
        path: the new file.
        font: a font's file, or None for Pillow's own, which has Latin letters.

    Raises:
        ConfigError: there is a file already, its suffix is of no known format, the font is none.
    """

    def __init__(self, path, font):
        from PIL import ImageFont

        self.path, self.predictions, self.left_out = path, [], 0
        self.format = _PLOT_FORMATS.get(os.path.splitext(path)[1].lower())
        if not self.format:
            raise ConfigError(f"{path}: -plot takes a name that ends in {', '.join(_PLOT_FORMATS)}")
        if os.path.lexists(path):
            raise ConfigError(f"{path}: is there already: give -plot another name, or remove it")
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise ConfigError(f"{path}: there is no such folder to write to")
        try:
            self.font = ImageFont.truetype(font, _FONT_SIZE) if font else _default_font(ImageFont)
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
        data = io.BytesIO()
        self.draw().save(data, self.format)
        with new_file(self.path) as temporary, open(temporary, "wb") as file:
            file.write(data.getvalue())

    def draw(self):
        """The picture, a PIL image."""
        from PIL import Image, ImageDraw

        lines = min(_PLOT_LINES, len(self.predictions[0].choices))
        columns = min(_PLOT_COLUMNS, math.ceil(math.sqrt(len(self.predictions))))
        rows = math.ceil(len(self.predictions) / columns)
        line_height = math.ceil(1.3 * _FONT_SIZE)
        width, height = _SIDE + _GAP, _SIDE + lines * line_height + 2 * _GAP
        sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
        draw = ImageDraw.Draw(sheet)
        for number, (_, pixels, choices) in enumerate(self.predictions):
            x, y = number % columns * width + _GAP, number // columns * height + _GAP
            small = len(pixels) < _SIDE  # whose pixels are to be seen
            method = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
            sheet.paste(Image.fromarray(pixels).resize((_SIDE, _SIDE), method), (x, y))
            y += _SIDE + _GAP // 2
            for line, choice in enumerate(choices[:lines]):
                text = self._fit(draw, f"{100 * choice.probability:.1f}%  {choice.name}")
                color = "gray" if line else "black"
                draw.text((x, y + line * line_height), text, color, self.font)
        return sheet

    def _fit(self, draw, text):
        """A text that is as wide as an image, or shorter, in characters that the font has."""
        from PIL import ImageFont

        text = "".join(c if c.isprintable() else "?" for c in text)
        if not isinstance(self.font, ImageFont.FreeTypeFont):
            text = text.encode("latin-1", "replace").decode("latin-1")
        short = text
        while draw.textlength(short, self.font) > _SIDE:
            text = text[:-1]
            short = text + "..."
        return short


def _default_font(fonts):
    try:
        return fonts.load_default(_FONT_SIZE)
    except TypeError:  # Pillow before 10.1: one of a fixed size
        return fonts.load_default()
