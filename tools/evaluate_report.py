"""Report what a model gets wrong: accuracy per class, confused pairs, calibration, sure mistakes.

    python tools/evaluate_report.py output/train-20260101-12-00-00
    python tools/evaluate_report.py -cfg configs/gmlp_s16_224.yaml -data_path /dataset/imagenet \\
        -json report.json -plot report.png gmlp_s16_224.pdparams

One pass over val_list.txt of -data_path, or of the run's own data set where that is here.  Images
and model are -eval's, and so is the accuracy.  What is printed is an extract: -json has everything,
-plot one picture; both are replaced where they exist.  -plot needs matplotlib.

    weights, weights_sha256, list   what was evaluated, on which list
    images, acc1, acc5, confidence  of the whole list
    classes      [{label, name, images, acc1, confidence}]; acc1 and confidence of a class without
                 images are null
    confusions   [{true, predicted, count}]: the labels of the 100 most confused pairs
    calibration  {ece, bins: [{from, to, images, accuracy, confidence}]}
    mistakes     [{path, true, predicted, probability, true_probability}]: the 24 most certain

acc1 and acc5 are percent, all other scores are 0 to 1.  The confidence of an image is the
probability of the class that it is taken for, the highest; elsewhere it is the mean over images.
The expected calibration error is that of Guo et al. (arXiv 1706.04599): images go by their
confidence into 15 bins of equal width, which have their upper limit in them; ece is the mean of
the bins' |accuracy - confidence|, weighted by their images.

Names of classes: as for predict.py.  Exit status: 0; 1 for what failed while running, such as an
image that cannot be read; 2 for what was asked wrongly.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common, predict
from config import ConfigError, get_config, require_model, update_config
from ranks import host
from tools.plot_run import check_place
from tools.report_picture import Picture, worst_classes
from utils import DataError, progress_bar, replace_text, show_path

# Paddle and NumPy come in work(): -h and a wrong flag answer at once.

BINS = 15  # as in the paper's tables
CONFUSIONS, MISTAKES = 100, 24  # of -json
_PRINTED = 5  # classes, and pairs


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("-cfg", metavar="YAML", help="the model (default: the run's whose weights these are)")
    add("-data_path", metavar="DIR", help="folder of val_list.txt (default: the run's)")
    add("-json", metavar="FILE", help="the whole report as data")
    add("-plot", metavar="FILE", help="the report as a picture, .png or .jpg")
    add("-font", metavar="FILE", help=".ttf or .otf for -plot, for names that DejaVu Sans lacks")
    add("-names", metavar="FILE", help="a line per class (default: the run's, or ImageNet's)")
    add("-batch_size", metavar="N", type=int, default=64, help="images per batch (default 64)")
    add("-num_workers", metavar="N", type=int, help="loader processes (default: by the cores)")
    add("-num_classes", metavar="N", type=int, help="classes of the model (default: as -cfg says)")
    add("-image_size", metavar="N", type=int, help="pixels (default: as -cfg says)")
    add("pretrained", metavar="RUN", help="a run's folder, or a file of weights")
    return parser


def work(args):
    """Reports what the arguments say."""
    config = update_config(get_config(), args)
    require_model(args)
    if args.json:
        check_place(args.json, "-json")
    if args.json and args.plot and os.path.realpath(args.json) == os.path.realpath(args.plot):
        raise ConfigError(f"{args.plot}: -json and -plot are the same file: give them two")
    picture = Picture(args.plot, args.font) if args.plot else None
    tally = common.Tally("evaluate_report.py: ")
    common.import_paddle()
    from datasets import build_dataset

    weights = config.MODEL.PRETRAINED
    model, digest = predict.load_with_digest(config, weights, tally.say)
    classes = predict.classes_of(args, config)
    data = build_dataset(config, train=False)
    try:
        outcome = evaluate(model, data, config, tally)
        report = {"weights": weights, "weights_sha256": digest, **summarize(outcome, data, classes)}
        print_report(report)
        if args.json:
            replace_text(args.json, json.dumps(report, indent=1) + "\n")
        if picture:
            pixels = [data[0, index][0] for index in certain_mistakes(outcome)]
            picture.save(report, pixels, tally)
    except DataError as error:  # an image, or the loader
        raise common.Failed(str(error)) from error
    for path in filter(None, (args.json, args.plot)):
        print(f"report in {path}")


class Outcome(NamedTuple):
    """What a model makes of a list of images: two counts, and arrays [images]."""

    correct: Any  # int64 [2]: images whose label is the most probable, among the five most probable
    labels: Any
    predicted: Any  # the class of the largest logit
    confidence: Any  # its probability
    own: Any  # the probability of the image's label


def evaluate(model, data, config, tally):
    """One pass over a list, in this process.

    Args:
        model: in evaluation mode, with its weights.
        data: a datasets.ImageDataset for validation.
        config: the merged config.
        tally: a common.Tally, for what is said about the CPU's inference.

    Returns:
        An Outcome.

    Raises:
        common.Failed: the model gives infinities or NaN.
        DataError: an image cannot be read, or the loader cannot work.
    """
    import numpy as np
    import paddle
    from paddle.nn import functional as F

    from datasets import EvalSampler
    from ranks.loader import build_loader, explain_dead_workers
    from training.evaluate import top_k_counts
    from training.inference import choose_model
    from transforms import BatchTransform

    on_gpu = paddle.get_device().startswith("gpu")
    log = SimpleNamespace(info=tally.say, warning=tally.say)
    model = choose_model(model, config, len(data), log, on_gpu)  # as -eval
    sampler = EvalSampler(len(data), config.DATA.BATCH_SIZE_EVAL, 0, 1)
    workers = host.choose_workers(config.DATA.NUM_WORKERS, on_gpu)
    loader = build_loader(data, sampler, workers, config.DATA.IMAGE_SIZE)
    transform, correct, parts, done = BatchTransform(config, train=False), 0, [], 0
    with contextlib.closing(loader) as batches, explain_dead_workers(), paddle.no_grad():
        for images, labels in progress_bar(batches, len(sampler)):
            logits = model(transform(images, None)[0]).astype("float32")
            correct = correct + top_k_counts(logits, labels).numpy()
            probabilities, logits, labels = F.softmax(logits), logits.numpy(), labels.numpy()
            probabilities, rows = probabilities.numpy(), np.arange(len(labels))
            predict.require_finite(logits, [data.images.image_path(done + row) for row in rows])
            best = logits.argmax(axis=1)  # of equal logits the first, as top_k_counts has it
            parts.append((labels, best, probabilities[rows, best], probabilities[rows, labels]))
            done += len(labels)
    return Outcome(correct, *map(np.concatenate, zip(*parts)))


def summarize(outcome, data, classes):
    """The report of an Outcome, as -json has it, without the weights.

    Args:
        outcome: of the images of `data`, in their order.
        data: a datasets.ImageDataset.
        classes: a predict.Class for each label.
    """
    count = len(outcome.labels)
    acc1, acc5 = (100 * int(correct) / count for correct in outcome.correct)
    return {
        "list": data.images.name,
        "images": count,
        "acc1": acc1,
        "acc5": acc5,
        "confidence": float(outcome.confidence.mean(dtype="float64")),
        "classes": by_class(outcome, classes),
        "confusions": confusions(outcome, len(classes)),
        "calibration": calibration(outcome.confidence, outcome.predicted == outcome.labels),
        "mistakes": mistakes(outcome, data),
    }


def by_class(outcome, classes):
    """Accuracy and confidence of each class's images."""
    import numpy as np

    right = outcome.predicted == outcome.labels
    images, correct, confidence = (
        np.bincount(outcome.labels, weights, len(classes)).tolist()
        for weights in (None, right, outcome.confidence)
    )
    return [
        {
            "label": label,
            "name": name,
            "images": images[label],
            "acc1": 100 * correct[label] / images[label] if images[label] else None,
            "confidence": confidence[label] / images[label] if images[label] else None,
        }
        for label, (name, _) in enumerate(classes)
    ]


def confusions(outcome, num_classes):
    """The pairs (label, what its images are taken for), the most frequent first, then by label."""
    import numpy as np

    pairs = outcome.labels.astype("int64") * num_classes + outcome.predicted
    pairs, counts = np.unique(pairs[outcome.predicted != outcome.labels], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:CONFUSIONS]
    return [
        {"true": pair // num_classes, "predicted": pair % num_classes, "count": count}
        for pair, count in zip(pairs[most].tolist(), counts[most].tolist())
    ]


def calibration(confidence, right):
    """The expected calibration error and its bins (see this file's docstring).

    Args:
        confidence: float array [images], 0 to 1.
        right: bool array [images].
    """
    import numpy as np

    edges = np.linspace(0, 1, BINS + 1)
    confidence = confidence.astype("float64")
    places = np.digitize(confidence, edges[1:-1], right=True)
    images, correct, sums = (
        np.bincount(places, weights, BINS) for weights in (None, right, confidence)
    )
    some = images > 0
    accuracy, mean = correct[some] / images[some], sums[some] / images[some]
    bins = [
        {"from": low, "to": high, "images": number, "accuracy": None, "confidence": None}
        for low, high, number in zip(edges.tolist(), edges[1:].tolist(), images.tolist())
    ]
    for place, *values in zip(np.flatnonzero(some), accuracy.tolist(), mean.tolist()):
        bins[place].update(zip(("accuracy", "confidence"), values))
    ece = float((images[some] * abs(accuracy - mean)).sum() / len(confidence))
    return {"ece": ece, "bins": bins}


def certain_mistakes(outcome):
    """The indices of the images taken for another class with the highest probabilities."""
    import numpy as np

    wrong = np.flatnonzero(outcome.predicted != outcome.labels)
    return wrong[np.argsort(-outcome.confidence[wrong], kind="stable")[:MISTAKES]].tolist()


def mistakes(outcome, data):
    """What those images are, and what they are taken for."""
    return [
        {
            "path": predict.utf8(data.images.image_path(index)),
            "true": int(outcome.labels[index]),
            "predicted": int(outcome.predicted[index]),
            "probability": float(outcome.confidence[index]),
            "true_probability": float(outcome.own[index]),
        }
        for index in certain_mistakes(outcome)
    ]


def print_report(report):
    """The report's extract."""

    def called(label):
        name = report["classes"][label]["name"]
        return str(label) if name == str(label) else f"{label} {show_path(name)}"

    print(
        f"Acc@1 {report['acc1']:.2f} Acc@5 {report['acc5']:.2f} on {report['images']:,} images of "
        f"{show_path(report['list'])}\n"
        f"expected calibration error {report['calibration']['ece']:.4f}, mean confidence "
        f"{report['confidence']:.4f}\nlowest Acc@1"
    )
    for each in worst_classes(report)[:_PRINTED]:
        images = f"{each['images']:,} {'image' if each['images'] == 1 else 'images'}"
        print(f"  {each['acc1']:6.2f}  {called(each['label'])} ({images})")
    print("most confused")
    for pair in report["confusions"][:_PRINTED]:
        print(f"  {pair['count']:6,}  {called(pair['true'])} taken for {called(pair['predicted'])}")
    if not report["confusions"]:
        print("       0  every image is right")


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
