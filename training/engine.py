"""The two loops: one epoch of training, one pass of evaluation."""

import contextlib
import time
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import paddle
from paddle.nn import functional as F

from ranks import stop
from utils import MeanMeter, all_reduce_sum

_BATCH_STREAM = 3  # what the draw is for; datasets.py has 1 and 2


class NonFiniteLoss(RuntimeError):
    """The loss is infinite or not a number: going on would only spoil the weights."""


@dataclass
class Training:
    """What the training loop works with; the parts stay the same from epoch to epoch.

    Attributes:
        model: the model, wrapped in DataParallel where there are several ranks.
        updater: optim.Updater.
        batch_transform: (uint8 images, labels, numpy Generator) -> (float images, soft targets).
        autocast: makes the context in which the model runs.
        no_sync: makes the context in which ranks do not exchange gradients.
        accum_iter: batches per optimizer step.
        seed, rank: what random draws are a function of, with the epoch and the batch.
        report_freq: batches between reports.
        report: called on every rank with (epoch, batches done, mean loss over all ranks since the
            last report, this rank's images/s).
        after_step: called on every rank after each optimizer step with (epoch, batches done,
            MeanMeter of this epoch's losses).
    """

    model: Any
    updater: Any
    batch_transform: Callable
    autocast: Callable
    no_sync: Callable
    accum_iter: int
    seed: int
    rank: int
    report_freq: int
    report: Callable
    after_step: Callable


def train_one_epoch(training, batches, epoch, total, first_batch=0, losses=None):
    """Trains on the rest of an epoch.

    Between reports the host never waits for the device: losses stay there.

    Args:
        training: the parts.
        batches: iterable of (uint8 [batch, H, W, 3], labels [batch]), from `first_batch` on.
        epoch: number of this epoch.
        total: batches of a whole epoch.
        first_batch: batches of this epoch that are done; a multiple of accum_iter, or all.
        losses: MeanMeter of the batches that are done; left out where there are none.

    Returns:
        The mean loss over the epoch's batches and all ranks.

    Raises:
        NonFiniteLoss: at a report, on every rank.
    """
    training.model.train()
    losses, recent = losses or MeanMeter(), MeanMeter()
    images_seen, start = 0, time.perf_counter()
    for batch, (images, labels) in enumerate(batches, first_batch):
        loss = _train_batch(training, images, labels, epoch, batch, total)
        stop.request.show_life()
        recent.add(loss)
        losses.add(loss)
        images_seen += len(labels)
        if (batch + 1) % training.report_freq == 0 or batch + 1 == total:
            mean_loss = recent.read()
            if not np.isfinite(mean_loss):
                raise NonFiniteLoss(
                    f"the loss is {mean_loss} in epoch {epoch}, at batch {batch + 1} or in the "
                    f"{recent.count - 1} before"
                )
            images_per_second = images_seen / (time.perf_counter() - start)
            training.report(epoch, batch + 1, mean_loss, images_per_second)
            recent, images_seen, start = MeanMeter(), 0, time.perf_counter()
        if _ends_step(training, batch, total):
            training.after_step(epoch, batch + 1, losses)
    return losses.read()


def _ends_step(training, batch, total):
    return (batch + 1) % training.accum_iter == 0 or batch + 1 == total


def _train_batch(training, images, labels, epoch, batch, total):
    """Forward and backward of one batch; after the last of its group, an optimizer step."""
    first_of_group = batch - batch % training.accum_iter
    group_size = min(training.accum_iter, total - first_of_group)
    ends_step = _ends_step(training, batch, total)
    rng = np.random.default_rng([_BATCH_STREAM, training.seed, epoch, batch, training.rank])
    paddle.seed(int(rng.integers(2**31)))  # dropout, drop path and erasing draw on the device
    images, targets = training.batch_transform(images, labels, rng)
    # Ranks exchange gradients once a step, not once a batch.
    synchronize = contextlib.nullcontext if ends_step else training.no_sync
    with synchronize():
        with training.autocast():
            logits = training.model(images)
        # Not its own mean: Paddle 2.6 looks for labels to ignore there, and the host would wait.
        losses = F.cross_entropy(
            logits.astype("float32"), targets, soft_label=True, reduction="none"
        )
        loss = losses.mean()
        training.updater.scale(loss / group_size).backward()
    if ends_step:
        training.updater.update()
    return loss


@paddle.no_grad()
def validate(model, batches, batch_transform, autocast):
    """Exact evaluation: sums over every rank's own images, divided once.

    Args:
        model: gives logits [batch, classes].
        batches: iterable of (uint8 [batch, H, W, 3], labels [batch]); ranks may have different
            numbers of them, as communication waits for the end.
        batch_transform: (images, labels, None) -> (float images, labels).
        autocast: makes the context in which the model runs.

    Raises:
        stop.Stopped: the run was asked to end.

    Returns:
        A dict with acc1 and acc5 (percent), loss (mean cross entropy) and images (their number).
    """
    model.eval()
    correct = paddle.zeros([2], dtype="int64")
    loss_sum = paddle.zeros([], dtype="float64")
    seen = 0
    for images, labels in batches:
        stop.request.raise_if_asked()
        images, labels = batch_transform(images, labels, None)
        with autocast():
            logits = model(images)
        logits = logits.astype("float32")
        correct += top_k_counts(logits, labels)
        loss_sum += F.cross_entropy(logits, labels, reduction="none").astype("float64").sum()
        seen += len(labels)
    stop.barrier()
    correct = all_reduce_sum(correct).numpy()
    num_images = int(all_reduce_sum(paddle.to_tensor(seen, dtype="int64")))
    return {
        "acc1": 100 * int(correct[0]) / num_images,
        "acc5": 100 * int(correct[1]) / num_images,
        "loss": float(all_reduce_sum(loss_sum)) / num_images,
        "images": num_images,
    }


def top_k_counts(logits, labels, ks=(1, 5)):
    """How many rows have their label among the k largest logits.

    Args:
        logits: float Tensor [batch, classes].
        labels: int64 Tensor [batch].
        ks: the k values; one above the number of classes counts every row.

    Returns:
        int64 Tensor [len(ks)]: a sum, so that ranks and batches of any size add up exactly.
    """
    own = paddle.take_along_axis(logits, labels.unsqueeze(1), axis=1)
    # Behind the label: smaller logits, and equal ones of later classes.  Asked this way round, a
    # NaN is behind nothing and a model of NaNs gets nothing right.
    later = paddle.arange(logits.shape[1]).unsqueeze(0) >= labels.unsqueeze(1)
    behind = (logits < own) | ((logits == own) & later)
    place = (~behind).astype("int64").sum(axis=1)  # of each row's label, from 0
    return paddle.stack([(place < k).astype("int64").sum() for k in ks])
