"""Images in folders, texts, and sentences for errors, as every program has them."""

import errno
import os
import resource
import sys

import pytest
from PIL import Image
from program import ROOT, run, run_tool

import utils
from tools import check_dataset, make_lists
from config import ConfigError, get_config
from utils import cause, describe_error, find_images, image_suffixes


def found_in(folder):
    """(paths of the images in a folder, {path: (kind, sentence)} of what is left out)."""
    left_out = {}

    def skip(kind, path, problem):
        left_out[os.path.relpath(path, folder)] = kind, problem

    return [os.path.relpath(path, folder) for path in find_images(str(folder), skip)], left_out


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_images_are_what_pillow_can_read_here():
    suffixes = image_suffixes()
    assert {".jpg", ".jfif", ".jpe", ".png", ".bmp", ".tif", ".webp", ".ppm", ".tga", ".mpo",
            ".gif", ".psd", ".ico"} <= set(suffixes)  # fmt: skip
    # Nothing, what Pillow only writes, and what it cannot read alone.
    assert not {"", ".pdf", ".txt", ".eps", ".h5", ".mpg", ".heic"} & set(suffixes)
    avif = {".avif"} <= set(Image.registered_extensions())  # Pillow 11.3 has it
    assert (".avif" in suffixes) == avif


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of formats that Pillow gives up
def test_every_suffix_that_pillow_writes_is_read_again(tmp_path):
    pixels = Image.new("RGB", (40, 30), "red")
    written = []
    for suffix in image_suffixes():
        path = tmp_path / f"a{suffix.upper()}"
        try:
            pixels.save(path)
        except (KeyError, OSError, ValueError):  # a format of other modes, or one only to be read
            path.unlink(missing_ok=True)
            continue
        with Image.open(path) as image:
            image.convert("RGB")
        written.append(path.name)
    assert len(written) > 20
    assert sorted(found_in(tmp_path)[0]) == sorted(written)


def test_folders_that_a_system_makes_are_left_out(tmp_path):
    systems = ["@eaDir", "__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN",
               "#recycle", ".ipynb_checkpoints"]  # fmt: skip
    touch(tmp_path, "a.jpg", "deep/b.jpg", *(f"deep/{name}/x.jpg" for name in systems))
    touch(tmp_path, *(f"{name}/y/x.jpg" for name in systems))
    images, left_out = found_in(tmp_path)
    assert images == ["a.jpg", "deep/b.jpg"]
    kinds = {path: kind for path, (kind, problem) in left_out.items()}
    for name in systems:
        kind = utils.HIDDEN if name.startswith(".") else utils.SYSTEM
        assert kinds.pop(name) == kinds.pop(f"deep/{name}") == kind
    assert kinds == {}
    assert found_in(tmp_path / "@eaDir")[0] == ["y/x.jpg"]  # where it is asked for


def test_the_order_is_that_of_the_names_bytes_whatever_a_locale_makes_of_them(tmp_path):
    touch(tmp_path, os.fsdecode(b"\xff.png"), "\uff00.png", "a.png")  # a lone surrogate is smaller
    assert found_in(tmp_path)[0] == ["a.png", "\uff00.png", "\udcff.png"]


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are(tmp_path, unreadable):
    touch(tmp_path, "a.jpg", "closed/b.jpg", "stale/c.jpg", "open/d.jpg")
    unreadable(tmp_path / "closed")
    unreadable(tmp_path / "stale", errno.ESTALE)
    images, left_out = found_in(tmp_path)
    assert images == ["a.jpg", "open/d.jpg"]
    sentence = "this folder cannot be read: "
    assert left_out == {
        "closed": (utils.UNREADABLE, sentence + "Permission denied"),
        "stale": (utils.UNREADABLE, sentence + os.strerror(errno.ESTALE)),
    }


def test_too_many_open_files_says_the_limit_and_what_to_do():
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"Too many open files: a process may have {limit} (ulimit -n): raise that, or take "
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.jpg")
    assert cause(error).startswith(advice) and "-num_workers" in cause(error)
    assert describe_error(error) == f"a.jpg: {cause(error)}"
    assert describe_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE))) == cause(error)
    assert describe_error(FileNotFoundError(2, "No such file", "b")) == "b: No such file"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_a_config_in_utf_16_is_told(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = tmp_path / "a.yaml"
    path.write_bytes(f"{mark}SEED: 1\n".encode(encoding))
    name = encoding[:6].upper()
    with pytest.raises(ConfigError, match=f"a.yaml: this config file is {name} text: save it as"):
        get_config(path)


def test_lists_are_the_same_bytes_in_a_locale_that_is_not_utf_8(tmp_path):
    for name in ("猫/图", "é/größe", "10/ß"):
        touch(tmp_path / "images", *(f"{name}{number}.png" for number in range(3)))
    for path in (tmp_path / "images").rglob("*.png"):
        Image.new("RGB", (8, 8)).save(path)
    root = tmp_path / "images"
    run_tool(make_lists, "-data_path", root).check()
    names = ["classes.txt", "train_list.txt", "val_list.txt"]
    expected = [(root / name).read_bytes() for name in names]
    assert expected[0].decode() == "10\né\n猫\n"
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    tool = [sys.executable, ROOT / "tools" / "make_lists.py", "-data_path", root, "-force"]
    run(tool, **ascii_locale).check()
    assert [(root / name).read_bytes() for name in names] == expected
    tool = [sys.executable, ROOT / "tools" / "check_dataset.py", "-data_path", root]
    result = run([*tool, "-num_classes", 3], **ascii_locale).check()
    assert result.out == run_tool(check_dataset, *tool[2:], "-num_classes", 3).check().out
