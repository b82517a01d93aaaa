"""Weight files: read without running code from them, written so that a kill never costs one.

    weights = pdparams.read("gmlp_s16_224.pdparams")         # nested dict of NumPy arrays
    pdparams.write("last.pdparams", {"model": model.state_dict(), "epoch": 3})

A ``.pdparams`` file is a pickle, ``paddle.load`` is ``pickle.load``, and a pickle may call any
function of any module. Here the table of opcodes in ``pickletools``, the standard library's
disassembler, decodes them, and a small machine interprets those that weights need. It has no way to
import, look up or call anything outside `_GLOBALS`.
"""

import collections
import functools
import hashlib
import math
import os
import pickletools
import stat
import struct
import types

import numpy as np

from files import new_file, show_path

# An S/16 training checkpoint with EMA takes 72,000 opcodes; of those that a hostile file would
# choose, 300,000 take more than a second.
_MAX_ITEMS = 300_000
_OPCODES_OF_TENSOR = 40  # at most, with its name: `write` makes no file that is too much for `read`
_MAX_DEPTH = 32
_MAX_SIZE = 4 << 30  # a B/16 training checkpoint with EMA takes 1.2 GB; a file with holes, nothing
_MAX_HEADER = 4 << 20  # of a .safetensors; S/16's takes 30 KB, one of 100 MB twenty seconds
_MAX_NAME = 1000  # of a dict's key, and of a global

_TRAILER = b"\x00gMLP SHA-256 1\n"  # then the digest of every byte before this marker
_TRAILER_SIZE = len(_TRAILER) + hashlib.sha256().digest_size

_SAFETENSORS_DTYPES = {
    **{"BOOL": "b1", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "C64": "c8"},
    **{"U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8", "F16": "f2", "F32": "f4", "F64": "f8"},
}
_DTYPES = {*_SAFETENSORS_DTYPES.values(), "c16"}
_SCALARS = (str, int, float, bool, type(None))
_NAME_TABLE = "StructuredToParameterName@@"  # Paddle's bookkeeping, beside the tensors
_SPLIT_TABLE = "UnpackBigParamInfor@@"  # protocols 2 and 3: tensors of 1 GB and more, in parts

_FROM_PYTORCH = "load it in PyTorch and save its tensors with safetensors.torch.save_file"
_OTHER_FORMATS = (
    (b"PK\x03\x04", f"is a zip archive, most likely a PyTorch file: {_FROM_PYTORCH}"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", f"is an old PyTorch file: {_FROM_PYTORCH}"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras?): convert it to .safetensors"),
    (b"\x93NUMPY", "is a NumPy array (.npy): give a file that holds a dict of arrays"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights: run `git lfs pull`"),
    (b"\x00\x00\x00\x00", "is in Paddle's inference format: give a file that paddle.save wrote"),
)
_UNTRUSTED = "which weights do not need: do not use this file unless you trust who made it"


class WeightsError(ValueError):
    """A weight file that cannot be used: one sentence that names the file and the cure."""


def read(path, require_checksum=False):
    """The contents of a ``.pdparams`` or ``.safetensors`` file, without running code from it.

    A checksum that `write` left at the end is verified. Tensors that Paddle pickled inside nested
    dicts as (name, array) come back as arrays, and its tables of parameter names are left out.

    Args:
        path: the file; what is in it decides the format, then its suffix.
        require_checksum: refuse a file without a checksum too, as a truncated checkpoint is.

    Returns:
        dict, nested, of dicts, lists, tuples, strings, numbers, None, NumPy scalars and read-only
        native-endian NumPy arrays in shapes as stored. bfloat16 is uint16 (its bits) out of a
        ``.pdparams``, as Paddle stores it, and float32 (exact) out of a ``.safetensors``.

    Raises:
        WeightsError: the file is missing, unreadable, damaged, of another format, or asks for
            anything that weights do not need.
    """
    path = os.fspath(path)
    shown = show_path(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise WeightsError(f"is {kind}: give the path of a weight file")
        with open(path, "rb") as file:
            return _parse(file, _size_without_trailer(file, require_checksum), path)
    except WeightsError as error:
        raise WeightsError(f"{shown} {error}") from None
    except FileNotFoundError:
        raise WeightsError(f"{shown} does not exist: check the path") from None
    except MemoryError:
        raise WeightsError(f"{shown} does not fit in memory: use a smaller file") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(f"{shown} cannot be read ({reason}): check the path") from None


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
    trailer = file.read(size - body)  # not a byte of those in /proc that have no size, but block
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
        return _read_safetensors(file.read(size))
    if head[:1] != b"\x80":
        raise WeightsError("is not a .pdparams file: give one that paddle.save wrote")
    try:
        tree = _Machine(size).run(_Source(file, size))
    except WeightsError:
        raise
    except (LookupError, OverflowError, TypeError, ValueError, struct.error) as error:
        raise WeightsError(f"is not an intact .pdparams file ({error}): use another copy") from None
    _check_tree(tree)
    if _SPLIT_TABLE in tree:
        raise WeightsError("holds tensors in parts: save it again with protocol=4")
    return tree


def _refuse_other_formats(head):
    if not head:
        raise WeightsError("is empty: use another copy")
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
            _check_key(name)
        return {name: _from_safetensors(name, **tensor) for name, tensor in tensors}
    except WeightsError:
        raise
    except (SafetensorError, OverflowError, ValueError) as error:  # the last two: a shape
        reason = _shown(str(error))  # may quote what is in the file
        raise WeightsError(f"is a damaged safetensors file ({reason}): use another copy") from None


def _from_safetensors(name, dtype, shape, data):
    if dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(data, "<u2").astype("<u4") << 16
        array = bits.view("<f4").reshape(shape)
    elif dtype in _SAFETENSORS_DTYPES:
        array = np.ndarray(shape, "<" + _SAFETENSORS_DTYPES[dtype], buffer=data)
    else:
        raise WeightsError(f"holds {_shown(name)} as {dtype}: convert it to float32")
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
        if depth > _MAX_DEPTH or visited + len(pending) > _MAX_ITEMS:
            raise WeightsError("is nested too deeply or holds too many items: save weights only")
        if type(value) in (list, tuple):
            pending.extend((key, item, depth + 1) for item in value)
        elif type(value) in (dict, collections.OrderedDict):
            for name, item in value.items():
                _check_key(name)
                pending.append((name, item, depth + 1))
        elif is_array:
            if value.dtype.str[1:] not in _DTYPES:
                raise WeightsError(f"holds an array of {value.dtype} at {_shown(key)}: drop it")
        elif type(value) not in _SCALARS and not isinstance(value, tensor_type):
            raise WeightsError(f"holds a {type(value).__name__} at {_shown(key)}: drop it")


def _check_key(key):
    # Hashing recurses through nested tuples, and large integers can be made to collide.
    if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
        raise WeightsError(f"has a key of type {type(key).__name__}: use strings or small integers")
    # Keys are parameter names, which end up in logs and error messages.
    if type(key) is str and not (len(key) <= _MAX_NAME and key.isprintable()):
        raise WeightsError(f"has a key that is no name, {_shown(key)}: use printable strings")


def _shown(text):
    return ascii(text[:100]) if isinstance(text, str) else type(text).__name__


class _Source:
    """A file as pickletools reads it, never asked for more than it holds.

    A file object allocates what it is asked for before it reads.
    """

    def __init__(self, file, size):
        self.file, self.left = file, size

    def read(self, size):
        return self._count(self.file.read(min(size, self.left)))

    def readline(self):  # the name of a global
        line = self._count(self.file.readline(min(_MAX_NAME, self.left)))
        if b"\\" in line:  # pickletools would decode it as an escape, and warn
            raise ValueError("a global has an odd name")
        return line

    def _count(self, data):
        self.left -= len(data)
        return data


class _Unbuilt:
    """What numpy.dtype or _reconstruct made, until BUILD gives it a state.

    The memo refers to it from before that, hence the room for the result.
    """

    def __init__(self, build):
        self.build = build
        self.result = self


class _Machine:
    """A pickle machine (see pickletools): a stack with marks, a memo, `_GLOBALS`, nothing else."""

    def __init__(self, size):
        self.stack, self.marks, self.memo = [], [], {}
        # Protocol 2 uses a byte twice, as text and in the array. A file that refers to the same
        # bytes again and again could fill the memory.
        self.bytes_left = 2 * size

    def run(self, source):
        for _ in range(_MAX_ITEMS):
            opcode = pickletools.code2op[source.read(1).decode("latin1")]
            # Before its argument is decoded: that of an opcode for text may import a codec.
            if opcode.name not in _OPCODES:
                raise WeightsError(f"uses the pickle opcode {opcode.name}, {_UNTRUSTED}")
            arg = opcode.arg.reader(source) if opcode.arg else None
            _OPCODES[opcode.name](self, arg)
            if opcode.name == "STOP":
                break
        else:
            raise WeightsError("holds too many items: save weights only")
        if source.left or self.marks or len(self.stack) != 1:
            raise ValueError("its end is not where it should be")
        return self.stack[0]

    def spend(self, size):
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise WeightsError(f"unpacks to far more than its size, {_UNTRUSTED}")

    def push(self, value):
        self.stack.append(value)

    def pop(self, count):
        return [self.stack.pop() for _ in range(count)][::-1]

    def pop_to_mark(self):
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def memoize(self, index):
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def recall(self, index):
        value = self.memo[index]
        self.push(value.result if type(value) is _Unbuilt else value)

    def append(self, items):
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to something that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items):
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it sets items of something that is not a dict")
        for key, value in zip(items[::2], items[1::2]):
            _check_key(key)
            if key != _NAME_TABLE:
                target[key] = value

    def find_global(self, module, name):
        if type(module) is not str or type(name) is not str:
            raise ValueError("a global has no name")
        if (module, name) not in _GLOBALS:
            asked = _shown(f"{module}.{name}").strip("'\"")
            raise WeightsError(f"asks for {asked}, {_UNTRUSTED}")
        self.push(_GLOBALS[module, name])

    def reduce(self, _):
        function, args = self.pop(2)
        # The only functions that can be on the stack are ours, from _GLOBALS.
        if type(function) is not types.FunctionType or type(args) is not tuple:
            raise ValueError("it calls something that is not a function")
        self.push(function(self, *args))

    def build(self, _):
        unbuilt, state = self.pop(2)
        if type(unbuilt) is not _Unbuilt or type(state) is not tuple:
            raise ValueError("it sets the state of something that has none")
        unbuilt.result = unbuilt.build(self, *state)
        self.push(unbuilt.result)


def _dtype(machine, code, align, copy):
    if type(code) is not str or code not in _DTYPES:
        raise WeightsError(f"holds an array of type {_shown(code)}, not of numbers: drop it")
    return _Unbuilt(functools.partial(_dtype_from_state, code))


def _dtype_from_state(code, machine, version, order, *rest):
    # rest: subarray, names, fields, size, alignment, flags; other types than numbers set them.
    if type(order) is not str or order not in "<>|" or rest != (None, None, None, -1, -1, 0):
        raise WeightsError("holds an array of structures: drop it")
    return np.dtype(order + code)


def _reconstruct(machine, array_type, shape, code):
    # What these say is a placeholder: the state has the array's shape and type.
    return _Unbuilt(_array_from_state)


def _array_from_state(machine, version, shape, dtype, is_fortran, data):
    return _frombuffer(machine, data, dtype, shape, "F" if is_fortran is True else "C")


def _frombuffer(machine, data, dtype, shape, order):
    if type(shape) is not tuple or len(shape) > 32:  # NumPy 1's limit
        raise ValueError("an array has an impossible shape")
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError("an array has an impossible shape")
    if type(data) not in (bytes, bytearray) or not isinstance(dtype, np.dtype) or order not in "CF":
        raise ValueError("an array has no data")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array's data do not fit its shape")
    machine.spend(len(data))
    array = np.ndarray(shape, dtype, buffer=data, order=order)  # shares the data
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def _scalar(machine, dtype, data):
    return _frombuffer(machine, data, dtype, (), "C")[()]


def _encode(machine, text, encoding):  # how protocol 2 writes bytes
    if type(text) is not str or encoding != "latin1":
        raise ValueError("it encodes something else than bytes")
    machine.spend(len(text))
    return text.encode("latin1")


def _tensor(machine, pair):  # Paddle pickles a Tensor as tuple((name, array)), by a call
    if type(pair) is not tuple or len(pair) != 2 or not isinstance(pair[1], np.ndarray):
        raise ValueError("a tensor is not a name and an array")
    return pair[1]


# The whole of what a file may name. The functions get the machine and the arguments in the file.
_GLOBALS = {
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): np.ndarray,  # only named: the machine calls nothing but functions
    ("collections", "OrderedDict"): lambda machine: {},
    ("_codecs", "encode"): _encode,
}
for _module in ("numpy.core", "numpy._core"):  # NumPy 1, NumPy 2
    _GLOBALS[f"{_module}.multiarray", "_reconstruct"] = _reconstruct
    _GLOBALS[f"{_module}.multiarray", "scalar"] = _scalar
    _GLOBALS[f"{_module}.numeric", "_frombuffer"] = _frombuffer  # protocol 5
for _module in ("__builtin__", "builtins"):  # protocol 2, later ones
    _GLOBALS[_module, "tuple"] = _tensor
    _GLOBALS[_module, "bytes"] = lambda machine: b""

# What protocols 2 to 5 write for such trees.
_OPCODES = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memoize),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": lambda machine, names: machine.find_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.find_global(*machine.pop(2)),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
