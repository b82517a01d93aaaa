"""Make ImageNet's data folder from its official archives, or from Kaggle's files.

    python tools/prepare_imagenet.py -archives /downloads -data_path /dataset/imagenet
    python tools/prepare_imagenet.py -archives /downloads -data_path /dataset/imagenet -val_only

-archives has ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as
they were downloaded, or Kaggle's ILSVRC/Data/CLS-LOC and LOC_val_solution.csv.  -data_path gets
train/CLASS/..., val/CLASS/... and make_lists.py's lists; labels are ranks of the sorted synsets.

Archives are read where they are, and nothing but the images is written; of Kaggle's files, links to
them.  An interrupted run goes on with the same command: checksums that were right and images that
are there are not done again.  Exit status: 0, 1 for what failed while running, 2 for what was asked
wrongly.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common, make_lists
from utils import (
    UserError,
    cannot_be_written,
    cause,
    lock,
    progress_bar,
    remove_temporary_files,
    show,
    show_path,
    temporary_path,
    write_text,
)

# Name, MD5, and bytes where a wrong size need not wait for the checksum.
ARCHIVES = {
    "devkit": ("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf", None),
    "val": ("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", 6744924160),
    "train": ("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", 147897477120),
}
CLASSES, IMAGES = 1000, {"train": 1_281_167, "val": 50_000}
_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
_KAGGLES, _SOLUTION = os.path.join("ILSVRC", "Data", "CLS-LOC"), "LOC_val_solution.csv"
_SYNSET = "n[0-9]{8}"  # a whole name, as those below: none leads out of a folder
_TRAIN_IMAGE, _VAL_IMAGE = f"{_SYNSET}_[0-9]+\\.JPEG", "ILSVRC2012_val_[0-9]{8}\\.JPEG"
# In the data folder: says that this tool made it, and which archives had the right checksum.
_STATE = ".prepare_imagenet.json"
_AGAIN = "download it again"
_PARTS = f"{_AGAIN}, or take a part of it with -no_check"


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    names = ", ".join(name for name, _, _ in ARCHIVES.values())
    add("-archives", metavar="DIR", required=True, help=f"folder of {names}, or of Kaggle's files")
    add("-data_path", metavar="DIR", required=True, help="the data set's folder, to be made")
    add("-val_only", action="store_true", help="the validation images alone, to evaluate on")
    add("-no_check", action="store_true", help="no checksums and counts: for parts of ImageNet")
    return parser


def work(args):
    """Makes the data folder that the arguments ask for."""
    signal.signal(signal.SIGTERM, common.leave)  # so that half-written files go
    folder, root, check = args.archives, args.data_path, not args.no_check
    splits = ["val"] if args.val_only else ["train", "val"]
    kaggles = os.path.isdir(os.path.join(folder, _KAGGLES))
    paths = {} if kaggles else find_archives(folder, ["devkit", *splits])
    with claim(root):
        if check and not kaggles:
            verify(root, "devkit", paths["devkit"])
        classes, synsets = read_kaggles(folder) if kaggles else read_devkit(paths["devkit"])
        if check and len(classes) != CLASSES:
            raise wrong(folder, f"has {len(classes):,} classes and not {CLASSES:,}", _PARTS)
        if kaggles:
            link_images(folder, root, splits, synsets)
        else:
            require_space(root, {split: paths[split] for split in splits})
            for split in reversed(splits if check else ()):
                verify(root, split, paths[split])
            extract_val(paths["val"], root, synsets)
            if "train" in splits:
                extract_train(paths["train"], root, classes)
        images = read_images(root, classes, splits, check)
        os.sync()  # where the lists are, so are the images
        make_lists.write_lists(root, classes, images)
    print(make_lists.describe_lists(classes, images))
    print(f"next: {make_lists.check_command(root, classes, images)}")


def wrong(path, what, cure=_AGAIN):
    """The error of a file or folder that is not as it should be."""
    return UserError(f"{show_path(path)}: {what}: {cure}")


def find_archives(folder, keys):
    """The paths of archives by their keys; raises UserError where one is missing."""
    paths = {key: os.path.join(folder, ARCHIVES[key][0]) for key in keys}
    missing = [ARCHIVES[key][0] for key, path in paths.items() if not os.path.isfile(path)]
    if missing:
        what = f"there is neither {' nor '.join(missing)} nor Kaggle's {_KAGGLES}"
        raise wrong(folder, what, "image-net.org has the archives for those who register")
    return paths


@contextlib.contextmanager
def claim(root):
    """Makes the data folder, or takes it up again, for itself alone.

    A folder goes again that was made for a run that failed before it did anything.
    """
    state, new = os.path.join(root, _STATE), not os.path.lexists(os.path.join(root, _STATE))
    made = [folder for folder in (Path(root), *Path(root).parents) if not folder.exists()]
    os.makedirs(root, exist_ok=True)
    for name in ("train", "val", *make_lists.FILES):
        if os.path.lexists(os.path.join(root, name)) and not os.path.exists(state):
            cure = "give -data_path a new folder; for class folders tools/make_lists.py is enough"
            raise wrong(os.path.join(root, name), "is there already, from another program", cure)
    with _lock(root, state):
        try:
            yield
        except BaseException:
            if new and os.listdir(root) == [_STATE] and not os.path.getsize(state):
                os.remove(state)
                with contextlib.suppress(OSError):  # something else has come into one
                    for folder in made:
                        folder.rmdir()
            raise


def _lock(root, state):
    try:
        return lock(state)
    except BlockingIOError:
        raise wrong(root, "another run fills this folder", "wait until it ends") from None
    except OSError as error:
        if error.filename:
            raise
        return open(state)  # a file system without locks


def verify(root, key, path):
    """Raises UserError where an archive's checksum is wrong; one that was right is not read."""
    (name, md5, size), status, state = ARCHIVES[key], os.stat(path), os.path.join(root, _STATE)
    found, verified = [status.st_size, status.st_mtime_ns], {}
    with open(state) as file, contextlib.suppress(ValueError):  # it is new, or half written
        verified = json.load(file)
    if verified.get(name) == found:
        return
    cure = _AGAIN if key == "devkit" else _PARTS
    if size not in (None, status.st_size):
        raise wrong(path, f"has {status.st_size:,} bytes, ImageNet's has {size:,}", cure)
    digest = hashlib.md5(usedforsecurity=False)
    with reading(path), open(path, "rb") as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        for block in progress_bar(blocks, -(-status.st_size >> 20), f"MD5 of {name}", unit="MB"):
            digest.update(block)
    if digest.hexdigest() != md5:
        raise wrong(path, f"its MD5 is {digest.hexdigest()}, that of ImageNet's is {md5}", cure)
    write_text(state, json.dumps({**verified, name: found}))


def require_space(root, paths):
    """Raises UserError where the disk has no room for what archives hold and is not there yet."""
    there = (path for split in paths for path in Path(root, split).glob("*/*"))
    needed = sum(map(os.path.getsize, paths.values())) * 1.02  # blocks and inodes take more
    needed -= sum(map(os.path.getsize, there))
    free = shutil.disk_usage(root).free
    if free < needed:
        what = f"{free / 1e9:,.1f} GB are free, and the images take {needed / 1e9:,.1f} GB"
        raise wrong(root, what, "make room, or give -data_path a folder on another disk")


@contextlib.contextmanager
def reading(path):
    """In here an archive that is damaged, or that the disk cannot read, is a sentence."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise wrong(path, f"is damaged or was cut off ({cause(error)})") from error
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno, f"cannot be read: {cause(error)}", show_path(path)) from error


# --- which class an image is of ---


def read_devkit(path):
    """(sorted synsets of the classes, {name of a validation image: its synset}), by scipy."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"reading {_META} needs scipy ({error}): pip install scipy") from None
    with reading(path), tarfile.open(path, "r:gz") as tar:
        members = {member.name.removeprefix("./"): member for member in tar if member.isreg()}
        if not {_META, _TRUTH} <= set(members):
            raise wrong(path, f"has no {_META} or no {_TRUTH}")
        meta, truth = (tar.extractfile(members[name]).read() for name in (_META, _TRUTH))
    try:
        rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = (row for row in rows if row["num_children"] == 0)  # 860 others are above these
        synsets = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in leaves}
        if not all(re.fullmatch(_SYNSET, synset) for synset in synsets.values()):
            raise ValueError(f"synsets {show(list(synsets.values()))}")
    except Exception as error:  # of any kind, for a damaged file
        raise wrong(path, f"its {_META} cannot be read ({cause(error)})") from error
    images = {}
    for number, word in enumerate(truth.decode(errors="replace").split(), 1):
        if word not in synsets:
            raise wrong(path, f"{_TRUTH}:{number}: {show(word)} is no class of meta.mat")
        images[f"ILSVRC2012_val_{number:08}.JPEG"] = synsets[word]
    return sorted(set(synsets.values())), images


def read_kaggles(folder):
    """As read_devkit, by Kaggle's LOC_val_solution.csv and its folders of training images."""
    path, images = os.path.join(folder, _SOLUTION), {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))[1:]
    except FileNotFoundError:
        raise wrong(path, "is missing", "Kaggle has it beside the folder ILSVRC") from None
    except (ValueError, csv.Error) as error:
        raise wrong(path, f"is no CSV file ({cause(error)})") from None
    for number, row in enumerate(rows, 2):
        name, synset = f"{''.join(row[:1])}.JPEG", "".join(row[1:2]).split(" ")[0]
        if not (re.fullmatch(_VAL_IMAGE, name) and re.fullmatch(_SYNSET, synset)):
            what = f"{show(','.join(row))} does not begin with an image and its synset"
            raise wrong(f"{path}:{number}", what)
        images[name] = synset
    train = (path.name for path in Path(folder, _KAGGLES, "train").glob("n*"))
    return sorted({*images.values(), *filter(re.compile(_SYNSET).fullmatch, train)}), images


# --- the images ---


def extract_val(path, root, synsets):
    """Puts the archive's images, which lie side by side in it, into folders of their classes."""
    folders = Folders(os.path.join(root, "val"))
    with reading(path), tarfile.open(path, "r:") as tar:
        images = files_in(tar, path, _VAL_IMAGE)
        for name, member in progress_bar(images, len(synsets), "val", unit="image"):
            if name not in synsets:
                raise wrong(path, f"the development kit has no class for {name}")
            folders.put(synsets[name], name, tar, member)
    folders.require_any(path)


def extract_train(path, root, classes):
    """Puts the images of the archive's archives, one for each class, into folders."""
    folders = Folders(os.path.join(root, "train"))
    with reading(path), tarfile.open(path, "r:") as outer:
        archives = list(files_in(outer, path, f"{_SYNSET}\\.tar"))
        for archive, place in progress_bar(archives, len(archives), "train", unit="class"):
            synset, inside = archive[: -len(".tar")], os.path.join(path, archive)
            if synset not in classes:
                raise wrong(inside, "is of no class of the development kit")
            with reading(inside), tarfile.open(fileobj=outer.extractfile(place), mode="r:") as tar:
                for name, member in files_in(tar, inside, _TRAIN_IMAGE, sized=True):
                    folders.put(synset, name, tar, member)
    folders.require_any(path)


def files_in(tar, where, pattern, sized=False):
    """(name, TarInfo) of the files in a TarFile, in its order; refuses all but folders otherwise.

    `where` is what messages call it, `pattern` that of a file's whole name.  `sized`: its size is
    known to be right, so that it may end without a mark.  Raises tarfile.ReadError for damage.
    """
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isdir():
            continue
        if not (member.isreg() and re.fullmatch(pattern, name)) or member.issparse():
            raise wrong(where, f"{show(member.name)} is nothing that ImageNet's has")
        yield name, member
    # tarfile takes a damaged header, or none, for the end, which is a block of zeros.
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if end.strip(b"\0") or not (end or sized):
        raise tarfile.ReadError(f"byte {tar.offset:,}")


class Folders:
    """Class folders in a folder, into which images are put: whole, and each once."""

    def __init__(self, root):
        self._root, self._ready = root, set()
        if os.path.islink(root):
            raise wrong(root, "is a link, which Kaggle's files have", "remove it")

    def require_any(self, archive):
        """Raises UserError where an archive had nothing to put here."""
        if not self._ready:
            raise wrong(archive, "holds no images")

    def put(self, synset, name, tar, member):
        """Writes a member of a TarFile as an image of a class, unless it is there in its size."""
        folder = os.path.join(self._root, synset)
        if synset not in self._ready:
            os.makedirs(folder, exist_ok=True)
            remove_temporary_files(folder)
            self._ready.add(synset)
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_size == member.size:
                return
        content = tar.extractfile(member).read()
        temporary = temporary_path(path)
        try:  # not by utils.new_file, which would wait for the disk a million times
            with open(temporary, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError as error:
            raise cannot_be_written(path, error) from error
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)


def link_images(folder, root, splits, synsets):
    """Links to Kaggle's images: the folder of the training images, each of the others."""
    source = os.path.join(os.path.abspath(folder), _KAGGLES)
    links = {os.path.join("val", synset, name): f"val/{name}" for name, synset in synsets.items()}
    if "train" in splits:
        links["train"] = "train"
    for link, target in progress_bar(links.items(), len(links), "links", unit="link"):
        path, target = os.path.join(root, link), os.path.join(source, target)
        if not os.path.exists(target):
            raise wrong(target, "is missing", "unpack Kaggle's archive again")
        if os.path.islink(path) and os.readlink(path) != target:
            os.remove(path)  # Kaggle's files are elsewhere now
        if not os.path.lexists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(target, path)


def read_images(root, classes, splits, check):
    """The images that are in the folder, as make_lists.write_lists takes them, if all are there."""

    def refuse(kind, path, problem):
        if problem:
            raise wrong(path, problem, "see to it, or give -data_path a new folder")

    images = {}
    for split in splits:
        folder = os.path.join(root, split)
        found = make_lists.read_folders(folder, refuse)
        for name in set(found) - set(classes):
            raise wrong(os.path.join(folder, name), "is no class of ImageNet's", "move it away")
        count = sum(map(len, found.values()))
        if check and count != IMAGES[split]:
            what = f"has {count:,} images, ImageNet has {IMAGES[split]:,}"
            raise wrong(folder, what, "move away what is not ImageNet's; -no_check takes parts")
        images[split] = [make_lists.relative(found.get(name, []), root) for name in classes]
    return images


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
