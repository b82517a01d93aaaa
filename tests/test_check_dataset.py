"""tools/check_dataset.py as its users run it: every problem at once, no hang, nothing left."""

import errno
import fcntl
import multiprocessing
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from PIL import Image
from processes import HANG_SECONDS, parent_of, process_ids
from program import ROOT, run, run_tool

from tools import check_dataset
from datasets import DataError, ImageDataset, ImageList

TOOL = ROOT / "tools" / "check_dataset.py"


def checked(folder, *args):
    return run_tool(check_dataset, "-data_path", folder, *args)


def noise(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """Three images to train, one to validate, of three classes, without a problem."""
    root = tmp_path / "my images"
    root.mkdir()
    for number in range(4):
        noise(number).save(root / f"{number}.JPEG")
    (root / "train_list.txt").write_text("0.JPEG 0\n1.JPEG 1\n2.JPEG 2\n")
    (root / "val_list.txt").write_text("3.JPEG 0\n")
    return root


def test_a_clean_data_set_is_one_line_and_status_0(few_digits):
    result = checked(few_digits, "-num_classes", 10).check()
    assert result.err == ""
    assert result.out == (
        "images: train_list.txt 203, val_list.txt 101; problems: 0, warnings: 0\n"
    )


def test_a_terminal_shows_a_progress_bar(folder):
    reader, writer = pty.openpty()
    os.set_blocking(reader, False)
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, str(TOOL), "-data_path", str(folder), "-num_classes", "3"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, timeout=HANG_SECONDS)
    shown = os.read(reader, 10_000).decode()
    os.close(writer)
    os.close(reader)
    assert done.returncode == 0 and b"problems: 0" in done.stdout
    assert "/4 [" in shown


def test_every_problem_is_reported_at_once_in_order_with_the_runs_sentence(folder):
    (folder / "cut.JPEG").write_bytes((folder / "0.JPEG").read_bytes()[:-300])
    (folder / "text.JPEG").write_text("<html>404</html>")
    (folder / "empty.JPEG").touch()
    Image.new("1", (10_000, 9_000)).save(folder / "bomb.JPEG", "PNG")
    train = ["0.JPEG 0", "no label", "1.JPEG 3", "gone.JPEG 1", "1.JPEG 1", "cut.JPEG 2", "",
             "text.JPEG 0", "0.JPEG 2", "empty.JPEG 1", "bomb.JPEG 2", "./1.JPEG 1"]  # fmt: skip
    (folder / "train_list.txt").write_text("\n".join(train))
    (folder / "val_list.txt").write_bytes(b"3.JPEG 0\n\xff.JPEG 0\n0.JPEG 0\n")
    result = checked(folder, "-num_classes", 3, "-num_workers", 2)
    assert (result.status, result.err) == (1, "")
    train, val = folder / "train_list.txt", folder / "val_list.txt"
    expected = [
        f"{train}:9: warning: {folder / '0.JPEG'}: this image is already in train_list.txt:1, "
        "with the label 0",
        f"{train}:12: warning: {folder}/./1.JPEG: this image is already in train_list.txt:5",
        f"{val}:3: warning: {folder / '0.JPEG'}: this image is already in train_list.txt:1",
        f"{val}: warning: 2 of 3 classes have no image: 1, 2",
        f"{train}:2: 'no label' has no label",
        f"{train}:3: label '3' is not in 0..2",
        f"{val}:2: this line is not UTF-8",
        f"{train}:4: cannot read {folder / 'gone.JPEG'}: No such file",
        f"{train}:6: cannot read {folder / 'cut.JPEG'}: image file is truncated",
        f"{train}:8: cannot read {folder / 'text.JPEG'}: cannot identify",
        f"{train}:10: cannot read {folder / 'empty.JPEG'}: cannot identify",
        f"{train}:11: cannot read {folder / 'bomb.JPEG'}: it has more than 89,478,485 pixels",
        "images: train_list.txt 9, val_list.txt 2; problems: 8, warnings: 4",
    ]
    lines = result.out.splitlines()
    assert len(lines) == len(expected), result.out
    for line, start in zip(lines, expected):
        assert line.startswith(start)
    assert lines[1].endswith("train_list.txt:5")
    # A run says the same of the first image that it cannot read.
    (folder / "train_list.txt").write_text("\n\n\ngone.JPEG 1\n")
    with pytest.raises(DataError) as error:
        ImageDataset(ImageList(str(folder), "train_list.txt", 3), None, 0)[(0, 0)]
    assert str(error.value) == lines[7]


def test_warnings_of_a_kind_are_one_line_and_problems_come_last(folder):
    (folder / "@eaDir").mkdir()
    (folder / "gone.JPEG").write_text("no image")
    thumbnails = [f"@eaDir/{number}.JPEG" for number in range(3)]
    for name in thumbnails:
        noise(0).save(folder / name)
    train = ["0.JPEG 1", "1.JPEG 1", "gone.JPEG 2", *["0.JPEG 1"] * 38, "1.JPEG 2",
             *(f"{name} 1" for name in thumbnails)]  # fmt: skip
    (folder / "train_list.txt").write_text("\n".join(train))
    result = checked(folder, "-num_classes", 3, "-lists", "train_list.txt")
    path, first = folder / "train_list.txt", folder / "0.JPEG"
    assert result.out.splitlines() == [
        f"{path}:4: warning: {first}: this image is already in train_list.txt:1 (37 more of these: "
        "lines 5, 6, 7, 8, 9, ...)",
        f"{path}:42: warning: {folder}/1.JPEG: this image is already in train_list.txt:2, with the "
        "label 1",
        f"{path}:43: warning: {folder}/@eaDir/0.JPEG: @eaDir is a folder that a system makes, of "
        "no images of yours (2 more of these: lines 44, 45)",
        f"{path}: warning: 1 of 3 classes have no image: 0 (labels start at 0)",
        f"{path}:3: cannot read {folder}/gone.JPEG: cannot identify image file "
        f"'{folder}/gone.JPEG'",
        "images: train_list.txt 45; problems: 1, warnings: 43",
    ]


def test_labels_that_were_counted_from_1_are_told_from_a_class_too_few(folder):
    hint = "; labels start at 0, and no line has a 0"
    (folder / "train_list.txt").write_text("0.JPEG 1\n1.JPEG 2\n2.JPEG 3\n")
    (folder / "val_list.txt").write_text("3.JPEG 00\n2.JPEG 3\n")
    lines = checked(folder, "-num_classes", 3).out.splitlines()
    label = "label '3' is not in 0..2 (MODEL.NUM_CLASSES is 3)"
    assert f"{folder}/train_list.txt:3: {label}{hint}" in lines
    assert f"{folder}/val_list.txt:2: {label}" in lines
    with pytest.raises(DataError, match=hint):
        ImageList(str(folder), "train_list.txt", 3)


def test_images_with_an_exif_orientation_are_counted(folder):
    for orientation, name in ((1, "0.JPEG"), (6, "1.JPEG"), (3, "3.JPEG")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        noise(0).save(folder / name, exif=exif)
    out = checked(folder, "-num_classes", 3).check().out
    assert "EXIF orientation, which is ignored, as in timm: 2 images\n" in out


def test_too_few_open_files_names_the_limit_and_what_to_do(folder, monkeypatch):
    def fail():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(multiprocessing, "Pipe", fail)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    sentence = f"Too many open files: a process may have {limit} (ulimit -n): raise that, or take"
    checked(folder).refused(1, sentence, "fewer -num_workers")


def test_warnings_alone_are_status_0(folder):
    (folder / "val_list.txt").write_text("0.JPEG 0\n")
    result = checked(folder, "-num_classes", 3).check()
    assert "problems: 0, warnings: 2" in result.out


def test_a_missing_list_is_a_problem_and_other_lists_can_be_named(folder):
    (folder / "val_list.txt").rename(folder / "other list.txt")
    result = checked(folder, "-num_classes", 3)
    assert result.status == 1
    assert f"{folder / 'val_list.txt'}: cannot read this image list: No such" in result.out
    result = checked(folder, "-num_classes", 3, "-lists", "other list.txt").check()
    assert "images: other list.txt 1; problems: 0, warnings: 1\n" in result.out


def test_paths_of_any_characters_are_printed_on_any_terminal(folder):
    (folder / "val_list.txt").write_bytes("größe\x1b[31m.JPEG 0\n".encode())
    command = [sys.executable, TOOL, "-data_path", folder, "-num_classes", 3]
    result = run(command, PYTHONIOENCODING="ascii")
    assert result.status == 1 and "Traceback" not in result.err
    assert r"gr\xf6\xdfe\x1b[31m.JPEG" in result.out


def test_help_and_wrong_flags_are_answered_without_paddle(folder, tmp_path):
    (tmp_path / "paddle.py").write_text("raise SystemExit('Paddle was imported')")
    path = {"PYTHONPATH": str(tmp_path)}
    help_text = run([sys.executable, TOOL, "-h"], **path).check().out
    for flag in ("-data_path", "-num_classes", "-num_workers", "-lists"):
        assert flag in help_text
    tool = [sys.executable, TOOL, "-data_path"]
    run([*tool, folder, "-epochs", 3], **path).refused(2, "unrecognized arguments: -epochs")
    run([*tool, folder, "-num_classes", 0], **path).refused(2, "MODEL.NUM_CLASSES", "at least 1")
    run([*tool, tmp_path / "gone"], **path).refused(2, str(tmp_path / "gone"), "train_list.txt")
    run([*tool, tmp_path], **path).refused(2, str(tmp_path), "val_list.txt", "docs/data.md")
    run(tool[:-1], **path).refused(2, "required: -data_path")


def test_a_reader_that_leaves_early_ends_the_check_quietly(folder):
    lines = [f"gone{number}.JPEG 1\n" for number in range(20_000)]
    (folder / "train_list.txt").write_text("".join(lines))
    command = f'"{sys.executable}" "{TOOL}" -data_path "{folder}" -num_classes 3 | head -n 1'
    result = run(["sh", "-c", command])
    assert result.out.startswith(f"{folder / 'train_list.txt'}: warning: ") and result.err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_at_once_and_leaves_no_process(folder, number):
    # Many small images rather than a few large ones: signals find the processes in Python's code.
    (folder / "train_list.txt").write_text("0.JPEG 1\n" * 100_000)
    command = [sys.executable, str(TOOL), "-data_path", str(folder), "-num_workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    children = []
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        children = [pid for pid in process_ids() if parent_of(pid) == process.pid]
    assert len(children) == 2 and process.poll() is None
    time.sleep(0.5)
    start = time.monotonic()
    os.killpg(process.pid, number)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert time.monotonic() - start < 2
    assert err == "" and all(": warning: " in line for line in out.splitlines())
    assert not set(children) & set(process_ids())


class Deadly:
    """Stands in for an ImageDataset some of whose images end the process that reads them."""

    def __init__(self, images, deadly):
        self.images, self.deadly = images, deadly

    def __len__(self):
        return len(self.images)

    def read(self, index):
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError(f"image {index}")


@pytest.fixture
def no_hang():
    """Fails the test after a minute."""

    def fail(number, frame):
        raise AssertionError("this hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_that_a_process_dies_of_is_one_of_all_problems(tmp_path, workers, no_hang):
    (tmp_path / "train_list.txt").write_text("a.JPEG 0\n" * 300)
    images = ImageList(str(tmp_path), "train_list.txt", 1)
    found = list(check_dataset.check_images(Deadly(images, {100, 102, 299}), workers))
    assert not multiprocessing.active_children()
    assert sum(done for done, _, _ in found) == 300
    sentences = [each for _, some, _ in found for each in some]
    death = "reading this image ended a process (SIGKILL)"
    deaths = [i for i, each in enumerate(sentences) if death in each]
    assert deaths == [100, 102, 299]
    assert all(f"train_list.txt:{i + 1}: " in sentences[i] for i in deaths)
    assert [s for i, s in enumerate(sentences) if i not in deaths] == [
        f"image {i}" for i in range(300) if i not in deaths
    ]


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_problems_come_in_the_lists_order_whoever_finds_them(tmp_path, workers):
    (tmp_path / "train_list.txt").write_text("a.JPEG 0\n" * 300)
    images = ImageList(str(tmp_path), "train_list.txt", 1)
    found = list(check_dataset.check_images(Deadly(images, ()), workers))
    assert [done for done, _, _ in found] == [64, 64, 64, 64, 44]
    assert [each for _, some, _ in found for each in some] == [f"image {i}" for i in range(300)]
