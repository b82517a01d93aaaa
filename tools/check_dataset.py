"""Read a whole data set ahead of a run, and report every problem at once.

    python tools/check_dataset.py -data_path /dataset/imagenet
    python tools/check_dataset.py -data_path data/digits -num_classes 10 -lists val_list.txt

Prints a line `list:line: ...` for each bad line and each image that a run would refuse, with the
run's own words, then warnings: images listed again (in the list itself, or of training in
validation) and classes without an image.  Exit status: 0, 1 where there is a problem (warnings are
none), 2 for what was asked wrongly.
"""

import argparse
import collections
import contextlib
import functools
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
from utils import DataError, progress_bar, show_path

# Paddle, which datasets.py imports, comes in check(): -h and a wrong flag answer at once.

_CHUNK = 64  # images that a process checks at a time


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
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
    lists = []
    for name in dict.fromkeys(names):
        try:
            on_bad_line = functools.partial(tally.add, "problems")
            lists.append(ImageList(root, name, num_classes, on_bad_line))
        except DataError as error:
            tally.add("problems", error)
    total = sum(map(len, lists))
    with progress_bar(None, total, unit="image") as bar:
        for images in lists:
            dataset = ImageDataset(images, transform=None, seed=0)
            for done, problems in check_images(dataset, workers):
                for problem in problems:
                    tally.add("problems", problem)
                bar.update(done)
    empty = (empty_classes(images, num_classes) for images in lists)
    for sentence in itertools.chain(repeated(lists), *empty):
        tally.add("warnings", sentence)
    sizes = ", ".join(f"{os.path.basename(images.name)} {len(images):,}" for images in lists)
    problems, warnings = tally.counts["problems"], tally.counts["warnings"]
    print(f"images: {sizes or 'none'}; problems: {problems:,}, warnings: {warnings:,}")
    return 1 if problems else 0


def check_images(dataset, workers):
    """Decodes every image of an ImageDataset, in `workers` processes.

    The parent hands out the work and waits on pipes, so that a process that dies is noticed, and
    nothing grows with the number of images but the sentences.  What a process died of is looked
    for image by image, in new processes.

    Yields:
        (number of images, list of sentences) of one piece of the list after the other, in order.
    """
    size = len(dataset)
    pieces = iter([(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)])
    again = collections.deque()  # images of pieces that a process died of, before all others
    processes, busy = {}, {}  # of each pipe: its process, and its piece
    finished, following = {}, 0  # (end, sentences) that wait for those of earlier pieces
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
                        finished[start] = end, [_describe_death(process, dataset, start)]
                    else:
                        again.extendleft((i, i + 1) for i in reversed(range(start, end)))
                piece = again.popleft() if again else next(pieces, None)
                if piece and died:
                    _start(dataset, processes, busy, piece)
                elif piece:
                    _hand_out(pipe, piece, busy)
            while following in finished:
                start, (following, problems) = following, finished.pop(following)
                yield following - start, problems
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
    """A process's loop: a piece in, the sentences of its bad images out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    host.die_with_parent(parent, signal.SIGKILL)
    while True:
        start, end = pipe.recv()
        problems = []
        for index in range(start, end):
            try:
                dataset.read(index)
            except DataError as error:
                problems.append(str(error))
        pipe.send(problems)


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
    """Sentences about the images that an earlier line, or an earlier list, has already."""
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
            f"{images.place(index)}: warning: "
            f"{show_path(images.image_path(index))}: this image is already in "
            f"{os.path.basename(earlier.place(earlier_index))}{other}"
        )


def empty_classes(images, num_classes):
    """A sentence about the classes that have no image in a list, where there are any."""
    import numpy as np

    empty = np.flatnonzero(np.bincount(images.labels, minlength=num_classes) == 0)
    if len(empty):
        some = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        yield (
            f"{images.name}: warning: {len(empty):,} of {num_classes:,} classes have no image: "
            f"{some} (-num_classes says how many there are)"
        )


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
