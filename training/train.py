"""Training: the epochs, the loop over batches, and one batch, from uint8 images to a step.

Training(run).train()
"""

import contextlib
import os
import signal
import time

import numpy as np
import paddle
from paddle.nn import functional as F

from datasets import BATCH_STREAM, TrainSampler, batches_per_epoch
from ranks import stop
from ranks.again import how_to_go_on
from ranks.collective import MeanMeter
from training import advice, cpu, evaluate, optim, state
from training.pace import Pace
from training.run import build_model
from training.state import NonFiniteLoss, Place
from transforms import BatchTransform
from utils import DataError, progress_bar


class Training:
    """A training run on one rank.

    Args:
        run: a training.run.Run: config, model, data, rank, folder, log.

    Attributes:
        model: the run's model, wrapped in DataParallel where there are several ranks.
        batches, steps_per_epoch: of an epoch, the same on every rank.
        accum_iter: batches per optimizer step; the last step of an epoch may have fewer.
        place: how far training is.
        best: the best validation's acc1 and epoch; scores: the last one's acc1 by EMA.name.
        saved, saved_place: the last checkpoint's path and place.

    Raises:
        ConfigError, DataError: this cannot be trained.
    """

    def __init__(self, run):
        self.run, self.config = run, run.config
        train, batch_size = self.config.TRAIN, self.config.DATA.BATCH_SIZE
        self.batches = batches_per_epoch(len(run.train_data), batch_size, run.world_size)
        if self.batches == 0:
            raise DataError(
                f"{run.train_data.images.name} has {len(run.train_data)} images, fewer than one "
                f"batch of {batch_size} for each of {run.world_size} rank(s): take "
                f"{advice.about_batch_size(len(run.train_data), run.world_size)}"
            )
        # A step sees no more batches than an epoch has.
        self.accum_iter = min(train.ACCUM_ITER, self.batches)
        self.steps_per_epoch = -(-self.batches // self.accum_iter)
        self.images_per_step = batch_size * self.accum_iter * run.world_size
        self.learning_rate = optim.LearningRate(train, self.images_per_step, self.steps_per_epoch)
        schedule = optim.build_schedule(self.learning_rate)
        self.optimizer = optim.build_optimizer(self.config, run.model, schedule)
        self.scaler = optim.build_scaler(run.amp)
        self.ema = self._build_ema()
        self.updater = optim.Updater(self.optimizer, schedule, self.scaler, self.ema)
        self.batch_transform = BatchTransform(self.config, train=True)
        self.pace = Pace(train.NUM_EPOCHS * self.batches, self.accum_iter, run.log.info)
        self.best, self.scores = {"acc1": -1.0, "epoch": 0}, {}
        self.place = Place(train.LAST_EPOCH)
        self.updater.move_to(train.LAST_EPOCH * self.steps_per_epoch)
        self.saved, self.saved_place = None, None
        if run.start.path:
            state.restore(self, run.start.tree, run.start.path)
            run.start = None  # as large as the model and its optimizer state
        cpu.speed_up(run.model)
        self.model, self.no_sync = run.model, contextlib.nullcontext
        if run.world_size > 1:
            self.model = paddle.DataParallel(run.model)
            self.no_sync = self.model.no_sync
        self._log_plan()

    def _build_ema(self):
        train = self.config.TRAIN
        if not train.MODEL_EMA:
            return optim.NoEMA(self.run.model)
        average = build_model(self.config)
        return optim.EMA(self.run.model, average, train.MODEL_EMA_DECAY, train.MODEL_EMA_FORCE_CPU)

    def _log_plan(self):
        log, rate = self.run.log, self.learning_rate
        log.info(
            f"{len(self.run.train_data):,} training and {len(self.run.val_data):,} validation "
            f"images; {self.images_per_step} images per step, {self.steps_per_epoch} steps per "
            f"epoch, {rate.total} steps in all"
        )
        log.info(str(rate))
        if sentence := advice.about_ranks(self):
            log.info(sentence)
        for sentence in advice.about_plan(self):
            log.warning(sentence)

    # --- epochs ---

    def train(self):
        """Trains the remaining epochs, with validation and checkpoints between them.

        Returns:
            The exit status: 0, or 128 + the signal's number where a signal ended the run, after it
            saved its place.

        Raises:
            NonFiniteLoss: a loss or a weight is infinite or NaN; no checkpoint has it.
        """
        try:
            with stop.request.finishing():
                status = 0
                try:
                    self._train_epochs()
                except stop.Stopped:
                    status = self._save_as_asked()
                stop.leave_together()
                return status
        except NonFiniteLoss as error:
            raise NonFiniteLoss(
                f"{error} (optimizer step {self.updater.step}, learning rate "
                f"{self.optimizer.get_lr():.3e}); last good checkpoint: {self.saved or 'none'}"
            ) from None

    def _train_epochs(self):
        config, log = self.config, self.run.log
        epochs = config.TRAIN.NUM_EPOCHS
        if self.place.epoch >= epochs:
            log.info(f"all {epochs} epochs are done already: nothing to train")
        for epoch in range(self.place.epoch + 1, epochs + 1):
            start = time.perf_counter()
            loss = self._train_epoch(epoch)
            seconds = time.perf_counter() - start
            log.info(f"epoch {epoch}/{epochs}: loss {loss:.4f}, {seconds:.1f} s")
            self.run.metrics.write(kind="epoch", epoch=epoch, step=self.updater.step, loss=loss)
            is_last = epoch == epochs
            improved = False
            if epoch % config.VALIDATE_FREQ == 0 or is_last:
                improved = self._validate(epoch)
            self.place = Place(epoch)
            self._save(keep=epoch % config.SAVE_FREQ == 0 or is_last, best=improved)
        if self.best["epoch"]:
            acc1, epoch = self.best["acc1"], self.best["epoch"]
            log.info(f"best Acc@1 {acc1:.2f} ({self.ema.name}) in epoch {epoch}")
        for sentence in advice.about_average(self):
            log.warning(sentence)
        log.info(f"outputs in {self.run.folder}")

    def _train_epoch(self, epoch):
        run = self.run
        sampler = TrainSampler(
            len(run.train_data), self.config.DATA.BATCH_SIZE, self.config.SEED, epoch, run.rank,
            run.world_size, self.place.batch,
        )  # fmt: skip
        with contextlib.closing(run.loader(run.train_data, sampler)) as batches:
            return self.train_batches(batches, epoch)

    def _validate(self, epoch):
        """Validates the weights, and their average.  Returns whether the best score improved.

        With an EMA its score counts, as its weights are the ones to use.
        """
        scores = self._validate_one(self.run.model, epoch, "model")
        if self.ema.average is not self.run.model:
            with self.ema.on_device() as average:
                scores = self._validate_one(average, epoch, "ema")
        if scores["acc1"] <= self.best["acc1"]:
            return False
        self.best = {"acc1": scores["acc1"], "epoch": epoch}
        return True

    def _validate_one(self, model, epoch, weights):
        scores = evaluate.validate_run(self.run, model, f"validate {weights}")
        self.run.log.info(f"epoch {epoch} {weights}: {evaluate.describe(scores)}")
        self.run.metrics.write(kind="eval", epoch=epoch, weights=weights, **scores)
        self.scores[weights] = scores["acc1"]
        if not np.isfinite(scores["loss"]):
            raise NonFiniteLoss(
                f"the validation loss is {scores['loss']} after epoch {epoch}, which is not saved"
            )
        return scores

    # --- batches ---

    def train_batches(self, batches, epoch):
        """Trains on the rest of an epoch, from `place` on.

        Between reports the host never waits for the device: losses stay there.

        Args:
            batches: iterable of (uint8 [batch, H, W, 3], labels [batch]).
            epoch: number of this epoch.

        Returns:
            The mean loss over the epoch's batches and all ranks.

        Raises:
            NonFiniteLoss: at a report, on every rank.
            stop.Stopped: the run was asked to end, and all ranks have done the same steps.
        """
        self.model.train()
        done, title = self.place.batch, f"epoch {epoch}/{self.config.TRAIN.NUM_EPOCHS}"
        bar = progress_bar(batches, self.batches, title, shown=self.run.rank == 0, done=done)
        losses, recent = MeanMeter(self.place.loss, done), MeanMeter()
        images_seen, start = 0, time.perf_counter()
        for batch, (images, labels) in enumerate(bar, done):
            loss = self.train_batch(images, labels, epoch, batch)
            stop.request.show_life()
            recent.add(loss)
            losses.add(loss)
            images_seen += len(labels)
            if (batch + 1) % self.config.REPORT_FREQ == 0 or batch + 1 == self.batches:
                mean_loss = recent.read()
                if not np.isfinite(mean_loss):
                    raise NonFiniteLoss(
                        f"the loss is {mean_loss} in epoch {epoch}, at batch {batch + 1} or one "
                        f"of the {recent.count - 1} before it"
                    )
                speed = self.run.world_size * images_seen / (time.perf_counter() - start)
                self._report(epoch, batch + 1, mean_loss, speed, bar)
                stop.request.share()
                recent, images_seen, start = MeanMeter(), 0, time.perf_counter()
            if self._ends_step(batch):
                self._save_or_stop(epoch, batch + 1, losses)
        return losses.read()

    def train_batch(self, images, labels, epoch, batch):
        """Forward and backward of one batch; after the last of its group, an optimizer step.

        Args:
            images: uint8 Tensor [batch, H, W, 3].
            labels: int64 Tensor [batch].
            epoch, batch: the place, from 1 and from 0; what is drawn is a function of it.

        Returns:
            The batch's mean loss, a Tensor on the device.
        """
        first_of_group = batch - batch % self.accum_iter
        group_size = min(self.accum_iter, self.batches - first_of_group)
        ends_step = self._ends_step(batch)
        rng = np.random.default_rng([BATCH_STREAM, self.config.SEED, epoch, batch, self.run.rank])
        paddle.seed(int(rng.integers(2**31)))  # dropout, drop path and erasing draw on the device
        images, targets = self.batch_transform(images, labels, rng)
        # Ranks exchange gradients once a step, not once a batch.
        synchronize = contextlib.nullcontext if ends_step else self.no_sync
        with synchronize():
            with self.run.autocast():
                logits = self.model(images)
            # Not reduction="mean": Paddle 2.6 looks there for labels to ignore, and the host waits.
            losses = F.cross_entropy(
                logits.astype(targets.dtype), targets, soft_label=True, reduction="none"
            )
            loss = losses.mean()
            self.updater.scale(loss / group_size).backward()
        if ends_step:
            self.updater.update()
        return loss

    def _ends_step(self, batch):
        return (batch + 1) % self.accum_iter == 0 or batch + 1 == self.batches

    def _report(self, epoch, done, loss, images_per_second, bar):
        """Shows and logs how far training is."""
        rate = self.optimizer.get_lr()
        speed = f"{images_per_second:.1f} images/s"
        pace, until = self.pace.report((epoch - 1) * self.batches + done)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {speed}{until}")
        self.run.log.debug(
            f"epoch {epoch}/{self.config.TRAIN.NUM_EPOCHS} batch {done}/{self.batches}: "
            f"loss {loss:.4f}, lr {rate:.3e}, {speed}"
        )
        self.run.metrics.write(
            kind="train",
            epoch=epoch,
            batch=done,
            step=self.updater.step,
            loss=loss,
            lr=rate,
            images_per_second=round(images_per_second, 2),
            **pace,
        )

    # --- checkpoints ---

    def _save_or_stop(self, epoch, batch, losses):
        """After an optimizer step: saves, or ends the run, where it is time to."""
        # Steps that loss scaling skipped count too: the same count on every rank and in every run.
        steps = (epoch - 1) * self.steps_per_epoch + -(-batch // self.accum_iter)
        due_to_stop = stop.request.is_due_after(steps)
        frequency = self.config.SAVE_FREQ_STEPS
        due_to_save = frequency > 0 and steps % frequency == 0
        if due_to_stop or due_to_save or batch == self.batches:
            loss = losses.read()
            if not np.isfinite(loss):
                raise NonFiniteLoss(f"the loss is {loss} in epoch {epoch}, up to batch {batch}")
            self.place = Place(epoch - 1, batch, loss)
        if due_to_save:
            self._save()
        if due_to_stop:
            raise stop.Stopped

    def _save(self, keep=False, best=False):
        """Writes a checkpoint (see state.save); every rank has to call it."""
        state.save(self, keep, best)
        stop.barrier()

    def _save_as_asked(self):
        """Saves where all ranks have done the same steps.  Returns the exit status."""
        if self.saved_place != self.place or os.path.dirname(self.saved) != self.run.folder:
            state.save(self)
        place, command = state.describe_place(self), how_to_go_on(self.run.folder)
        self.run.log.info(f"stopped as asked after {place}; {command}")
        return 128 + (stop.request.signal_number or signal.SIGTERM)
