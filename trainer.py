"""The training program of one rank: the parts that only training has, and the epochs."""

import contextlib
import os
import time

import numpy as np
import paddle

import checkpoint
import engine
import optim
import utils
from config import ConfigError
from datasets import DataError, TrainSampler, batches_per_epoch
from transforms import build_batch_transform
from worker import build_model, describe_scores


class Trainer:
    """What a training run holds beside the worker's parts."""

    def __init__(self, worker):
        self.worker, self.config = worker, worker.config
        data, train = self.config.DATA, self.config.TRAIN
        self.batches = batches_per_epoch(len(worker.train_data), data.BATCH_SIZE, worker.world_size)
        if self.batches == 0:
            raise DataError(
                f"{worker.train_data.images.path} has {len(worker.train_data)} images, fewer than "
                f"one batch of {data.BATCH_SIZE} for each of {worker.world_size} rank(s): "
                "take a smaller -batch_size"
            )
        # A step sees no more batches than an epoch has.
        self.accum_iter = min(train.ACCUM_ITER, self.batches)
        self.steps_per_epoch = -(-self.batches // self.accum_iter)
        images_per_step = data.BATCH_SIZE * self.accum_iter * worker.world_size
        self.learning_rates = optim.scaled_learning_rates(train, images_per_step)
        learning_rate = optim.warmup_cosine(
            *self.learning_rates,
            warmup=optim.warmup_steps(train, self.steps_per_epoch),
            total=train.NUM_EPOCHS * self.steps_per_epoch,
        )
        schedule = optim.build_schedule(learning_rate)
        self.optimizer = optim.build_optimizer(self.config, worker.model, schedule)
        self.scaler = self._build_scaler()
        self.ema = self._build_ema()
        self.updater = optim.Updater(self.optimizer, schedule, self.scaler, self.ema)
        self.best = {"acc1": -1.0, "epoch": 0}
        self.first_epoch = 1 + train.LAST_EPOCH
        self.updater.move_to(train.LAST_EPOCH * self.steps_per_epoch)
        if worker.start is not None:
            self._restore(worker.start, worker.start_path)
            worker.start = None  # as large as the model and its optimizer state
        self.training = self._build_training()
        self._log_plan(images_per_step)

    def _build_scaler(self):
        scaler = optim.build_scaler(self.worker.amp, self.config.AMP_DTYPE)
        if scaler.is_enable() and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            raise ConfigError(
                f"AMP_DTYPE float16 cannot run with NumPy {np.__version__}, where Paddle's loss "
                "scaling fails at the first overflow: pip install 'numpy<2.4', or take bfloat16"
            )
        return scaler

    def _build_ema(self):
        train = self.config.TRAIN
        if not train.MODEL_EMA:
            return optim.NoEMA(self.worker.model)
        average = build_model(self.config)
        return optim.EMA(
            self.worker.model, average, train.MODEL_EMA_DECAY, train.MODEL_EMA_FORCE_CPU
        )

    def _build_training(self):
        model, no_sync = self.worker.model, contextlib.nullcontext
        if self.worker.world_size > 1:
            model = paddle.DataParallel(model)
            no_sync = model.no_sync
        return engine.Training(
            model=model,
            updater=self.updater,
            batch_transform=build_batch_transform(self.config, train=True),
            autocast=self.worker.autocast,
            no_sync=no_sync,
            accum_iter=self.accum_iter,
            seed=self.config.SEED,
            rank=self.worker.rank,
            report_freq=self.config.REPORT_FREQ,
            report=self._report,
        )

    def _log_plan(self, images_per_step):
        train, log = self.config.TRAIN, self.worker.log
        start, base, end = self.learning_rates
        total_steps = self.steps_per_epoch * train.NUM_EPOCHS
        log.info(
            f"{len(self.worker.train_data):,} training and {len(self.worker.val_data):,} "
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

    def run(self):
        """Trains the remaining epochs, with validation and checkpoints between them."""
        config, log = self.config, self.worker.log
        epochs = config.TRAIN.NUM_EPOCHS
        if self.first_epoch > epochs:
            log.info(f"all {epochs} epochs are done already: nothing to train")
        for epoch in range(self.first_epoch, epochs + 1):
            start = time.perf_counter()
            loss = self._train_epoch(epoch)
            log.info(
                f"epoch {epoch}/{epochs}: loss {loss:.4f}, {time.perf_counter() - start:.1f} s"
            )
            self.worker.metrics.write(kind="epoch", epoch=epoch, step=self.updater.step, loss=loss)
            is_last = epoch == epochs
            improved = False
            if epoch % config.VALIDATE_FREQ == 0 or is_last:
                improved = self._validate(epoch)
            self._save(epoch, keep=epoch % config.SAVE_FREQ == 0 or is_last, best=improved)
        if self.best["epoch"]:
            weights = self.ema.name
            log.info(
                f"best Acc@1 {self.best['acc1']:.2f} ({weights}) in epoch {self.best['epoch']}"
            )
        log.info(f"outputs in {self.worker.folder}")

    def _train_epoch(self, epoch):
        worker = self.worker
        sampler = TrainSampler(
            len(worker.train_data),
            self.config.DATA.BATCH_SIZE,
            self.config.SEED,
            epoch,
            worker.rank,
            worker.world_size,
        )
        loader = worker.loader(worker.train_data, sampler)
        title = f"epoch {epoch}/{self.config.TRAIN.NUM_EPOCHS}"
        self.bar = utils.progress_bar(loader, self.batches, title, worker.rank)
        return engine.train_one_epoch(self.training, self.bar, epoch, self.batches)

    def _report(self, epoch, done, loss, images_per_second):
        rate = self.optimizer.get_lr()
        speed = images_per_second * self.worker.world_size
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {speed:.1f} images/s")
        self.worker.log.debug(
            f"epoch {epoch}/{self.config.TRAIN.NUM_EPOCHS} batch {done}/{self.batches}: "
            f"loss {loss:.4f}, lr {rate:.3e}, {speed:.1f} images/s"
        )
        self.worker.metrics.write(
            kind="train",
            epoch=epoch,
            batch=done,
            step=self.updater.step,
            loss=loss,
            lr=rate,
            images_per_second=round(speed, 2),
        )

    def _validate(self, epoch):
        """Validates the weights, and their average.  Returns whether the best score improved.

        With an EMA its score counts, as its weights are the ones to use.
        """
        scores = self._validate_one(self.worker.model, epoch, "model")
        if self.ema.average is not self.worker.model:
            with self.ema.on_device() as average:
                scores = self._validate_one(average, epoch, "ema")
        if scores["acc1"] <= self.best["acc1"]:
            return False
        self.best = {"acc1": scores["acc1"], "epoch": epoch}
        return True

    def _validate_one(self, model, epoch, weights):
        scores = self.worker.validate(model, f"validate {weights}")
        self.worker.log.info(f"epoch {epoch} {weights}: {describe_scores(scores)}")
        self.worker.metrics.write(kind="eval", epoch=epoch, weights=weights, **scores)
        if not np.isfinite(scores["loss"]):
            raise engine.NonFiniteLoss(
                f"the validation loss is {scores['loss']} after epoch {epoch}: it is not saved"
            )
        return scores

    def _save(self, epoch, keep, best):
        """Writes what is due after an epoch: rank 0 does it, the others wait."""
        if self.worker.rank == 0:
            self._write(epoch, keep, best)
        utils.meet()

    def _write(self, epoch, keep, best):
        folder = self.worker.folder
        # In this order: a kill in between must not leave a `last` that knows of a better score
        # than the files of the best model have.
        names = ["best.pdparams"] if best else []
        names += [f"Epoch-{epoch}.pdparams"] if keep else []
        names += ["last.pdparams"]
        if best:
            checkpoint.save(folder, ["best_weights.pdparams"], self.ema.average.state_dict())
        checkpoint.save(folder, names, self._state(epoch))
        self.worker.log.info(f"saved {', '.join(names)}")

    def _state(self, epoch):
        """Everything that going on after `epoch` needs; PaddleViT's keys come first."""
        state = {
            "model": self.worker.model.state_dict(),
            "optimizer": checkpoint.optimizer_state(self.optimizer, self.worker.model),
            "epoch": epoch,
            "lr_scheduler": {"last_epoch": self.updater.step, "last_lr": self.optimizer.get_lr()},
            "amp_grad_scaler": self.scaler.state_dict(),
            "step": self.updater.step,
            "best": self.best,
            "run": {
                "model_name": self.config.MODEL.NAME,
                "world_size": self.worker.world_size,
                "steps_per_epoch": self.steps_per_epoch,
            },
        }
        if self.config.TRAIN.MODEL_EMA:
            state["model_ema"] = self.ema.average.state_dict()
        return state

    def _restore(self, state, path):
        """Goes on from a checkpoint; what it lacks (as PaddleViT's do) is said and starts fresh."""
        log = self.worker.log
        if "epoch" in state:
            self.first_epoch = state["epoch"] + 1
            if state.get("run", {}).get("steps_per_epoch") == self.steps_per_epoch:
                self.updater.move_to(state.get("step", state["epoch"] * self.steps_per_epoch))
            else:
                self.updater.move_to(state["epoch"] * self.steps_per_epoch)
                log.warning(
                    f"{path} was made with other steps per epoch (batch, ranks or accumulation): "
                    "going on at the same epoch, not bit for bit"
                )
            if os.path.dirname(path) == self.worker.folder:  # where the best model's files are
                self.best = state.get("best") or self.best
        else:
            log.warning(f"{path} has no epoch: starting at {self.first_epoch} with its weights")
        if not checkpoint.restore_optimizer(
            self.optimizer, self.worker.model, state.get("optimizer")
        ):
            log.warning(f"{path} has no optimizer state that can be matched: it starts fresh")
        if self.scaler.is_enable() and state.get("amp_grad_scaler"):
            self.scaler.load_state_dict(state["amp_grad_scaler"])
        if self.config.TRAIN.MODEL_EMA:
            if not state.get("model_ema"):
                log.warning(f"{path} has no averaged weights (EMA): they start from the model's")
            average = state.get("model_ema") or state["model"]
            checkpoint.assign_weights(self.ema.average, average, path)
        log.info(f"going on with epoch {self.first_epoch} from {path}")
