"""tools/make_lists.py: the lists that a run reads, in both layouts, whatever is in the folders."""

import errno
import os
import sys

import numpy as np
import pytest
from PIL import Image
from program import ROOT, SMALL, run, run_program, run_tool

from tools import check_dataset, make_lists
from datasets import ImageList
from utils import show_path

TOOL = ROOT / "tools" / "make_lists.py"


def made(folder, *args):
    return run_tool(make_lists, "-data_path", folder, *args)


def images(folder, *names):
    """Small images in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        seed = list(os.fsencode(f"{folder}/{name}"))
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name, "PNG")


def read(folder, split):
    """(path in the folder, label) of each line, as a run reads them."""
    found = ImageList(str(folder), f"{split}_list.txt", 1000)
    paths = [os.path.relpath(found.image_path(i), folder) for i in range(len(found))]
    return list(zip(paths, found.labels.tolist()))


def classes(folder):
    return (folder / "classes.txt").read_bytes().decode().split("\n")[:-1]


def files(folder):
    """The files in a folder: the lists, and whatever else is left of writing them."""
    return sorted(path.name for path in folder.iterdir() if not path.is_dir())


LISTS = ["classes.txt", "train_list.txt", "val_list.txt"]


@pytest.fixture
def flat(tmp_path):
    """Class folders alone: 20 cats, 2 dogs, 1 bird."""
    root = tmp_path / "my pets"
    images(root / "cat", *(f"{i:02}.png" for i in range(20)))
    images(root / "dog", "a.JPG", "b c.jpeg")
    images(root / "Bird", "only one.PNG")
    return root


@pytest.fixture
def split(tmp_path):
    """ImageNet's layout: two classes, and more beside them."""
    root = tmp_path / "split"
    images(root / "train" / "n02", "b.JPEG", "a.JPEG")
    images(root / "train" / "n01" / "deeper", "x.JPEG")
    images(root / "val" / "n01", "v1.JPEG")
    images(root / "val" / "n02", "v2.JPEG")
    return root


def test_imagenets_layout(split):
    result = made(split).check()
    assert classes(split) == ["n01", "n02"]
    assert read(split, "train") == [
        ("train/n01/deeper/x.JPEG", 0), ("train/n02/a.JPEG", 1), ("train/n02/b.JPEG", 1)
    ]  # fmt: skip
    assert read(split, "val") == [("val/n01/v1.JPEG", 0), ("val/n02/v2.JPEG", 1)]
    assert result.err == ""
    assert result.out == (
        "train_list.txt 3 images, val_list.txt 2 images, classes: 2\n"
        f"next: python tools/check_dataset.py -data_path {split} -num_classes 2\n"
    )
    result = run_tool(check_dataset, "-data_path", split, "-num_classes", 2).check()
    assert "train_list.txt 3, val_list.txt 2; problems: 0, warnings: 0" in result.out


def test_digits_in_class_folders_can_be_trained_on(digits, tmp_path):
    for label in "014":
        (tmp_path / label).symlink_to(digits / "val" / label)
    run([sys.executable, TOOL, "-data_path", ".", "-val_fraction", "0.2"], cwd=tmp_path).check()
    assert classes(tmp_path) == ["0", "1", "4"]
    assert [label for _, label in read(tmp_path, "val")] == 20 * [0] + 20 * [1] + 20 * [2]
    opts = {**SMALL, "TRAIN.NUM_EPOCHS": 1}
    words = ["-data_path", tmp_path, "-output", tmp_path / "runs", "-num_classes", 3]
    result = run_program(*words, opts=opts).check()
    assert "on 60 images" in result.out


def test_each_class_gives_its_share_and_at_least_one_where_it_has_two(flat):
    result = made(flat).check()
    train, val = read(flat, "train"), read(flat, "val")
    assert classes(flat) == ["Bird", "cat", "dog"]
    assert [label for _, label in val] == [1, 1, 2]
    assert [label for _, label in train] == [0] + 18 * [1] + [2]
    everything = [str(p.relative_to(flat)) for p in flat.glob("*/*")]
    assert sorted(path for path, _ in train + val) == sorted(everything)
    assert [path for path, _ in train] == sorted(path for path, _ in train)
    assert all(path.startswith(classes(flat)[label] + "/") for path, label in train + val)
    assert result.err == (
        f"make_lists.py: warning: {flat}/Bird/only one.PNG: the only image of its class: "
        "validation gets none\n"
    )
    assert f"-data_path '{flat}' -num_classes 3" in result.out
    made(flat, "-force", "-val_fraction", 0.99).check()
    assert [label for _, label in read(flat, "train")] == [0, 1, 2]


def test_the_split_is_a_function_of_the_seed_and_the_paths(flat, tmp_path):
    made(flat).check()
    first = read(flat, "val")
    # On another machine, with files made in another order, and some that were not there before.
    other = tmp_path / "other"
    images(other / "dog", "b c.jpeg", "a.JPG")
    images(other / "cat", *(f"{i:02}.png" for i in reversed(range(21))))
    images(other / "Bird", "only one.PNG", "another.png")
    made(other).check()
    assert len(set(first) - set(read(other, "val"))) <= 1  # moved by the new cat
    # Written down: another Python or another release has to split in the same way.
    assert [path for path, _ in first] == ["cat/16.png", "cat/19.png", "dog/a.JPG"]
    made(flat, "-force", "-seed", 1).check()
    assert read(flat, "val") != first
    made(flat, "-force", "-seed", 0).check()
    assert read(flat, "val") == first


def test_links_loops_hidden_files_and_what_is_no_image(flat, tmp_path):
    images(tmp_path / "elsewhere" / "deep", "far.png")
    (flat / "linked").symlink_to(tmp_path / "elsewhere")
    (flat / "linked" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (flat / "dog" / "up").symlink_to("..")
    (flat / "dog" / "itself").symlink_to(".")
    (flat / "dog" / "link.png").symlink_to("../cat/00.png")
    (flat / "dog" / "dead.png").symlink_to("gone.png")
    (flat / "dog" / "loop.png").symlink_to("loop.png")
    (flat / "dead class").symlink_to("gone")
    os.mkfifo(flat / "dog" / "pipe.png")
    for name in ("._a.JPG", "Thumbs.db", "a.txt"):
        (flat / "dog" / name).write_text("no image")
    images(flat / ".git", "x.png")
    images(flat / "dog" / ".thumbnails", "x.png")
    (flat / "readme.txt").touch()
    result = made(flat).check()
    found = {path for path, _ in read(flat, "train") + read(flat, "val")}
    assert classes(flat) == ["Bird", "cat", "dog", "linked"]
    assert {path for path in found if not path.startswith("cat")} == {
        "Bird/only one.PNG", "dog/a.JPG", "dog/b c.jpeg", "dog/link.png", "linked/deep/far.png"
    }  # fmt: skip
    for path, reason in (
        ("dead class", "this link leads nowhere"),
        ("dog/dead.png", "this link leads nowhere"),
        ("dog/loop.png", "this link leads nowhere"),
        ("dog/pipe.png", "this is neither a file nor a folder"),
    ):
        assert f"warning: {flat}/{path}: {reason}: left out\n" in result.err
    assert f"make_lists.py: left out: 3 (hidden): {flat}/.git, {flat}/dog/._a.JPG" in result.err
    assert f"(without an image's suffix): {flat}/dog/Thumbs.db, {flat}/dog/a.txt\n" in result.err
    counts = result.out.splitlines()[1]
    assert sorted(counts.removeprefix("left out: ").split("), ")) == sorted([
        "3 (hidden", "2 (without an image's suffix", "3 (links that lead nowhere",
        "1 (neither files nor folders", "1 (outside the class folders)",
        "3 (links to a folder above or one that was read already",
    ])  # fmt: skip


def test_names_of_what_is_left_out_are_a_few(flat):
    for number in range(9):
        (flat / "cat" / f"{number}.txt").touch()
    err = made(flat).check().err
    assert f"left out: 9 (without an image's suffix): {flat}/cat/0.txt, {flat}/cat/1.txt, " in err
    assert err.endswith(", ...\n") and err.count(".txt") == 3


def test_folders_of_a_system_are_no_classes_and_give_no_images(flat, split):
    for root in (flat, split, split / "train", split / "val"):
        for name in ("lost+found", "@eaDir"):
            images(root / name, "thumb.png")
    images(flat / "cat" / "@eaDir", "thumb.png")
    images(split / "train" / "n01" / "__MACOSX", "thumb.png")
    for root, names, count in ((flat, ["Bird", "cat", "dog"], 3), (split, ["n01", "n02"], 5)):
        result = made(root).check()
        assert classes(root) == names
        assert f"left out: {count} (folders that a system makes)\n" in result.out
        assert not [path for path, _ in read(root, "train") + read(root, "val") if "thumb" in path]
        assert "neither train nor val" not in result.err


def test_folders_that_cannot_be_read_are_named_and_left_out(flat, unreadable):
    images(flat / "dog" / "closed", "x.png")
    images(flat / "secret", "x.png")
    unreadable(flat / "dog" / "closed")
    unreadable(flat / "secret")
    result = made(flat).check()
    assert classes(flat) == ["Bird", "cat", "dog"]
    for path in ("dog/closed", "secret"):
        sentence = "this folder cannot be read: Permission denied: left out"
        assert f"warning: {flat}/{path}: {sentence}\n" in result.err
    assert "left out: 2 (folders that cannot be read)\n" in result.out
    unreadable(flat)
    made(flat, "-force").refused(2, f"{flat}: Permission denied")


def test_classes_that_are_whole_numbers_are_labelled_by_value(tmp_path):
    for number in range(12):
        images(tmp_path / str(number), "1.png", "2.png")
    result = made(tmp_path).check()
    assert classes(tmp_path) == [str(number) for number in range(12)]
    assert all(path.split("/")[0] == str(label) for path, label in read(tmp_path, "train"))
    said = "label 2 is class 2, which in the order of strings would be class 10 (-string_order)"
    assert said in result.err
    result = made(tmp_path, "-force", "-string_order").check()
    assert classes(tmp_path) == sorted(map(str, range(12))) and result.err == ""
    (tmp_path / "11").rename(tmp_path / "eleven")  # names, of which some look like numbers
    assert made(tmp_path, "-force").check().err == ""
    assert classes(tmp_path) == [*sorted(map(str, range(11))), "eleven"]


def test_imagenet_v2s_folders_are_all_for_validation_with_their_numbers_for_labels(tmp_path):
    for number in range(12):
        images(tmp_path / str(number), "a.jpeg", "b.jpeg")
    result = made(tmp_path, "-val_fraction", 1).check()
    assert read(tmp_path, "val") == [
        (f"{number}/{name}.jpeg", number) for number in range(12) for name in "ab"
    ]
    assert files(tmp_path) == ["classes.txt", "val_list.txt"]
    next_command = f"-data_path {tmp_path} -num_classes 12 -lists val_list.txt"
    assert result.out.splitlines() == [
        "val_list.txt 24 images, classes: 12",
        f"next: python tools/check_dataset.py {next_command}",
    ]
    words = next_command.split()
    assert run_tool(check_dataset, *words).check().out.endswith("problems: 0, warnings: 0\n")
    made(tmp_path, "-val_fraction", 0.5, "-force").check()  # and back: no list of before stays
    made(tmp_path, "-val_fraction", 1, "-force").check()
    assert files(tmp_path) == ["classes.txt", "val_list.txt"]


def test_whole_numbers_of_one_length_say_nothing_and_those_of_both_folders_agree(tmp_path):
    for part in ("train", "val"):
        for name in ("0000", "0009", "0010"):
            images(tmp_path / part / name, f"{part}.png")
    assert made(tmp_path).check().err == ""
    for part in ("train", "val"):
        (tmp_path / part / "0010").rename(tmp_path / part / "7")
    assert "label 1 is class 7, which" in made(tmp_path, "-force").check().err
    assert classes(tmp_path) == ["0000", "7", "0009"]
    for part in ("train", "val"):
        assert [label for _, label in read(tmp_path, part)] == [0, 1, 2]
        assert [path.split("/")[1] for path, _ in read(tmp_path, part)] == ["0000", "7", "0009"]


@pytest.mark.parametrize("name", ["a b", "日本", "x\r y", "tab\tbed", "1 2", "#", "'\"", "a\x0bb"])
def test_names_that_a_line_can_hold_come_back_from_the_list(tmp_path, name):
    images(tmp_path / "other", "1.png", "2.png")
    images(tmp_path / name, f"{name}.png", f" {name} .png")
    made(tmp_path).check()
    label = classes(tmp_path).index(name)
    found = read(tmp_path, "train") + read(tmp_path, "val")
    assert sorted(path for path, of in found if of == label) == sorted(
        [f"{name}/{name}.png", f"{name}/ {name} .png"]
    )


@pytest.mark.parametrize(
    "folder, name, reason",
    [
        ("cat", "two\nlines.png", "there is a line end in its name"),
        ("cat\n", "1.png", "there is a line end in its name"),
        ("cat", os.fsdecode(b"\xff.png"), "its name is not UTF-8"),
        (os.fsdecode(b"\xff"), "1.png", "its name is not UTF-8"),
        (" cat", "1.png", "its name begins or ends with white space"),
        ("cat ", "1.png", "its name begins or ends with white space"),
        ("\ufeffcat", "1.png", "its name begins or ends with white space"),
    ],
)
def test_a_name_that_no_line_can_hold_is_refused(tmp_path, folder, name, reason):
    images(tmp_path / "other", "1.png", "2.png")
    images(tmp_path / folder, "0.png", name)
    made(tmp_path).refused(2, f"{reason}, which a list cannot hold: rename it")
    bad = tmp_path / folder / name if folder == "cat" else tmp_path / folder
    assert show_path(str(bad)) + ": " in made(tmp_path).err
    assert files(tmp_path) == []


def test_lists_that_are_there_stay_without_force(flat):
    (flat / "val_list.txt").write_text("mine")
    made(flat).refused(2, f"{flat}/val_list.txt: is there already; -force")
    assert files(flat) == ["val_list.txt"] and (flat / "val_list.txt").read_text() == "mine"
    made(flat, "-force").check()
    assert files(flat) == LISTS
    before = [(flat / name).read_bytes() for name in LISTS]
    made(flat).refused(2, "classes.txt: is there already")
    assert made(flat, "-force").check().out.count("left out") == 0  # its own lists
    assert before == [(flat / name).read_bytes() for name in LISTS]


def test_a_folder_where_a_list_goes_is_refused_with_force_too(flat):
    (flat / "train_list.txt").mkdir()
    made(flat, "-force").refused(2, f"{flat}/train_list.txt: this is a folder")
    assert files(flat) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [1, 3])
def test_all_three_lists_appear_or_none(flat, monkeypatch, call, number):
    calls = []
    real = getattr(os, call)

    def fail(*args):
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    names = ["classes.txt", "val_list.txt", "train_list.txt"]  # in the order of their appearance
    name = names[number - 1] if call == "replace" else names[-number]
    made(flat).refused(1, f"{flat}/{name}: cannot be written: No space left on device")
    assert len(calls) == number
    assert files(flat) == []


def test_val_and_train_have_to_agree(split):
    images(split / "train" / "n03", "x.JPEG")
    result = made(split).check()
    assert f"warning: {split}/train/n03: this class has no images in val\n" in result.err
    assert classes(split) == ["n01", "n02", "n03"]
    assert [label for _, label in read(split, "val")] == [0, 1]
    images(split / "val" / "n04", "x.JPEG")
    made(split, "-force").refused(2, f"{split}/val/n04: {split}/train has no such class")
    assert classes(split) == ["n01", "n02", "n03"]


def test_folders_beside_train_and_val_are_named(split):
    images(split / "test" / "n01", "x.JPEG")
    result = made(split).check()
    assert f"warning: {split}/test: left out, as it is neither train nor val\n" in result.err
    made(split, "-force", "-val_fraction", 0.5).refused(2, f"{split}/val: ", "-val_fraction")


def test_folders_that_are_no_data_set_are_refused(tmp_path, flat, split):
    made(tmp_path / "gone").refused(2, f"{tmp_path}/gone: there is no such folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    made(empty).refused(2, f"{empty}: has no class folders")
    (flat / "notes").mkdir()
    made(flat).refused(2, f"{flat}/notes: no image in this class's folder")
    half = tmp_path / "half"
    images(half / "train" / "cat", "1.png")
    made(half).refused(2, f"but no {half}/val: give -data_path {half}/train")
    images(half / "val", "ILSVRC2012_val_00000001.png")
    made(half).refused(2, f"{half}/val: has no class folders", "ImageNet's validation images")
    single = tmp_path / "single"
    images(single / "a", "1.png")
    made(single).refused(2, f"{single}: every class has one image")
    for fraction in ("0", "1.01", "nan", "-0.1"):
        made(single, f"-val_fraction={fraction}").refused(2, "above 0 and at most 1")


def test_a_class_may_be_called_train(tmp_path):
    images(tmp_path / "train", "1.png", "2.png")
    images(tmp_path / "bus", "1.png", "2.png")
    made(tmp_path).check()
    assert classes(tmp_path) == ["bus", "train"]
