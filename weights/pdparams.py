"""Weight files: read without running code from them, written so that a kill never costs one.

    weights = pdparams.read("gmlp_s16_224.pdparams")         # nested dict of NumPy arrays
    pdparams.write("last.pdparams", {"model": model.state_dict(), "epoch": 3})

A ``.pdparams`` file is a pickle, ``paddle.load`` is ``pickle.load``, and a pickle may call any
function of any module. unpickle.py reads it without that.
"""

import collections
import hashlib
import os
import stat

import numpy as np

from utils import cause, new_file, show, show_path
from weights.unpickle import (
    DTYPES,
    MAX_ITEMS,
    SAFETENSORS_DTYPES,
    WeightsError,
    check_key,
    from_bfloat16,
    unpickle,
)

_OPCODES_OF_TENSOR = 40  # at most, with its name: `write` makes no file that is too much for `read`
_MAX_DEPTH = 32
_MAX_SIZE = 4 << 30  # a B/16 training checkpoint with EMA takes 1.2 GB
_MAX_HEADER = 4 << 20  # of a .safetensors; S/16's takes 30 KB, one of 100 MB twenty seconds

_TRAILER = b"\x00gMLP SHA-256 1\n"  # then the digest of every byte before this marker
_TRAILER_SIZE = len(_TRAILER) + hashlib.sha256().digest_size

_SCALARS = (str, int, float, bool, type(None))
_SPLIT_TABLE = "UnpackBigParamInfor@@"  # protocols 2 and 3: tensors of 1 GB and more, in parts

SUFFIXES = (".pdparams", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz")
_FROM_NUMPY = "save the arrays as .safetensors, with safetensors.numpy.save_file"
_OTHER_FORMATS = (
    (b"PK\x03\x04", "is a zip archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras?): convert it to .safetensors"),
    (b"\x93NUMPY", f"is a NumPy array (.npy): {_FROM_NUMPY}"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights: run `git lfs pull`"),
    (b"\x00\x00\x00\x00", "is in Paddle's inference format: give a file that paddle.save wrote"),
)


def read(path, require_checksum=False):
    """The contents of a ``.pdparams`` or ``.safetensors`` file, without running code from it.

    A checksum that `write` left at the end is verified. Tensors that Paddle pickled inside nested
    dicts as (name, array) come back as arrays (their names: read_with_names), and its tables of
    parameter names are left out.

    Args:
        path: the file; what is in it decides the format, then its suffix.
        require_checksum: refuse a file without a checksum too, as a truncated checkpoint is.

    Returns:
        dict, nested, of dicts, lists, tuples, strings, numbers, None, NumPy scalars and read-only
        native-endian NumPy arrays in shapes as stored. bfloat16, which Paddle stores as uint16,
        becomes float32 with the same values.

    Raises:
        WeightsError: the file is missing, unreadable, damaged, of another format, or asks for
            anything that weights do not need.
    """
    return read_with_names(path, require_checksum)[0]


def read_with_names(path, require_checksum=False):
    """As read, with the names that Paddle gave the tensors in the process that wrote the file.

    Returns:
        (tree, names): what read returns; and the name ("linear_0.w_0") of each tensor that was
        pickled inside a nested dict, by the `id` of its array in the tree.
    """
    path = os.fspath(path)
    shown = show_path(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise WeightsError(f"is a folder: give the path of a weight file{_files_in(path)}")
        if not stat.S_ISREG(mode):
            raise WeightsError("is not a regular file: give the path of a weight file")
        with open(path, "rb") as file:
            return _parse(file, _size_without_trailer(file, require_checksum), path)
    except WeightsError as error:
        raise WeightsError(f"{shown} {error}") from None
    except FileNotFoundError:
        raise WeightsError(f"{shown} does not exist: {_meant(path)}") from None
    except MemoryError:
        raise WeightsError(f"{shown} does not fit in memory: use a smaller file") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise WeightsError(f"{shown} cannot be read ({cause(error)}): check the path") from None


def _files_in(folder):
    """What a sentence says of the weight files in a folder; those that people want come first."""
    wanted = ("best_weights.pdparams", "last.pdparams")
    names = [name for name in os.listdir(folder) if name.endswith(SUFFIXES)]
    names = [n for n in wanted if n in names] or sorted(n for n in names if n[:1] != ".")[:2]
    paths = " or ".join(show_path(os.path.join(folder, name)) for name in names)
    return paths and f", such as {paths}"


def _meant(path):
    """What to do about a path where nothing is: what a slip of the keyboard may have meant."""
    if "://" in path:
        return "download it first, and give the path of the file"
    home = os.path.expanduser(path)  # in -pretrained=~/w.pdparams no shell does it
    stems = (home.rstrip("."), os.path.splitext(home)[0])
    for other in (home, *(stem + suffix for stem in stems for suffix in SUFFIXES)):
        if os.path.isfile(other):
            return f"did you mean {show_path(other)}?"
    return "check the path"


def is_of_pytorch(path):
    """Whether a file begins as one that torch.save wrote; False where it cannot be read."""
    try:
        if not os.path.isfile(path):  # a pipe might never answer
            return False
        with open(path, "rb") as file:
            return _is_of_pytorch(file.read(512))
    except OSError:
        return False


def _is_of_pytorch(head):
    # Since PyTorch 1.6 a zip archive with NAME/data.pkl first, before that a pickled number.
    old = head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
    return old or _first_in_zip(head).endswith(b"/data.pkl")


def _first_in_zip(head):
    """The name of the first file in a zip archive that begins so; nothing for another format."""
    is_zip = head.startswith(b"PK\x03\x04")
    return head[30 : 30 + int.from_bytes(head[26:28], "little")] if is_zip else b""


def write(path, tree):
    """Writes a tree with ``paddle.save`` and a checksum, whole or not at all.

    Everything goes to a temporary file in the same folder, which takes the place of ``path`` once
    it is on disk. The checksum stands behind the pickle's end, where ``paddle.load`` does not look.

    Args:
        path: the file to create or replace, in a folder that exists.
        tree: nested dict (lists and tuples too) of Paddle tensors, numeric NumPy arrays, numbers,
            strings and None, with strings or integers for keys.

    Raises:
        WeightsError: the tree holds something that `read` would refuse.
        OSError: the disk is full, the folder missing or read-only; an old file is as it was.
    """
    import paddle  # here, so that reading needs no Paddle

    shown = show_path(path)
    try:
        _check_tree(tree, tensor_type=paddle.Tensor)
    except WeightsError as error:
        raise WeightsError(f"{shown} cannot be written, the tree {error}") from None

    with new_file(path) as temporary:
        open(temporary, "wb").close()  # fails without a folder, which paddle.save would create
        paddle.save(tree, temporary, protocol=4)
        _append_trailer(temporary)
        if os.path.getsize(temporary) > _MAX_SIZE:
            raise WeightsError(f"{shown} cannot be written: above {_MAX_SIZE >> 30} GB")


def checksum(path):
    """What tells files apart: the checksum at a file's end, or of one without it the SHA-256.

    The checksum is as the file says; `read` verifies it.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_SIZE:  # `read` refuses it
            return f"{size} bytes"
        file.seek(max(0, size - _TRAILER_SIZE))
        trailer = file.read(_TRAILER_SIZE)
    if trailer.startswith(_TRAILER):
        return trailer.removeprefix(_TRAILER).hex()
    return sha256(path)


def sha256(path):
    """SHA-256 of a whole file, 64 hex digits; raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return _digest(file, os.fstat(file.fileno()).st_size).hex()


def _digest(file, size):
    digest = hashlib.sha256()
    while chunk := file.read(min(size, 1 << 20)):
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()


def _size_without_trailer(file, require_checksum):
    size = os.fstat(file.fileno()).st_size
    if size > _MAX_SIZE:
        raise WeightsError(f"takes {size:,} bytes, more than weights do: use another file")
    body = max(0, size - _TRAILER_SIZE)
    file.seek(body)
    # Nothing of files in /proc, whose size is 0 and whose read may block.
    trailer = file.read(size - body)
    file.seek(0)
    if not trailer.startswith(_TRAILER):
        if require_checksum:
            raise WeightsError("is incomplete, it has no checksum at its end: use an earlier one")
        return size
    if trailer != _TRAILER + _digest(file, body):
        raise WeightsError("is damaged, its checksum does not match: use another copy")
    file.seek(0)
    return body


def _append_trailer(path):
    with open(path, "r+b") as file:
        digest = _digest(file, os.fstat(file.fileno()).st_size)
        file.seek(0, os.SEEK_END)
        file.write(_TRAILER + digest)
        file.flush()
        os.fsync(file.fileno())


def _parse(file, size, path):
    head = file.read(min(size, 512))
    file.seek(0)
    _refuse_other_formats(head)
    # A safetensors file is the length of its JSON header, eight bytes, then that header.
    looks_safe = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8
    if looks_safe or path.endswith(".safetensors"):
        if int.from_bytes(head[:8], "little") > _MAX_HEADER:
            raise WeightsError("has too long a header for a safetensors file: use another copy")
        return _read_safetensors(file.read(size)), {}
    if head[:1] != b"\x80":
        raise WeightsError("is not a .pdparams file: give one that paddle.save wrote")
    tree, names = unpickle(file, size)
    _check_tree(tree)
    if _SPLIT_TABLE in tree:
        raise WeightsError("holds tensors in parts: save it again with protocol=4")
    return tree, names


def _refuse_other_formats(head):
    if not head:
        raise WeightsError("is empty: use another copy")
    if _is_of_pytorch(head):
        raise WeightsError("is a PyTorch file: tools/port_weights.py makes a .pdparams of it")
    if _first_in_zip(head).endswith(b".npy"):
        raise WeightsError(f"is an .npz of NumPy arrays: {_FROM_NUMPY}")
    for signature, sentence in _OTHER_FORMATS:
        if head.startswith(signature):
            raise WeightsError(sentence)
    if head[257:262] == b"ustar":
        raise WeightsError("is a tar archive: unpack it first")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise WeightsError("is a web page, from a download that failed: download it again")
    if head.isascii() and b"\x00" not in head:
        raise WeightsError("is a text file: give a file that paddle.save wrote")


def _read_safetensors(data):
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError:
        raise WeightsError("needs a package that is missing: pip install safetensors") from None
    try:
        tensors = deserialize(data)
        for name, _ in tensors:
            check_key(name)
        return {name: _from_safetensors(name, **tensor) for name, tensor in tensors}
    except WeightsError:
        raise
    except (SafetensorError, OverflowError, ValueError) as error:  # the last two: a shape
        reason = show(str(error))  # may quote what is in the file
        raise WeightsError(f"is a damaged safetensors file ({reason}): use another copy") from None


def _from_safetensors(name, dtype, shape, data):
    if dtype in ("BF16", "U16"):  # safetensors.numpy makes U16 of what Paddle gives for bfloat16
        array = from_bfloat16(np.ndarray(shape, "<u2", buffer=data))
    elif dtype in SAFETENSORS_DTYPES:
        array = np.ndarray(shape, "<" + SAFETENSORS_DTYPES[dtype], buffer=data)
    else:
        raise WeightsError(f"holds {show(name)} as {dtype}: convert it to float32")
    array.flags.writeable = False
    return array


def _check_tree(tree, tensor_type=()):
    """Refuses what weights do not hold, and a tree too large to walk.

    A hundred bytes can hold a list that is its own item, or a tree of 2**30 leaves.
    """
    if not isinstance(tree, dict):
        raise WeightsError("has no dict at the top: give a state dict")
    pending = [("the top", tree, 0)]
    visited = 0
    while pending:
        key, value, depth = pending.pop()
        is_array = isinstance(value, (np.ndarray, np.generic))
        visited += _OPCODES_OF_TENSOR if is_array or isinstance(value, tensor_type) else 1
        if depth > _MAX_DEPTH or visited + len(pending) > MAX_ITEMS:
            raise WeightsError("is nested too deeply or holds too many items: save weights only")
        if type(value) in (list, tuple):
            pending.extend((key, item, depth + 1) for item in value)
        elif type(value) in (dict, collections.OrderedDict):
            for name, item in value.items():
                check_key(name)
                pending.append((name, item, depth + 1))
        elif is_array:
            if value.dtype.str[1:] not in DTYPES:
                raise WeightsError(f"holds an array of {value.dtype} at {show(key)}: drop it")
        elif type(value) not in _SCALARS and not isinstance(value, tensor_type):
            raise WeightsError(f"holds a {type(value).__name__} at {show(key)}: drop it")
