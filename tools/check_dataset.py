"""Read a whole data set ahead of a run, and report every problem at once.

    python tools/check_dataset.py -data_path /dataset/imagenet
    python tools/check_dataset.py -data_path data/digits -num_classes 10 -lists val_list.txt

Prints warnings, one for all of a kind: images listed again (in the list itself, or of training in
validation), images in folders that a system makes, classes without an image.  Then a line
`list:line: ...` for each bad line and each image that a run would refuse, with the run's own words.
Images with an EXIF orientation, which is ignored when they are read, as in timm, are counted.  Exit
status: 0, 1 where there is a problem (warnings are none), 2 for what was asked wrongly.
"""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from multiprocessing import connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import ConfigError, get_config, update_config
from ranks import host
from utils import DataError, is_system_folder, progress_bar, show_path

# Paddle, which datasets.py imports, comes in check(): -h and a wrong flag answer at once.

_ORIENTATION = 0x0112
_CHUNK = 64  # images that a process checks at a time


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("-data_path", metavar="DIR", required=True, help="folder with the lists")
    add("-num_classes", metavar="N", type=int, help="classes of the data set (default 1000)")
    add("-num_workers", metavar="N", type=int, help="processes (default: one per core)")
    add(
        "-lists",
        metavar="LIST",
        nargs="+",
        default=["train_list.txt", "val_list.txt"],
        help="list files in the folder (default: train_list.txt val_list.txt)",
    )
    return parser


def work(args):
    """Checks what the arguments say.  Returns the exit status."""
    config = update_config(get_config(), args)
    if not any(os.path.exists(os.path.join(args.data_path, name)) for name in args.lists):
        raise ConfigError(f"{args.data_path} has no {' or '.join(args.lists)} (docs/data.md)")
    workers = config.DATA.NUM_WORKERS
    workers = host.available_cores() if workers < 0 else max(1, workers)
    return check(args.data_path, args.lists, config.MODEL.NUM_CLASSES, workers)


def check(root, names, num_classes, workers):
    """Checks the lists of a folder, and prints what is wrong.  Returns the exit status."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process per core does the work
    common.import_paddle()
    from datasets import ImageDataset, ImageList

    tally = common.Tally(stream="stdout")
    lists, wrong, turned = [], [], 0
    for name in dict.fromkeys(names):
        try:
            lists.append(ImageList(root, name, num_classes, wrong.append))
        except DataError as error:
            wrong.append(error)
    empty = (empty_classes(images, num_classes) for images in lists)
    warnings = itertools.chain(repeated(lists), in_system_folders(lists), *empty)
    count = say_grouped(warnings, tally)
    for problem in wrong:
        tally.add("problems", problem)
    total = sum(map(len, lists))
    with progress_bar(None, total, unit="image") as bar:
        for images in lists:
            dataset = ImageDataset(images, transform=None, seed=0)
            for done, problems, oriented in check_images(dataset, workers):
                for problem in problems:
                    tally.add("problems", problem)
                turned += oriented
                bar.update(done)
    if turned:
        print(f"EXIF orientation, which is ignored, as in timm: {turned:,} images")
    sizes = ", ".join(f"{os.path.basename(images.name)} {len(images):,}" for images in lists)
    problems = tally.counts["problems"]
    print(f"images: {sizes or 'none'}; problems: {problems:,}, warnings: {count:,}")
    return 1 if problems else 0


def say_grouped(warnings, tally):
    """Says the first of each kind, and how many more there are.  Returns how many in all.

    Args:
        warnings: (kind, sentence, line number or None) of each.
        tally: a common.Tally.
    """
    first, lines = {}, {}
    for kind, sentence, line in warnings:
        first.setdefault(kind, sentence)
        lines.setdefault(kind, []).append(line)
    for kind, sentence in first.items():
        more = lines[kind][1:]
        if more:
            some = ", ".join(map(str, more[:5])) + (", ..." if more[5:] else "")
            sentence += f" ({len(more):,} more of these: lines {some})"
        tally.say(sentence)
    return sum(map(len, lines.values()))


def check_images(dataset, workers):
    """Decodes every image of an ImageDataset, in `workers` processes.

    The parent hands out the work and waits on pipes, so that a process that dies is noticed, and
    nothing grows with the number of images but the sentences.  What a process died of is looked
    for image by image, in new processes.

    Yields:
        (number of images, sentences, number of those with an EXIF orientation) of one piece of the
        list after the other, in order.
    """
    size = len(dataset)
    pieces = iter([(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)])
    again = collections.deque()  # images of pieces that a process died of, before all others
    processes, busy = {}, {}  # of each pipe: its process, and its piece
    finished, following = {}, 0  # (end, what was found) that wait for those of earlier pieces
    try:
        for _ in range(min(workers, -(-size // _CHUNK))):
            _start(dataset, processes, busy, next(pieces))
        while busy:
            for pipe in connection.wait(list(busy)):
                start, end = busy.pop(pipe)
                try:
                    finished[start] = end, pipe.recv()
                    died = False
                except (EOFError, OSError):
                    died = True
                    process = processes.pop(pipe)
                    if end - start == 1:
                        finished[start] = end, ([_describe_death(process, dataset, start)], 0)
                    else:
                        again.extendleft((i, i + 1) for i in reversed(range(start, end)))
                piece = again.popleft() if again else next(pieces, None)
                if piece and died:
                    _start(dataset, processes, busy, piece)
                elif piece:
                    _hand_out(pipe, piece, busy)
            while following in finished:
                start, (following, found) = following, finished.pop(following)
                yield following - start, *found
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _start(dataset, processes, busy, piece):
    """A new process, with its first piece."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(dataset, theirs, os.getpid()), daemon=True
    )
    process.start()
    theirs.close()  # so that its end is the end of the pipe
    processes[ours] = process
    _hand_out(ours, piece, busy)


def _hand_out(pipe, piece, busy):
    busy[pipe] = piece
    with contextlib.suppress(OSError):  # it died: reading from it will say so
        pipe.send(piece)


def _work(dataset, pipe, parent):
    """A process's loop: a piece in; its bad images' sentences, and how many are turned, out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    host.die_with_parent(parent, signal.SIGKILL)
    while True:
        start, end = pipe.recv()
        problems, turned = [], 0
        for index in range(start, end):
            try:
                turned += is_turned(dataset.read(index))
            except DataError as error:
                problems.append(str(error))
        pipe.send((problems, turned))


def is_turned(image):
    """Whether a PIL image has an EXIF orientation by which it would be shown turned."""
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # of damaged metadata, which a run does not read
        return False


def _describe_death(process, dataset, index):
    process.join(10)
    code = process.exitcode
    reason = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
    images = dataset.images
    return (
        f"{images.place(index)}: reading this image ended a process ({reason}): if the system "
        "killed it for lack of memory, take fewer -num_workers"
    )


def repeated(lists):
    """As say_grouped takes them: images that an earlier line, or an earlier list, has already."""
    import numpy as np

    starts = np.cumsum([0, *map(len, lists)])

    def entry(place):
        number = np.searchsorted(starts, place, "right") - 1
        return lists[number], int(place - starts[number])

    def name(images, index):
        return os.path.normpath(images.image_path(index))

    # Hashes, as a million paths would take hundreds of megabytes.
    places = range(starts[-1])
    hashes = np.fromiter((hash(name(*entry(place))) for place in places), np.int64, len(places))
    _, firsts, groups = np.unique(hashes, return_index=True, return_inverse=True)
    firsts = firsts[groups.reshape(-1)]
    for place in np.flatnonzero(firsts != np.arange(len(hashes))):
        (images, index), (earlier, earlier_index) = entry(place), entry(firsts[place])
        if name(images, index) != name(earlier, earlier_index):
            continue  # two paths of one hash
        label, earlier_label = images.labels[index], earlier.labels[earlier_index]
        other = f", with the label {earlier_label}" if label != earlier_label else ""
        yield (
            (images.name, earlier.name, bool(other)),
            f"{images.place(index)}: warning: "
            f"{show_path(images.image_path(index))}: this image is already in "
            f"{os.path.basename(earlier.place(earlier_index))}{other}",
            line_of(images, index),
        )


def line_of(images, index):
    return int(images.place(index).rsplit(":", 1)[1])


def in_system_folders(lists):
    """As say_grouped takes them: images that a system has made, such as thumbnails."""
    for images in lists:
        for index in range(len(images)):
            path = images.image_path(index)[len(images.root) :]
            folder = next(filter(is_system_folder, path.split("/")[:-1]), None)
            if folder:
                yield (
                    (images.name, "system"),
                    f"{images.place(index)}: warning: {show_path(images.image_path(index))}: "
                    f"{folder} is a folder that a system makes, of no images of yours",
                    line_of(images, index),
                )


def empty_classes(images, num_classes):
    """As say_grouped takes it: the classes that have no image in a list, where there are any."""
    import numpy as np

    empty = np.flatnonzero(np.bincount(images.labels, minlength=num_classes) == 0)
    if len(empty):
        some = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        hints = ["-num_classes says how many there are"] if empty[-1] == num_classes - 1 else []
        hints += ["labels start at 0"] if empty[0] == 0 and len(images) else []
        hint = f" ({'; '.join(hints)})" if hints else ""
        yield (
            (images.name, "empty"),
            f"{images.name}: warning: {len(empty):,} of {num_classes:,} classes have no image: "
            f"{some}{hint}",
            None,
        )


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
