"""The machine that reads pickles without running what they say.

The table of opcodes in ``pickletools``, the standard library's disassembler, decodes them, and a
small machine interprets those that weights need.  It has no way to import, look up or call anything
outside `_GLOBALS`.
"""

import functools
import math
import pickletools
import struct
import types

import numpy as np

from utils import UserError, show

# An S/16 training checkpoint with EMA takes 72,000 opcodes; of those that a hostile file would
# choose, 300,000 take more than a second.
MAX_ITEMS = 300_000
_MAX_NAME = 1000  # of a dict's key, and of a global
_NAME_TABLE = "StructuredToParameterName@@"  # Paddle's bookkeeping, beside the tensors
_UNTRUSTED = "which weights do not need: do not use this file unless you trust who made it"
SAFETENSORS_DTYPES = {
    **{"BOOL": "b1", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "C64": "c8"},
    **{"U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8", "F16": "f2", "F32": "f4", "F64": "f8"},
}
DTYPES = {*SAFETENSORS_DTYPES.values(), "c16"}


class WeightsError(UserError):
    """A weight file that cannot be used; the message names the file and the cure."""


def check_key(key):
    # Hashing recurses through nested tuples, and large integers can be made to collide.
    if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
        raise WeightsError(f"has a key of type {type(key).__name__}: use strings or small integers")
    # Keys are parameter names, which end up in logs and error messages.
    if type(key) is str and not (len(key) <= _MAX_NAME and key.isprintable()):
        raise WeightsError(f"has a key that is no name, {show(key)}: use printable strings")


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


def unpickle(file, size):
    """The tree in the first `size` bytes of a binary file; see the top of this module.

    Returns:
        (tree, names): names has Paddle's name of each tensor that was pickled with one, by the
        `id` of its array in the tree.

    Raises:
        WeightsError: it is damaged, or asks for anything that weights do not need.
    """
    try:
        return _Machine(size).run(_Source(file, size))
    except WeightsError:
        raise
    except (LookupError, OverflowError, TypeError, ValueError, struct.error) as error:
        raise WeightsError(f"is not an intact .pdparams file ({error}): use another copy") from None


class _Machine:
    """A pickle machine (see pickletools): a stack with marks, a memo, `_GLOBALS`, nothing else."""

    def __init__(self, size):
        self.stack, self.marks, self.memo = [], [], {}
        # Protocol 2 uses a byte twice, as text and in the array. A file that refers to the same
        # bytes again and again could fill the memory.
        self.bytes_left = 2 * size
        self.tensors = []  # (array, name); an id is an array's own as long as the array lives

    def run(self, source):
        for _ in range(MAX_ITEMS):
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
        return self.stack[0], {id(array): name for array, name in self.tensors}

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
            check_key(key)
            if key != _NAME_TABLE:
                target[key] = value

    def find_global(self, module, name):
        if type(module) is not str or type(name) is not str:
            raise ValueError("a global has no name")
        if (module, name) not in _GLOBALS:
            asked = show(f"{module}.{name}").strip("'\"")
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
    if type(code) is not str or code not in DTYPES:
        raise WeightsError(f"holds an array of type {show(code)}, not of numbers: drop it")
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


def from_bfloat16(bits):
    """The float32 array of bfloat16 numbers, which are the upper halves of these: exact."""
    return np.asarray(np.left_shift(bits.astype("u4"), np.uint32(16))).view("f4")


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
    if dtype.kind == "u" and dtype.itemsize == 2:  # Paddle has no uint16, and stores bfloat16 so
        array = from_bfloat16(array)
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
    if type(pair) is not tuple or [type(part) for part in pair] != [str, np.ndarray]:
        raise ValueError("a tensor is not a name and an array")
    name, array = pair
    check_key(name)
    machine.tensors.append((array, name))
    return array


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
