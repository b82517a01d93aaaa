"""tools/predict.py: the probabilities of -eval, in three formats, whatever the files are."""

import ast
import contextlib
import csv
import io
import json
import os
import sys

import numpy as np
import paddle
import pytest
import yaml
from paddle.nn import functional as F
from PIL import Image, ImageDraw, ImageFont
from program import CONFIG, ROOT, SMALL, run, run_tool

from tools import make_lists, predict, sheet
from config import get_config
from datasets import EvalSampler, build_dataset
from ranks.loader import build_loader
from training import evaluate
from training.run import build_model
from transforms import BatchTransform
from utils import DataError
from weights import pdparams
from weights.checkpoint import assign_weights, load_weights

TOOL = ROOT / "tools" / "predict.py"
PHOTOS = ROOT / "tests" / "data" / "images"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Flags of a small model of ten classes with weights that tell images apart."""
    folder = tmp_path_factory.mktemp("model")
    mixer = {key.split(".")[-1]: SMALL[key] for key in SMALL if key.startswith("MODEL.MIXER.")}
    tree = {"BASE": [str(CONFIG)], "MODEL": {"MIXER": mixer}}
    (folder / "small.yaml").write_text(yaml.safe_dump(tree))
    paddle.seed(1)
    state = build_model(get_config(folder / "small.yaml")).state_dict()
    state["head.weight"] = paddle.randn(state["head.weight"].shape)
    pdparams.write(folder / "small.pdparams", state)
    return ["-cfg", folder / "small.yaml", "-pretrained", folder / "small.pdparams"]


@pytest.fixture
def predicted(model):
    """Runs the tool with the small model."""
    return lambda *args: run_tool(predict, *model, *args)


@pytest.fixture
def folder(digits, tmp_path):
    """Five digits, 0 to 4, and things that are none."""
    root = tmp_path / "my digits"
    for label in range(5):
        (root / str(label)).mkdir(parents=True)
        source = sorted((digits / "val" / str(label)).iterdir())[0]
        (root / str(label) / "digit.png").write_bytes(source.read_bytes())
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_text("no image")
    return root


def rows(result):
    return [json.loads(line) for line in result.out.splitlines()]


def labels(row):
    return [(choice["label"], choice["name"], choice["synset"]) for choice in row["top"]]


def probabilities(row):
    return [choice["probability"] for choice in row["top"]]


def in_folder(folder):
    return [f"{folder}/{label}/digit.png" for label in range(5)]


def test_the_probabilities_are_those_of_the_evaluation(model, predicted, few_digits):
    config = get_config(model[1])
    config.DATA.DATA_PATH = str(few_digits)
    network = build_model(config)
    assign_weights(network, load_weights(model[3]), "")
    data = build_dataset(config, train=False)
    batches, seen = build_loader(data, EvalSampler(len(data), 16, 0, 1), 0, 28), []
    network.register_forward_post_hook(lambda _, images, logits: seen.append(F.softmax(logits)))
    transform = BatchTransform(config, train=False)
    scores = evaluate.validate(network, batches, transform, contextlib.nullcontext)
    expected = paddle.concat(seen).numpy()

    paths = [data.images.image_path(index) for index in range(len(data))]
    result = predicted("-batch_size", 16, "-format", "jsonl", "-topk", 10, *paths).check()
    found = rows(result)
    assert [row["path"] for row in found] == paths and len(paths) == 101
    for row, wanted in zip(found, expected):
        labels = [choice["label"] for choice in row["top"]]
        values = probabilities(row)
        assert np.array_equal(np.float32(values), wanted[labels])
        assert sorted(labels) == list(range(10)) and values == sorted(values, reverse=True)
    right = sum(row["top"][0]["label"] == label for row, label in zip(found, data.images.labels))
    assert 100 * right / 101 == scores["acc1"]
    assert len({row["top"][0]["label"] for row in found}) > 1  # not the same for all


def test_a_user_runs_it_on_a_folder(model, folder):
    result = run([sys.executable, TOOL, *model, "-topk", 2, folder]).check()
    lines = result.out.splitlines()
    assert result.err.splitlines() == [
        f"predict.py: left out: 1 (hidden): {folder}/.hidden.png",
        f"predict.py: left out: 1 (without an image's suffix): {folder}/notes.txt",
    ]
    assert lines[::3] == in_folder(folder)
    for line in lines[1::3] + lines[2::3]:
        percent, label = line.split()
        assert 0 < float(percent.removesuffix("%")) <= 100 and label in "0123456789"


def test_the_formats_say_the_same(predicted, folder, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(WORDS))
    args = ["-names", tmp_path / "names.txt", "-topk", 3, folder, "-format"]
    objects = rows(predicted(*args, "jsonl").check())
    table = predicted(*args, "table").check().out.splitlines()
    header, *records = csv.reader(io.StringIO(predicted(*args, "csv").check().out))
    assert header == ["path", "rank", "label", "name", "synset", "probability"]
    assert len(records) == 15 and len(objects) == 5 and len(table) == 20
    for i, record in enumerate(records):
        image, choice = objects[i // 3], objects[i // 3]["top"][i % 3]
        assert choice["name"] == WORDS[choice["label"]] and choice["synset"] is None
        assert record == [
            image["path"], str(i % 3 + 1), str(choice["label"]), choice["name"], "",
            str(choice["probability"]),
        ]  # fmt: skip
        assert table[i // 3 * 4] == image["path"]
        line = table[i // 3 * 4 + 1 + i % 3].split()
        assert line == [f"{100 * choice['probability']:.2f}%", str(choice["label"]), choice["name"]]


ODD_NAMES = [b"a\nb.png", b"\xff\xfe.png", b'q"u,o.png', b"r\rx.png", b"\xe6\x97\xa5.png",
             b" \t.png", b"\x1b[31mred.png", b"=1+1.png", b"c'\".png"]  # fmt: skip


def test_odd_file_names_survive_in_every_format(predicted, folder, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in ODD_NAMES:
        (odd / os.fsdecode(name)).write_bytes((folder / "3" / "digit.png").read_bytes())
    paths = sorted(str(path) for path in odd.iterdir())
    args = ["-topk", 1, odd, "-format"]
    assert [row["path"] for row in rows(predicted(*args, "jsonl").check())] == paths
    out = predicted(*args, "csv").check().out
    found = [record[0] for record in csv.reader(io.StringIO(out, newline=""))][1:]
    assert found == [path.encode(errors="backslashreplace").decode() for path in paths]
    found = predicted(*args, "table").check().out.split("\n")[:-1:2]
    assert [path if path in paths else ast.literal_eval(path) for path in found] == paths
    assert all(path.isprintable() for path in found)


def test_a_broken_image_is_named_and_the_others_are_predicted(predicted, folder):
    whole = rows(predicted("-format", "jsonl", "-batch_size", 2, folder).check())
    for workers in (0, 2):
        (folder / "1" / "digit.png").write_bytes(b"no image")
        (folder / "4" / "digit.png").write_bytes((folder / "3" / "digit.png").read_bytes()[:-90])
        (folder / "2" / "dead.jpg").symlink_to("gone")
        os.mkfifo(folder / "2" / "pipe.jpg")
        args = ["-format", "jsonl", "-batch_size", 2, "-num_workers", workers]
        result = predicted(*args, folder)
        assert result.status == 1
        # An image alone in its batch takes other kernels: equal to rounding, not to the bit.
        found, expected = rows(result), [whole[0], whole[2], whole[3]]
        assert [row["path"] for row in found] == [row["path"] for row in expected]
        for row, wanted in zip(found, expected):
            assert labels(row) == labels(wanted)
            assert probabilities(row) == pytest.approx(probabilities(wanted), rel=1e-4)
        *_, first, second, third, fourth = result.err.splitlines()
        assert f"cannot read {folder}/2/dead.jpg: this link leads nowhere" in first + second
        assert f"cannot read {folder}/2/pipe.jpg: this is neither a file" in first + second
        assert third.startswith(f"predict.py: cannot read {folder}/1/digit.png: cannot identify")
        assert fourth.startswith(f"predict.py: cannot read {folder}/4/digit.png: ")
        (folder / "2" / "dead.jpg").unlink()
        (folder / "2" / "pipe.jpg").unlink()
    result = predicted("-format", "csv", folder / "1", folder / "4")
    assert (result.status, result.out.count("\n")) == (1, 1)  # the header


def test_paths_are_files_folders_and_patterns_each_image_once(predicted, folder, monkeypatch):
    def found(*args):
        return [row["path"] for row in rows(predicted("-format", "jsonl", *args).check())]

    monkeypatch.chdir(folder)
    assert found(".") == [f"./{label}/digit.png" for label in range(5)]
    assert found("3", "1/digit.png", "3") == ["3/digit.png", "1/digit.png"]
    assert found("[24]/*.png", "0*") == ["2/digit.png", "4/digit.png", "0/digit.png"]
    assert found("**") == [f"{label}/digit.png" for label in range(5)]
    (folder / "[24]").mkdir()
    (folder / "[24]" / "no suffix").write_bytes((folder / "0" / "digit.png").read_bytes())
    assert found("[24]/no suffix") == ["[24]/no suffix"]
    (folder / "0" / "up").symlink_to("..")
    assert found("0") == ["0/digit.png"]


def test_suffixes_that_pillow_reads_count_and_what_it_cannot_is_counted(predicted, tmp_path):
    image = Image.open(PHOTOS / "odd_257x300.jpg")
    for name in ("a.jfif", "b.BMP", "c.tga", "d.jpe"):
        image.save(tmp_path / name)
    (tmp_path / "e.heic").touch()
    (tmp_path / "f.mp4").touch()
    for path in (tmp_path, tmp_path / "*"):
        result = predicted("-format", "jsonl", path).check()
        assert [row["path"][-6:] for row in rows(result)] == [
            "a.jfif",
            "/b.BMP",
            "/c.tga",
            "/d.jpe",
        ]
        assert "left out: 2 (without an image's suffix): " in result.err and "e.heic" in result.err


def test_what_is_missing_or_closed_or_a_systems_does_not_stop_the_others(
    predicted, folder, unreadable
):
    (folder / "3" / "@eaDir").mkdir()
    (folder / "3" / "@eaDir" / "x.png").write_bytes((folder / "0" / "digit.png").read_bytes())
    unreadable(folder / "1")
    gone = folder / "gone.jpg"
    result = predicted("-format", "jsonl", gone, folder / "1", folder / "2", folder / "3")
    assert result.status == 1
    assert [row["path"] for row in rows(result)] == in_folder(folder)[2:4]
    assert f"predict.py: {gone}: no such file or folder\n" in result.err
    closed = f"cannot read {folder}/1: this folder cannot be read: Permission denied\n"
    assert f"predict.py: {closed}" in result.err
    left_out = f"left out: 1 (folders that a system makes): {folder}/3/@eaDir\n"
    assert left_out in result.err
    result = predicted("-format", "jsonl", folder / "3" / "**").check()
    assert [row["path"] for row in rows(result)] == [f"{folder}/3/digit.png"]
    assert len(rows(predicted("-format", "jsonl", folder / "3" / "@eaDir" / "*").check())) == 1
    predicted(folder / "1").refused(2, closed)
    predicted(gone, folder / "1").refused(2, f"{gone}: no such file or folder\n", closed)


def test_weights_among_the_images_are_those_of_a_pattern_for_another_flag(model, folder):
    words = [*model, model[3], folder]
    result = run_tool(predict, *words)
    result.refused(2, f"{model[3]}: this is no image", "did a pattern match several?")


def test_a_reader_that_leaves_early_ends_it_quietly(model, folder):
    quoted = " ".join(f'"{word}"' for word in [sys.executable, TOOL, *model])
    result = run(["sh", "-c", f'{quoted} -batch_size 1 -format jsonl "{folder}" | head -n 1'])
    assert "left out" in result.err and result.err.count("\n") == 2 and len(rows(result)) == 1


def test_each_batch_is_flushed(model, folder, monkeypatch):
    class Output(io.StringIO):
        def flush(self):
            flushed.append(len(self.getvalue().splitlines()))

    flushed = []
    monkeypatch.setattr(sys, "stdout", Output())
    args = [*model, "-batch_size", 2, "-format", "jsonl", folder]
    predict.work(predict.build_parser().parse_args(list(map(str, args))))
    assert sorted(set(flushed)) in ([0, 2, 4, 5], [2, 4, 5])


def test_imagenets_names_are_in_the_order_of_the_labels():
    classes = predict.read_classes(None, 1000)
    assert len(classes) == 1000
    synsets = [kind.synset for kind in classes]
    assert synsets == sorted(set(synsets))
    for label, synset, name in (
        (0, "n01440764", "tench, Tinca tinca"),
        (1, "n01443537", "goldfish, Carassius auratus"),
        (134, "n02012849", "crane"),
        (207, "n02099601", "golden retriever"),
        (517, "n03126707", "crane"),
        (999, "n15075141", "toilet tissue, toilet paper, bathroom tissue"),
    ):
        assert classes[label] == (name, synset)


def test_names_are_a_line_per_class(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes(
        b"\xef\xbb\xbfcat\r\n n01440764 \nn01440764 my fish\nn99999999\nn01 \r x\n\n\n"
    )
    assert predict.read_classes(file, 5) == [
        ("cat", None), ("tench, Tinca tinca", "n01440764"), ("my fish", "n01440764"),
        ("n99999999", "n99999999"), ("n01 \r x", None),
    ]  # fmt: skip
    assert predict.read_classes(None, 3) == [("0", None), ("1", None), ("2", None)]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "gbk"])
def test_names_that_are_not_utf_8_are_refused(tmp_path, encoding):
    text = "猫\n狗\n" if encoding in ("gbk", "utf-32") else "\ufeff猫\n狗\n"
    (tmp_path / "names.txt").write_bytes(text.encode(encoding))
    what = "not UTF-8 text" if encoding == "gbk" else f"{encoding[:6].upper()} text: save it as"
    with pytest.raises(DataError, match=f"names.txt: this file of names is {what}"):
        predict.read_classes(tmp_path / "names.txt", 2)


def test_the_classes_of_make_lists_are_names(predicted, folder, tmp_path):
    for label in range(5, 10):
        (folder / f"x {label}").mkdir()
        (folder / f"x {label}" / "1.png").write_bytes((folder / "3" / "digit.png").read_bytes())
    (folder / "x 5" / "2.png").write_bytes((folder / "3" / "digit.png").read_bytes())
    run_tool(make_lists, "-data_path", folder).check()
    args = ["-names", folder / "classes.txt", "-topk", 99, "-format", "jsonl", folder / "0"]
    (row,) = rows(predicted(*args).check())
    assert {choice["label"]: choice["name"] for choice in row["top"]} == {
        label: str(label) if label < 5 else f"x {label}" for label in range(10)
    }


def test_a_sheet_shows_the_images_above_their_classes(predicted, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "PLOT_IMAGES", 3)
    names, picture = tmp_path / "names.txt", tmp_path / "sheet.png"
    names.write_text("".join(f"{word} \u65e5\x07 {'x' * 300}\n" for word in WORDS))
    bitmap = ImageFont.load_default_imagefont  # Pillow's before 10.1
    for own in (sheet._pillows_own, lambda fonts: bitmap()):
        monkeypatch.setattr(sheet, "find_dejavu", lambda: None)
        monkeypatch.setattr(sheet, "_pillows_own", own)
        result = predicted("-names", names, "-plot", picture, folder).check()
        assert f"{picture}: shows the first 3 images; 2 more are left out" in result.err
        assert f"{picture}: its font has no '\u65e5': give one that has by -font FILE" in result.err
        assert "or install matplotlib" in result.err
        with Image.open(picture) as image:
            found = np.asarray(image.convert("L"))
        side, gap = sheet._SIDE, sheet._GAP
        width, height = side + gap, side + 4 * 20 + 2 * gap  # of a cell
        assert found.shape == (2 * height + gap, 2 * width + gap)
        for label, (x, y) in enumerate([(gap, gap), (gap + width, gap), (gap, gap + height)]):
            with Image.open(folder / str(label) / "digit.png") as image:
                pixels = np.asarray(image.convert("L")).repeat(8, 0).repeat(8, 1)
            assert np.array_equal(found[y : y + side, x : x + side], pixels)
            text = found[y + side : y + height - gap, x : x + side]
            for line in range(4):  # three classes and the file
                assert (text[6 + 20 * line : 26 + 20 * line] < 200).any()
        assert (found[:, -gap:] == 255).all()  # long names are cut
        assert (found[height + gap :, width + gap :] == 255).all()  # there is no fourth image
        predicted("-plot", picture, folder).refused(2, f"{picture}: is there already")
        picture.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my digits", "names.txt"]


def test_a_sheet_has_the_letters_of_dejavu_and_names_some_of_those_that_it_lacks(
    predicted, folder, tmp_path
):
    pytest.importorskip("matplotlib")
    names, picture = tmp_path / "names.txt", tmp_path / "a.png"
    names.write_text("Übung шёл λύω\n" * 10, encoding="utf-8")
    args = "-names", names, "-plot", picture, folder / "0"
    assert predicted(*args).check().err == ""
    picture.unlink()
    names.write_text("一二三四五六七八九十百千\n" * 10, encoding="utf-8")
    said = predicted(*args).check().err
    assert " and 2 more characters: give one that has by -font FILE, a .ttf or .otf\n" in said


def test_below_an_image_stands_the_end_of_its_path(predicted, folder, tmp_path, monkeypatch):
    drawn = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, place, t, *a: (drawn.append(t), text(self, place, t, *a)),
    )
    result = predicted("-topk", 1, "-plot", tmp_path / "a.png", folder / "0", folder / "1").check()
    assert [len(drawn), result.err] == [4, ""]
    for path in drawn[1::2]:
        assert path.startswith("...") and path.endswith(
            f"/my digits/{drawn.index(path) // 2}/digit.png"
        )


def test_a_picture_that_cannot_be_written(predicted, folder, tmp_path, monkeypatch):
    for path, reason in (
        ("sheet.gif", "ends in .png, .jpg"),
        ("gone/sheet.png", "there is no such folder"),
    ):
        predicted("-plot", tmp_path / path, folder).refused(2, f"{tmp_path / path}: ", reason)
    font = ["-font", CONFIG, "-plot", tmp_path / "a.png"]
    predicted(*font, folder).refused(2, f"{CONFIG}: -font cannot be read as a font")
    (folder / "0" / "digit.png").write_bytes(b"")
    result = predicted("-plot", tmp_path / "a.png", folder / "0")
    result.refused(1, f"{tmp_path / 'a.png'}: is not written")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict.os, "replace", fail)
    result = predicted("-plot", tmp_path / "a.png", folder / "1")
    result.refused(1, f"{tmp_path / 'a.png'}: cannot be written: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["my digits"]


def test_other_photographs_and_another_size(predicted):
    result = predicted("-format", "jsonl", "-image_size", 35, PHOTOS).check()
    assert "is for images of 28 pixels: its spatial projections are resampled" in result.err
    assert [row["path"] for row in rows(result)] == sorted(map(str, PHOTOS.iterdir()))


def test_what_is_asked_wrongly_is_one_sentence_without_paddle(model, folder, tmp_path):
    (tmp_path / "paddle.py").write_text("raise SystemExit('Paddle was imported')")
    path = {"PYTHONPATH": str(tmp_path)}
    help_text = run([sys.executable, TOOL, "-h"], **path).check().out
    for flag in ("-cfg", "-pretrained", "-topk", "-names", "-format", "-plot", "PATH"):
        assert flag in help_text
    run([sys.executable, TOOL, *model, tmp_path / "gone"], **path).refused(2, "gone: no such file")


def test_what_cannot_be_is_one_sentence(model, predicted, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n\nc\n")
    predicted("-names", names, folder).refused(2, f"{names}:3: this line is empty")
    names.write_text("a\nb\nc\n")
    predicted("-names", names, folder).refused(2, f"{names}: there are 3 names in it", "10 classes")
    names.write_bytes(b"\xff")
    predicted("-names", names, folder).refused(2, f"{names}: ", "not UTF-8")
    predicted("-names", tmp_path, folder).refused(2, f"{tmp_path}: ", "Is a directory")
    predicted("-topk", 0, folder).refused(2, "-topk is 0")
    predicted("-batch_size", 0, folder).refused(2, "DATA.BATCH_SIZE is 0")
    predicted("-image_size", 30, folder).refused(2, "DATA.IMAGE_SIZE 30 is not a multiple")
    predicted("-num_classes", 11, folder).refused(2, f"{model[3]}: ", "give -num_classes 10")
    predicted("/dev/null").refused(2, "/dev/null: this is neither a file nor a folder")
    predicted(folder / "*.txt").refused(2, f"{folder}/*.txt: no image is there")
    predicted(ROOT / "configs").refused(2, f"{ROOT}/configs: no image is there")
    run_tool(predict, *model[:3], CONFIG, folder).refused(2, f"{CONFIG} is a text file")
    run_tool(predict, "-cfg", CONFIG, *model[2:], folder).refused(2, "wrong -cfg?")


def test_weights_that_give_no_numbers_are_an_error(model, folder, tmp_path):
    state = dict(pdparams.read(model[3]))
    state["head.bias"] = np.full(10, np.nan, np.float32)
    pdparams.write(tmp_path / "nan.pdparams", state)
    result = run_tool(predict, *model[:3], tmp_path / "nan.pdparams", folder)
    result.refused(1, f"{folder}/0/digit.png: the model's outputs for it are not finite")
    assert result.out == ""


def test_too_little_memory_is_a_sentence(predicted, folder, monkeypatch):
    def full(*args):
        raise MemoryError("(ResourceExhausted)")

    monkeypatch.setattr(predict, "load_model", full)
    predicted(folder).refused(1, "not enough memory", "-batch_size")
