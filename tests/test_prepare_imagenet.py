"""tools/prepare_imagenet.py, on small replicas of ImageNet's archives and of Kaggle's files."""

import errno
import hashlib
import io
import os
import shutil
import signal
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from program import run_tool

from tools import check_dataset, make_lists, prepare_imagenet
from utils import lock, temporary_path

scipy_io = pytest.importorskip("scipy.io")

# In the order of their ILSVRC2012_IDs, from 1, as in meta.mat: not in that of the synsets.
CLASSES = ["n02119789", "n01440764", "n15075141", "n04591713"]
ABOVE = ["n00001740", "n00021265"]  # synsets with children, which are no classes
TRUTH = [3, 1, 2, 4, 4, 2, 1]  # IDs of the validation images
DEVKIT, VAL, TRAIN = (f"ILSVRC2012_{name}" for name in (
    "devkit_t12.tar.gz", "img_val.tar", "img_train.tar"))  # fmt: skip
LISTS = ["classes.txt", "train_list.txt", "val_list.txt"]


def jpeg(name):
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (9, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def val_name(number):
    return f"ILSVRC2012_val_{number:08}.JPEG"


def train_names(synset):
    return [f"{synset}_{number}.JPEG" for number in (10026, 7, 301)]


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_of(*members, mode="w:"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def meta_mat(classes=CLASSES, above=ABOVE):
    """A meta.mat with the fields of the official one."""
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children",
             "wordnet_height", "num_train_images"]  # fmt: skip
    rows = [(i, synset, f"word, {synset}", "what it is", 0, [], 0, 1300)
            for i, synset in enumerate(classes, 1)]  # fmt: skip
    rows += [(len(classes) + i, synset, "above", "more", 2, [1, 2], 3, 0)
             for i, synset in enumerate(above, 1)]  # fmt: skip
    synsets = np.empty((len(rows), 1), [(name, object) for name in names])
    for place, row in zip(synsets[:, 0], rows):
        for name, value in zip(names, row):
            place[name] = value
    file = io.BytesIO()
    scipy_io.savemat(file, {"synsets": synsets})
    return file.getvalue()


def devkit(meta=None, truth=None):
    folder = "ILSVRC2012_devkit_t12"
    files = {
        "readme.txt": b"This is the documentation.",
        "data/meta.mat": meta_mat() if meta is None else meta,
        "data/ILSVRC2012_validation_ground_truth.txt": (
            "".join(f"{i}\n" for i in TRUTH).encode() if truth is None else truth
        ),
    }
    folders = [member(f"{folder}{end}", type=tarfile.DIRTYPE) for end in ("", "/data")]
    files = [member(f"{folder}/{name}", content) for name, content in files.items()]
    return tar_of(*folders, *files, mode="w:gz")


def val_tar():
    names = map(val_name, range(1, len(TRUTH) + 1))
    return tar_of(*(member(name, jpeg(name)) for name in names))


def class_tar(synset):
    return tar_of(*(member(name, jpeg(name)) for name in train_names(synset)))


def train_tar(classes=CLASSES):
    return tar_of(*(member(f"{synset}.tar", class_tar(synset)) for synset in classes))


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A folder with replicas of the archives, whose sizes and checksums count as official."""
    folder = tmp_path / "down loads"
    folder.mkdir()
    for key, content in (("devkit", devkit()), ("val", val_tar()), ("train", train_tar())):
        name, _, size = prepare_imagenet.ARCHIVES[key]
        (folder / name).write_bytes(content)
        official = (name, hashlib.md5(content).hexdigest(), size and len(content))
        monkeypatch.setitem(prepare_imagenet.ARCHIVES, key, official)
    count(monkeypatch, len(CLASSES), 3 * len(CLASSES), len(TRUTH))
    return folder


def count(monkeypatch, classes, train, val):
    monkeypatch.setattr(prepare_imagenet, "CLASSES", classes)
    monkeypatch.setattr(prepare_imagenet, "IMAGES", {"train": train, "val": val})


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """The lists that were there whenever the disk was told to write everything."""
    seen = []
    monkeypatch.setattr(os, "sync", lambda: seen.append(True))  # of a machine that others use
    return seen


@pytest.fixture
def root(tmp_path):
    return tmp_path / "image net"


def prepare(archives, root, *args):
    return run_tool(prepare_imagenet, "-archives", archives, "-data_path", root, *args)


def tree(folder):
    """Path in a folder to content, of its files and links; what is hidden is in it too."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
    }


def expected_images(splits=("train", "val")):
    train = {f"train/{s}/{name}": jpeg(name) for s in CLASSES for name in train_names(s)}
    val = {
        f"val/{CLASSES[number - 1]}/{val_name(i)}": jpeg(val_name(i))
        for i, number in enumerate(TRUTH, 1)
    }
    return {**(train if "train" in splits else {}), **val}


def images_in(root):
    return {path: content for path, content in tree(root).items() if "/" in path}


def lists_in(root):
    return {path.name: path.read_bytes() for path in root.glob("*.txt")}


def lists_of_make_lists(root):
    run_tool(make_lists, "-data_path", root, "-force").check()
    return lists_in(root)


# --- what comes of the archives ---


def test_the_archives_become_the_folder_and_the_lists_of_make_lists(archives, root, synced):
    result = prepare(archives, root).check()
    assert images_in(root) == expected_images()
    assert set(tree(root)) - set(expected_images()) == {*LISTS, prepare_imagenet._STATE}
    assert (root / "classes.txt").read_text().split() == sorted(CLASSES)
    lines = (root / "val_list.txt").read_text().splitlines()
    label = sorted(CLASSES).index(CLASSES[TRUTH[0] - 1])
    assert f"val/{CLASSES[TRUTH[0] - 1]}/{val_name(1)} {label}" in lines and len(lines) == 7
    lists = lists_in(root)
    assert lists == lists_of_make_lists(root) and synced
    checked = f"-data_path '{root}' -num_classes 4"
    assert result.out.splitlines() == [
        "train_list.txt 12 images, val_list.txt 7 images, classes: 4",
        f"next: python tools/check_dataset.py {checked}",
    ]
    assert result.err == ""


def test_the_next_command_finds_no_problem(archives, root):
    prepare(archives, root, "-val_only").check()
    words = ["-data_path", root, "-num_classes", 4, "-lists", "val_list.txt", "-num_workers", 1]
    assert "val_list.txt 7; problems: 0, warnings: 0" in run_tool(check_dataset, *words).check().out


def test_the_validation_images_alone_have_the_same_list_and_the_rest_can_follow(archives, root):
    (archives / TRAIN).rename(archives / "later")
    result = prepare(archives, root, "-val_only").check()
    assert "-num_classes 4 -lists val_list.txt\n" in result.out
    assert images_in(root) == expected_images(["val"])
    lists = lists_in(root)
    assert sorted(lists) == ["classes.txt", "val_list.txt"]
    prepare(archives, root).refused(2, f"{archives}: there is neither {TRAIN} nor Kaggle's ILSVRC/")
    (archives / "later").rename(archives / TRAIN)
    before = {path: path.stat().st_mtime_ns for path in root.glob("val/*/*")}
    prepare(archives, root).check()
    assert before == {path: path.stat().st_mtime_ns for path in root.glob("val/*/*")}
    assert images_in(root) == expected_images()
    assert {**lists_in(root), **lists} == lists_in(root) == lists_of_make_lists(root)


def test_parts_of_the_archives_keep_imagenets_labels(archives, root):
    (archives / TRAIN).write_bytes(train_tar(CLASSES[:2]))
    prepare(archives, root).refused(2, f"{TRAIN}: has ", " bytes, ImageNet's has ", "-no_check")
    result = prepare(archives, root, "-no_check").check()
    assert "train_list.txt 6 images, val_list.txt 7 images, classes: 4" in result.out
    labels = {line.split()[0].split("/")[1]: int(line.split()[1])
              for line in (root / "train_list.txt").read_text().splitlines()}  # fmt: skip
    assert labels == {synset: sorted(CLASSES).index(synset) for synset in CLASSES[:2]}
    assert (root / "classes.txt").read_text().split() == sorted(CLASSES)


def test_archives_that_were_packed_again_are_read_too(archives, root):
    folder = member("./", type=tarfile.DIRTYPE)
    images = (member(f"./{val_name(i)}", jpeg(val_name(i))) for i in range(1, 8))
    (archives / VAL).write_bytes(tar_of(folder, *images))
    # Classes whose archives end without a mark: their sizes say that they are whole.
    contents = [(synset, class_tar(synset).rstrip(b"\0")) for synset in CLASSES]
    classes = (
        member(f"./{s}.tar", content + bytes(-len(content) % 512)) for s, content in contents
    )
    (archives / TRAIN).write_bytes(tar_of(folder, *classes))
    prepare(archives, root, "-no_check").check()
    assert images_in(root) == expected_images()


# --- interrupted ---


def writes(monkeypatch, stop_at=None, error=None):
    """The images that get their names, in a list that grows; one of them is interrupted."""
    named, replace = [], os.replace

    def note(source, path):
        if path.endswith(".JPEG"):
            named.append(os.path.basename(path))
            if len(named) == stop_at:
                if error:
                    raise error
                os.kill(os.getpid(), signal.SIGTERM)
        replace(source, path)

    monkeypatch.setattr(os, "replace", note)
    return named


@pytest.mark.parametrize("stop_at", [1, 9, 19])
def test_an_interrupted_run_goes_on_and_does_nothing_twice(archives, root, monkeypatch, stop_at):
    with monkeypatch.context() as patch:
        first = writes(patch, stop_at)
        assert prepare(archives, root).status == 128 + signal.SIGTERM
    assert len(images_in(root)) == stop_at - 1 and not list(root.glob("*.txt"))  # no temporary file
    monkeypatch.setattr(hashlib, "md5", None)  # checksums that were right are not computed again
    rest = writes(monkeypatch)
    prepare(archives, root).check()
    assert sorted([*first[:-1], *rest]) == sorted(map(os.path.basename, expected_images()))
    assert images_in(root) == expected_images()
    rest.clear()
    prepare(archives, root).check()
    assert rest == []


def test_what_a_killed_run_left_half_written_does_not_count(archives, root):
    prepare(archives, root).check()
    lists = lists_in(root)
    image, empty = (
        root / "train" / CLASSES[0] / train_names(CLASSES[0])[0],
        next(root.glob("val/*/*")),
    )
    image.rename(temporary_path(image, pid=99999999))
    empty.write_bytes(b"")  # as after a power cut
    (root / prepare_imagenet._STATE).write_text('{"ILSVRC2012_img_')
    for name in LISTS:
        (root / name).unlink()
    prepare(archives, root).check()
    assert images_in(root) == expected_images() and lists_in(root) == lists


def test_an_archive_that_was_changed_is_checked_again(archives, root):
    prepare(archives, root, "-val_only").check()
    content = bytearray((archives / VAL).read_bytes())
    content[600] ^= 1
    (archives / VAL).write_bytes(content)
    os.utime(archives / VAL, ns=(1, 1))
    prepare(archives, root, "-val_only").refused(2, f"{archives / VAL}: its MD5 is ", "ImageNet's")


def test_two_runs_do_not_fill_one_folder(archives, root):
    root.mkdir()
    with lock(root / prepare_imagenet._STATE):
        prepare(archives, root).refused(2, f"{root}: another run fills this folder: wait")
    prepare(archives, root).check()


# --- refused ---


@pytest.mark.parametrize("name", ["train", "val", "val_list.txt"])
def test_a_folder_of_others_images_is_left_alone(archives, root, name):
    (root / name).mkdir(parents=True)
    prepare(archives, root).refused(2, f"{root}/{name}: is there already", "tools/make_lists.py")
    assert [path.name for path in root.iterdir()] == [name]


def test_no_space_is_said_before_the_large_checksums(archives, root, monkeypatch):
    size = sum(os.path.getsize(archives / name) for name in (VAL, TRAIN))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    checked, verify = [], prepare_imagenet.verify

    def note(root, key, path):
        checked.append(key)
        verify(root, key, path)

    monkeypatch.setattr(prepare_imagenet, "verify", note)
    prepare(archives, root).refused(2, f"{root}: 0.0 GB are free, and the images take 0.0 GB: make")
    assert checked == ["devkit"] and images_in(root) == {}
    # What an interrupted run has put there is not needed again.
    image = root / "train" / CLASSES[0] / train_names(CLASSES[0])[0]
    image.parent.mkdir(parents=True)
    image.write_bytes(bytes(size // 20))
    prepare(archives, root).check()
    assert checked == ["devkit", "devkit", "val", "train"]


def test_a_disk_that_fills_up_is_a_sentence_and_the_run_can_go_on(archives, root, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        named = writes(patch, 3, full)
        result = prepare(archives, root)
        result.refused(1, f"/{named[-1]}: cannot be written: No space left on device")
    assert len(images_in(root)) == 2
    prepare(archives, root).check()
    assert images_in(root) == expected_images()


def cut(name, header, after=0):
    """Cuts an archive off behind the first bytes of a member's header."""
    return name, lambda content: content[: content.index(header) + after]


def spoil(name, header):
    """Damages the header of a member."""
    return name, lambda content: content.replace(header, b"\xff" * len(header))


HTML = b"<html>404</html>" * 100
last_class, second_image = f"{CLASSES[-1]}.tar".encode(), train_names(CLASSES[1])[1].encode()


@pytest.mark.parametrize(
    "damage, where",
    [
        (cut(TRAIN, last_class), TRAIN),  # between two classes
        (cut(TRAIN, last_class, 100), TRAIN),  # in a header
        (cut(TRAIN, last_class, 3000), TRAIN),  # in an image
        (cut(TRAIN, second_image, 300), TRAIN),
        (cut(VAL, val_name(7).encode()), VAL),
        (cut(VAL, val_name(7).encode(), 700), VAL),
        (cut(DEVKIT, b"\x1f\x8b", 400), DEVKIT),
        (spoil(VAL, val_name(3).encode()), VAL),
        (spoil(TRAIN, last_class), TRAIN),
        (spoil(TRAIN, second_image), f"{TRAIN}/{CLASSES[1]}.tar"),
        *(((name, lambda content: HTML), name) for name in (DEVKIT, VAL, TRAIN)),
        ((VAL, lambda content: b""), VAL),
    ],
)
def test_a_damaged_archive_is_a_sentence_and_makes_no_lists(archives, root, damage, where):
    name, change = damage
    (archives / name).write_bytes(change((archives / name).read_bytes()))
    result = prepare(archives, root, "-no_check")
    result.refused(
        2, f": {archives / where}: is damaged or was cut off (", "): download it again\n"
    )
    assert not list(root.glob("*.txt"))
    assert all(content == expected_images()[path] for path, content in images_in(root).items())
    prepare(archives, root).refused(2, f"{archives / name}: ", "ImageNet's")


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]


@pytest.mark.parametrize(
    "name, fields",
    [
        ("../evil.JPEG", {}),
        (f"../{val_name(8)}", {}),
        (f"/tmp/{val_name(8)}", {}),
        (f"val/{val_name(8)}", {}),
        (f"{val_name(8)}\n", {}),
        (f"././{val_name(8)}", {}),
        *((val_name(8), {"type": kind, "linkname": "/etc/passwd"}) for kind in KINDS),
    ],
)
def test_members_with_hostile_names_or_kinds_are_never_followed(
    archives, root, tmp_path, name, fields
):
    for key in ("val", "class", "train"):
        here, pattern = name, val_name(8)
        if key != "val":
            image = train_names(CLASSES[0])[0] if key == "class" else f"{CLASSES[0]}.tar"
            here = name.replace(pattern, image)
        bad = tar_of(member(here, b"" if fields else b"evil", **fields))
        if key == "class":
            bad = tar_of(member(f"{CLASSES[0]}.tar", bad))
        (archives / VAL).write_bytes(bad if key == "val" else val_tar())
        (archives / TRAIN).write_bytes(train_tar() if key == "val" else bad)
        before = set(tmp_path.rglob("*")) - set(root.rglob("*"))
        result = prepare(archives, root, "-no_check")
        where = {"val": VAL, "class": f"{TRAIN}/{CLASSES[0]}.tar", "train": TRAIN}[key]
        result.refused(2, f"{archives / where}: {here!r} is nothing that ImageNet's has: download")
        assert not list(root.glob("*.txt")) and not list(root.rglob("*evil*"))
        assert set(tmp_path.rglob("*")) - set(root.rglob("*")) - {root} == before - {root}
        shutil.rmtree(root, ignore_errors=True)


def test_what_the_development_kit_does_not_know_is_refused(archives, root):
    (archives / VAL).write_bytes(tar_of(member(val_name(8), b"x")))
    result = prepare(archives, root, "-no_check")
    result.refused(2, f"{VAL}: the development kit has no class for {val_name(8)}: download")
    (archives / VAL).write_bytes(val_tar())
    (archives / TRAIN).write_bytes(train_tar(["n00000001"]))
    result = prepare(archives, root, "-no_check")
    result.refused(2, f"{TRAIN}/n00000001.tar: is of no class of the development kit: download")


@pytest.mark.parametrize(
    "content, part",
    [
        ({"meta": b"no matrix"}, "its ILSVRC2012_devkit_t12/data/meta.mat cannot be read ("),
        ({"meta": meta_mat()[:300]}, "its ILSVRC2012_devkit_t12/data/meta.mat cannot be read ("),
        ({"meta": meta_mat(["../../evil", "n01440764"])}, "cannot be read (synsets ['../../evil'"),
        ({"truth": b"3\n5\n"}, "validation_ground_truth.txt:2: '5' is no class of meta.mat"),
        ({"truth": b"3\nx\xff\n"}, "validation_ground_truth.txt:2: 'x\ufffd' is no class"),
    ],
)
def test_a_development_kit_that_is_none_is_refused(archives, root, content, part):
    (archives / DEVKIT).write_bytes(devkit(**content))
    result = prepare(archives, root, "-no_check")
    result.refused(2, f": {archives / DEVKIT}: ", part, "download it again\n")
    (archives / DEVKIT).write_bytes(tar_of(member("a", b"b"), mode="w:gz"))
    prepare(archives, root, "-no_check").refused(2, "has no ILSVRC2012_devkit_t12/data/meta.mat or")


def test_scipy_is_asked_for_only_here_and_in_a_sentence(archives, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    prepare(archives, root).refused(2, "meta.mat needs scipy (", "): pip install scipy\n")


def test_numbers_of_classes_and_images_are_checked(archives, root, monkeypatch):
    prepare(archives, root).check()
    strange = root / "train" / CLASSES[0] / "mine.png"
    strange.touch()
    prepare(archives, root).refused(2, f"{root}/train: has 13 images, ImageNet has 12: move away")
    strange.unlink()
    (root / "val" / "mine").mkdir()
    (root / "val" / "mine" / "a.png").touch()
    prepare(archives, root).refused(2, f"{root}/val/mine: is no class of ImageNet's: move it away")
    count(monkeypatch, 1000, 12, 7)
    prepare(archives, root).refused(2, f"{archives}: has 4 classes and not 1,000: download")


def test_folders_that_are_not_there_are_a_sentence(tmp_path, root):
    result = prepare(tmp_path / "gone", root)
    missing = f"neither {DEVKIT} nor {TRAIN} nor {VAL} nor Kaggle's ILSVRC/Data/CLS-LOC"
    result.refused(2, f"{tmp_path}/gone: there is {missing}: image-net.org has")
    assert not root.exists()


def test_help_names_the_archives():
    text = run_tool(prepare_imagenet, "-h").check().out
    assert all(name in text for name in (DEVKIT, VAL, TRAIN))


def test_a_run_that_did_nothing_leaves_nothing_that_was_not_there(archives, tmp_path):
    kit = archives / DEVKIT
    content = kit.read_bytes()
    for folder in (tmp_path / "new" / "er", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        kit.write_bytes(content[:-99])
        prepare(archives, folder).refused(2, f"{kit}: its MD5 is ", ": download it again\n")
        prepare(archives, folder, "-no_check").refused(2, f"{kit}: ")
        assert not (tmp_path / "new").exists() and not list((tmp_path / "there").iterdir())
        kit.write_bytes(content)
        prepare(archives, folder).check()
        (archives / VAL).rename(archives / "aside")
        before = tree(folder)
        assert prepare_imagenet._STATE in before
        prepare(archives, folder).refused(2, f"there is neither {VAL} nor")
        assert tree(folder) == before
        (archives / "aside").rename(archives / VAL)
        shutil.rmtree(folder.parent if folder.name == "er" else folder)


@pytest.mark.parametrize("name", [VAL, TRAIN])
def test_an_archive_of_zeros_holds_no_images(archives, root, name):
    (archives / name).write_bytes(bytes(10240))
    result = prepare(archives, root, "-no_check")
    result.refused(2, f"{archives / name}: holds no images: download it again\n")
    assert not list(root.glob("*.txt"))


# --- Kaggle's files ---


@pytest.fixture
def kaggles(tmp_path, monkeypatch):
    folder = tmp_path / "kaggle's"
    for path, content in expected_images().items():
        split, synset, name = path.split("/")
        place = folder / "ILSVRC" / "Data" / "CLS-LOC" / split
        place = place / synset if split == "train" else place
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    lines = ["ImageId,PredictionString"]
    for i, number in reversed(list(enumerate(TRUTH, 1))):
        box = f"{CLASSES[number - 1]} 85 1 499 272 "
        lines.append(f"{val_name(i).removesuffix('.JPEG')},{box * (i % 2 + 1)}")
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    count(monkeypatch, len(CLASSES), 3 * len(CLASSES), len(TRUTH))
    return folder


def test_kaggles_files_become_the_same_lists_by_links(kaggles, archives, root, tmp_path):
    prepare(archives, tmp_path / "other").check()
    before = tree(kaggles)
    result = prepare(kaggles, root).check()
    assert "train_list.txt 12 images, val_list.txt 7 images, classes: 4\n" in result.out
    assert lists_in(root) == lists_in(tmp_path / "other") == lists_of_make_lists(root)
    assert tree(kaggles) == before
    paths = [path for path in expected_images() if (root / path).is_file()]
    assert {path: (root / path).read_bytes() for path in paths} == expected_images()
    assert (root / "train").is_symlink() and all(p.is_symlink() for p in root.glob("val/*/*"))
    (root / "val" / CLASSES[0]).joinpath(val_name(2)).unlink()  # and it goes on
    prepare(archives, root).refused(2, f"{root}/train: is a link, which Kaggle's files have: ")
    moved = kaggles.rename(tmp_path / "moved")
    prepare(moved, root).check()
    assert {path: (root / path).read_bytes() for path in paths} == expected_images()


def test_kaggles_validation_images_alone(kaggles, root):
    shutil.rmtree(kaggles / "ILSVRC" / "Data" / "CLS-LOC" / "train")
    prepare(kaggles, root).refused(2, "CLS-LOC/train: is missing: unpack Kaggle's archive again")
    prepare(kaggles, root, "-val_only").check()
    assert sorted(lists_in(root)) == ["classes.txt", "val_list.txt"]
    assert (root / "classes.txt").read_text().split() == sorted(CLASSES)


@pytest.mark.parametrize(
    "row", ["../../evil,n02119789 1 2 3 4", "ILSVRC2012_val_00000001,../../evil 1 2 3 4",
            "ILSVRC2012_val_00000001", ",", "ILSVRC2012_val_00000001,n0211978 1", ""]
)  # fmt: skip
def test_a_row_of_kaggles_file_that_is_none_is_refused(kaggles, root, row):
    path = kaggles / "LOC_val_solution.csv"
    path.write_text(f"ImageId,PredictionString\n{row}\n")
    prepare(kaggles, root).refused(2, f"{path}:2: ", "does not begin with an image and its synset")
    assert images_in(root) == {}


def test_kaggles_files_of_which_some_are_missing_are_refused(kaggles, root):
    val = kaggles / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    image = (val / val_name(3)).rename(val / "aside")
    prepare(kaggles, root).refused(2, f"{val}/{val_name(3)}: is missing: unpack")
    image.rename(val / val_name(3))
    solution = kaggles / "LOC_val_solution.csv"
    solution.write_bytes(b"\xff\xfe\x00")
    prepare(kaggles, root).refused(2, f"{solution}: is no CSV file (")
    solution.unlink()
    prepare(kaggles, root).refused(2, f"{solution}: is missing: Kaggle has it beside")
