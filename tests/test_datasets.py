"""List files, samplers and loaders: every image once, no randomness but the seed's."""

import errno
import io
import itertools
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zlib
from types import SimpleNamespace

import fuzz_inputs
import numpy as np
import paddle
import preloaded
import pytest
from PIL import Image, PngImagePlugin
from processes import HANG_SECONDS, is_running, parent_of, process_ids, wait_for
from program import ROOT

import datasets
from config import get_config
from datasets import (
    DataError,
    EvalSampler,
    ImageList,
    ImageSource,
    TrainSampler,
    batches_per_epoch,
    build_dataset,
)
from ranks import loader
from ranks.host import remove_batches
from ranks.loader import build_loader, require_shared_memory

SIZE = 16


def png(seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(kind):
    """The bytes of a noisy picture, a few thousand, in one of Pillow's formats."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png())).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven images, all in both lists."""
    root = tmp_path_factory.mktemp("eleven images")
    for index in range(11):
        (root / f"{index}.png").write_bytes(png(index))
    lines = "".join(f"{index}.png {index}\n" for index in range(11))
    for name in ("train_list.txt", "val_list.txt"):
        (root / name).write_text(lines)
    return root


def config_of(folder, num_classes=11):
    config = get_config()
    config.DATA.DATA_PATH = str(folder)
    config.DATA.IMAGE_SIZE = SIZE
    config.MODEL.NUM_CLASSES = num_classes
    return config


def dataset_of(folder, train=False, seed=0):
    config = config_of(folder)
    config.SEED = seed
    return build_dataset(config, train)


def read_list(folder, content, num_classes=10):
    (folder / "val_list.txt").write_bytes(content)
    return ImageList(str(folder), "val_list.txt", num_classes)


def refusal(function, *arguments):
    """The message of the DataError that the call raises: one short line."""
    with pytest.raises(DataError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_a_list_from_windows_is_told_what_separates_folders(tmp_path):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a.png")
    (tmp_path / "val_list.txt").write_text("train\\a.png 0\ntrain\\b.png 0\n")
    config = get_config()
    config.DATA.DATA_PATH = str(tmp_path)
    data = build_dataset(config, train=False)
    with pytest.raises(DataError, match=r"val_list.txt:1: .*write / for \\"):
        data.read(0)
    with pytest.raises(DataError, match=r"val_list.txt:2: .*b\.png: No such file or directory$"):
        data.read(1)


# --- lists ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a.JPEG 0\nb/c.JPEG 9\n", [("a.JPEG", 0, 1), ("b/c.JPEG", 9, 2)]),
        (b"two  words.JPEG 3\n", [("two  words.JPEG", 3, 1)]),
        (b"a 1 2.JPEG\t\t 3 \t\n", [("a 1 2.JPEG", 3, 1)]),
        (b"\xef\xbb\xbfa.JPEG 1\r\nb.JPEG 2\r\n", [("a.JPEG", 1, 1), ("b.JPEG", 2, 2)]),
        (b"\n  \r\na.JPEG 1\n\n\nb.JPEG 2\n\n", [("a.JPEG", 1, 3), ("b.JPEG", 2, 6)]),
        (b"a.JPEG 1\nb.JPEG 2", [("a.JPEG", 1, 1), ("b.JPEG", 2, 2)]),
        ("größe/日本\u00a0.JPEG 7\n".encode(), [("größe/日本\u00a0.JPEG", 7, 1)]),
        (b"a.JPEG 007\n", [("a.JPEG", 7, 1)]),
    ],
)
def test_lines_are_read_however_they_were_written(tmp_path, content, expected):
    images = read_list(tmp_path, content)
    assert len(images) == len(expected)
    for index, (path, label, line) in enumerate(expected):
        assert images.image_path(index) == str(tmp_path / path)
        assert images.labels[index] == label
        assert images.place(index).endswith(f":{line}")


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        (b"a.JPEG 0\n\nb.JPEG\n", 3, "'b.JPEG' has no label"),
        (b"a.JPEG 0\n5\n", 2, "'5' has no label"),
        (b"a.JPEG one\n", 1, "no label"),
        (b"a.JPEG 1.5\n", 1, "no label"),
        (b"a.JPEG -1\n", 1, "not in 0..9"),
        ("a.JPEG ²\n".encode(), 1, "no label"),
        (b"a.JPEG 0\r\nb.JPEG 10\r\n", 2, "label '10' is not in 0..9"),
        (b"a.JPEG " + b"9" * 500, 1, "is not in 0..9 (MODEL.NUM_CLASSES is 10)"),
        (b"a.JPEG 0\nb\xff.JPEG 1\nc.JPEG 2\n", 2, "not UTF-8"),
        (b"a\xc3 0\n\xa9b 1\n", 1, "not UTF-8"),  # together they would be
        (b"a.JPEG 0\n" + b"x" * 6000 + b" 1\n", 2, "longer than any path"),
        (b"\0" * 10_000_000, 1, "longer than any path"),
        (b" " * 20_000 + b"\na.JPEG 0\n", 1, "longer than any path"),
        ("a.JPEG 0\n".encode("utf-16"), 1, ""),
    ],
)
def test_a_wrong_line_is_named(tmp_path, content, line, part):
    message = refusal(read_list, tmp_path, content)
    assert f"{tmp_path / 'val_list.txt'}:{line}: " in message
    assert part in message


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_list_in_utf_16_says_so(tmp_path, encoding):
    message = refusal(read_list, tmp_path, "\ufeffa.JPEG 0\n".encode(encoding))
    name = encoding[:6].upper()
    assert f"val_list.txt:1: this list is {name} text: save it as UTF-8 (iconv -f {name}" in message


def test_a_lists_bytes_are_the_files_name_where_there_is_one(tmp_path):
    name = "狗.JPEG".encode("gbk")
    message = refusal(read_list, tmp_path, name + b" 0\n")
    assert "not UTF-8 text, and no file has its bytes for a name" in message
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(png())
    (tmp_path / "val_list.txt").write_bytes(name + b" 0\n")
    assert dataset_of(tmp_path).read(0).size == (40, 30)


def test_all_wrong_lines_can_be_collected_and_the_others_keep_their_numbers(tmp_path):
    lines = [
        b"a.JPEG 0",
        b"b.JPEG",
        b" " * 20_000,
        b"c\xff 1",
        b"",
        b"d.JPEG 10",
        b"x" * 20_000 + b" 1",
    ]
    (tmp_path / "val_list.txt").write_bytes(b"\n".join([*lines, b"e.JPEG 9"]))
    wrong = []
    images = ImageList(str(tmp_path), "val_list.txt", 10, wrong.append)
    start = len(f"{tmp_path}/val_list.txt:")
    assert [int(message[start:].split(":")[0]) for message in wrong] == [2, 3, 4, 6, 7]
    assert [images.place(index).rsplit(":")[-1] for index in range(len(images))] == ["1", "8"]
    assert images.image_path(1) == str(tmp_path / "e.JPEG") and images.labels.tolist() == [0, 9]
    (tmp_path / "val_list.txt").write_bytes(b"only wrong lines")
    assert len(ImageList(str(tmp_path), "val_list.txt", 10, wrong.append)) == 0


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
def test_an_empty_list_is_named(tmp_path, content):
    message = refusal(read_list, tmp_path, content)
    assert message == f"{tmp_path / 'val_list.txt'}: the list is empty"


def test_a_missing_list_is_named_with_what_a_data_folder_needs(tmp_path):
    message = refusal(ImageList, str(tmp_path / "nowhere"), "train_list.txt", 10)
    assert str(tmp_path / "nowhere" / "train_list.txt") in message
    assert "No such file" in message and "train_list.txt and val_list.txt" in message
    assert "null" in refusal(ImageList, "a\0b", "val_list.txt", 10)
    (tmp_path / "val_list.txt").mkdir()
    assert "Is a directory" in refusal(ImageList, str(tmp_path), "val_list.txt", 10)


def test_wild_lists_load_or_are_refused_in_a_sentence(tmp_path):
    fuzz_inputs.run("lists", tmp_path, seed=0, count=300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_wild_lists_load_or_are_refused_in_a_sentence(tmp_path, seed):
    fuzz_inputs.run("lists", tmp_path, seed, count=5000)


def test_a_long_list_makes_no_python_object_a_line(tmp_path):
    lines = 200_000
    path = "train/n01440764/n01440764_10026.JPEG"
    (tmp_path / "val_list.txt").write_text(f"{path} 7\n" * lines)
    before = sys.getallocatedblocks()
    images = ImageList(str(tmp_path), "val_list.txt", 10)
    assert sys.getallocatedblocks() - before < 1000
    assert len(images) == lines and images.image_path(lines - 1) == str(tmp_path / path)


# --- images ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.JPEG", None),
        ("cut.png", png()[:1000]),
        ("cut.JPEG", picture("JPEG")[:-200]),
        ("cut.webp", picture("WEBP")[:-200]),
        ("half.gif", picture("GIF")[:300]),
        ("zeros.JPEG", bytes(5000)),
        ("head.JPEG", picture("JPEG")[:600] + bytes(5000)),
        ("text.JPEG", b"<html>404</html>"),
        ("empty.JPEG", b""),
        (".", None),
    ],
)
def test_an_image_that_cannot_be_read_names_list_line_and_path(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "val_list.txt").write_text(f"a.JPEG 0\n\n{name} 1\n")
    dataset = build_dataset(config_of(tmp_path), train=False)
    message = refusal(dataset.__getitem__, (0, 1))
    assert f"{tmp_path / 'val_list.txt'}:3: " in message
    assert os.path.join(str(tmp_path), name) in message


def test_a_path_with_control_characters_is_quoted_in_its_message(tmp_path):
    (tmp_path / "val_list.txt").write_bytes(b"nul\0.JPEG 0\na\rb\x1b[31m 0\n")
    dataset = build_dataset(config_of(tmp_path), train=False)
    for index, quoted in enumerate([r"nul\x00.JPEG'", r"a\rb\x1b[31m'"]):
        message = refusal(dataset.read, index)
        assert message.isprintable() and quoted in message


def png_with(kind, content, at_end=False):
    """A picture's PNG with one more chunk, before its pixels or after them."""
    data = png()
    chunk = struct.pack(">I", len(content)) + kind + content
    chunk += struct.pack(">I", zlib.crc32(kind + content))
    place = data.index(b"IEND") - 4 if at_end else data.index(b"IDAT") - 4
    return data[:place] + chunk + data[place:]


LONG = zlib.compress(bytes(80_000_000))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("kind", "content"),
    [(b"zTXt", b"k\0\0" + LONG), (b"iTXt", b"k\0\1\0\0\0" + LONG), (b"iCCP", b"k\0\0" + LONG),
     (b"tEXt", b"k\0" + bytes(70_000_000)), (b"pHYs", b"1"), (b"sRGB", b"")],
)  # fmt: skip
def test_a_png_is_its_pixels_whatever_else_is_in_it(tmp_path, kind, content, at_end):
    (tmp_path / "a.png").write_bytes(png_with(kind, content, at_end))
    (tmp_path / "val_list.txt").write_text("a.png 0\n")
    readers = dict(vars(PngImagePlugin.PngStream))
    expected = np.asarray(Image.open(io.BytesIO(png())))
    tracemalloc.start()
    image = dataset_of(tmp_path).read(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(np.asarray(image), expected)
    assert peak < 3 * len(content) + 5_000_000  # what the file has, never what it unpacks to
    assert dict(vars(PngImagePlugin.PngStream)) == readers  # Pillow is as it was


@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 10_000)])  # Pillow warns, Pillow raises
def test_a_decompression_bomb_is_refused_without_a_warning(tmp_path, size):
    Image.new("1", size).save(tmp_path / "bomb.png")
    (tmp_path / "val_list.txt").write_text("bomb.png 0\n")
    dataset = build_dataset(config_of(tmp_path), train=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        message = refusal(dataset.read, 0)
    assert f"val_list.txt:1: cannot read {tmp_path / 'bomb.png'}: it has more than" in message
    assert "89,478,485 pixels" in message and not caught


def stripes():
    """Three colours in columns, 48 x 30: what a lossy format keeps within a few levels."""
    image = Image.new("RGB", (48, 30), (250, 10, 20))
    image.paste((20, 240, 30), (16, 0, 32, 30))
    image.paste((10, 20, 230), (32, 0, 48, 30))
    return image


def write_image(path, kind):
    """A file of the stripes in one of the kinds that data sets have by mistake."""
    image = stripes()
    if kind == "cmyk":
        image.convert("CMYK").save(path, "JPEG", quality=95)
    elif kind == "png named JPEG":
        image.save(path, "PNG")
    elif kind in ("palette with transparency", "palette with one transparent colour"):
        alpha = bytes([0, 100, 255]) if kind == "palette with transparency" else 1
        image.quantize(3).save(path, "PNG", transparency=alpha)
    elif kind == "transparent":
        image.putalpha(0)
        image.save(path, "PNG")
    elif kind in ("GIF", "PNG", "WEBP", "TIFF"):  # animated
        more = [Image.new("RGB", image.size, color) for color in ("white", "black")]
        options = {"lossless": True} if kind == "WEBP" else {}
        image.save(path, kind, save_all=True, append_images=more, **options)


@pytest.mark.parametrize(
    "kind",
    ["cmyk", "png named JPEG", "palette with transparency", "palette with one transparent colour",
     "transparent", "GIF", "PNG", "WEBP", "TIFF"],
)  # fmt: skip
def test_unusual_files_give_the_picture_that_they_hold_and_no_warning(tmp_path, kind):
    write_image(tmp_path / "a.JPEG", kind)
    (tmp_path / "train_list.txt").write_text("a.JPEG 3\n")
    dataset = dataset_of(tmp_path, train=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = dataset.read(0)
        pixels, label = dataset[(0, 0)]
    assert image.mode == "RGB" and image.size == (48, 30) and label == 3 and not caught
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(stripes()))
    away_from_edges = difference.reshape(30, 3, 16, 3)[:, :, 4:-4]
    assert away_from_edges.max() <= (12 if kind == "cmyk" else 0)
    assert pixels.shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif", "a.pgm"])
def test_16_bit_gray_keeps_its_high_bits(tmp_path, name):
    values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 40 30 65535\n" + values.astype(">u2").tobytes())
    elif name == "big_endian.tif":
        image = Image.frombytes("I;16B", (40, 30), values.astype(">u2").tobytes())
        image.save(tmp_path / name)
    else:
        Image.fromarray(values).save(tmp_path / name)
    (tmp_path / "val_list.txt").write_text(f"{name} 0\n")
    pixels = np.asarray(dataset_of(tmp_path).read(0))
    assert np.array_equal(pixels, np.repeat((values >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused_as_their_white_is_unknown(tmp_path, mode):
    Image.new(mode, (40, 30), 100).save(tmp_path / "a.tif")
    (tmp_path / "val_list.txt").write_text("a.tif 0\n")
    assert "a.tif: its pixels have 32 bits" in refusal(dataset_of(tmp_path).read, 0)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000)])
def test_images_of_extreme_shapes_are_read_and_transformed(tmp_path, size, train):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    for part in ("train", "val"):
        (tmp_path / f"{part}_list.txt").write_text("a.png 0\n")
    pixels, _ = dataset_of(tmp_path, train)[(0, 0)]
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    assert train or (pixels == [10, 200, 30]).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
@pytest.mark.parametrize("train", [False, True])
def test_images_of_every_mode_come_out_as_rgb(tmp_path, mode, train):
    name = "image.jpg" if mode == "CMYK" else "image.png"
    gray = Image.fromarray(np.full((30, 40), 200, np.uint8))
    image = Image.new("I;16", (40, 30), 200) if mode == "I;16" else gray.convert(mode)
    image.save(tmp_path / name)
    for part in ("train", "val"):
        (tmp_path / f"{part}_list.txt").write_text(f"{name} 3\n")
    pixels, label = build_dataset(config_of(tmp_path), train)[(0, 0)]
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    assert label == 3
    if mode in ("L", "LA", "RGBA", "P") and not train:
        assert (pixels == 200).all()


def test_what_happens_to_an_image_is_a_function_of_seed_epoch_and_index(folder):
    pixels = dataset_of(folder, train=True)[(3, 5)][0]
    np.random.seed(99)  # global random state has no part in it
    same = dataset_of(folder, train=True)
    same[(1, 1)]
    assert np.array_equal(same[(3, 5)][0], pixels)
    assert not np.array_equal(same[(4, 5)][0], pixels)
    assert not np.array_equal(dataset_of(folder, train=True, seed=1)[(3, 5)][0], pixels)


def test_two_entries_of_one_image_are_augmented_differently(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "train_list.txt").write_text("a.png 0\na.png 0\n")
    dataset = dataset_of(tmp_path, train=True)
    assert not np.array_equal(dataset[(0, 0)][0], dataset[(0, 1)][0])


def test_each_part_has_its_own_list_and_transform(tmp_path):
    for name, seed in (("train", 0), ("val", 1)):
        (tmp_path / f"{name}.png").write_bytes(png(seed))
        (tmp_path / f"{name}_list.txt").write_text(f"{name}.png {seed}\n")
    train, val = dataset_of(tmp_path, train=True), dataset_of(tmp_path)
    assert train.images.image_path(0) == str(tmp_path / "train.png")
    assert val.images.image_path(0) == str(tmp_path / "val.png")
    assert np.array_equal(val[(0, 0)][0], val[(1, 0)][0])  # evaluation draws nothing


def test_other_channels_than_rgbs_are_refused(folder):
    config = config_of(folder)
    config.DATA.IMAGE_CHANNELS = 1
    assert "DATA.IMAGE_CHANNELS is 1" in refusal(build_dataset, config, False)


# --- samplers ---


@pytest.mark.parametrize(
    ("images", "batch", "ranks"),
    list(itertools.product((1, 2, 7, 64, 101), (1, 4, 64), (1, 2, 3, 8))),
)
def test_evaluation_shards_hold_every_image_once(images, batch, ranks):
    samplers = [EvalSampler(images, batch, rank, ranks) for rank in range(ranks)]
    shards = [list(sampler) for sampler in samplers]
    seen = [index for shard in shards for keys in shard for _, index in keys]
    assert sorted(seen) == list(range(images))
    assert [len(sampler) for sampler in samplers] == [len(shard) for shard in shards]
    assert all(1 <= len(keys) <= batch for shard in shards for keys in shard)
    shares = [sum(map(len, shard)) for shard in shards]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("images", "batch", "ranks"), list(itertools.product((7, 64, 101), (1, 4), (1, 2, 3)))
)
def test_every_rank_trains_on_as_many_full_batches_none_shared(images, batch, ranks):
    samplers = [TrainSampler(images, batch, 0, 5, rank, ranks) for rank in range(ranks)]
    shards = [list(sampler) for sampler in samplers]
    batches = images // (batch * ranks)
    assert [len(shard) for shard in shards] == [batches] * ranks
    assert [len(sampler) for sampler in samplers] == [batches] * ranks
    assert batches_per_epoch(images, batch, ranks) == batches
    keys = [key for shard in shards for batch_keys in shard for key in batch_keys]
    assert len(set(keys)) == len(keys) == batches * batch * ranks
    assert all(epoch == 5 and 0 <= index < images for epoch, index in keys)


def epoch_order(seed=0, epoch=0, **options):
    sampler = TrainSampler(40, 4, seed, epoch, options.pop("rank", 1), 2, **options)
    return [[index for _, index in keys] for keys in sampler]


def test_training_order_is_a_function_of_seed_and_epoch():
    order = epoch_order()
    np.random.seed(3)
    assert epoch_order() == order
    assert epoch_order(epoch=1) != order
    assert epoch_order(seed=1) != order
    assert epoch_order(seed=1, epoch=0) != epoch_order(seed=0, epoch=1)
    flat = [index for batch in epoch_order(rank=0) + order for index in batch]
    assert sorted(flat) == list(range(40)) and flat != sorted(flat)


@pytest.mark.parametrize("first_batch", [0, 1, 4, 5])
def test_an_epoch_goes_on_where_it_was_left(first_batch):
    assert epoch_order(first_batch=first_batch) == epoch_order()[first_batch:]
    assert len(TrainSampler(40, 4, 0, 0, 1, 2, first_batch)) == 5 - first_batch


# --- formats ---


def test_a_data_set_that_is_unknown_is_named_with_those_there_are(folder):
    config = config_of(folder)
    config.DATA.DATASET = "cifar10"
    message = refusal(build_dataset, config, False)
    assert "DATA.DATASET" in message and "'cifar10'" in message and "'imagenet2012'" in message


def test_another_format_is_a_source_and_an_entry_in_the_table(tmp_path, monkeypatch):
    class Folder(ImageSource):
        def __init__(self, root):
            self.name, self.root = root, root
            self.names = sorted(name for name in os.listdir(root) if name.endswith(".png"))
            self.labels = np.arange(len(self.names), dtype=np.int32)

        def image_path(self, index):
            return os.path.join(self.root, self.names[index])

    monkeypatch.setitem(
        datasets.DATASETS, "folder", lambda config, train: Folder(config.DATA.DATA_PATH)
    )
    config = config_of(tmp_path)
    config.DATA.DATASET = "folder"
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_text("no image")
    dataset = build_dataset(config, train=False)
    pixels, label = dataset[0, 0]
    assert pixels.shape == (SIZE, SIZE, 3) and label == 0
    assert (dataset.images.name, len(dataset)) == (str(tmp_path), 2)
    assert refusal(dataset.read, 1).startswith(f"cannot read {tmp_path / 'b.png'}: ")


# --- loaders ---


def batches_of(dataset, sampler, workers):
    loaded = list(build_loader(dataset, sampler, workers, SIZE))
    for images, labels in loaded:
        assert (images.dtype, labels.dtype) == (paddle.uint8, paddle.int64)
    return [(images.numpy(), labels.numpy()) for images, labels in loaded]


def test_batches_do_not_depend_on_the_number_of_workers(folder):
    dataset, sampler = dataset_of(folder, train=True), TrainSampler(11, 2, 0, 3, 0, 1)
    expected = [
        (np.stack([dataset[key][0] for key in keys]), [index for _, index in keys])
        for keys in sampler
    ]
    for workers in (0, 1, 3):
        loaded = batches_of(dataset, sampler, workers)
        assert len(loaded) == len(expected) == 5
        for (images, labels), (expected_images, expected_labels) in zip(loaded, expected):
            assert np.array_equal(images, expected_images)
            assert np.array_equal(labels, expected_labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_paddles_reader_thread_copies_batches_to_the_device(folder, workers, monkeypatch):
    monkeypatch.setattr(loader, "_unpack", lambda batches: batches)
    batches = build_loader(dataset_of(folder), EvalSampler(11, 8, 0, 1), workers, SIZE)
    # Pinned memory is the host's; without it the reader thread copies, two batches ahead.
    assert not batches.pin_memory and batches.use_buffer_reader


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_loaders_end_with_a_short_batch_and_take_more_workers_than_batches(folder, workers):
    loaded = batches_of(dataset_of(folder), EvalSampler(11, 8, 0, 1), workers)
    assert [images.shape for images, _ in loaded] == [(8, SIZE, SIZE, 3), (3, SIZE, SIZE, 3)]
    assert [label for _, labels in loaded for label in labels] == list(range(11))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_images_gets_no_batch(folder, workers):
    assert batches_of(dataset_of(folder), EvalSampler(1, 8, 1, 2), workers) == []


OPEN = """
import sys, time
from config import get_config
from datasets import EvalSampler, build_dataset
from ranks.loader import build_loader
config = get_config()
config.DATA.DATA_PATH, config.DATA.IMAGE_SIZE = sys.argv[1], 16
dataset = build_dataset(config, False)
"""
LOAD = """
if sys.argv[3] == "bug":
    def transform(image, rng):
        return len(rng)
    transform.image_size = 16
    dataset.transform = transform
seen = 0
try:
    for images, labels in build_loader(dataset, EvalSampler(11, 2, 0, 1), int(sys.argv[2]), 8):
        seen += len(labels)
except Exception as error:
    print(type(error).__name__, seen, error, flush=True)
"""


def load_elsewhere(folder, workers, kind):
    """What loading all batches prints, in a process of its own, as a loader may hang for good."""
    return subprocess.run(
        [sys.executable, "-c", OPEN + LOAD, str(folder), str(workers), kind],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_damaged_image_stops_any_loader_with_its_sentence(folder, tmp_path, workers):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "7.png").write_bytes(b"damaged")
    done = load_elsewhere(tmp_path, workers, "image")
    # Three whole batches of two come before it.
    start = f"DataError 6 {tmp_path / 'val_list.txt'}:8: cannot read {tmp_path / '7.png'}"
    assert done.stdout.startswith(start), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_in_a_transform_does_not_hang_the_loader(folder, workers):
    done = load_elsewhere(folder, workers, "bug")
    assert "Generator' has no len()" in done.stdout + done.stderr


HOLD = """
batches = build_loader(dataset, EvalSampler(11, 1, 0, 1), 2, 16)
next(batches)
open(sys.argv[2], "w").close()
time.sleep(1000)
"""


def children():
    return {pid for pid in process_ids() if parent_of(pid) == os.getpid()}


def test_loader_workers_end_with_a_process_that_is_killed_without_a_launcher(folder, tmp_path):
    command = [sys.executable, "-c", OPEN + HOLD, str(folder), str(tmp_path / "loads")]
    holder = preloaded.Program(command, dict(os.environ), ROOT)
    wait_for((tmp_path / "loads").exists, holder)
    workers = [pid for pid in process_ids() if parent_of(pid) == holder.pid]
    assert len(workers) == 2
    holder.kill()
    try:
        wait_for(lambda: not any(map(is_running, workers)))
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)
        remove_batches(workers)  # nobody is left who does


def test_a_worker_that_hangs_is_gone_when_a_loader_is_closed(folder, monkeypatch):
    def hang(image, rng):
        if hang.calls:
            time.sleep(HANG_SECONDS)
        hang.calls += 1
        return np.zeros((SIZE, SIZE, 3), np.uint8)

    hang.calls, hang.image_size = 0, SIZE
    monkeypatch.setattr(loader, "_END_SECONDS", 0.1)
    dataset, before = dataset_of(folder), children()
    dataset.transform = hang
    batches = build_loader(dataset, EvalSampler(11, 1, 0, 1), 2, SIZE)
    next(batches)
    assert len(children() - before) == 2
    batches.close()
    assert children() <= before  # not even as a zombie, which may not have left its batch yet


@pytest.mark.parametrize("end", [list, lambda batches: batches.close()], ids=["used up", "closed"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_has_ended_has_no_thread_that_still_ends(folder, workers, end):
    # It would hold a lock for a moment, which is locked for good in a process forked meanwhile.
    for _ in range(1 if workers else 20):
        before = set(threading.enumerate())
        batches = build_loader(dataset_of(folder), EvalSampler(11, 1, 0, 1), workers, SIZE)
        next(batches)
        started = set(threading.enumerate()) - before
        (reader,) = (thread for thread in started if thread.name != "QueueFeederThread")
        end(batches)
        assert str(reader.native_id) not in os.listdir("/proc/self/task")


def test_a_loader_without_workers_ends_without_paddles_seconds_of_waiting(folder, monkeypatch):
    waits, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds) or sleep(seconds))
    batches = build_loader(dataset_of(folder), EvalSampler(11, 1, 0, 1), 0, SIZE)
    next(batches)
    batches.close()
    assert max(waits, default=0) < 1


def test_too_little_shared_memory_is_said_before_a_worker_dies(tmp_path):
    message = refusal(require_shared_memory, 1 << 60, str(tmp_path))
    assert str(tmp_path) in message and "1099511627777 MB" in message
    assert "--shm-size" in message and "-num_workers 0" in message
    require_shared_memory(1, str(tmp_path))
    require_shared_memory(1 << 60, str(tmp_path / "no such folder"))


def test_without_semaphores_workers_are_refused_and_this_process_still_loads(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(multiprocessing.get_context("fork"), "Lock", fail)
    dataset, sampler = dataset_of(folder), EvalSampler(11, 4, 0, 1)
    message = refusal(build_loader, dataset, sampler, 2, SIZE)
    assert "/dev/shm: Read-only file system" in message and "-num_workers 0" in message
    assert len(list(build_loader(dataset, sampler, 0, SIZE))) == 3


def test_a_loader_asks_for_the_memory_of_its_workers_on_all_ranks(folder, monkeypatch):
    free = 4 * 2 * 3 * SIZE * SIZE * 3  # four ranks, two workers with three batches of one image
    stat = SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr(loader.os, "statvfs", lambda path: stat)
    dataset, sampler = dataset_of(folder), EvalSampler(11, 1, 0, 1)
    build_loader(dataset, sampler, 2, SIZE, ranks_on_host=4)
    stat.f_bavail -= 1
    assert "shared memory" in refusal(build_loader, dataset, sampler, 2, SIZE, 4)
    build_loader(dataset, sampler, 0, SIZE, ranks_on_host=4)


def test_a_line_of_odd_blanks_alone_is_a_wrong_line(tmp_path):
    (tmp_path / "val_list.txt").write_bytes(b"a.png 3\n\x1c\n")
    with pytest.raises(DataError, match=r"val_list\.txt:[12]: "):
        ImageList(str(tmp_path), "val_list.txt", 2)
