"""Write the list files of a data set that comes as one folder per class.

    python tools/make_lists.py -data_path /dataset/imagenet
    python tools/make_lists.py -data_path flowers -val_fraction 0.2 -seed 1

Two layouts: DIR/train/CLASS/... beside DIR/val/CLASS/..., or DIR/CLASS/... alone, of which each
class gives -val_fraction of its images to validation.  Writes train_list.txt, val_list.txt and
classes.txt (the classes' names in the order of their labels, for predict.py's -names) into DIR: all
of them or none; -val_fraction 1, for data to evaluate on, makes no train_list.txt.  Labels are the
ranks of the sorted class names, as ImageNet's are; where all names are whole numbers they are
sorted as numbers, as timm does, unless -string_order is given.

The split is a function of -seed and the images' paths in DIR, so it is the same on every machine,
and images that come later move few others.  Images are what Pillow can read here, by the suffix.
Hidden files, other files, folders that a system makes (@eaDir, lost+found, ...) and folders that
cannot be read are left out, counted and named; links are followed, each folder once.

An EXIF orientation in an image is ignored when it is read, as in timm.  Exit status: 0, 1 for what
failed while running, 2 for what was asked wrongly.
"""

import contextlib
import hashlib
import os
import pathlib
import shlex
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import ConfigError
from utils import (
    HIDDEN,
    SYSTEM,
    UNREADABLE,
    broken,
    find_images,
    is_folder,
    is_system_folder,
    new_file,
    progress_bar,
    show_path,
    sorted_entries,
)

CLASSES = "classes.txt"
# The order in which they appear: where train_list.txt is, the others are.
FILES = (CLASSES, "val_list.txt", "train_list.txt")
_OUTSIDE = "outside the class folders"


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add(
        "-data_path",
        metavar="DIR",
        required=True,
        help="folder with train/CLASS/... and val/CLASS/..., or with CLASS/... to split",
    )
    add(
        "-val_fraction",
        metavar="F",
        type=float,
        help="share of each class that validation gets where there is no val folder (default 0.1; "
        "1: all, to evaluate on)",
    )
    add("-seed", metavar="N", type=int, default=0, help="of the split (default 0)")
    add(
        "-string_order",
        action="store_true",
        help="label whole numbers in the order of strings too (10 before 2)",
    )
    add("-force", action="store_true", help="replace lists that are there already")
    return parser


def work(args):
    """Writes the lists that the arguments ask for."""
    signal.signal(signal.SIGTERM, common.leave)  # so that temporary files go
    root, fraction = args.data_path, args.val_fraction
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"-val_fraction is {fraction}, it must be above 0 and at most 1")
    _require_new(root, args.force)
    tally, left_out = common.Tally("make_lists.py: warning: "), common.LeftOut()

    def skip(kind, path, problem):
        left_out.add(kind, path)
        if problem:
            tally.say(f"{show_path(path)}: {problem}: left out")

    sort = sort_strings if args.string_order else sort_names
    names, splits = read_classes(root, fraction, args.seed, sort, skip, tally.say)
    write_lists(root, names, splits)
    if "train" not in splits:
        with contextlib.suppress(FileNotFoundError):  # one that -force allows to replace
            os.remove(os.path.join(root, "train_list.txt"))
    moved = [pair for pair in enumerate(zip(names, sort_strings(names))) if len({*pair[1]}) > 1]
    if moved:
        label, (name, other) = moved[0]
        tally.say(
            f"all classes are whole numbers, sorted by value: label {label} is class {name}, which "
            f"in the order of strings would be class {other} (-string_order)"
        )
    for sentence in left_out.sentences():
        print(f"make_lists.py: {sentence}", file=sys.stderr)
    print(describe_lists(names, splits))
    if left_out.counts:
        print("left out: " + ", ".join(f"{n:,} ({kind})" for kind, n in left_out.counts.items()))
    print(f"next: {check_command(root, names, splits)}")


def sort_strings(names):
    """Names by their bytes, in any locale alike."""
    return sorted(names, key=os.fsencode)


def sort_names(names):
    """Names as sort_strings has them; by value where all are whole numbers."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sort_strings(names)


def read_classes(root, fraction, seed, sort, skip, warn):
    """The classes of a data set in either layout.

    Args:
        root: the data set's folder.
        fraction: what validation gets of each class of a data set without a val folder; None: 0.1;
            1: all, and there is no "train" in what is returned.
        seed: of that split.
        sort: sort_names or sort_strings.
        skip: see utils.find_images.
        warn: called with sentences.

    Returns:
        (names, {"train": ..., "val": ...}): the sorted class names, and for each of them a list of
        image paths in train and in val, relative to the root.

    Raises:
        ConfigError: no layout, a class without images, a class of val that is none of train.
    """
    train, val = (os.path.join(root, name) for name in ("train", "val"))
    both = os.path.isdir(train) and os.path.isdir(val)
    if not both:
        for folder, other in ((train, val), (val, train)):
            if os.path.isdir(folder) and any(map(_may_be_class, sorted_entries(folder))):
                raise ConfigError(
                    f"{root}: has folders in {folder}, but no {other}: give -data_path {folder} to "
                    "split that one, or add the other"
                )
        return _split(read_folders(root, skip), root, fraction or 0.1, seed, sort, warn)
    if fraction is not None:
        raise ConfigError(f"{val}: validation has a folder of its own: leave -val_fraction out")
    for entry in sorted_entries(root):
        if entry.name not in ("train", "val") and _may_be_class(entry):
            warn(f"{show_path(entry.path)}: left out, as it is neither train nor val")
    images = {"train": read_folders(train, skip), "val": read_folders(val, skip)}
    names = sort(images["train"])
    unknown = sort_strings(set(images["val"]) - set(names))
    if unknown:
        more = f" (and {len(unknown) - 1:,} more)" if unknown[1:] else ""
        raise ConfigError(
            f"{show_path(os.path.join(val, unknown[0]))}{more}: "
            f"{show_path(train)} has no such class"
        )
    for name in names:
        if name not in images["val"]:
            warn(f"{show_path(os.path.join(train, name))}: this class has no images in val")
    return names, {
        split: [relative(images[split].get(name, []), root) for name in names] for split in images
    }


def read_folders(folder, skip):
    """Class names to sorted lists of image paths, for the folders in a folder.

    Raises ConfigError where there are none, or one has no images.
    """
    classes, unreadable = {}, set()

    def skip_and_note(kind, path, problem):
        skip(kind, path, problem)
        if kind == UNREADABLE:
            unreadable.add(path)

    entries = sorted_entries(folder)
    for entry in progress_bar(entries, len(entries), folder, unit="class"):
        if _may_be_class(entry):
            images = list(find_images(entry.path, skip_and_note))
            if entry.path not in unreadable:
                classes[entry.name] = images
        elif entry.name.startswith("."):
            skip(HIDDEN, entry.path, None)
        elif is_folder(entry):
            skip(SYSTEM, entry.path, None)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            skip(*broken(entry.path))
        elif entry.name not in FILES:
            skip(_OUTSIDE, entry.path, None)
    if not classes:
        raise ConfigError(
            f"{folder}: has no class folders: it needs one folder per class with its images "
            "(ImageNet's validation images come in one folder: take tools/prepare_imagenet.py)"
        )
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        more = f" (and {len(empty) - 1:,} more)" if empty[1:] else ""
        raise ConfigError(
            f"{show_path(os.path.join(folder, empty[0]))}{more}: no image in this class's folder: "
            "add some (.jpg, .png and what else Pillow reads), or move it away"
        )
    return classes


def _may_be_class(entry):
    """Whether an entry of os.scandir is a folder that a person made."""
    return not entry.name.startswith(".") and is_folder(entry) and not is_system_folder(entry.name)


def relative(paths, root):
    """Paths in a folder, as its lists have them."""
    start = len(os.path.join(root, ""))  # os.path.relpath would take seconds for a million
    return [path[start:] for path in paths]


def _split(classes, root, fraction, seed, sort, warn):
    """As read_classes: each class's share to val, at least one image where there are two."""

    def draw(path):
        return hashlib.sha256(os.fsencode(f"{seed}/{path}")).digest()

    names = sort(classes)
    if fraction == 1:
        return names, {"val": [relative(classes[name], root) for name in names]}
    train, val = [], []
    for name in names:
        paths = relative(classes[name], root)
        count = min(max(1, round(fraction * len(paths))), len(paths) - 1)
        if not count:
            warn(
                f"{show_path(classes[name][0])}: the only image of its class: validation gets none"
            )
        chosen = set(sorted(paths, key=draw)[:count])
        train.append([path for path in paths if path not in chosen])
        val.append([path for path in paths if path in chosen])
    if not any(val):
        raise ConfigError(f"{root}: every class has one image: there is nothing to validate with")
    return names, {"train": train, "val": val}


def write_lists(root, names, splits):
    """Writes classes.txt and the list of each split, all of them or none.

    Args:
        root: the data set's folder.
        names, splits: as read_classes gives them.

    Raises:
        ConfigError: a name is none that a line can hold.
        OSError: with the path.
    """
    require_lines(root, names, splits)
    texts = {CLASSES: "".join(f"{name}\n" for name in names)}
    for split, classes in splits.items():
        images = ((path, label) for label, paths in enumerate(classes) for path in paths)
        texts[f"{split}_list.txt"] = "".join(f"{path} {label}\n" for path, label in images)
    # The bytes that the file system has, whatever the locale makes of them.
    write_files(root, {name: os.fsencode(texts[name]) for name in FILES if name in texts})


def describe_lists(names, splits):
    """What was written, as a line to print."""
    images = (f"{split}_list.txt {sum(map(len, of)):,} images" for split, of in splits.items())
    return f"{', '.join(images)}, classes: {len(names):,}"


def check_command(root, names, splits):
    """The command that checks the data set, ready to paste."""
    words = ["python", "tools/check_dataset.py", "-data_path", root, "-num_classes", len(names)]
    if "train" not in splits:
        words += ["-lists", "val_list.txt"]
    return shlex.join(map(str, words))


def require_lines(root, names, splits):
    """Raises ConfigError where a class's name or an image's path is none that a line can hold.

    The rules are those of datasets.ImageList.
    """
    images = (path for classes in splits.values() for paths in classes for path in paths)
    wrong = [(name, why) for name in (*names, *images) if (why := _why_no_line(name))]
    if wrong:
        path, why = show_path(os.path.join(root, wrong[0][0])), wrong[0][1]
        more = f" ({len(wrong) - 1:,} more are like that)" if wrong[1:] else ""
        raise ConfigError(f"{path}: {why}, which a list cannot hold: rename it{more}")


def _why_no_line(name):
    """What keeps a path, or a class's name, from a line of its own; None where nothing does."""
    try:
        name = os.fsencode(name).decode()
    except UnicodeDecodeError:
        if not name.isprintable():  # is no text in this locale either
            return "its name is not UTF-8"
    if "\n" in name:
        return "there is a line end in its name"
    # "\ufeff" at a file's start is a byte order mark.
    if name != name.strip() or name.startswith("\ufeff"):
        return "its name begins or ends with white space"
    return None


def _require_new(root, force):
    if not os.path.isdir(root):
        raise ConfigError(f"{root}: there is no such folder")
    for name in FILES:
        path = os.path.join(root, name)
        if os.path.isdir(path):
            raise ConfigError(f"{path}: this is a folder, where a file has to go: rename it")
        if os.path.lexists(path) and not force:
            raise ConfigError(f"{path}: is there already; -force replaces it")


def write_files(folder, texts):
    """Writes files of a folder, all of them or none.

    Args:
        folder: where.
        texts: file names to contents in bytes, in the order in which they appear.

    Raises:
        OSError: with the path; what was new is removed again.
    """
    paths = {os.path.join(folder, name): text for name, text in texts.items()}
    new = [path for path in paths if not os.path.lexists(path)]
    try:
        with contextlib.ExitStack() as files:  # which get their names at its end, last one first
            for path, text in reversed(paths.items()):
                temporary = files.enter_context(new_file(path))
                with open(temporary, "wb") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):
                os.remove(path)
        raise


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
