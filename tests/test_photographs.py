"""From a folder of photographs to predictions and an export, by the front page's commands."""

import csv
import io
import json
import re
import shlex
import sys

import paddle
import pytest
from PIL import Image
from program import ROOT, run, run_tool

from tools import predict
from config import get_config
from training.run import build_model
from weights import pdparams

pytestmark = pytest.mark.slow
CROPS = 8  # of each photograph


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder per class: crops of scikit-image's and scikit-learn's photographs."""
    skimage_data = pytest.importorskip("skimage.data")
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    photos = {
        "astronaut": skimage_data.astronaut(),
        "кофе": skimage_data.coffee(),
        "猫": skimage_data.chelsea(),
        "ναός της Κίνας": load_sample_image("china.jpg"),
        "flor d'aigua": load_sample_image("flower.jpg"),
    }
    root = tmp_path_factory.mktemp("photos") / "my photographs"
    for name, pixels in photos.items():
        (root / name).mkdir(parents=True)
        image = Image.fromarray(pixels)
        for number in range(CROPS):
            left, top = 15 * number, 10 * number
            box = (left, top, left + image.width // 2, top + image.height // 2)
            image.crop(box).save(root / name / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the shape of the published ones."""
    paddle.seed(0)
    path = tmp_path_factory.mktemp("weights") / "gmlp_s16_224.pdparams"
    model = build_model(get_config(ROOT / "configs" / "gmlp_s16_224.yaml"))
    pdparams.write(path, model.state_dict())
    return path


def test_the_five_commands_of_the_front_page_work_as_printed(photographs, weights, tmp_path):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [text for text in re.findall(r"```shell\n(.*?)```", page, re.S) if "flowers" in text]
    commands = block.replace("\\\n", " ").strip().splitlines()
    assert [re.search(r"\w+(?=\.py)", command)[0] for command in commands] == [
        "make_lists", "check_dataset", "main_multi_gpu", "predict", "export",
    ]  # fmt: skip
    photo = photographs / "猫" / "3.jpg"
    for command in commands:
        folder = "".join(map(str, (tmp_path / "output").glob("train-*")))
        names = {
            "/data/flowers": str(photographs), "102": "5", "photo.jpg": str(photo),
            "gmlp_s16_224.pdparams": str(weights), "output/train-<time>": folder,
        }  # fmt: skip
        words = [names.get(word, word) for word in shlex.split(command)]
        words[:2] = sys.executable, str(ROOT / words[1])
        if "-cfg" in words:  # 2 of the 30 epochs
            words += ["-opts", "TRAIN.NUM_EPOCHS", "2"]
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
        print(run(words, cwd=tmp_path, CUDA_VISIBLE_DEVICES="").check().out)
    run_folder = next((tmp_path / "output").glob("train-*"))
    classes = (run_folder / "classes.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(classes) == sorted(path.name for path in photographs.iterdir() if path.is_dir())
    signature = json.loads((tmp_path / "exported" / "signature.json").read_text("utf-8"))
    assert signature["classes"] == classes
    table = run_tool(predict, "-pretrained", run_folder, "-format", "csv", photo).check()
    rows = list(csv.DictReader(io.StringIO(table.out)))
    assert {row["name"] for row in rows} == set(classes)
