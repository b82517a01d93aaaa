"""Classify images: the most probable classes of each, with names and probabilities.

    python tools/predict.py -cfg configs/gmlp_s16_224.yaml -pretrained gmlp_s16_224.pdparams \\
        photo.jpg
    python tools/predict.py -cfg configs/gmlp_digits.yaml -pretrained best_weights.pdparams \\
        -topk 3 -format csv -plot digits.png data/digits/val 'scans/*.png'

A PATH is an image, a folder (its images and those of the folders in it, sorted by name) or a
pattern.  In folders and patterns, images are what Pillow can read here, by the suffix; the rest is
counted on stderr.  Images are read, cropped and normalized as -eval does it (an EXIF orientation is
ignored, as in timm), so these are the probabilities behind its accuracy.  They are printed batch by
batch:

    table   a line with the path, then a line per class: probability, label, name
    jsonl   an object per image: {"path": ..., "top": [{"label": ..., "name": ..., "synset": ...,
            "probability": ...}, ...]}
    csv     a header, then a row per image and class: path, rank, label, name, synset, probability

The synset is a WordNet id, such as ImageNet's classes have, otherwise null or empty.  Bytes of a
path that are not UTF-8 are written \\udcXX (Python's json and os.fsencode give them back).  An
image that cannot be read is named on stderr, and the others go on.

-names is a file with a line per class in the order of the labels, as make_lists.py writes it: a
name, a WordNet id, or an id and a name.  Without it 1,000 classes are ImageNet's, and those of
other models go by their labels.  Exit status: 0; 1 where an image could not be read, or for what
else failed while running; 2 for what was asked wrongly.
"""

import contextlib
import csv
import glob
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import ConfigError, get_config, require_model, run_file, update_config
from ranks import host
from tools.sheet import PLOT_IMAGES, Sheet
from utils import (
    NO_IMAGE,
    SYSTEM,
    DataError,
    broken,
    find_images,
    is_image_name,
    is_system_folder,
    progress_bar,
    read_names,
    show_path,
)
from weights import load_into
from weights.pdparams import sha256

# Paddle comes in work(): -h and a wrong flag answer at once.

# ImageNet's classes by label.  The ids and their order are timm 1.0.31's imagenet_synsets.txt
# (Apache-2.0), the names its imagenet_synset_to_lemma.txt, which are WordNet 3.0's (Copyright 2006
# by Princeton University).  torchvision 0.28.0 has the same first names in the same order.
_IMAGENET = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "imagenet_classes.txt")


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("-cfg", metavar="YAML", help="the model (default: the run's whose weights these are)")
    add("-pretrained", metavar="FILE", required=True, help="weights, or a run's folder")
    add("-topk", metavar="K", type=int, default=5, help="classes per image (default 5)")
    add("-batch_size", metavar="N", type=int, default=32, help="images per batch (default 32)")
    add("-names", metavar="FILE", help="a line per class (default: ImageNet's of 1,000 classes)")
    add("-format", choices=_WRITERS, default="table", help="of what is printed (default: table)")
    add(
        "-plot",
        metavar="FILE",
        help=f"a new .png or .jpg: the first {PLOT_IMAGES} images with their classes",
    )
    add(
        "-font",
        metavar="FILE",
        help=".ttf or .otf for -plot, for names that DejaVu Sans lacks",
    )
    add("-num_classes", metavar="N", type=int, help="classes of the model (default: as -cfg says)")
    add("-image_size", metavar="N", type=int, help="pixels (default: as -cfg says)")
    add("-num_workers", metavar="N", type=int, help="loader processes (default: by the cores)")
    add("paths", metavar="PATH", nargs="+", help="an image, a folder or a pattern")
    return parser


class Class(NamedTuple):
    """A class of the model; `synset` is its WordNet id, where it has one."""

    name: str
    synset: Optional[str] = None


class Choice(NamedTuple):
    """A class that an image may be of."""

    label: int
    name: str
    synset: Optional[str]
    probability: float


class Prediction(NamedTuple):
    """An image: its path, what the model saw (uint8 [size, size, 3]), its choices, best first."""

    path: str
    pixels: Any
    choices: list[Choice]


def work(args):
    """Classifies what the arguments say.  Returns the exit status."""
    config = update_config(get_config(), args)
    require_model(args)
    if args.topk < 1:
        raise ConfigError(f"-topk is {args.topk}, it must be at least 1")
    sheet = Sheet(args.plot, args.font) if args.plot else None
    tally = common.Tally("predict.py: ")
    paths = find_paths(args.paths, tally)
    common.import_paddle()
    from ranks.loader import explain_dead_workers

    model = load_model(config, config.MODEL.PRETRAINED, tally.say)
    # After the weights: another number of names may only mean a wrong -cfg.
    classes = classes_of(args, config)
    write = _WRITERS[args.format]
    bar = progress_bar(None, len(paths), unit="image")
    batches = predict(model, config, paths, classes, args.topk, tally)
    try:
        with bar, contextlib.closing(batches), explain_dead_workers():
            for number, (done, predictions) in enumerate(batches):
                text = io.StringIO()
                write(text, predictions, number == 0)
                bar.write(text.getvalue(), end="", file=sys.stdout)
                sys.stdout.flush()
                if sheet:
                    sheet.add(predictions)
                bar.update(done)
    except DataError as error:  # of the loader: images were reported
        raise common.Failed(str(error)) from error
    if sheet:
        sheet.save(tally)
    return 1 if tally.counts["problems"] else 0


def classes_of(args, config):
    """The classes that a tool's arguments name: of -names, else of the run, see read_classes.

    Beside a mere file of weights, for which -cfg says the model, a classes.txt may be of anything.
    """
    is_run = not args.cfg or os.path.isdir(os.path.expanduser(args.pretrained))
    own = run_file(args.pretrained, "classes.txt") if is_run else None
    return read_classes(args.names or own, config.MODEL.NUM_CLASSES)


def read_classes(path, count):
    """The classes of a model, by label.

    Args:
        path: a file with a line per class, or None.
        count: how many the model has.

    Returns:
        A list of `count` Class.

    Raises:
        ConfigError: the file cannot be read, or has another number of lines.
    """
    if path is None and count != 1000:
        return [Class(str(label)) for label in range(count)]
    names = read_names(path or _IMAGENET)
    if len(names) != count:
        raise ConfigError(
            f"{path}: there are {len(names):,} names in it, and the model has {count:,} classes "
            "(-num_classes says how many)"
        )
    known = dict(line.split(" ", 1) for line in read_names(_IMAGENET))
    classes = []
    for name in names:
        match = re.fullmatch(r"(n\d{8})(?:\s+(.+))?", name)
        synset, own_name = match.groups() if match else (None, name)
        classes.append(Class(own_name or known.get(synset, synset), synset))
    return classes


def find_paths(arguments, tally):
    """The images that PATH arguments mean, in their order, each path once.

    Args:
        arguments: files of any name; folders, and patterns of glob for files and folders, which
            mean the files with the suffix of an image.
        tally: a common.Tally, for what cannot be read, and for what is left out.

    Raises:
        ConfigError: there is no image, or an argument belongs to another flag.
    """
    paths, wrong, seen, left_out = {}, [], set(), common.LeftOut()

    def skip(kind, path, problem):
        if path in seen:  # by another pattern
            return
        seen.add(path)
        if problem:
            wrong.append(f"cannot read {show_path(path)}: {problem}")
        else:
            left_out.add(kind, path)

    for argument in arguments:
        count = len(wrong)
        found = list(_images_of(argument, skip))
        paths.update(dict.fromkeys(found))
        if not found and len(wrong) == count:
            there = os.path.exists(argument) or glob.glob(argument, recursive=True)
            what = "no image is there" if there else "no such file or folder"
            wrong.append(f"{show_path(argument)}: {what}")
    for sentence in left_out.sentences():
        tally.say(sentence)
    last = wrong.pop() if not paths else None
    for sentence in wrong:
        tally.add("problems", sentence)
    if last:
        raise ConfigError(last)
    return list(paths)


def _images_of(argument, skip):
    """The images of one PATH; `skip` as for utils.find_images."""
    if os.path.isfile(argument):
        if argument.lower().endswith(_NOT_OF_PATH):
            raise ConfigError(
                f"{show_path(argument)}: this is no image, and -pretrained and -cfg take one file "
                "each: did a pattern match several?"
            )
        yield argument
        return
    known = {argument} if os.path.lexists(argument) else glob.glob(argument, recursive=True)
    for path in sorted(known, key=os.fsencode):
        new = set(Path(path).parts) - set(Path(argument).parts)  # what the pattern has found
        if any(map(is_system_folder, new)):
            skip(SYSTEM, path, None)
        elif os.path.isdir(path):
            yield from find_images(path, skip)
        elif path != argument and not is_image_name(path):
            skip(NO_IMAGE, path, None)
        elif os.path.isfile(path):
            yield path
        else:
            skip(*broken(path))


_NOT_OF_PATH = (".pdparams", ".safetensors", ".yaml", ".yml")


def load_model(config, path, note):
    """The config's model with the weights of a file, as -eval has it.

    Args:
        config: the merged config.
        path: the weights.
        note: called with a sentence where they were resampled.

    Raises:
        ConfigError, WeightsError: there is no such model, or these are not its weights.
    """
    from ranks.collective import init_distributed
    from training.run import build_model

    if config.DATA.IMAGE_CHANNELS != 3:
        raise ConfigError(f"DATA.IMAGE_CHANNELS is {config.DATA.IMAGE_CHANNELS}: images are RGB: 3")
    init_distributed()  # takes the device
    model = build_model(config)
    for sentence in load_into(model, path):
        note(sentence)
    model.eval()
    return model


def load_with_digest(config, path, note):
    """(load_model's model, the SHA-256 of the file that its weights are of)."""
    while True:
        digest = sha256(path) if os.path.isfile(path) else None  # load_model says so
        model = load_model(config, path, note)
        if sha256(path) == digest:  # otherwise a training that still runs has replaced the file
            return model, digest


class Images:
    """A data set for ranks.loader.build_loader whose broken images end nothing.

    An item is (uint8 [size, size, 3], index); an image that cannot be read is black and has the
    index ~index.
    """

    def __init__(self, paths, config):
        from datasets import ImageDataset, ImageSource
        from transforms import build_transform

        class Paths(ImageSource):
            labels = range(len(paths))  # so that a prediction finds its path again

            def image_path(self, index):
                return paths[index]

        self._dataset = ImageDataset(Paths(), build_transform(config, train=False), config.SEED)
        self._size = config.DATA.IMAGE_SIZE

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, key):
        import numpy as np

        try:
            return self._dataset[key]
        except DataError:
            return np.zeros([self._size, self._size, 3], np.uint8), ~key[1]

    def why(self, index):
        """What is wrong with an image, in a run's words."""
        try:
            self._dataset.read(index)
        except DataError as error:
            return str(error)
        return (
            f"{self._dataset.images.image_path(index)}: it could not be read at first, now it can"
        )


def read_batches(config, paths, tally):
    """Reads images as -eval does, in batches of DATA.BATCH_SIZE_EVAL.

    Args:
        config: the merged config.
        paths: image files.
        tally: a common.Tally, for the images that cannot be read.

    Yields:
        (count, paths, pixels): how many images were tried, which could be read, and those as uint8
        Tensor [images, size, size, 3].

    Raises:
        DataError: the loader cannot work.
    """
    import numpy as np
    import paddle

    from datasets import EvalSampler
    from ranks.loader import build_loader

    images = Images(paths, config)
    sampler = EvalSampler(len(paths), config.DATA.BATCH_SIZE_EVAL, 0, 1)
    workers, on_gpu = config.DATA.NUM_WORKERS, paddle.get_device().startswith("gpu")
    # A single batch needs none, unless they are asked for.
    workers = host.choose_workers(workers, on_gpu) if len(sampler) > 1 else max(0, workers)
    loader = build_loader(images, sampler, workers, config.DATA.IMAGE_SIZE)
    with contextlib.closing(loader) as batches:
        for pixels, indices in batches:
            indices = indices.numpy()
            for index in indices[indices < 0]:
                tally.add("problems", images.why(~index))
            read = np.flatnonzero(indices >= 0)
            if len(read) < len(indices):
                pixels = paddle.to_tensor(pixels.numpy()[read])
            yield len(indices), [paths[index] for index in indices[read]], pixels


def predict(model, config, paths, classes, k, tally):
    """Classifies images.

    Args:
        model: in evaluation mode, with its weights.
        config, paths, tally: see read_batches.
        classes: a Class for each label.
        k: choices per image; all where there are fewer classes.

    Yields:
        (number of images, list of Prediction) for each batch; those that cannot be read are missing
        in the list.

    Raises:
        common.Failed: the model gives infinities or NaN.
        DataError: the loader cannot work.
    """
    import numpy as np
    import paddle
    from paddle.nn import functional as F

    from transforms import BatchTransform

    transform = BatchTransform(config, train=False)
    with contextlib.closing(read_batches(config, paths, tally)) as batches:
        for count, names, pixels in batches:
            if not names:
                yield count, []
                continue
            with paddle.no_grad():
                logits = model(transform(pixels, None)[0]).astype("float32")
                probabilities = F.softmax(logits).numpy()
            pixels, logits = pixels.numpy(), logits.numpy()
            # By the logits, as accuracy counts: probabilities may be equal where they are not.
            order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
            predictions = []
            require_finite(logits, names)
            for row, path in enumerate(names):
                choices = [
                    Choice(i, *classes[i], probabilities[row, i]) for i in order[row].tolist()
                ]
                predictions.append(Prediction(utf8(path), pixels[row], choices))
            yield count, predictions


def require_finite(logits, paths):
    """Raises common.Failed, with the path of an image, where a row has infinities or NaN."""
    import numpy as np

    for row in np.flatnonzero(~np.isfinite(logits).all(axis=1))[:1]:
        raise common.Failed(
            f"{show_path(paths[row])}: the model's outputs for it are not finite numbers: the "
            "weights are spoilt"
        )


def utf8(path):
    """A path's bytes as UTF-8, where they are that: not what another locale makes of them."""
    with contextlib.suppress(UnicodeDecodeError):
        path = os.fsencode(path).decode()
    return path


def write_table(file, predictions, first):
    """A line per image, and one per choice below it."""
    for path, _, choices in predictions:
        file.write(f"{show_path(path)}\n")
        digits = max(len(str(choice.label)) for choice in choices)
        for label, name, _, probability in choices:
            name = "" if name == str(label) else f"  {show_path(name)}"
            file.write(f"  {100 * probability:6.2f}%  {label:>{digits}}{name}\n")


def write_jsonl(file, predictions, first):
    """An object per line and image, in ASCII."""
    for path, _, choices in predictions:
        top = [{**choice._asdict(), "probability": _number(choice)} for choice in choices]
        file.write(json.dumps({"path": path, "top": top}) + "\n")


def write_csv(file, predictions, first):
    """A row per image and choice."""
    # Quoted throughout: otherwise Python before 3.13 leaves a "\r" in a name bare.
    writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    if first:
        writer.writerow(["path", "rank", "label", "name", "synset", "probability"])
    for path, _, choices in predictions:
        for rank, choice in enumerate(choices, 1):
            label, name, synset, _ = choice
            writer.writerow([path, rank, label, name, synset or "", _number(choice)])


def _number(choice):
    return float(str(choice.probability))  # the fewest digits that are the same float32


_WRITERS = {"table": write_table, "jsonl": write_jsonl, "csv": write_csv}


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
