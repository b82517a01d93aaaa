"""Evaluation: scores as sums that add up exactly, one pass over a list, and the `-eval` program."""

import contextlib
import os
import time

import paddle
from paddle.nn import functional as F

from datasets import EvalSampler
from ranks import stop
from ranks.collective import all_reduce_sum
from training.inference import choose_model
from transforms import BatchTransform
from utils import progress_bar, replace_text, to_json


class Scores:
    """Top-1 and top-5 accuracy and loss, exact however images are spread over batches and ranks.

    They are kept as sums over this rank's images, on the device.
    """

    def __init__(self):
        self._correct = paddle.zeros([2], dtype="int64")
        self._loss = paddle.zeros([], dtype="float64")
        self._images = 0

    def add(self, logits, labels):
        """Counts a batch: float Tensor [batch, classes] and int64 Tensor [batch]."""
        logits = logits.astype("float32")
        self._correct += top_k_counts(logits, labels)
        self._loss += F.cross_entropy(logits, labels, reduction="none").astype("float64").sum()
        self._images += len(labels)

    def result(self):
        """utils.SCORES (accuracies in percent) and images, their number; a collective."""
        correct, loss = all_reduce_sum(self._correct), all_reduce_sum(self._loss)
        images = int(all_reduce_sum(paddle.to_tensor(self._images, dtype="int64")))
        acc1, acc5 = (100 * int(count) / images for count in correct.numpy())
        return {"acc1": acc1, "acc5": acc5, "loss": float(loss) / images, "images": images}


def describe(result):
    """A result of Scores, or of real.RealScores, as a sentence for the log."""
    text = (
        f"Acc@1 {result['acc1']:.2f} Acc@5 {result['acc5']:.2f} loss {result['loss']:.4f} "
        f"on {result['images']} images"
    )
    if "real_images" in result:
        text += (
            f"; with the ReaL labels Acc@1 {result['real_acc1']:.2f} Acc@5 "
            f"{result['real_acc5']:.2f} on {result['real_images']}"
        )
    return text


def top_k_counts(logits, labels, ks=(1, 5)):
    """How many rows have their label among the k largest logits.

    Args:
        logits: float Tensor [batch, classes].
        labels: int64 Tensor [batch].
        ks: the k values; one above the number of classes counts every row.

    Returns:
        int64 Tensor [len(ks)]: a sum, so that ranks and batches of any size add up exactly.
    """
    place = places(logits, labels.unsqueeze(1))
    return paddle.stack([(place < k).astype("int64").sum() for k in ks])


def places(logits, labels):
    """How many classes have a larger logit than each label's: int64 Tensor [batch, n].

    Args:
        logits: float Tensor [batch, classes].
        labels: int64 Tensor [batch, n].
    """
    own = paddle.take_along_axis(logits, labels, axis=1).unsqueeze(2)
    # A class is behind the label if its logit is smaller, or equal and of a later class.  Counting
    # those that are not behind puts a NaN ahead of the label: a model of NaNs gets nothing right.
    later = paddle.arange(logits.shape[1]) >= labels.unsqueeze(2)  # [batch, n, classes]
    logits = logits.unsqueeze(1)
    behind = (logits < own) | ((logits == own) & later)
    return (~behind).astype("int64").sum(axis=2)


@paddle.no_grad()
def validate(model, batches, batch_transform, autocast, scores=None):
    """One exact pass: every image once, over all ranks.

    Args:
        model: gives logits [batch, classes].
        batches: iterable of (uint8 [batch, H, W, 3], labels [batch]); ranks may have different
            numbers of them, as communication waits for the end.
        batch_transform: (images, labels) -> (float images, labels).
        autocast: makes the context in which the model runs.
        scores: what counts; None: new Scores.

    Returns:
        What the scores' result gives.

    Raises:
        stop.Stopped: the run was asked to end.
    """
    model.eval()
    scores = scores or Scores()
    for images, labels in batches:
        stop.request.raise_if_asked()
        images, labels = batch_transform(images, labels)
        with autocast():
            logits = model(images)
        scores.add(logits, labels)
        stop.request.show_life()
    stop.barrier()
    return scores.result()


def validate_run(run, model, title):
    """Validates a model on the whole validation list of a run; see validate."""
    data = run.config.DATA
    batch_size = data.BATCH_SIZE_EVAL or data.BATCH_SIZE
    sampler = EvalSampler(len(run.val_data), batch_size, run.rank, run.world_size)
    transform = BatchTransform(run.config, train=False)
    scores = run.real.scores(sampler.indices) if run.real else None
    with contextlib.closing(run.loader(run.val_data, sampler)) as batches:
        bar = progress_bar(batches, len(sampler), title, shown=run.rank == 0)
        return validate(model, bar, transform, run.autocast, scores)


def evaluate(run):
    """The `-eval` program: logs the accuracy, writes `eval.json`.  Returns the exit status, 0."""
    images = len(run.val_data) // run.world_size
    model = choose_model(run.model, run.config, images, run.log, run.on_gpu)
    start = time.perf_counter()
    scores = validate_run(run, model, "eval")
    seconds = time.perf_counter() - start
    result = {
        **scores,
        "seconds": round(seconds, 3),
        "images_per_second": round(scores["images"] / seconds, 2),
        "weights": run.config.MODEL.PRETRAINED,
        "weights_sha256": run.weights_digest,
    }
    run.log.info(describe(scores))
    run.metrics.write(kind="eval", **result)
    if run.rank == 0:
        replace_text(os.path.join(run.folder, "eval.json"), to_json(result, indent=2) + "\n")
    run.log.info(f"outputs in {run.folder}")
    stop.leave_together()
    return 0
