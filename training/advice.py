"""Advice about a training, before its first step and at its end: sentences with what to change."""

import math

from ranks import host, launch, report

_WARMUP = 20 / 300  # epochs of warm-up per epoch in the paper
# Shares of the average that are still the weights it began with, at the run's end.
_SLOW, _GOOD = math.exp(-3), math.exp(-10)


def about_batch_size(images, ranks):
    """What makes a data set smaller than a batch of all ranks trainable."""
    if images < ranks:
        return f"-nprocs {images}, and -batch_size 1"
    return f"-batch_size {images // ranks}"


def about_ranks(training):
    """What two ranks would bring to a run that begins on several cores of a CPU; "": nothing."""
    run, batch_size, cores = training.run, training.config.DATA.BATCH_SIZE, host.available_cores()
    if run.on_gpu or run.world_size > 1 or cores == 1 or batch_size % 2:
        return ""
    # Whoever chose the threads, or another launcher, knows better; others would give other bits.
    chosen = host.threads() != cores or (launch.is_rank() and not report.has_launcher())
    if chosen or training.place.epoch or training.place.batch:
        return ""
    return (
        f"one rank computes on {cores} cores: -nprocs 2 -batch_size {batch_size // 2} makes steps "
        "of as many images faster (on two cores in 0.9 of the time: docs/performance.md#training)"
    )


def about_plan(training):
    """Sentences about settings that do not go with the length of this run."""
    train, rate = training.config.TRAIN, training.learning_rate
    if training.accum_iter < train.ACCUM_ITER:
        yield (
            f"TRAIN.ACCUM_ITER is {train.ACCUM_ITER}, but an epoch has only {training.batches} "
            "batches: a step takes all of them"
        )
    images, ranks = len(training.run.train_data), training.run.world_size
    left_out = images - training.batches * training.config.DATA.BATCH_SIZE * ranks
    if left_out > images / 5:
        yield (
            f"an epoch leaves out {left_out:,} of {images:,} images, others each time, as they do "
            "not fill a batch on every rank: take -batch_size "
            f"{images // ((training.batches + 1) * ranks)}, or one near it"
        )
    if rate.warmup > rate.total:
        yield (
            f"warm-up is longer than the whole run of {rate.total} steps: the learning rate will "
            "not reach its peak: take TRAIN.WARMUP_STEPS None and TRAIN.WARMUP_EPOCHS "
            f"{_WARMUP * train.NUM_EPOCHS:.2g} or so"
        )
    share = train.MODEL_EMA_DECAY**rate.total
    if train.MODEL_EMA and share > _SLOW:
        yield (
            f"TRAIN.MODEL_EMA_DECAY {train.MODEL_EMA_DECAY:g} is slow for a run of {rate.total} "
            f"steps: at its end {100 * share:.0f}% of the average (EMA) are still the weights that "
            f"it began with, and best_weights.pdparams is the average: take about "
            f"{_GOOD ** (1 / rate.total):.3g}, or TRAIN.MODEL_EMA False"
        )


def about_average(training):
    """A sentence where the average that best_weights.pdparams holds is worse than the model."""
    scores, decay = training.scores, training.config.TRAIN.MODEL_EMA_DECAY  # the last validation's
    if "ema" in scores and scores["ema"] < scores["model"]:
        yield (
            f"at the end the average (EMA) has Acc@1 {scores['ema']:.2f} and the model itself "
            f"{scores['model']:.2f}, but best_weights.pdparams is the average: "
            f"TRAIN.MODEL_EMA_DECAY {decay:g} may be slow for this run (last.pdparams has both)"
        )
