"""pdparams.py: what real files give, what hostile ones do not get, what a failed write leaves."""

import bz2
import collections
import contextlib
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import paddle
import pytest

import utils
from weights import pdparams
from weights.pdparams import WeightsError

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "pdparams"


def same(a, b):
    """Equal to the bit, types and shapes included."""
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (np.ndarray, np.generic)):
        return (
            type(a) is type(b)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.tobytes() == b.tobytes()
        )
    return type(a) is type(b) and a == b


def arrays(tree):
    """A tree of Paddle tensors as read() gives it back."""
    if isinstance(tree, dict):
        return {key: arrays(value) for key, value in tree.items()}
    return tree.numpy() if isinstance(tree, paddle.Tensor) else tree


def small_model():
    return paddle.nn.Sequential(
        paddle.nn.Conv2D(3, 4, 2), paddle.nn.Flatten(), paddle.nn.Linear(4, 3)
    )


def training_checkpoint():
    model = small_model()
    scheduler = paddle.optimizer.lr.CosineAnnealingDecay(0.1, 10)
    optimizer = paddle.optimizer.AdamW(scheduler, parameters=model.parameters())
    model(paddle.ones([1, 3, 2, 2])).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def put(path, data):
    path.write_bytes(data)
    return path


def read_bytes(tmp_path, data):
    return pdparams.read(put(tmp_path / "file.pdparams", data))


# Real files


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_state_dict_that_paddle_saved_reads_back_bit_for_bit(tmp_path, protocol):
    state = small_model().state_dict()
    path = str(tmp_path / "weights.pdparams")
    paddle.save(state, path, protocol=protocol)
    assert same(pdparams.read(path), arrays(state))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_training_checkpoint_that_paddle_saved_reads_back_with_arrays_for_tensors(
    tmp_path, protocol
):
    tree = training_checkpoint()
    path = str(tmp_path / "last.pdparams")
    paddle.save(tree, path, protocol=protocol)
    assert same(pdparams.read(path), arrays(tree))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_python_and_numpy_values_keep_their_types(tmp_path, protocol):
    shared = np.arange(4, dtype="int64")
    tree = {
        "ints": [0, 1, -1, 255, 65536, 2**31, -(2**40), 2**200],
        "others": (1.5, float("inf"), True, False, None, "", "gMLP 模型", ()),
        "tuples": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], {}),
        "long": ["x" * 300, "y" * 70000],
        "scalars": [np.float32(0.1), np.int64(-3), np.bool_(True), np.complex64(1j)],
        "dtypes": [np.zeros(3, code) for code in sorted(pdparams.DTYPES - {"u2"})],
        "shapes": [np.zeros(shape, "f4") for shape in ((), (0,), (2, 0), (1,) * 32)],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "large": np.arange(100_000, dtype="f4"),
        "shared": [shared, shared],
        5: "an integer key",
    }
    assert same(read_bytes(tmp_path, pickle.dumps(tree, protocol)), tree)


def test_an_ordered_dict_reads_as_a_dict_in_its_order(tmp_path):
    tree = {"model": collections.OrderedDict([("b", 1), ("a", 2)])}
    read = read_bytes(tmp_path, pickle.dumps(tree))["model"]
    assert type(read) is dict and list(read.items()) == [("b", 1), ("a", 2)]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_big_endian_arrays_come_back_in_the_machine_s_order(tmp_path, protocol):
    tree = {"array": np.arange(5, dtype=">i4"), "scalar": np.array(2.5, ">f8")}
    read = read_bytes(tmp_path, pickle.dumps(tree, protocol))
    assert read["array"].dtype.isnative and read["array"].tolist() == [0, 1, 2, 3, 4]
    assert read["scalar"].dtype.isnative and read["scalar"] == 2.5


def test_arrays_are_read_only_and_share_the_bytes_of_the_file(tmp_path):
    for protocol in (4, 5):
        array = read_bytes(tmp_path, pickle.dumps({"a": np.zeros(9)}, protocol))["a"]
        assert not array.flags.writeable and not array.flags.owndata


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("kind", ["weights", "training"])
def test_files_of_paddle_2_6_and_numpy_1_read_bit_for_bit(kind, protocol):
    def flatten(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key}/")
            elif value is not None:
                yield prefix + key, np.asarray(value)

    path = DATA / f"{kind}_{protocol}.pickle"
    assert b"numpy.core.multiarray" in path.read_bytes()
    read = dict(flatten(pdparams.read(path)))
    with np.load(DATA / f"{kind}.npz") as expected:
        assert sorted(read) == sorted(expected.files)
        for name, array in read.items():
            native = expected[name].astype(expected[name].dtype.newbyteorder("="))
            if native.dtype == "uint16":  # Paddle's bfloat16
                native = (native.astype("uint32") << 16).view("float32")
            assert same(array, native), name


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_the_names_that_paddle_gave_tensors_come_beside_them(tmp_path, protocol):
    tree = training_checkpoint()
    path = str(tmp_path / "last.pdparams")
    paddle.save(tree, path, protocol=protocol)
    read, names = pdparams.read_with_names(path)
    read["optimizer"].pop("LR_Scheduler"), tree["optimizer"].pop("LR_Scheduler")
    for part in ("model", "optimizer"):
        found = {key: names.pop(id(array)) for key, array in read[part].items()}
        assert found == {key: tensor.name for key, tensor in tree[part].items()}
    assert not names
    paddle.save(tree["model"], path, protocol=protocol)
    assert pdparams.read_with_names(path)[1] == {}  # as arrays, with a table
    _, names = pdparams.read_with_names(DATA / f"training_{protocol}.pickle")  # of Paddle 2.6
    assert {"conv2d_0.w_0", "linear_0.b_0_beta2_pow_acc_0"} <= set(names.values())


def test_names_of_numpy_1_and_2_are_the_same(tmp_path):
    one = pickle.dumps({"a": np.arange(3), "b": np.float64(1)}, 2).replace(b"_core", b"core")
    two = one.replace(b"cnumpy.core.", b"cnumpy._core.")
    assert one != two
    assert same(read_bytes(tmp_path, one), read_bytes(tmp_path, two))


def test_the_table_of_parameter_names_is_dropped_at_any_level(tmp_path):
    table = {"StructuredToParameterName@@": {"a": "b"}, "a": 1}
    assert read_bytes(tmp_path, pickle.dumps({"model": table, **table})) == {
        "model": {"a": 1},
        "a": 1,
    }


def test_tensors_in_parts_are_refused_with_the_cure(tmp_path):
    with pytest.raises(WeightsError, match="protocol=4"):
        read_bytes(tmp_path, pickle.dumps({"UnpackBigParamInfor@@": {}, "a@@.0": 1}))


def test_reading_does_not_import_paddle():
    code = "import sys; from weights import pdparams\n"
    code += "pdparams.read(sys.argv[1]); sys.exit('paddle' in sys.modules)"
    command = [sys.executable, "-c", code, str(DATA / "training_4.pickle")]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(("protocol", "times"), [(2, 2), (4, 1.1), (5, 1.2)])
def test_reading_takes_little_more_memory_than_the_file(tmp_path, protocol, times):
    noise = np.random.RandomState(0).bytes(500_000)
    tree = {str(n): np.frombuffer(noise, "u1") ^ np.uint8(n) for n in range(16)}
    path = put(tmp_path / "file.pdparams", pickle.dumps(tree, protocol))
    tracemalloc.start()
    pdparams.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < times * path.stat().st_size


# safetensors


def safetensors_bytes(**tensors):
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = entry(dtype, shape, len(data), len(data) + len(content))
        data += content
    return safetensors_file(header, data)


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def safetensors_file(header, data=b""):
    text = header if type(header) is bytes else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("name", ["w.safetensors", "w.pdparams"])
def test_safetensors_are_read_whatever_their_suffix(tmp_path, name):
    numpy = pytest.importorskip("safetensors.numpy")
    tree = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.array(3), "c": np.zeros((0, 2))}
    tree.update({str(code): np.ones(2, code) for code in ("b1", "u1", "i1", "i8", "f2", "u8")})
    path = put(tmp_path / name, numpy.save(tree))
    assert same(
        dict(sorted(pdparams.read(path).items())),
        dict(sorted(tree.items())),
    )


VALUES = np.array([[1.0, -2.5], [0.0, 2.0**100]], "f4")  # which bfloat16 has


# U16 is what safetensors.numpy makes of the bits in which Paddle has bfloat16.
@pytest.mark.parametrize("dtype", ["BF16", "U16"])
def test_bfloat16_safetensors_become_float32_with_the_same_values(tmp_path, dtype):
    pytest.importorskip("safetensors")
    bits = (VALUES.view("u4") >> 16).astype("u2")
    data = safetensors_bytes(w=(dtype, [2, 2], bits.tobytes()))
    assert same(read_bytes(tmp_path, data), {"w": VALUES})


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_bfloat16_that_paddle_saved_becomes_float32_with_the_same_values(tmp_path, protocol):
    tensor, path = paddle.to_tensor(VALUES).astype("bfloat16"), str(tmp_path / "w.pdparams")
    for tree in ({"w": tensor}, {"model": {"w": tensor}, "epoch": 1}):  # stored in two ways
        paddle.save(tree, path, protocol=protocol)
        read = pdparams.read(path)
        assert same(read.get("model", read), {"w": VALUES})
    scalar = pickle.dumps({"w": np.uint16(0x4020)}, protocol)
    assert same(read_bytes(tmp_path, scalar), {"w": np.float32(2.5)})


def test_safetensors_of_other_types_are_refused_by_name(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(WeightsError, match=r"'w' as F8_E4M3: convert"):
        read_bytes(tmp_path, safetensors_bytes(w=("F8_E4M3", [2], b"ab")))


def test_a_missing_safetensors_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(WeightsError, match="pip install safetensors"):
        read_bytes(tmp_path, safetensors_bytes(w=("F32", [1], b"abcd")))


def test_damaged_safetensors_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    good = safetensors_bytes(w=("F32", [2], b"abcdefgh"))
    path = tmp_path / "w.safetensors"
    for end in range(2, len(good)):
        with pytest.raises(WeightsError, match="is a damaged safetensors file"):
            pdparams.read(put(path, good[:end]))


# Other formats


def archive(kind, content=b"", name="archive/data.pkl"):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


OTHER_FORMATS = {
    "PyTorch": (archive("zip"), "is a PyTorch file: tools/port_weights.py makes a .pdparams"),
    "old PyTorch": (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02.",
        "tools/port_weights.py",
    ),
    "npz": (archive("zip", name="head.weight.npy"), r"\.npz.* safetensors\.numpy\.save_file"),
    "zip": (archive("zip", name="weights.pdparams"), "zip archive: unpack"),
    "tar": (archive("tar"), "tar archive"),
    "gzip": (gzip.compress(b"x"), "gzip"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\x00\x00", "HDF5"),
    "npy": (b"\x93NUMPY\x01\x00v\x00{'descr'", r"NumPy array.* safetensors\.numpy"),
    "inference": (bytes(20), "inference format"),
    "text": (b"hello\nworld\n", "text file"),
    "yaml": (b"MODEL:\n  NAME: gmlp\n", "text file"),
    "protocol 0": (pickle.dumps({"a": 1}, 0), "text file"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html><html>", "download it again"),
    "empty": (b"", "is empty"),
    "image": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not a .pdparams"),
    "list": (pickle.dumps([1]), "no dict at the top"),
    "array": (pickle.dumps(np.arange(2)), "no dict at the top"),
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_another_format_is_one_sentence_that_names_the_file_and_the_cure(tmp_path, kind):
    data, words = OTHER_FORMATS[kind]
    with pytest.raises(WeightsError, match=words) as error:
        read_bytes(tmp_path, data)
    assert str(error.value).startswith(str(tmp_path / "file.pdparams"))
    assert "\n" not in str(error.value)


def test_what_is_not_a_file_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, target in {"pipe": "fifo", "folder": ".", "gone": "missing", "loop": "loop"}.items():
        os.symlink(target, tmp_path / name)
    for name, words in {
        ".": "is a folder",
        "missing": "does not exist",
        "fifo": "not a regular file",
        "pipe": "not a regular file",
        "folder": "is a folder",
        "gone": "does not exist",
        "loop": "cannot be read",
        "a\0b": "cannot be read",
        "x" * 300: "cannot be read",
    }.items():
        with pytest.raises(WeightsError, match=words):
            pdparams.read(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("given", "there", "words"),
    [
        ("w/plain", "w/plain.pdparams", r"does not exist: did you mean \S*w/plain\.pdparams\?"),
        ("w/plain.", "w/plain.pdparams", r"did you mean \S*w/plain\.pdparams\?"),
        ("w/plain", "w/plain.pth", r"did you mean \S*w/plain\.pth\?"),
        ("w/plain.pdparams", "w/plain.safetensors", r"did you mean \S*w/plain\.safetensors\?"),
        ("w/plain.pdopt", "w/plain.pdparams", r"did you mean \S*w/plain\.pdparams\?"),
        ("w/gmlp_1.5", "w/gmlp_1.5.pdparams", r"did you mean \S*w/gmlp_1\.5\.pdparams\?"),
        ("~/w/x.pdparams", "w/x.pdparams", r"^~/w/x\.pdparams .*did you mean \S+w/x\.pdparams\?"),
        ("https://a.org/x.pdparams", "w/x", "download it first"),
        ("w", "w/last.pdparams", r"is a folder: .*, such as \S*w/last\.pdparams$"),
        ("w", "w/other.safetensors", r"is a folder: .*, such as \S*w/other\.safetensors$"),
        ("w", "w/log.txt", "is a folder: give the path of a weight file$"),
        ("w/other", "w/plain.pdparams", "does not exist: check the path"),
    ],
)  # fmt: skip
def test_a_slip_in_a_path_is_answered_with_the_file_that_is_there(
    given, there, words, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w").mkdir()
    (tmp_path / there).touch()
    with pytest.raises(WeightsError, match=words):
        pdparams.read(given if given[0] == "~" or "://" in given else f"{tmp_path}/{given}")


@pytest.mark.parametrize("require_checksum", [False, True])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/dev/zero", "is not a regular file"),
        ("/proc/self", "is a folder"),
        # Regular files of no bytes, whose reader may wait for the kernel's next message.
        ("/proc/self/mem", "is empty|is incomplete"),
        ("/proc/self/maps", "is empty|is incomplete"),
        ("/proc/kmsg", "is empty|is incomplete|cannot be read|does not exist"),
    ],
)
def test_not_a_byte_is_read_of_what_the_kernel_passes_off_as_files(path, words, require_checksum):
    code = "import sys; from weights import pdparams\n"
    code += "pdparams.read(sys.argv[1], bool(int(sys.argv[2])))"
    command = [sys.executable, "-c", code, path, str(int(require_checksum))]
    run = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert re.search(rf"WeightsError: {path} ({words})", run.stderr.splitlines()[-1])


def test_an_odd_path_is_quoted_in_messages(tmp_path):
    for name in ("a\x1b[2J\nb", "a\udcff"):
        for path in (tmp_path / name, put(tmp_path / f"{name}.pdparams", b"x")):
            with pytest.raises(WeightsError) as raised:
                pdparams.read(path)
            assert repr(str(path)) in str(raised.value) and str(raised.value).isprintable()
        with pytest.raises(WeightsError) as raised:
            pdparams.write(path, [])
        assert str(raised.value).isprintable()
        with pytest.raises(OSError, match="cannot be written: Not a directory") as raised:
            pdparams.write(path / "file.pdparams", {})
        assert raised.value.filename.isprintable()


@pytest.mark.parametrize("change", [b"", b"\x80\x04", b"\x80\x04}.", bytes(1000), None])
def test_a_file_that_changes_after_its_checksum_was_verified_is_read_or_refused(
    tmp_path, monkeypatch, change
):
    path = tmp_path / "file.pdparams"
    pdparams.write(path, {"a": np.arange(100_000)})  # more than is buffered
    digest, sound = pdparams._digest, path.read_bytes()

    def then_change(file, size):
        result = digest(file, size)
        path.write_bytes(sound * 2 if change is None else change)
        return result

    monkeypatch.setattr(pdparams, "_digest", then_change)
    with contextlib.suppress(WeightsError):
        assert type(pdparams.read(path, require_checksum=True)) is dict
    assert path.read_bytes() != sound


def test_a_file_that_does_not_fit_in_memory_is_one_sentence(tmp_path):
    path = put(tmp_path / "file.pdparams", PROTO + b"}" + b"\x8e" + struct.pack("<Q", 2**30))
    os.truncate(path, 2**30 + 100)  # a hole: it takes no room on the disk
    code = (
        "import resource, sys; from weights import pdparams\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "pdparams.read(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, path]
    run = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert "WeightsError: " in run.stderr and "does not fit in memory" in run.stderr


def test_an_unreadable_file_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = put(tmp_path / "file", b"x")
    monkeypatch.setattr("builtins.open", refuse)  # root may read anything
    with pytest.raises(WeightsError, match=r"file cannot be read \(Permission denied\)"):
        pdparams.read(path)


# Hostile files: opcodes put together by hand, since no pickler writes most of these.

END = b"."
PROTO = b"\x80\x04"
NESTED = 100_000


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def binary(value):
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def several(*items):
    return b"(" + b"".join(items) + b"t"


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def call(module, name, *args):
    return named(module, name) + several(*args) + b"R"


def in_dict(value):
    """A whole pickle: {"a": value}."""
    return PROTO + b"}" + text("a") + value + b"s" + END


PLAIN = b"NNN" + integer(-1) * 2 + integer(0)  # of a type of numbers


def dtype(code="f4", order="<", rest=PLAIN):
    made = call("numpy", "dtype", text(code), b"\x89", b"\x88")
    return made + several(integer(3), text(order), rest) + b"b"


def array(shape=None, kind=None, data=None, fortran=b"\x89"):
    made = call(
        "numpy.core.multiarray", "_reconstruct", named("numpy", "ndarray"), b")", binary(b"b")
    )
    shape = several(integer(2)) if shape is None else shape
    state = several(integer(1), shape, kind or dtype(), fortran, data or binary(bytes(8)))
    return made + state + b"b"


def tensor(name, data=None):
    return call("builtins", "tuple", several(name, data or array()))


def calls(marker):
    """Pickles that would leave the file `marker` if any of what they name were called."""
    shell, python = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    touch = several(text("touch"), text(str(marker)))
    many = {
        "os.system": [text(shell)],
        "posix.system": [text(shell)],
        "os.popen": [text(shell)],
        "subprocess.Popen": [touch],
        "subprocess.check_output": [touch],
        "builtins.eval": [text(python)],
        "builtins.exec": [text(python)],
        "builtins.open": [text(str(marker)), text("w")],
        "builtins.__import__": [text("antigravity")],
        "builtins.compile": [text(python), text(""), text("exec")],
        "builtins.getattr": [named("numpy", "ndarray"), text("__reduce__")],
        "builtins.bytearray": [integer(2**40)],
        "__builtin__.eval": [text(python)],
        "__builtin__.apply": [named("os", "system"), several(text(shell))],
        "importlib.import_module": [text("os")],
        "runpy.run_path": [text(str(marker))],
        "pickle.loads": [binary(b"cos\nsystem\n(S'true'\ntR.")],
        "marshal.loads": [binary(b"N")],
        "shutil.copy": [text(__file__), text(str(marker))],
        "socket.socket": [],
        "ctypes.CDLL": [text("libc.so.6")],
        "webbrowser.open": [text("http://localhost")],
        "operator.attrgetter": [text("system")],
        "functools.partial": [named("os", "system"), text(shell)],
        "types.CodeType": [],
        "copyreg._reconstructor": [named("numpy", "ndarray"), named("builtins", "object"), b"N"],
        "codecs.open": [text(str(marker)), text("w")],
        "_codecs.decode": [binary(b"x"), text("zlib")],
        "collections.Counter": [],
        "numpy.load": [text(str(marker))],
        "numpy.fromfile": [text(str(marker))],
        "numpy.memmap": [
            text(str(marker)),
            text("u1"),
            text("w+"),
            integer(0),
            several(integer(9)),
        ],
        "numpy.save": [text(str(marker)), integer(0)],
        "numpy.zeros": [integer(2**40)],
        "numpy.f2py.compile": [text("")],
        "numpy.testing._private.utils.runstring": [text(python), b"}"],
        "numpy.core.multiarray.fromfile": [text(str(marker))],
        "numpy._core.multiarray.empty": [integer(2**40)],
        "numpy.core.numeric.load": [text(str(marker))],
        "paddle.load": [text(str(marker))],
        "paddle.utils.cpp_extension.load": [],
        "torch._utils._rebuild_tensor_v2": [],
    }
    files = {}
    for name, args in many.items():
        module, _, attribute = name.rpartition(".")
        files[f"call {name}"] = in_dict(call(module, attribute, *args))
        pushed = text(module) + text(attribute) + b"\x93" + several(*args) + b"R"
        files[f"stack call {name}"] = in_dict(pushed)
    # How Paddle itself pickles a DenseTensor.
    files["call eval of Paddle"] = in_dict(
        call("builtins", "eval", text("data"), b"}" + text("data") + array() + b"s")
    )
    payload = call("os", "system", text(shell))
    chain = call("builtins", "getattr", named("builtins", "object"), text("__subclasses__"))
    chain = call("builtins", "getattr", chain + b")R", text("__getitem__"))
    files["a chain of getattr"] = in_dict(chain)
    files["a chain of dots"] = in_dict(text("builtins") + text("tuple.__class__.mro") + b"\x93")
    files["inst"] = in_dict(b"(" + text(shell) + b"ios\nsystem\n")
    files["obj"] = in_dict(b"(" + named("os", "system") + text(shell) + b"o")
    files["obj of a known global"] = in_dict(b"(" + named("numpy", "dtype") + text("f4") + b"o")
    files["newobj"] = in_dict(named("numpy", "ndarray") + several(several(integer(9))) + b"\x81")
    files["newobj_ex"] = in_dict(named("numpy", "ndarray") + b")}" + b"\x92")
    files["after the end"] = PROTO + b"}." + PROTO + payload + END
    files["as a key"] = PROTO + b"}" + payload + b"Ns."
    files["in the table of names"] = (
        PROTO + b"}" + text("StructuredToParameterName@@") + payload + b"s."
    )
    files["in an array's state"] = in_dict(array(data=payload))
    files["escaped name"] = in_dict(call("os", "sys\\x74em", text(shell)))
    files["odd escapes"] = in_dict(call("os", "s\\Ostem", text(shell)))
    files["as a global's name"] = in_dict(text("os") + payload + b"\x93")
    files["attribute path"] = in_dict(text("numpy") + text("ndarray.__class__") + b"\x93")
    files["name with a newline"] = in_dict(text("os") + text("system\n\x1b[2J") + b"\x93")
    files["extension 1"] = in_dict(b"\x82\x01")
    files["extension 2"] = in_dict(b"\x83\x01\x00")
    files["extension 4"] = in_dict(b"\x84\x01\x00\x00\x00")
    files["persistent id"] = in_dict(b"Pid\n")
    files["binary persistent id"] = in_dict(text("id") + b"Q")
    return files


def odd_values():
    """Well-formed pickles of what weights never hold, and arrays that lie about themselves."""
    placeholder = call(
        "numpy.core.multiarray", "_reconstruct", named("numpy", "ndarray"), b")", b"N"
    )
    unbuilt = call("numpy", "dtype", text("f4"), b"\x89", b"\x88")
    opcodes = {"dup": b"N2", "pop": b"NN0", "pop mark": b"N(1", "empty set": b"\x8f"}
    opcodes.update({"frozen set": b"(\x91", "dict": b"(d", "list": b"(l", "int": b"I1\n"})
    opcodes.update({"long": b"L1L\n", "unicode": b"Va\n", "string": b"S'a'\n", "float": b"F1\n"})
    opcodes.update({"short string": b"U\x01a", "get": b"Np0\ng0\n", "next buffer": b"\x97"})
    opcodes.update({"read-only buffer": b"N\x98", "unknown": b"\xff", "bytes": binary(b"x")})
    values = {
        **opcodes,
        "a long of 9 million digits": b"L" + b"9" * 9_000_000 + b"L\n",
        "a global's name of 9 million letters": named("a", "b" * 9_000_000),
        "a long of 9 million bytes": b"\x8b" + struct.pack("<i", 9_000_000) + b"\x7f" * 9_000_000,
        "a global": named("numpy", "ndarray"),
        "a type": dtype(),
        "an unbuilt type": unbuilt,
        "an unbuilt array": placeholder,
        "a call of ndarray": call("numpy", "ndarray", several(integer(9))),
        "a call of a dict": b"})R",
        "a call without a tuple": named("collections", "OrderedDict") + b"NR",
        "a call with a list": named("collections", "OrderedDict") + b"]R",
        "a list for a state": placeholder
        + b"]("
        + several(integer(1), several(integer(2)), dtype(), b"\x89", binary(bytes(8)))[1:-1]
        + b"eb",
        "a call with too much": call("collections", "OrderedDict", b"N"),
        "bytes of a length": call("builtins", "bytes", integer(2**40)),
        "an ordinary tuple, called": call("builtins", "tuple", several(integer(1), integer(2))),
        "a tuple of a string": call("builtins", "tuple", text("abc")),
        "a tensor without a name": tensor(b"N"),
        "a tensor with a number for a name": tensor(integer(1)),
        "a tensor with a list for a name": tensor(b"]"),
        "a tensor with an escape in its name": tensor(text("\x1b[2J")),
        "a tensor whose name is 9 million letters": tensor(text("a" * 9_000_000)),
        "a tensor of a scalar": tensor(
            text("a"), call("numpy.core.multiarray", "scalar", dtype(), binary(bytes(4)))
        ),
        "encode to zlib": call("_codecs", "encode", text("a"), text("zlib_codec")),
        "encode a list": call("_codecs", "encode", b"]", text("latin1")),
        "encode what latin1 has not": call("_codecs", "encode", text("模"), text("latin1")),
        "state of a dict": b"}}" + text("__class__") + b"Nsb",
        "state of a global": named("numpy", "ndarray") + several(integer(1)) + b"b",
        "state of a built array": array() + several(integer(1)) + b"b",
        "state of a wrong length": placeholder + several(integer(1)) + b"b",
        "state in a dict": placeholder + b"}b",
        "append to a dict": b"}Na",
        "append to an array": array() + b"Na",
        "items of a list": b"]" + text("a") + b"Ns",
        "items of an array": array() + text("a") + b"Ns",
        "half an item": b"}(" + text("a") + b"u",
        "an unknown memo": b"h\x09",
        "a global of numbers": integer(1) + integer(2) + b"\x93",
        "a global of tuples": b"(" * NESTED + b"t" * NESTED + text("a") + b"\x93",
        "no data": array(data=b"N"),
        "text for data": array(data=text("a" * 8)),
        "a list for data": array(data=b"]"),
        "too little data": array(data=binary(bytes(7))),
        "too much data": array(data=binary(bytes(9))),
        "no type": array(kind=b"N"),
        "a string for a type": array(kind=text("f4")),
        "an unbuilt type in an array": array(kind=unbuilt),
        "a structure": array(kind=dtype(rest=b"N" + several(text("a")) + b"}" + integer(4) * 3)),
        "a subarray": array(
            kind=dtype(rest=several(b"N", b")") + b"NN" + integer(-1) * 2 + integer(0))
        ),
        "object flags": array(kind=dtype(rest=b"NNN" + integer(-1) * 2 + integer(63))),
        "a size of its own": array(kind=dtype(rest=b"NNN" + integer(2**40) * 2 + integer(0))),
        "metadata": array(kind=dtype(rest=PLAIN + b"}")),
        "an odd byte order": array(kind=dtype(order="<>")),
        "byte order of a number": array(kind=dtype().replace(text("<"), integer(1))),
        "a list for a shape": array(shape=b"]" + integer(2) + b"a"),
        "a scalar of no data": call("numpy.core.multiarray", "scalar", dtype(), binary(b"")),
        "a scalar of an object": call("numpy.core.multiarray", "scalar", dtype("O"), binary(b"")),
        "a buffer in order K": call(
            "numpy._core.numeric",
            "_frombuffer",
            binary(bytes(8)),
            dtype(),
            several(integer(2)),
            text("K"),
            several(integer(0)),
        ),
        "a buffer in no order": call(
            "numpy._core.numeric",
            "_frombuffer",
            binary(bytes(8)),
            dtype(),
            several(integer(2)),
            b"N",
        ),
    }
    for code in (
        "O",
        "O8",
        "|O",
        "V8",
        "S4",
        "U4",
        "M8",
        "m8",
        "f16",
        "f4,f4",
        "(2,)f4",
        "",
        "object",
    ):
        values[f"type {code}"] = array(kind=dtype(code))
    shapes = {
        "huge": [2**40],
        "overflowing": [2**32, 2**32],
        "negative": [-2],
        "two negatives": [-1, -2],
        "zero and huge": [0, 2**500],
        "huge and zero": [2**62, 2**62, 0],
        "of 2**2000": [2**2000],
    }
    for name, sizes in shapes.items():
        values[f"a shape {name}"] = array(shape=several(*map(integer, sizes)))
    empty = binary(b"")
    values["a shape zero by huge, no data"] = array(several(integer(0), integer(2**62)), data=empty)
    values["a shape with True"] = array(shape=several(b"\x88", integer(2)))
    values["a shape with a float"] = array(shape=several(b"G" + struct.pack(">d", 2)))
    values["a shape of 50,000 sizes"] = array(shape=several(*[integer(2**2000)] * 50_000))
    files = {name: in_dict(value) for name, value in values.items()}
    keys = {"None": b"N", "True": b"\x88", "bytes": binary(b"a"), "a list": b"]", "a dict": b"}"}
    keys.update(
        {"-0.0": b"G" + struct.pack(">d", -0.0), "an array": array(), "an empty tuple": b")"}
    )
    keys.update({"NaN": b"G" + struct.pack(">d", float("nan")), "a type": dtype()})
    keys.update({"with an escape": text("\x1b[2J"), "with a line end": text("a\nb")})
    keys.update({"right to left": text("\u202e"), "of 9 million letters": text("a" * 9_000_000)})
    keys["a surrogate"] = b"X\x03\x00\x00\x00\xed\xa0\x80"
    files.update({f"key {name}": PROTO + b"}" + key + b"Ns." for name, key in keys.items()})
    files["an open mark"] = PROTO + b"}(" + END
    files["two trees"] = PROTO + b"}}" + END
    files["no tree"] = PROTO + END
    return files


def bombs():
    """Small files that would take much memory, time or stack."""
    laughs = b"]q\x00" + b"".join(
        b"](" + (b"h" + bytes([level])) * 9 + b"eq" + bytes([level + 1]) for level in range(25)
    )
    again = named("_codecs", "encode") + b"q\x02" + several(text("a" * 1_000_000), text("latin1"))
    swapped = several(
        integer(1), several(integer(250_000)), dtype(order=">"), b"\x89", binary(bytes(1_000_000))
    )
    placeholder = call("numpy.core.multiarray", "_reconstruct", b"N", b"N", b"N")
    collisions = b"".join(integer(n * (2**61 - 1)) + b"N" for n in range(1, 100_000))
    flood = 2_000_000
    return {
        "nested lists": in_dict(b"]" * NESTED + b"a" * (NESTED - 1)),
        "nested tuples": in_dict(b"(" * NESTED + b"t" * NESTED),
        "nested tuples of one": in_dict(b")" + b"\x85" * 250_000),
        "nested dicts": in_dict((b"}" + text("a")) * NESTED + b"N" + b"s" * NESTED),
        "nested tuples for a key": PROTO + b"}" + b")" + b"\x85" * 250_000 + b"Ns.",
        "nested tuples for a size": in_dict(array(shape=several(b")" + b"\x85" * 250_000))),
        "nested tuples for a byte order": in_dict(
            call("numpy", "dtype", text("f4"), b"\x89", b"\x88")
            + several(integer(3), b")" + b"\x85" * 250_000, b"NNN", integer(-1) * 2, integer(0))
            + b"b"
        ),
        "nested tuples for an encoding": in_dict(
            call("_codecs", "encode", text("a"), b")" + b"\x85" * 250_000)
        ),
        "a list in itself": in_dict(b"]q\x00h\x00a"),
        "a dict in itself": PROTO + b"}q\x00" + text("a") + b"h\x00s.",
        "a billion laughs": in_dict(b"(" + laughs + b"t"),
        "the same text encoded 100,000 times": in_dict(
            b"](" + again + b"q\x03R" + b"h\x02h\x03R" * 100_000 + b"e"
        ),
        "the same bytes swapped 100,000 times": in_dict(
            b"](" + placeholder + swapped + b"q\x04b" + (placeholder + b"h\x04b") * 30_000 + b"e"
        ),
        "colliding keys": in_dict(b"}(" + collisions + b"u"),
        "twenty million None": PROTO + b"(" + b"N" * 20_000_000 + b"t.",
        "two million dicts": PROTO + b"(" + b"}" * flood + b"t.",
        "two million marks": PROTO + b"(" * flood + END,
        "two million memos": PROTO + b"}" + b"\x94" * flood + END,
        "two million frames": PROTO + (b"\x95" + bytes(8)) * (flood) + b"}.",
        "a memo at 2**32": in_dict(b"](}r\xff\xff\xff\xffj\xfe\xff\xff\xffe"),
        "bytes of 2**32": in_dict(b"B\xff\xff\xff\xffabc"),
        "bytes of 2**40": in_dict(b"\x8e" + struct.pack("<Q", 2**40) + b"abc"),
        "bytes of 2**64": in_dict(b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"abc"),
        "text of 2**31": in_dict(b"X\xff\xff\xff\x7fabc"),
        "text of 2**64": in_dict(b"\x8d" + struct.pack("<Q", 2**64 - 1) + b"abc"),
        "text of 2**62": in_dict(b"\x8d" + struct.pack("<Q", 2**62) + b"abc"),
        "a bytearray of 2**50": in_dict(b"\x96" + struct.pack("<Q", 2**50) + b"abc"),
        "a long of 2**31": in_dict(b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc"),
        "a long of -1": in_dict(b"\x8b" + struct.pack("<i", -1) + b"abc"),
        "text that is not UTF-8": in_dict(b"X\x02\x00\x00\x00\xff\xfe"),
        **floods(),
    }


def floods():
    """Opcodes again and again, of those that take longest."""

    def flood(opcodes, again, *setup):
        kept = b"".join(item + b"q" + bytes([index]) for index, item in enumerate(setup))
        return in_dict(b"(" + kept + again * (500_000 // opcodes) + b"t")

    shape, empty = several(*[integer(0)] * 32), binary(b"")
    reconstruct, placeholder = named("numpy.core.multiarray", "_reconstruct"), several(b"NNN")
    state = several(integer(1), shape, dtype(order=">"), b"\x89", empty)
    buffer = several(empty, dtype(order=">"), shape, text("C"))
    of_four, plain = several(text("f4"), b"\x89\x88"), several(integer(3), text("<"), PLAIN)
    latin = several(text("a"), text("latin1"))
    return {
        "a flood of globals": flood(1, named("numpy._core.multiarray", "_reconstruct")),
        "a flood of stack globals": flood(3, b"h\0h\1\x93", text("numpy"), text("ndarray")),
        "a flood of long integers": flood(1, integer(2**500)),
        "a flood of floats": flood(1, b"G" + bytes(8)),
        "a flood of dicts": flood(4, b"}K\1Ns"),
        "a flood of types": flood(4, b"h\0h\1Rh\2b", named("numpy", "dtype"), of_four, plain),
        "a flood of arrays": flood(5, b"h\0h\1Rh\2b", reconstruct, placeholder, state),
        "a flood of buffers": flood(
            3, b"h\0h\1R", named("numpy._core.numeric", "_frombuffer"), buffer
        ),
        "a flood of encodings": flood(3, b"h\0h\1R", named("_codecs", "encode"), latin),
        "a flood of emoji": flood(1, text("\U0001f600")),
        "a flood of memos": flood(2, b"Nr\0\0\0\xff"),
    }


def unsafe_tensors():
    """.safetensors that lie about what is in them, or take long."""
    one = entry("U8", [1], 0, 1)
    shapes = {"0 by 2**62": [0, 2**62], "0 by 2**63": [0, 2**63], "0 by 2**64": [0, 2**64 - 1]}
    shapes.update(
        {"2**32 by 2**32": [2**32] * 2, "2**64": [2**64], "negative": [-1], "text": ["1"]}
    )
    shapes.update({"of 65 ones": [1] * 65, "of 100,000 ones": [1] * 100_000, "nested": [[1]]})
    files = {f"shape {name}": {"a": entry("F32", shape, 0, 0)} for name, shape in shapes.items()}
    files["shape of 65 ones, one byte"] = {"a": entry("U8", [1] * 65, 0, 1)}
    files["shape of 65 ones, BF16"] = {"a": entry("BF16", [1] * 65, 0, 2)}
    files["BF16 0 by 2**63"] = {"a": entry("BF16", [0, 2**63], 0, 0)}
    files["overlap"] = {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}
    files["the same bytes twice"] = {"a": one, "b": one}
    files["hole"] = {"a": one, "b": entry("U8", [1], 2, 3)}
    files["reversed"] = {"a": entry("U8", [1], 1, 0)}
    files["beyond the end"] = {"a": entry("U8", [2**40], 0, 2**40)}
    files["unknown type"] = {"a": entry("\x1b[2J" * 100, [1], 0, 1)}
    files["type of eight bits"] = {"\x1b[2J": entry("F8_E4M3", [1], 0, 1)}
    files["name with an escape"] = {"\x1b[2J": one}
    files["name of 100,000 letters"] = {"a" * 100_000: one}
    files["metadata of a list"] = {"__metadata__": [1]}
    files["no entry"] = {"a": 1}
    files["nested"] = b'{"a":' * NESTED + b"1" + b"}" * NESTED
    files["surrogate"] = b'{"\\ud800":' + json.dumps(one).encode() + b"}"
    files["the same name twice"] = b'{"a":%b,"a":%b}' % (
        json.dumps(one).encode(),
        json.dumps(entry("U8", [1], 1, 2)).encode(),
    )
    files["not JSON"] = b"{" + bytes(100)
    empty = json.dumps(entry("U8", [0], 0, 0)).encode()
    files["350,000 tensors"] = b"{" + b",".join(b'"%d":' % n + empty for n in range(350_000)) + b"}"
    files["twenty million spaces"] = b"{" + b" " * 20_000_000 + b"}"
    sizes = b",".join([b"1"] * 10_000_000)
    files["ten million sizes"] = (
        b'{"a":{"dtype":"U8","data_offsets":[0,1],"shape":[' + sizes + b"]}}"
    )
    data = {"shape of 65 ones, BF16": bytes(2), "overlap": bytes(3), "hole": bytes(3)}
    data.update({name: b"" for name in files if "shape 0 by" in name or "BF16 0 by" in name})
    return {
        f"safetensors {name}": safetensors_file(header, data.get(name, b"a"))
        for name, header in files.items()
    }


def disguises(marker):
    """Archives of a hostile file, alone and as the other half of a pickle; pieces of files."""
    hostile = in_dict(call("os", "system", text(f"touch {marker}")))
    archives = {
        "zip": archive("zip", hostile),
        "zip of weights": archive("zip", hostile, "weights.pdparams"),
        "empty zip": b"PK\x05\x06" + bytes(18),
        "tar": archive("tar", hostile),
        "tar named like a pickle": archive("tar", hostile, "\x80\x04}.").replace(
            b"\xc2\x80", b"\x80"
        ),
        "tar.gz": gzip.compress(archive("tar", hostile)),
        "gzip": gzip.compress(hostile),
        "bzip2": bz2.compress(hostile),
        "xz": lzma.compress(hostile),
    }
    files = dict(archives)
    sound = pickle.dumps({"a": 1}, 4)
    files.update({f"a pickle, then {name}": sound + data for name, data in archives.items()})
    checksum = pdparams._TRAILER + hashlib.sha256(hostile).digest()
    files["hostile, with its checksum"] = hostile + checksum
    files["hostile, behind a checksum"] = sound + checksum + hostile
    for name in ("training_2", "training_4"):
        data = (DATA / f"{name}.pickle").read_bytes()
        for end in range(1, len(data), len(data) // 20):
            files[f"{name}, {end} bytes of it"] = data[:end]
    return files


# What of a file is not a hole: (start, size of the file, end).
SPARSE = {
    "a terabyte of bytes": (in_dict(b"\x8e" + struct.pack("<Q", 2**39))[:-2], 2**40, b""),
    "a terabyte before a checksum": (PROTO, 2**40, pdparams._TRAILER + bytes(32)),
    "a terabyte of safetensors": (
        safetensors_file({"a": entry("U8", [2**40], 0, 2**40)}),
        2**40,
        b"",
    ),
    "a gigabyte of a global's name": (PROTO + b"c", 2**30, b""),
    "a header of a gigabyte": (struct.pack("<Q", 2**30) + b"{", 2**30 + 8, b""),
}


# Reads every file of a folder.  Prints of each what it raised, every audit event meanwhile but the
# opening of the file itself, whether the marker exists, and the processor's seconds and the bytes
# of memory that it took (its own peak, where the kernel lets the process set that back).
READER = """
import json, os, resource, sys, time
from weights import pdparams
folder, marker, *good = sys.argv[1:]
for path in good:
    pdparams.read(path)  # what Python imports at first use is imported now
def kilobytes(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0])
start = kilobytes("VmRSS")
limit = 3 << 30  # far above what is allowed: only so that a mistake does not fill the machine
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
events, results = [], {}
sys.addaudithook(lambda event, args: events.append(f"{event} {args!r:.200}"))
for name in sorted(os.listdir(folder)):
    path, raised = f"{folder}/{name}", None
    try:
        open("/proc/self/clear_refs", "w").write("5")
    except OSError:
        pass
    events.clear()
    seconds = time.process_time()
    try:
        pdparams.read(path)
    except BaseException as error:
        raised = f"{type(error).__name__}: {error!s:.1000}"
    seconds = time.process_time() - seconds
    seen = [event for event in events if not event.startswith(f"open ({path!r}, 'r'")]
    added = (kilobytes("VmHWM") - start) << 10
    results[name] = [raised, seen, os.path.exists(marker), seconds, added]
json.dump(results, sys.stdout)
"""
Verdict = collections.namedtuple("Verdict", "raised events marker seconds added")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What became of each hostile file, by name."""
    folder = tmp_path_factory.mktemp("hostile")
    marker = folder.parent / "marker"
    sound = put(folder.parent / "sound.safetensors", safetensors_bytes(w=("U8", [1], b"a")))
    files = {**calls(marker), **odd_values(), **bombs(), **unsafe_tensors(), **disguises(marker)}
    names = [*files, *SPARSE]
    for number, name in enumerate(names):
        start, size, end = SPARSE.get(name) or (files.pop(name), 0, b"")
        with open(folder / f"{number:03d}", "wb") as file:
            file.write(start)
            if size:
                file.truncate(size - len(end))
                file.seek(0, os.SEEK_END)
                file.write(end)
    command = [sys.executable, "-W", "error", "-c", READER, folder, marker]
    command += [DATA / "training_4.pickle", *([sound] if find_spec("safetensors") else [])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    shutil.rmtree(folder)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout)
    return {name: Verdict(*results[f"{number:03d}"]) for number, name in enumerate(names)}


def test_every_hostile_file_is_refused_in_one_printable_sentence(verdicts):
    assert len(verdicts) > 300
    wrong = {
        name: verdict.raised
        for name, verdict in verdicts.items()
        if not re.fullmatch(r"WeightsError: .{,500}", verdict.raised or "")
        or not verdict.raised.isprintable()
    }
    assert not wrong


def test_nothing_is_imported_opened_run_or_compiled_while_reading_hostile_files(verdicts):
    assert not {name: v.events for name, v in verdicts.items() if v.events or v.marker}


def test_each_hostile_file_is_refused_within_two_seconds_of_the_processor(verdicts):
    assert not {name: v.seconds for name, v in verdicts.items() if v.seconds > 2}


def test_each_hostile_file_is_refused_within_500_mb_of_memory(verdicts):
    assert max(v.added for v in verdicts.values()) > 0  # it is measured
    assert not {name: v.added for name, v in verdicts.items() if v.added > 500e6}
    assert not [name for name, v in verdicts.items() if "fit in memory" in v.raised]


def test_a_refusal_names_what_the_file_asks_for(verdicts):
    for name in (
        "os.system",
        "builtins.eval",
        "numpy.load",
        "paddle.load",
        "copyreg._reconstructor",
    ):
        for kind in ("call", "stack call"):
            assert f"asks for {name}, which" in verdicts[f"{kind} {name}"].raised
    assert "encodes something else" in verdicts["encode to zlib"].raised
    assert "impossible shape" in verdicts["a shape two negatives"].raised
    assert "calls something that is not a function" in verdicts["a call of ndarray"].raised
    assert "opcode INST" in verdicts["inst"].raised
    assert "opcode BINPERSID" in verdicts["binary persistent id"].raised
    assert "key that is no name" in verdicts["key with an escape"].raised
    assert "key that is no name" in verdicts["safetensors name with an escape"].raised
    assert "a key that is no name" in verdicts["a tensor with an escape in its name"].raised
    assert "too long a header" in verdicts["a header of a gigabyte"].raised
    assert "holds too many items" in verdicts["a flood of globals"].raised
    for name in ("shape 0 by 2**62", "BF16 0 by 2**63", "shape of 65 ones, one byte", "overlap"):
        assert "is a damaged safetensors file" in verdicts[f"safetensors {name}"].raised
    for name in SPARSE:
        assert "terabyte" not in name or "more than weights do" in verdicts[name].raised


def test_the_payloads_of_the_hostile_files_are_real(tmp_path):
    marker = tmp_path / "marker"
    for name in ("call os.system", "stack call builtins.exec", "in an array's state", "inst"):
        with pytest.raises(WeightsError, match=r"asks for|INST"):
            read_bytes(tmp_path, calls(marker)[name])
        assert not marker.exists(), name
        with contextlib.suppress(TypeError, ValueError):  # after the call
            pickle.loads(calls(marker)[name])
        assert marker.exists(), name
        marker.unlink()


def test_the_arrays_that_hostile_files_bend_are_read_when_straight(tmp_path):
    assert read_bytes(tmp_path, in_dict(array()))["a"].tolist() == [0, 0]
    assert read_bytes(tmp_path, in_dict(tensor(text("linear_0.w_0"))))["a"].tolist() == [0, 0]
    assert read_bytes(tmp_path, in_dict(array(kind=dtype("f8"), shape=several())))["a"].shape == ()


# Damage


@pytest.mark.parametrize("name", ["weights_2", "weights_4"])
def test_every_truncation_of_a_file_without_checksum_is_refused(tmp_path, name):
    data = (DATA / f"{name}.pickle").read_bytes()
    for end in range(len(data)):
        with pytest.raises(WeightsError):
            read_bytes(tmp_path, data[:end])


def mutate(data, rng):
    """A few flipped, lost, doubled or inserted bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        start = rng.randrange(len(data))
        stop = start + rng.choice([1, 1, 2, 8, 64])
        data[start:stop] = rng.choice(
            [
                bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1 : stop],
                rng.randbytes(min(stop - start, 4)),
                b"",
                data[start:stop] * 2,
                bytes([rng.choice(b"()}]NtsuabRhqcBXC\x85\x86\x87\x93\x94\x8e\x8d\x8a")]),
            ]
        )
        if not data:
            return b""
    return bytes(data if rng.random() < 0.95 else data[: rng.randrange(len(data))])


def survive_mutations(tmp_path, seed, count):
    rng = random.Random(seed)
    originals = [path.read_bytes() for path in sorted(DATA.glob("*.pickle"))]
    tensors = {"a.weight": ("F32", [2, 2], bytes(16)), "b": ("BF16", [3], bytes(6))}
    originals.append(safetensors_bytes(**tensors))
    outcomes = collections.Counter()
    for number in range(count):
        data = mutate(rng.choice(originals), rng)
        if number % 4 == 0:  # whoever damages on purpose can count a checksum
            data += pdparams._TRAILER + hashlib.sha256(data).digest()
        try:
            pdparams.read(put(tmp_path / "file.pdparams", data), require_checksum=number % 4 == 0)
            outcomes["read"] += 1
        except WeightsError:
            outcomes["refused"] += 1
        except BaseException:
            put(Path(f"mutation-{seed}-{number}"), data)
            raise
    assert min(outcomes["read"], outcomes["refused"]) > count / 20  # both paths were taken


def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path):
    survive_mutations(tmp_path, seed=1, count=2500)


@pytest.mark.slow
def test_many_more_mutated_files_are_read_or_refused_and_nothing_else(tmp_path):
    survive_mutations(tmp_path, seed=2, count=20_000)


# Writing


def folder_of(path):
    return sorted(entry.name for entry in path.parent.iterdir())


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of epoch 1, alone in its folder."""
    path = tmp_path / "run" / "last.pdparams"
    path.parent.mkdir()
    pdparams.write(path, {"epoch": 1})
    return path


def test_a_written_checkpoint_is_read_back_by_this_module_and_by_paddle(tmp_path):
    tree = training_checkpoint()
    path = str(tmp_path / "last.pdparams")
    pdparams.write(path, tree)
    assert same(pdparams.read(path, require_checksum=True), arrays(tree))
    loaded = paddle.load(path)
    assert isinstance(loaded["model"]["2.weight"], paddle.Tensor)
    assert same(arrays(loaded), arrays(tree))


def test_a_written_state_dict_is_what_set_state_dict_takes_from_paddle_load(tmp_path):
    state = small_model().state_dict()
    path = str(tmp_path / "best_weights.pdparams")
    pdparams.write(path, state)
    other = small_model()
    assert other.set_state_dict(paddle.load(path)) == ([], [])
    assert same(arrays(dict(other.state_dict())), arrays(dict(state)))
    # How Paddle loads on macOS, from memory.
    pickle.loads(Path(path).read_bytes(), encoding="latin1")


def test_a_tree_of_numpy_arrays_is_written_and_left_alone(tmp_path):
    tree = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": [np.int64(1), {"c": (1.5, "x")}]}
    path = tmp_path / "file.pdparams"
    pdparams.write(path, tree)
    assert same(pdparams.read(path), tree) and list(tree) == ["a", "b"]


@pytest.mark.parametrize(
    "value",
    [
        {1},
        collections.defaultdict(int),
        b"x",
        object(),
        np.array([object()]),
        np.array("text"),
        {(1, 2): 3},
        {"a\nb": 3},
        1j,
        range(3),
    ],
)
def test_what_could_not_be_read_is_not_written(checkpoint, value):
    with pytest.raises(WeightsError, match=r"last.pdparams cannot be written, the tree h"):
        pdparams.write(checkpoint, {"a": value})
    assert pdparams.read(checkpoint) == {"epoch": 1}


def test_what_is_written_is_never_too_much_to_read(checkpoint):
    def tensors(count):
        return {f"blocks.{n}.weight": paddle.zeros([1]) for n in range(count)}

    pdparams.write(checkpoint, {"model": tensors(3000), "optimizer": tensors(4490)})
    tree = pdparams.read(checkpoint)
    assert [len(part) for part in tree.values()] == [3000, 4490]
    with pytest.raises(WeightsError, match=r"cannot be written, the tree .* too many items"):
        pdparams.write(checkpoint, tensors(7600))


def test_a_list_is_not_written_as_a_checkpoint(checkpoint):
    with pytest.raises(WeightsError, match="no dict at the top"):
        pdparams.write(checkpoint, [1])


def test_every_truncation_of_a_written_file_is_seen_where_a_checksum_is_required(checkpoint):
    data = checkpoint.read_bytes()
    for end in range(len(data)):
        with pytest.raises(WeightsError):
            pdparams.read(put(checkpoint, data[:end]), require_checksum=True)


def test_every_changed_byte_of_a_written_file_is_seen(checkpoint):
    data = checkpoint.read_bytes()
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1
        with pytest.raises(WeightsError):
            pdparams.read(put(checkpoint, bytes(changed)))


def test_a_wrong_checksum_is_called_damage(checkpoint):
    data = bytearray(checkpoint.read_bytes())
    data[5] ^= 1
    with pytest.raises(WeightsError, match="its checksum does not match"):
        pdparams.read(put(checkpoint, bytes(data)))


def test_a_published_file_has_no_checksum_and_needs_none(tmp_path):
    path = put(tmp_path / "file.pdparams", pickle.dumps({"a": 1}))
    assert pdparams.read(path) == {"a": 1}
    with pytest.raises(WeightsError, match="has no checksum"):
        pdparams.read(path, require_checksum=True)


def test_sha256_is_that_of_the_whole_file(checkpoint):
    expected = subprocess.run(["sha256sum", checkpoint], capture_output=True, text=True).stdout
    assert pdparams.sha256(checkpoint) == expected.split()[0]


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "paddle.save"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")],
)
def test_a_failed_write_leaves_the_old_file_and_no_other(checkpoint, monkeypatch, function, error):
    def fail(*args, **kwargs):
        raise error

    before = checkpoint.read_bytes()
    monkeypatch.setattr(function, fail)
    with pytest.raises(type(error)) as raised:
        pdparams.write(checkpoint, {"epoch": 2})
    assert checkpoint.read_bytes() == before
    assert folder_of(checkpoint) == ["last.pdparams"]
    if isinstance(error, OSError):
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.strerror == "cannot be written: No space left on device"
        assert raised.value.filename == str(checkpoint)


def test_a_file_size_limit_in_the_middle_of_a_tensor_leaves_the_old_file(checkpoint):
    before, limits = checkpoint.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written: File too large") as raised:
            pdparams.write(checkpoint, {"a": np.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG
    assert checkpoint.read_bytes() == before and folder_of(checkpoint) == ["last.pdparams"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {done.stderr.strip()}")
    try:
        path = disk / "last.pdparams"
        pdparams.write(path, {"epoch": 1})
        with pytest.raises(OSError, match="No space left on device") as raised:
            pdparams.write(path, {"a": np.zeros(100_000)})
        assert raised.value.errno == errno.ENOSPC
        assert pdparams.read(path, require_checksum=True) == {"epoch": 1}
        assert folder_of(path) == ["last.pdparams"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path):
    path = tmp_path / "missing" / "last.pdparams"
    with pytest.raises(FileNotFoundError, match="cannot be written: No such file"):
        pdparams.write(path, {"epoch": 1})
    assert not path.parent.exists()


def test_a_file_where_the_folder_should_be_is_an_error(checkpoint):
    with pytest.raises(NotADirectoryError, match="cannot be written: Not a directory"):
        pdparams.write(checkpoint / "last.pdparams", {"epoch": 1})


def test_a_folder_that_cannot_be_synced_does_not_fail_the_write(checkpoint, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(utils, "_sync_folder", refuse)
    pdparams.write(checkpoint, {"epoch": 2})
    assert pdparams.read(checkpoint) == {"epoch": 2}


def test_the_file_is_synced_before_it_takes_its_name_and_the_folder_after(checkpoint, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def note(*args, name=name, real=real):
            steps.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, note)
    pdparams.write(checkpoint, {"epoch": 2})
    assert steps == ["fsync", "replace", "fsync"]


def test_a_bare_file_name_is_written_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pdparams.write("last.pdparams", {"epoch": 1})
    assert os.listdir(tmp_path) == ["last.pdparams"]


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_file(checkpoint):
    code = (
        "import itertools, sys, numpy; from weights import pdparams\n"
        "for epoch in itertools.count(2):\n"
        "    pdparams.write(sys.argv[1], {'epoch': epoch, 'a': numpy.full(500_000, epoch)})\n"
        "    print(epoch, flush=True)\n"
    )
    command = [sys.executable, "-c", code, checkpoint]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    written = int(process.stdout.readline())
    time.sleep(random.Random(0).random() / 10)
    process.kill()
    written = max([written, *map(int, process.communicate()[0].split())])
    tree = pdparams.read(checkpoint, require_checksum=True)
    assert tree["epoch"] >= written and (tree["a"] == tree["epoch"]).all()
