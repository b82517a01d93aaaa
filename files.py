"""Files that are whole or not there at all, and paths in sentences.  Needs no Paddle."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil


@contextlib.contextmanager
def new_file(path):
    """Gives a temporary path to write, which takes the place of `path` if all goes well.

    Otherwise, Ctrl-C included, it is removed and an old file at `path` is as it was.

    Raises:
        OSError: it cannot be written; always with the name `path`, which a full disk does not say.
    """
    path = os.fspath(path)
    temporary = temporary_path(path)
    try:
        # May be left of a killed process with this number, as a link to a file that is to stay.
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


@contextlib.contextmanager
def new_folder(path):
    """Gives a temporary folder to fill, which takes the name `path` if all goes well.

    Otherwise it is removed with all that is in it.  There must be no `path` yet.

    Raises:
        OSError: it cannot be made; an error that names a file of its own keeps it.
    """
    path = os.path.abspath(path)
    temporary = temporary_path(path)
    try:
        os.mkdir(temporary)
        yield temporary
        if os.path.lexists(path):  # os.rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(temporary, path)
    except OSError as error:
        if not str(error.filename or temporary).startswith(temporary):
            raise
        raise cannot_be_written(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path, text, mode="w"):
    """Writes or appends text in place.  Raises OSError, always with the file's name in it."""
    try:
        with open(path, mode) as file:
            file.write(text)
    except OSError as error:
        raise cannot_be_written(path, error) from error


def cannot_be_written(path, error):
    """An OSError of the same type that says which file could not be written, and why."""
    # Of an error with a number, the standard library chooses the type; Paddle's have none.
    reason = error.strerror or str(error)
    return OSError(error.errno, f"cannot be written: {reason}", show_path(os.fspath(path)))


def temporary_path(path, pid=None):
    """Where a process, this one or `pid`, writes before the file takes the name `path`."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(folder, f".{name}.tmp-{pid or os.getpid()}")


def remove_temporary_files(folder, pid="*"):
    """Removes what killed processes, or one of them, have left half written in a folder.

    Without `pid` it is for who alone writes there.
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


def show_path(path):
    """A path for a message: quoted where it holds control characters or is no text, cut if long."""
    text = str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 300 else text[:297] + "..."


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
