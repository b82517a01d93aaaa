"""Evaluation in this process: exact sums, whatever the batches are."""

import contextlib

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F
from test_train import make_batches, make_model

from training.evaluate import top_k_counts, validate
from utils import SCORES


def test_validation_is_exact_for_any_batches():
    model = make_model()
    images, labels = (paddle.concat(parts) for parts in zip(*make_batches(1, 37)))
    logits = model(images).numpy()
    order = np.argsort(-logits, axis=1)
    hits = order == labels.numpy()[:, None]
    for size in (1, 5, 37):
        batches = [(images[i : i + size], labels[i : i + size]) for i in range(0, 37, size)]
        scores = validate(model, batches, lambda x, y: (x, y), contextlib.nullcontext)
        assert scores["images"] == 37 and set(scores) == {*SCORES, "images"}
        assert scores["acc1"] == 100 * hits[:, 0].sum() / 37
        assert scores["acc5"] == 100 * hits[:, :5].sum() / 37
        assert scores["loss"] == pytest.approx(float(F.cross_entropy(model(images), labels)))


def test_top_k_counts_break_ties_by_class_and_count_no_nan():
    logits = paddle.to_tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 3.0]])
    labels = paddle.to_tensor([0, 1, 0])
    assert top_k_counts(logits, labels, ks=(1, 2, 3, 9)).tolist() == [1, 2, 3, 3]
    assert top_k_counts(logits * float("nan"), labels, ks=(1, 2)).tolist() == [0, 0]
