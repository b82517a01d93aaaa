"""Small things without Paddle: whole files, sentences, images in folders, a run's log and rows.

Nothing here imports Paddle, NumPy or tqdm before it is needed, so that every program can use it.
"""

import codecs
import contextlib
import errno
import fcntl
import functools
import glob
import json
import logging
import math
import os
import pathlib
import re
import reprlib
import resource
import sys
import time

# --- files ---


@contextlib.contextmanager
def new_file(path):
    """Gives a temporary path to write, which takes the place of `path` if all goes well.

    Otherwise, Ctrl-C included, it is removed and an old file at `path` is as it was.

    Raises:
        OSError: it cannot be written; the error names `path`, which that of a full disk does not.
    """
    path = os.fspath(path)
    temporary = temporary_path(path)
    try:
        # A killed process of this number may have left it, as a hard link to a checkpoint, which
        # writing would destroy.
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, temporary):  # another file's: it has its name
            raise
        raise cannot_be_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
    with contextlib.suppress(OSError):  # the file is whole; some network disks cannot sync a folder
        _sync_folder(os.path.dirname(temporary))


def write_text(path, text, mode="w"):
    """Writes or appends text in place.  Raises OSError, always with the file's name in it."""
    try:
        with open(path, mode, encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    except OSError as error:
        raise cannot_be_written(path, error) from error


def replace_text(path, text):
    """Writes a text file, whole or not at all.  Raises OSError as write_text."""
    with new_file(path) as temporary:
        write_text(temporary, text)


def text_lines(path, limit):
    """The lines of a text file that are not blank, after a byte order mark.

    Yields:
        (number from 1, stripped bytes); of a line longer than `limit` bytes only the start, as
        long as more than that.

    Raises:
        DataError: it is UTF-16 or UTF-32, as wide_text says it.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        if what := wide_text(start):
            raise DataError(what)
        file.seek(3 if start.startswith(codecs.BOM_UTF8) else 0)
        for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), 1):
            if len(line) > limit:
                yield number, line
                while line and not line.endswith(b"\n"):
                    line = file.readline(limit + 1)
            elif line := line.strip():
                yield number, line


def read_names(path):
    """The lines of a file of names, such as classes.txt, without empty ones at the end.

    Raises:
        DataError: it cannot be read, is no UTF-8 text, or a line in it is empty.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path}: cannot read this file of names: {cause(error)}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = os.fsdecode(data)  # as make_lists.py writes the names of folders in another locale
        what = wide_text(data) or (re.search("[\udc80-\udcff]", text) and "not UTF-8 text")
        if what:
            raise DataError(f"{path}: this file of names is {what}") from error
    # Only "\n" ends a line: names of folders may hold any other character.
    names = [line.strip() for line in text.split("\n")]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise DataError(f"{path}:{names.index('') + 1}: this line is empty; each names a class")
    return names


def cannot_be_written(path, error):
    """An OSError of the same type that says which file could not be written, and why."""
    # OSError chooses its subclass by the number; Paddle's errors have none.
    return OSError(error.errno, f"cannot be written: {cause(error)}", show_path(os.fspath(path)))


def temporary_path(path, pid=None):
    """Where a process, this one or `pid`, writes before the file takes the name `path`."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(folder, f".{name}.tmp-{pid or os.getpid()}")


def remove_temporary_files(folder, pid="*"):
    """Removes what killed processes, or one of them, have left half written in a folder.

    Without `pid`, only for a folder in which nobody else writes.
    """
    for path in glob.glob(temporary_path(os.path.join(glob.escape(folder), "*"), pid)):
        with contextlib.suppress(OSError):
            os.remove(path)


def lock(path):
    """Locks a file, which is made where it is missing, until this process and its children end.

    Returns:
        The open file, to be kept.

    Raises:
        BlockingIOError: another process has it.
        OSError: this file system has no locks.
    """
    file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- sentences ---


class UserError(ValueError):
    """What a person gave cannot be used; the message is one sentence for that person."""


class DataError(UserError):
    """Data that cannot be used; the message names the file and the line."""


def show_path(path):
    """A path for a message: quoted where it holds control characters or is no text, cut if long."""
    text = str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 300 else text[:297] + "..."


def show(value, limit=100):
    """Any value for a message, however deep, long or hostile, as Python would write it."""
    if isinstance(value, bytes):
        value = value[: limit + 1].decode(errors="replace")
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = limit
    try:
        text = shortened.repr(value)
    except ValueError:  # an int of thousands of digits
        return "a very large number"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def wide_text(start):
    """What a text with these first bytes is where that is UTF-16 or UTF-32, in words; else None."""
    for name, marks in _WIDE_MARKS.items():
        if start.startswith(marks):
            return f"{name} text: save it as UTF-8 (iconv -f {name} -t UTF-8 OLD > NEW)"
    return None


_WIDE_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # the first begins as UTF-16 does
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def cause(error):
    """An error's reason in one line; of an OSError without its number and file."""
    text = getattr(error, "strerror", None) or str(error)
    text = " ".join(text.split())[:200] or type(error).__name__
    if getattr(error, "errno", None) == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        text += f": a process may have {limit} (ulimit -n): raise that, or take fewer -num_workers"
    return text


def describe_error(error):
    """An error as one sentence; an OSError's own text would begin with its number."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    return f"{error.filename}: {cause(error)}" if error.filename else cause(error)


# --- images in folders ---

# Kinds of what is left out, for counts.
HIDDEN = "hidden"
SYSTEM = "folders that a system makes"
NO_IMAGE = "without an image's suffix"
DEAD_LINK = "links that lead nowhere"
NO_FILE = "neither files nor folders"
UNREADABLE = "folders that cannot be read"
AGAIN = "links to a folder above or one that was read already"
# Thumbnails, copies and what was deleted: of Synology, QNAP, macOS, Windows, ext4, FAT, Android and
# Jupyter.  Lower case, as these systems do not tell case.
_SYSTEM_FOLDERS = {
    "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb",
    "__macosx", "$recycle.bin", "system volume information", "lost+found", "found.000",
    "lost.dir", ".ipynb_checkpoints",
}  # fmt: skip
# Formats that Pillow recognizes, and cannot read without another program or library.
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.lru_cache(None)
def image_suffixes():
    """The suffixes, in lower case, of the images that Pillow can read on this machine."""
    from PIL import Image

    Image.init()
    formats = {*Image.OPEN, "MPO"} - _NO_PIXELS  # .mpo is read as the JPEG that it begins with
    return tuple(
        suffix for suffix, name in Image.registered_extensions().items() if name in formats
    )


def is_image_name(path):
    """Whether a file's name has the suffix of an image."""
    return path.lower().endswith(image_suffixes())


def is_system_folder(name):
    """Whether a folder of this name was made by a system, not by a person."""
    return name.lower() in _SYSTEM_FOLDERS


def find_images(folder, skip):
    """The images in a folder and the folders in it, by their suffix and sorted by name.

    Links are followed, but no folder is read twice, and none above `folder`.

    Args:
        folder: where to look.
        skip: called with (HIDDEN or another kind; path; a sentence that says what is wrong with it,
            None where nothing is) of what is left out.

    Yields:
        Paths that begin with `folder`.
    """
    seen = {
        _identity(parent) for parent in (*_parents(folder), *_parents(os.path.realpath(folder)))
    }
    stack = [(folder, True)]
    while stack:
        path, to_read = stack.pop()
        if not to_read:
            yield path
            continue
        try:
            identity, entries = _identity(path), sorted_entries(path)
        except OSError as error:
            skip(UNREADABLE, path, f"this folder cannot be read: {cause(error)}")
            continue
        if identity in seen:
            skip(AGAIN, path, None)
            continue
        seen.add(identity)
        found = []
        for entry in entries:
            if entry.name.startswith("."):
                skip(HIDDEN, entry.path, None)
            elif is_folder(entry):
                if is_system_folder(entry.name):
                    skip(SYSTEM, entry.path, None)
                else:
                    found.append((entry.path, True))
            elif not is_image_name(entry.name):
                skip(NO_IMAGE, entry.path, None)
            elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                found.append((entry.path, False))
            else:
                skip(*broken(entry.path))
        stack.extend(reversed(found))


def broken(path):
    """(kind, path, sentence) of what is neither a file nor a folder, as for find_images's skip."""
    if os.path.exists(path):
        return NO_FILE, path, "this is neither a file nor a folder"
    return DEAD_LINK, path, "this link leads nowhere"


@contextlib.contextmanager
def only_pixels():
    """In here Pillow reads of a PNG what decides its pixels, and passes over texts and profiles.

    It would refuse the image for one that is long, or many megabytes long when it is unpacked.
    """
    from PIL import PngImagePlugin

    stream = PngImagePlugin.PngStream
    PngImagePlugin.PngStream = _without_readers(stream)
    try:
        yield
    finally:
        PngImagePlugin.PngStream = stream


@functools.lru_cache(None)
def _without_readers(stream):
    chunks = ("tEXt", "zTXt", "iTXt", "iCCP", "gAMA", "cHRM", "sRGB", "pHYs")
    # A chunk whose reader raises AttributeError is passed over.
    return type(stream.__name__, (stream,), {f"chunk_{name}": property() for name in chunks})


def _identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _parents(path):
    return map(str, pathlib.Path(path).absolute().parents)


def is_folder(entry):
    """Whether an entry of os.scandir is a folder, or a link to one."""
    # A link that leads to itself makes entry.is_dir() raise.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def sorted_entries(folder):
    """The entries of os.scandir by the bytes of their names, in any locale alike."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: os.fsencode(entry.name))


# --- what a program prints ---


def prepare_streams():
    """Makes the standard streams such that nothing printed can end a program; called first in each.

    A stream that is closed (`>&-`) becomes /dev/null: otherwise the next file that is opened takes
    its number, and gets what C++ code prints.  Characters that a console lacks are escaped.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        # Jupyter's streams do not have it, nor need it.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")


# --- a run's log and progress ---


def setup_logging(folder, rank):
    """A logger: `log_<rank>.txt` for every rank; on rank 0 also `log.txt` and standard output.

    On a terminal, where a progress bar shows them, reports (level DEBUG) go to the files only, and
    so does what is logged with `extra={"file_only": True}`.
    """
    logger = logging.getLogger("gmlp")
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logging.raiseExceptions = False  # a full disk would print a traceback for each line
    formatter = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers = [_log_file(folder, f"log_{rank}.txt")]
    if rank == 0:
        handlers.append(_log_file(folder, "log.txt"))
        console = _ConsoleHandler()
        console.setLevel(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
        console.addFilter(lambda record: not getattr(record, "file_only", False))
        handlers.append(console)
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


def _log_file(folder, name):
    path = os.path.join(folder, name)
    return logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")


class _ConsoleHandler(logging.Handler):
    """Prints on standard output, above a progress bar where there is one."""

    def emit(self, record):
        from tqdm import tqdm

        with contextlib.suppress(OSError):  # such as `| head`, a full disk: the run itself goes on
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def progress_bar(items, total, title="", unit="batch", shown=True, done=0):
    """`items` with a progress bar on a terminal, without one elsewhere or where not `shown`."""
    from tqdm import tqdm

    return tqdm(
        items, f"{title}: " if title else "", total, leave=False, unit=unit, initial=done,
        disable=not (shown and sys.stderr.isatty()),
        dynamic_ncols=True,  # of the window as it is now: a line that is too long leaves its rest
        bar_format=_BAR,
    )  # fmt: skip


# A narrow window cuts off the end: what a person looks for stands first.
_BAR = "{desc}{percentage:.0f}%{postfix} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


# --- a run's numbers, metrics.jsonl ---

SCORES = ("acc1", "acc5", "loss")  # what a validation gives: percent, percent, mean cross entropy


class MetricsFile:
    """Appends one JSON object per row to `metrics.jsonl`; does nothing on other ranks than 0."""

    def __init__(self, folder, rank):
        self.path = os.path.join(folder, "metrics.jsonl") if rank == 0 else None
        if self.path and os.path.exists(self.path):
            _cut_last_line(self.path)

    def write(self, **row):
        """Appends a row with the time.  Raises OSError, with the file's name in it."""
        if self.path:
            row = {"time": round(time.time(), 3), **row}
            write_text(self.path, to_json(row) + "\n", mode="a")


def last_time(path):
    """The time of the last row of a metrics.jsonl, in seconds; None where it has no such row."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 10_000))
            line = file.read().rpartition(b"\n")[0].splitlines()[-1]
        seconds = float(json.loads(line)["time"])
        return seconds if 0 < seconds < 1e11 else None
    return None


def _cut_last_line(path):
    """Takes off what a killed process left of a line, so that the next one starts on its own."""
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def to_json(row, **kwargs):
    """A flat dict as JSON; numbers that are not finite, which JSON has not, become null."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(finite, **kwargs)
