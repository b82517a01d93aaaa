"""tools/evaluate_report.py: -eval's accuracy, scikit-learn's numbers, pictures, refusals."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image, ImageDraw
from program import CONFIG, SMALL, flatten, run_as_rank, run_tool, write_run
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

from tools import common, evaluate_report, predict, report_picture
from config import get_config
from datasets import build_dataset
from tools.predict import Class
from training.run import build_model
from transforms import BatchTransform
from weights import load_into, pdparams

NAMES = ["zero", "un", "δύο", "three", "$4$", "five six", "три" * 20, "семь", "8", "nine"]


@pytest.fixture(scope="module")
def small(few_digits, tmp_path_factory):
    """A run of the small model of ten classes, as its program leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "train-1"
    return write_run(folder, NAMES, DATA__DATA_PATH=str(few_digits))


@pytest.fixture(scope="module")
def reported(small, tmp_path_factory):
    """What the tool prints and writes for that run."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    result = run_tool(evaluate_report, small, "-json", path, "-batch_size", 16).check()
    return result, json.loads(path.read_text())


@pytest.fixture(scope="module")
def logits(small, few_digits):
    """The run's logits [101, 10] and labels, computed image by image."""
    config = get_config(small / "config.yaml")
    model = build_model(config)
    load_into(model, str(small / "best_weights.pdparams"))
    model.eval()
    transform, data = BatchTransform(config, train=False), build_dataset(config, train=False)
    rows = [
        model(transform(paddle.to_tensor(data[0, index][0][None]), None)[0]).numpy()[0]
        for index in range(len(data))
    ]
    return np.float64(rows), data.images.labels


def with_state(folder, small, change):
    """A copy of a run whose weights are changed by a function."""
    shutil.copytree(small, folder)
    state = dict(pdparams.read(small / "best_weights.pdparams"))
    change(state)
    pdparams.write(folder / "best_weights.pdparams", state)
    return folder


def direct_ece(confidence, right, bins=15):
    """The paper's formula, bin by bin."""
    total = 0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
    return total / len(confidence)


# --- numbers ---


def test_the_accuracy_is_the_evaluations(small, reported, few_digits, tmp_path):
    weights = small / "best_weights.pdparams"
    flags = ["-eval", "-pretrained", weights, "-data_path", few_digits, "-output", tmp_path]
    run_as_rank(*flags, "-opts", *flatten(SMALL)).check()
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "eval.json").read_text())
    names = ("acc1", "acc5", "images", "weights", "weights_sha256")
    assert {name: reported[1][name] for name in names} == {name: result[name] for name in names}
    assert result["images"] == 101 and 0 < result["acc1"] < result["acc5"] < 100
    assert reported[1]["list"] == str(few_digits / "val_list.txt")
    assert f"Acc@1 {result['acc1']:.2f} Acc@5 {result['acc5']:.2f} on 101 images" in reported[0].out


def test_the_numbers_are_scikit_learns(reported, logits):
    report, (rows, labels) = reported[1], logits
    predicted = rows.argmax(1)
    probabilities = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    confidence, right = probabilities.max(1), predicted == labels
    every = list(range(10))
    assert report["acc1"] == pytest.approx(100 * accuracy_score(labels, predicted))
    top5 = top_k_accuracy_score(labels, rows, k=5, labels=every)
    assert report["acc5"] == pytest.approx(100 * top5)

    matrix = confusion_matrix(labels, predicted, labels=every)
    for label, each in enumerate(report["classes"]):
        own = labels == label
        assert (each["label"], each["name"]) == (label, NAMES[label])
        assert each["images"] == matrix[label].sum() == own.sum()
        assert each["acc1"] == pytest.approx(100 * matrix[label, label] / matrix[label].sum())
        assert each["confidence"] == pytest.approx(confidence[own].mean(), rel=1e-5)
    np.fill_diagonal(matrix, 0)
    pairs = {(pair["true"], pair["predicted"]): pair["count"] for pair in report["confusions"]}
    assert pairs == {(i, j): matrix[i, j] for i in every for j in every if matrix[i, j]}
    assert list(pairs.values()) == sorted(pairs.values(), reverse=True)

    assert report["confidence"] == pytest.approx(confidence.mean(), rel=1e-5)
    ece = direct_ece(confidence, right)
    assert report["calibration"]["ece"] == pytest.approx(ece, rel=1e-4) and ece > 0.01
    worst = sorted(np.flatnonzero(~right), key=lambda index: -confidence[index])[:24]
    for mistake, index in zip(report["mistakes"], worst):
        assert (mistake["true"], mistake["predicted"]) == (labels[index], predicted[index])
        assert mistake["probability"] == pytest.approx(confidence[index], rel=1e-4)
        own = probabilities[index, labels[index]]
        assert mistake["true_probability"] == pytest.approx(own, rel=1e-3)
        assert mistake["path"].endswith(".png") and f"/{labels[index]}/" in mistake["path"]
    assert len(report["mistakes"]) == 24


def test_equal_logits_are_ranked_by_label_as_in_the_evaluation(small, logits, tmp_path):
    run = with_state(tmp_path / "run", small, forget)
    run_tool(evaluate_report, run, "-json", tmp_path / "a.json").check()
    report, labels = json.loads((tmp_path / "a.json").read_text()), logits[1]
    assert report["acc1"] == 100 * (labels == 0).sum() / 101
    assert report["acc5"] == 100 * (labels < 5).sum() / 101
    assert {pair["predicted"] for pair in report["confusions"]} == {0}
    assert report["calibration"]["ece"] == pytest.approx(abs((labels == 0).mean() - 0.1), rel=1e-5)


def forget(state):
    state["head.weight"] = 0 * state["head.weight"]
    state["head.bias"] = 0 * state["head.bias"]


def test_weights_that_are_replaced_while_they_are_loaded_are_loaded_again(
    small, tmp_path, monkeypatch
):
    old, new = tmp_path / "old", with_state(tmp_path / "new", small, forget)
    shutil.copytree(small, old)
    loads = []

    def load(model, path):
        loads.append(load_into(model, path))
        if len(loads) == 1:
            shutil.copy(new / "best_weights.pdparams", path)
        return loads[-1]

    monkeypatch.setattr(predict, "load_into", load)
    reports = []
    for run in (old, new):
        run_tool(evaluate_report, run, "-json", tmp_path / "a.json").check()
        reports.append({**json.loads((tmp_path / "a.json").read_text()), "weights": None})
    assert reports[0] == reports[1] and len(loads) == 2 + 1


def test_a_bin_has_its_upper_limit_in_it_and_an_empty_one_has_no_accuracy():
    confidence = np.float32([1.0, 0.99, 1.0, 0.5])
    found = evaluate_report.calibration(confidence, np.array([True, False, True, True]))
    bins = found["bins"]
    assert (bins[0]["from"], bins[14]["to"], len(bins)) == (0, 1, 15)
    assert [each["images"] for each in bins] == [0] * 7 + [1] + [0] * 6 + [3]
    assert (bins[3]["accuracy"], bins[3]["confidence"]) == (None, None)
    assert bins[14]["accuracy"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx((3 * (2.99 / 3 - 2 / 3) + 0.5) / 4)
    assert evaluate_report.calibration(np.array([2 / 15]), np.array([True]))["bins"][1]["images"]


def imagenets(num_classes=1000, images=50_000):
    """An Outcome of ImageNet's size, without images of class 7; the data set and the classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, images)
    labels[labels == 7] = 8
    predicted = np.where(rng.random(images) < 0.8, labels, rng.integers(0, num_classes, images))
    confidence = rng.random(images, dtype="float32")
    correct = np.array([(labels == predicted).sum(), images])
    outcome = evaluate_report.Outcome(correct, labels, predicted, confidence, confidence / 2)
    source = SimpleNamespace(name="val_list.txt", image_path=lambda index: f"{index}.jpg")
    classes = [Class(f"class {label}", None) for label in range(num_classes)]
    return outcome, SimpleNamespace(images=source), classes


def test_imagenets_size_is_fast_and_small():
    outcome, data, classes = imagenets()
    start = time.perf_counter()
    report = evaluate_report.summarize(outcome, data, classes)
    text = json.dumps(report)
    assert time.perf_counter() - start < 5 and len(text) < 200_000
    matrix = confusion_matrix(outcome.labels, outcome.predicted, labels=range(1000))
    np.fill_diagonal(matrix, 0)
    counts = [pair["count"] for pair in report["confusions"]]
    assert counts == np.sort(matrix, axis=None)[::-1][:100].tolist()
    assert all(matrix[p["true"], p["predicted"]] == p["count"] for p in report["confusions"])
    assert len(report["mistakes"]) == 24
    seven = {"label": 7, "name": "class 7", "images": 0, "acc1": None, "confidence": None}
    assert report["classes"][7] == seven
    assert 7 not in [each["label"] for each in report_picture.worst_classes(report)]


def test_what_is_printed_are_the_worst_classes_and_pairs(reported):
    def called(label):
        return "8" if label == 8 else f"{label} {NAMES[label]}"

    out, report = reported[0].out, reported[1]
    lines = [line.strip() for line in out.splitlines()]
    lines, pairs = lines[: lines.index("most confused")], lines[lines.index("most confused") + 1 :]
    worst = sorted(report["classes"], key=lambda each: each["acc1"])[:5]
    assert lines[lines.index("lowest Acc@1") + 1 :] == [
        f"{each['acc1']:.2f}  {called(each['label'])} ({each['images']} images)" for each in worst
    ]
    assert pairs[:5] == [
        f"{pair['count']}  {called(pair['true'])} taken for {called(pair['predicted'])}"
        for pair in report["confusions"][:5]
    ]
    assert pairs[5].startswith("report in ") and len(pairs) == 6


# --- the picture ---


@pytest.fixture
def texts(monkeypatch):
    """The texts that are drawn into a sheet."""
    drawn, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda *args: (drawn.append(args[2]), text(*args))
    )
    return drawn


def test_the_picture_has_the_mistakes_and_replaces_an_old_one(small, reported, texts, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    path.write_text("old")
    result = run_tool(evaluate_report, small, "-plot", path, "-batch_size", 16).check()
    assert result.out == f"{reported[0].out.rpartition('report in')[0]}report in {path}\n"
    assert result.err == ""  # Greek and Cyrillic letters are in its font
    with Image.open(path) as picture:
        assert picture.size[0] == 6 * 236 + 12 and picture.size[1] > 4 * 236 + 600
    for mistake, *lines in zip(reported[1]["mistakes"], texts[::3], texts[1::3], texts[2::3]):
        for line, label in zip(lines, (mistake["predicted"], mistake["true"])):
            percent, name = line.split("  ")
            assert NAMES[label].startswith(name.removesuffix("...")) and percent.endswith("%")
        assert mistake["path"].endswith(lines[2].removeprefix("..."))
    assert len(texts) == 3 * 24 and [p.name for p in tmp_path.iterdir()] == ["report.png"]


def draw(path, report, pixels=(), font=None):
    tally = common.Tally()
    report_picture.Picture(str(path), font).save(report, pixels, tally)


def test_a_thousand_classes_and_names_that_the_font_lacks(texts, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    outcome, data, classes = imagenets()
    classes = [Class("猫" * 50) for _ in classes]
    report = evaluate_report.summarize(outcome, data, classes)
    pixels = [np.zeros([32, 32, 3], "uint8")] * 24
    draw(tmp_path / "a.jpg", report, pixels)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "its font has no '猫': give one that has by -font FILE" in lines[0]
    assert texts[0].endswith("?...") and (tmp_path / "a.jpg").stat().st_size > 0


@pytest.mark.parametrize("num_classes", [3, 10, 1000])
@pytest.mark.parametrize("name", ["8", "W" * 50])
def test_the_charts_titles_are_whole_and_apart(num_classes, name, tmp_path, monkeypatch):
    text = pytest.importorskip("matplotlib.text")
    outcome, data, classes = imagenets(num_classes)
    report = evaluate_report.summarize(outcome, data, [Class(name) for _ in classes])
    figures, picture = [], report_picture.Picture(str(tmp_path / "a.png"), None)
    monkeypatch.setattr(picture._plt, "close", figures.append)
    picture.save(report, [], common.Tally())
    monkeypatch.undo()
    (figure,) = figures
    picture._plt.close(figure)
    texts = [t for t in figure.findobj(text.Text) if t.get_visible() and t.get_text()]
    boxes = {each: each.get_window_extent() for each in texts}
    titles = [each for each in texts if each.get_fontsize() >= 11]
    assert {title.get_text().split(" ")[0] for title in titles} >= {"Most", "Accuracy", "The"}
    assert len(titles) == 5 and len(texts) > 30
    for each, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, each
        assert not any(box.overlaps(boxes[title]) for title in titles if title is not each), each


def test_a_font_of_ones_own_is_that_of_the_charts_too(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSerif.ttf"
    picture = report_picture.Picture(str(tmp_path / "a.png"), font)
    assert picture._style["font.family"] == ["DejaVu Serif", "DejaVu Sans"]


def test_a_model_without_mistakes_has_a_picture_too(tmp_path):
    pytest.importorskip("matplotlib")
    outcome, data, classes = imagenets(3, 10)
    outcome = outcome._replace(predicted=outcome.labels, correct=np.array([10, 10]))
    report = evaluate_report.summarize(outcome, data, classes)
    assert (report["acc1"], report["confusions"], report["mistakes"]) == (100, [], [])
    draw(tmp_path / "a.png", report)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height < 700


# --- what cannot be ---


def test_a_broken_image_ends_it_as_it_ends_an_evaluation(small, few_digits, tmp_path):
    shutil.copytree(few_digits, tmp_path / "data", symlinks=True)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with open(tmp_path / "data" / "val_list.txt", "a") as file:
        file.write("../broken.png 3\n")
    flags = ["-data_path", tmp_path / "data", "-json", tmp_path / "a.json"]
    result = run_tool(evaluate_report, small, *flags)
    result.refused(1, f"{tmp_path}/data/val_list.txt:102: cannot read ", "broken.png: ")
    assert result.err.count("\n") == 1 and not (tmp_path / "a.json").exists()


def test_weights_that_give_no_numbers_are_an_error(small, tmp_path):
    def spoil(state):
        state["head.bias"] = np.full(10, np.nan, np.float32)

    run = with_state(tmp_path / "run", small, spoil)
    result = run_tool(evaluate_report, run)
    result.refused(1, ".png: the model's outputs for it are not finite numbers")
    assert result.out == ""


def test_what_is_asked_wrongly_is_one_sentence(small, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")

    def refused(*args):
        return run_tool(evaluate_report, *args)

    refused("-data_path", tmp_path, small).refused(2, "val_list.txt: cannot read this image list")
    refused(small / "best.pdparams").refused(2, "best.pdparams does not exist")
    refused(tmp_path).refused(2, "there is no best_weights.pdparams in this folder")
    (tmp_path / "a.pdparams").touch()
    refused(tmp_path / "a.pdparams").refused(2, "which model? Give its file with -cfg")
    refused("-cfg", CONFIG, small).refused(2, "wrong -cfg?")
    refused("-batch_size", 0, small).refused(2, "DATA.BATCH_SIZE is 0")
    refused("-names", CONFIG, small).refused(2, f"{CONFIG}: there are ")
    refused("-json", tmp_path / "no" / "a", small).refused(2, "no: make it first")
    refused("-json", tmp_path, small).refused(2, "this is a folder: give -json a file")
    refused("-plot", tmp_path / "a.svg", small).refused(2, "-plot must end in .png or .jpg")
    for names in (("a.png", "a.png"), ("a.png", "../data/a.png")):
        flags = [word for pair in zip(("-json", "-plot"), names) for word in pair]
        refused(*flags, small).refused(2, "a.png: -json and -plot are the same file")
    refused(small, small).refused(2, "unrecognized arguments")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.pdparams"]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(small, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    font = ["-plot", path, "-font", CONFIG]
    run_tool(evaluate_report, small, *font).refused(2, "-font cannot be read as a font")
    path.write_text("old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    result = run_tool(evaluate_report, small, "-plot", path)
    result.refused(1, f"{path}: cannot be written: No space left on device")
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"] and path.read_text() == "old"
