"""The training program of one rank: the parts that only training has, and the epochs."""

import contextlib
import os
import signal
import time
from typing import NamedTuple

import numpy as np
import paddle

import utils
from config import ConfigError
from datasets import DataError, TrainSampler, batches_per_epoch
from ranks import stop
from ranks.host import busy
from training import engine, optim
from training.run import build_model, describe_scores
from transforms import build_batch_transform
from weights import checkpoint, pdparams


class _Place(NamedTuple):
    """How far training is: `epoch` epochs, and `batch` batches of the next with a mean loss."""

    epoch: int
    batch: int = 0
    loss: float = 0.0


class Trainer:
    """What a training run holds beside the parts of every run."""

    def __init__(self, run):
        self.run, self.config = run, run.config
        data, train = self.config.DATA, self.config.TRAIN
        self.batches = batches_per_epoch(len(run.train_data), data.BATCH_SIZE, run.world_size)
        if self.batches == 0:
            raise DataError(
                f"{run.train_data.images.path} has {len(run.train_data)} images, fewer than "
                f"one batch of {data.BATCH_SIZE} for each of {run.world_size} rank(s): "
                "take a smaller -batch_size"
            )
        # A step sees no more batches than an epoch has.
        self.accum_iter = min(train.ACCUM_ITER, self.batches)
        self.steps_per_epoch = -(-self.batches // self.accum_iter)
        images_per_step = data.BATCH_SIZE * self.accum_iter * run.world_size
        self.learning_rates = optim.scaled_learning_rates(train, images_per_step)
        learning_rate = optim.warmup_cosine(
            *self.learning_rates,
            warmup=optim.warmup_steps(train, self.steps_per_epoch),
            total=train.NUM_EPOCHS * self.steps_per_epoch,
        )
        schedule = optim.build_schedule(learning_rate)
        self.optimizer = optim.build_optimizer(self.config, run.model, schedule)
        self.scaler = self._build_scaler()
        self.ema = self._build_ema()
        self.updater = optim.Updater(self.optimizer, schedule, self.scaler, self.ema)
        self.best = {"acc1": -1.0, "epoch": 0}
        self.place = _Place(train.LAST_EPOCH)
        self.updater.move_to(train.LAST_EPOCH * self.steps_per_epoch)
        self.saved, self.saved_place = None, None  # the last checkpoint: its path, what it holds
        if run.start is not None:
            self._restore(run.start, run.start_path)
            run.start = None  # as large as the model and its optimizer state
        self.training = self._build_training()
        self._log_plan(images_per_step)

    def _build_scaler(self):
        scaler = optim.build_scaler(self.run.amp, self.config.AMP_DTYPE)
        if scaler.is_enable() and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            raise ConfigError(
                f"AMP_DTYPE float16 cannot run with NumPy {np.__version__}, where Paddle's loss "
                "scaling fails at the first overflow: pip install 'numpy<2.4', or take bfloat16"
            )
        return scaler

    def _build_ema(self):
        train = self.config.TRAIN
        if not train.MODEL_EMA:
            return optim.NoEMA(self.run.model)
        average = build_model(self.config)
        return optim.EMA(self.run.model, average, train.MODEL_EMA_DECAY, train.MODEL_EMA_FORCE_CPU)

    def _build_training(self):
        model, no_sync = self.run.model, contextlib.nullcontext
        if self.run.world_size > 1:
            model = paddle.DataParallel(model)
            no_sync = model.no_sync
        return engine.Training(
            model=model,
            updater=self.updater,
            batch_transform=build_batch_transform(self.config, train=True),
            autocast=self.run.autocast,
            no_sync=no_sync,
            accum_iter=self.accum_iter,
            seed=self.config.SEED,
            rank=self.run.rank,
            report_freq=self.config.REPORT_FREQ,
            report=self._report,
            after_step=self._after_step,
        )

    def _log_plan(self, images_per_step):
        train, log = self.config.TRAIN, self.run.log
        start, base, end = self.learning_rates
        total_steps = self.steps_per_epoch * train.NUM_EPOCHS
        log.info(
            f"{len(self.run.train_data):,} training and {len(self.run.val_data):,} "
            f"validation images; {images_per_step} images per step, {self.steps_per_epoch} steps "
            f"per epoch, {total_steps} steps in all"
        )
        log.info(
            f"learning rate {start:g} to {base:g} in "
            f"{optim.warmup_steps(train, self.steps_per_epoch)} steps, then to {end:g}"
        )
        if self.accum_iter < train.ACCUM_ITER:
            log.warning(f"TRAIN.ACCUM_ITER: an epoch has only {self.batches} batches, taking those")
        if optim.warmup_steps(train, self.steps_per_epoch) > total_steps:
            log.warning(
                f"warm-up is longer than the whole run of {total_steps} steps: the learning rate "
                "will not reach its peak (TRAIN.WARMUP_STEPS, TRAIN.WARMUP_EPOCHS)"
            )

    def train(self):
        """Trains the remaining epochs, with validation and checkpoints between them.

        Returns:
            The exit status: 0, or 128 + a signal's number where the run was asked to end and has
            saved the place where it is.

        Raises:
            NonFiniteLoss: going on would spoil the weights; nothing was saved since they were good.
        """
        try:
            with stop.request.finishing():
                try:
                    self._train_epochs()
                except stop.Stopped:
                    return self._save_and_part()
        except engine.NonFiniteLoss as error:
            raise engine.NonFiniteLoss(
                f"{error} (optimizer step {self.updater.step}, learning rate "
                f"{self.optimizer.get_lr():.3e}); last good checkpoint: {self.saved or 'none'}"
            ) from None
        return 0

    def _train_epochs(self):
        config, log = self.config, self.run.log
        epochs = config.TRAIN.NUM_EPOCHS
        if self.place.epoch >= epochs:
            log.info(f"all {epochs} epochs are done already: nothing to train")
        for epoch in range(self.place.epoch + 1, epochs + 1):
            start = time.perf_counter()
            loss = self._train_epoch(epoch)
            log.info(
                f"epoch {epoch}/{epochs}: loss {loss:.4f}, {time.perf_counter() - start:.1f} s"
            )
            self.run.metrics.write(kind="epoch", epoch=epoch, step=self.updater.step, loss=loss)
            is_last = epoch == epochs
            improved = False
            if epoch % config.VALIDATE_FREQ == 0 or is_last:
                improved = self._validate(epoch)
            self.place = _Place(epoch)
            self._save(keep=epoch % config.SAVE_FREQ == 0 or is_last, best=improved)
        if self.best["epoch"]:
            weights = self.ema.name
            log.info(
                f"best Acc@1 {self.best['acc1']:.2f} ({weights}) in epoch {self.best['epoch']}"
            )
        log.info(f"outputs in {self.run.folder}")

    def _train_epoch(self, epoch):
        run, done = self.run, self.place.batch
        sampler = TrainSampler(
            len(run.train_data),
            self.config.DATA.BATCH_SIZE,
            self.config.SEED,
            epoch,
            run.rank,
            run.world_size,
            done,
        )
        title = f"epoch {epoch}/{self.config.TRAIN.NUM_EPOCHS}"
        losses = utils.MeanMeter(self.place.loss, done)
        with contextlib.closing(run.loader(run.train_data, sampler)) as batches:
            self.bar = utils.progress_bar(batches, self.batches, title, run.rank, done)
            return engine.train_one_epoch(
                self.training, self.bar, epoch, self.batches, done, losses
            )

    def _after_step(self, epoch, batch, losses):
        """Saves and stops in the middle of an epoch, where it is time to."""
        # Of steps that loss scaling skipped too: the same count on every rank and in every run.
        steps = (epoch - 1) * self.steps_per_epoch + -(-batch // self.accum_iter)
        due_to_stop = stop.request.is_due_after(steps)
        frequency = self.config.SAVE_FREQ_STEPS
        due_to_save = frequency > 0 and steps % frequency == 0
        if due_to_stop or due_to_save or batch == self.batches:
            loss = losses.read()
            if not np.isfinite(loss):
                raise engine.NonFiniteLoss(f"the loss is {loss} in epoch {epoch}, by batch {batch}")
            self.place = _Place(epoch - 1, batch, loss)
        if due_to_save:
            self._save()
        if due_to_stop:
            raise stop.Stopped

    def _report(self, epoch, done, loss, images_per_second):
        rate = self.optimizer.get_lr()
        speed = images_per_second * self.run.world_size
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {speed:.1f} images/s")
        self.run.log.debug(
            f"epoch {epoch}/{self.config.TRAIN.NUM_EPOCHS} batch {done}/{self.batches}: "
            f"loss {loss:.4f}, lr {rate:.3e}, {speed:.1f} images/s"
        )
        self.run.metrics.write(
            kind="train",
            epoch=epoch,
            batch=done,
            step=self.updater.step,
            loss=loss,
            lr=rate,
            images_per_second=round(speed, 2),
        )
        stop.request.share()

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
        scores = self.run.validate(model, f"validate {weights}")
        self.run.log.info(f"epoch {epoch} {weights}: {describe_scores(scores)}")
        self.run.metrics.write(kind="eval", epoch=epoch, weights=weights, **scores)
        if not np.isfinite(scores["loss"]):
            raise engine.NonFiniteLoss(
                f"the validation loss is {scores['loss']} after epoch {epoch}: it is not saved"
            )
        return scores

    def _save(self, keep=False, best=False):
        """Writes a checkpoint of this place; every rank has to call it.

        Args:
            keep: under the name of the epoch too.
            best: as the best model too.
        """
        self._write(keep, best)
        stop.barrier()

    def _write(self, keep=False, best=False):
        """Rank 0 writes; the others know that it does, and go on."""
        self._check_weights()
        if self.run.rank == 0:
            with busy():  # a slow disk is no hang
                self._write_files(keep, best)
        path = os.path.join(self.run.folder, "last.pdparams")
        self.saved, self.saved_place = path, self.place

    def _check_weights(self):
        """Raises NonFiniteLoss where a weight is not finite, which the loss shows a step later."""
        finite = [paddle.isfinite(param).all() for param in self.run.model.parameters()]
        if not bool(paddle.stack(finite).all()):
            raise engine.NonFiniteLoss("a weight is not a finite number")

    def _write_files(self, keep, best):
        folder = self.run.folder
        names = ["best"] if best else []
        names += [f"Epoch-{self.place.epoch}"] if keep else []
        # The best model before the checkpoint that knows of its score.
        if best:
            path = os.path.join(folder, "best_weights.pdparams")
            pdparams.write(path, self.ema.average.state_dict())
        checkpoint.save(folder, self._state(), names, self.saved)
        names = ", ".join(f"{name}.pdparams" for name in ("last", *names))
        self.run.log.info(f"saved {names} ({self._describe_place()})")
        if keep and self.config.KEEP_LAST:
            for line in checkpoint.remove_old_epochs(folder, self.config.KEEP_LAST):
                self.run.log.info(line)

    def _describe_place(self):
        place = f"epoch {self.place.epoch}"
        if self.place.batch:
            place = f"epoch {self.place.epoch + 1}, batch {self.place.batch}/{self.batches}"
        return f"{place}, step {self.updater.step}"

    def _describe_next(self):
        epoch, batch, _ = self.place
        if batch == self.batches:
            return f"the end of epoch {epoch + 1}"
        return f"epoch {epoch + 1}" + (f", batch {batch + 1}/{self.batches}" if batch else "")

    def _save_and_part(self):
        """The end of a run that was asked to end, where all ranks have done the same steps."""
        if self.saved_place != self.place or os.path.dirname(self.saved) != self.run.folder:
            self._write()
        self.run.log.info(
            f"stopped as asked after {self._describe_place()}; to go on: the same command with "
            f"-resume auto, or with -resume {self.saved}"
        )
        stop.leave_together()
        return 128 + (stop.request.signal_number or signal.SIGTERM)

    def _run_facts(self):
        """What has to be the same for a resumed run to be the same bit for bit."""
        return {
            "model_name": self.config.MODEL.NAME,
            "images": len(self.run.train_data),
            "ranks": self.run.world_size,
            "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
            "batch_size": self.config.DATA.BATCH_SIZE,
            "accum_iter": self.accum_iter,
            "seed": self.config.SEED,
        }

    def _state(self):
        """Everything that going on from this place needs; PaddleViT's keys come first."""
        state = {
            "model": self.run.model.state_dict(),
            "optimizer": checkpoint.optimizer_state(self.optimizer, self.run.model),
            "epoch": self.place.epoch,
            "lr_scheduler": {"last_epoch": self.updater.step, "last_lr": self.optimizer.get_lr()},
            "amp_grad_scaler": self.scaler.state_dict(),
            "step": self.updater.step,
            "batch": self.place.batch,
            "loss": self.place.loss,
            "best": self.best,
            "run": self._run_facts(),
        }
        if self.config.TRAIN.MODEL_EMA:
            state["model_ema"] = self.ema.average.state_dict()
        return state

    def _restore(self, state, path):
        """Goes on from a checkpoint; what it lacks (as PaddleViT's do) is said and starts fresh."""
        log = self.run.log
        if "epoch" in state:
            self._move_to_place_of(state, path)
            if os.path.dirname(path) == self.run.folder:  # where the best model's files are
                self.best = {**self.best, **state.get("best", {})}
        else:
            log.warning(f"{path} has no epoch: starting at {self.place.epoch + 1} with its weights")
        if not checkpoint.restore_optimizer(self.optimizer, self.run.model, state.get("optimizer")):
            log.warning(f"{path} has no optimizer state that can be matched: it starts fresh")
        if self.scaler.is_enable() and state.get("amp_grad_scaler"):
            self.scaler.load_state_dict(state["amp_grad_scaler"])
        if self.config.TRAIN.MODEL_EMA:
            if not state.get("model_ema"):
                log.warning(f"{path} has no averaged weights (EMA): they start from the model's")
            average = state.get("model_ema") or state["model"]
            checkpoint.assign_weights(self.ema.average, average, path)
        log.info(f"going on with {self._describe_next()} from {path}")
        self.saved, self.saved_place = path, self.place

    def _move_to_place_of(self, state, path):
        """Epoch, batch and step of a checkpoint; with other facts, the same place in the epoch."""
        facts, old = self._run_facts(), state.get("run", {})
        layout = ("images", "ranks", "batch_size", "accum_iter")
        batch = state.get("batch", 0)
        step = state.get("step", state["epoch"] * self.steps_per_epoch)
        if any(facts[key] != old.get(key) for key in layout):
            images = batch * old.get("batch_size", 0) * old.get("ranks", 0)
            batch = min(images // (facts["batch_size"] * facts["ranks"]), self.batches)
            if batch < self.batches:
                batch -= batch % self.accum_iter
            step = state["epoch"] * self.steps_per_epoch + -(-batch // self.accum_iter)
        self.place = _Place(state["epoch"], batch, state.get("loss", 0.0))
        self.updater.move_to(step)
        changes = [
            f"{key} {old[key]} (now {value})"
            for key, value in facts.items()
            if key in old and old[key] != value
        ]
        if changes or not old:
            made = "made with " + ", ".join(changes) if changes else "made by another program"
            self.run.log.warning(
                f"{path} was {made}: going on at the same place in the epoch, not bit for bit"
            )
