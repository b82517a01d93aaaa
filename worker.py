"""One rank of a run: builds the parts from the config and runs the loops."""

import os
import time

import paddle

import checkpoint
import engine
import optim
import pdparams
import utils
from checkpoint import WeightsError
from config import ConfigError
from datasets import DataError, EvalSampler, build_dataset, build_loader
from gmlp import build_gmlp
from launch import default_workers, local_ranks
from transforms import build_batch_transform

# What a user can set right by other arguments, and what only shows while running.
SETUP_ERRORS = (ConfigError, DataError, WeightsError, OSError)
RUN_ERRORS = (DataError, WeightsError, engine.NonFiniteLoss, OSError)


class Worker:
    """The parts of a run that training and evaluation share.

    Attributes:
        config: the merged config.
        rank, world_size: this process among all.
        folder: where this run's files go.
        start: the checkpoint's tree that the run goes on from, or None.
    """

    def __init__(self, config):
        """Builds everything up to the first batch.

        Args:
            config: the merged config; it is not changed.

        Raises:
            ConfigError, DataError, WeightsError: what the user asked for cannot be had.
        """
        self.config = config
        self.rank, self.world_size = utils.init_distributed()
        self.warnings = []  # for the log, once there is one
        paddle.seed(config.SEED)
        self.model = build_model(config)
        self.val_data = build_dataset(config, train=False)
        self.train_data = None if config.EVAL else build_dataset(config, train=True)
        self.start, self.start_path = self._load_start()
        self._load_pretrained()
        self.folder = self._make_folder()
        self.log = utils.setup_logging(self.folder, self.rank)
        self.metrics = utils.MetricsFile(self.folder, self.rank)
        self.autocast = optim.build_autocast(self.amp, config.AMP_DTYPE)
        if config.AMP and not self.amp:
            device = f"GPU without {config.AMP_DTYPE}" if self.on_gpu else "CPU, without AMP"
            self.warnings.append(f"-amp: this is a {device}: running float32")
        self._log_start()

    def _load_start(self):
        """(checkpoint, path) to go on from, its weights in the model; or (None, None)."""
        resume = self.config.MODEL.RESUME
        if not resume:
            return None, None
        if self.config.EVAL:
            raise ConfigError("-eval goes with -pretrained FILE, not with -resume")
        path = self._find_newest() if resume == "auto" else resume
        if path is None:
            self.warnings.append(
                f"-resume auto: no checkpoint of {self.config.MODEL.NAME} under "
                f"{self.config.SAVE}, starting fresh"
            )
            return None, None
        state = checkpoint.read(path, require_checksum=resume == "auto")
        checkpoint.assign_weights(self.model, state["model"], path)
        return state, path

    def _find_newest(self):
        """The newest valid checkpoint of this model, or None; rank 0 searches, so all agree."""
        found = None
        for path in checkpoint.candidates(self.config.SAVE) if self.rank == 0 else ():
            try:
                state = checkpoint.read(path, require_checksum=True)
                checkpoint.check_weights(self.model, state["model"], path)
            except WeightsError as error:
                self.warnings.append(f"-resume auto: passed over {error}")
                continue
            if state.get("run", {}).get("model_name") == self.config.MODEL.NAME:
                found = path
                break
        utils.meet()  # reading large files may have taken rank 0 long
        return utils.broadcast_object(found)

    def _load_pretrained(self):
        path = self.config.MODEL.PRETRAINED
        if self.config.EVAL and not path:
            raise ConfigError("-eval needs -pretrained FILE: there are no weights to evaluate")
        if not path or self.start:
            return
        weights = checkpoint.load_weights(path)
        if checkpoint.assign_weights(self.model, weights, path, not self.config.EVAL):
            self.warnings.append(
                f"the head in {path} has another number of classes than MODEL.NUM_CLASSES "
                f"{self.config.MODEL.NUM_CLASSES}: the head starts anew"
            )

    def _make_folder(self):
        """The run's folder, which rank 0 names for all; a resumed run goes on in its own."""
        if self.start_path and self.config.MODEL.RESUME == "auto":
            return os.path.dirname(self.start_path)
        kind = "eval" if self.config.EVAL else "train"
        folder = None
        if self.rank == 0:
            folder = _new_folder(self.config.SAVE, f"{kind}-{time.strftime('%Y%m%d-%H-%M-%S')}")
            with open(os.path.join(folder, "config.yaml"), "w") as file:
                file.write(self.config.dump())
        folder = utils.broadcast_object(folder)
        os.makedirs(folder, exist_ok=True)  # on another host
        return folder

    @property
    def amp(self):
        """Whether the model runs in mixed precision: asked for, and the device can."""
        supported = {
            "float16": paddle.amp.is_float16_supported,
            "bfloat16": paddle.amp.is_bfloat16_supported,
        }
        return self.config.AMP and self.on_gpu and supported[self.config.AMP_DTYPE]()

    @property
    def on_gpu(self):
        return paddle.get_device().startswith("gpu")

    def _log_start(self):
        parameters = sum(int(param.size) for param in self.model.parameters())
        for line in utils.describe_machine(self.world_size):
            self.log.info(line)
        self.log.info(f"{self.config.MODEL.NAME}: {parameters:,} parameters")
        self.log.info(f"config:\n{self.config.dump().rstrip()}")
        if self.config.MODEL.PRETRAINED and not self.start:
            self.log.info(f"weights from {self.config.MODEL.PRETRAINED}")
        for warning in self.warnings:
            self.log.warning(warning)

    def validate(self, model, title):
        """Evaluates a model on the whole validation list; see engine.validate."""
        batch_size = self.config.DATA.BATCH_SIZE_EVAL or self.config.DATA.BATCH_SIZE
        sampler = EvalSampler(len(self.val_data), batch_size, self.rank, self.world_size)
        loader = self.loader(self.val_data, sampler)
        batches = utils.progress_bar(loader, len(sampler), title, self.rank)
        transform = build_batch_transform(self.config, train=False)
        return engine.validate(model, batches, transform, self.autocast)

    def loader(self, dataset, sampler):
        workers = self.config.DATA.NUM_WORKERS
        if workers < 0:
            workers = default_workers(self.on_gpu)
        return build_loader(dataset, sampler, workers, local_ranks())


def evaluate(worker):
    """The `-eval` program: logs the accuracy and writes `eval.json`."""
    start = time.perf_counter()
    scores = worker.validate(worker.model, "eval")
    seconds = time.perf_counter() - start
    path = worker.config.MODEL.PRETRAINED
    result = {
        **scores,
        "seconds": round(seconds, 3),
        "images_per_second": round(scores["images"] / seconds, 2),
        "weights": path,
        "weights_sha256": pdparams.sha256(path) if path else None,
    }
    worker.log.info(describe_scores(scores))
    worker.metrics.write(kind="eval", **result)
    if worker.rank == 0:
        with open(os.path.join(worker.folder, "eval.json"), "w") as file:
            file.write(utils.to_json(result, indent=2) + "\n")
    worker.log.info(f"outputs in {worker.folder}")


def build_model(config):
    try:
        return build_gmlp(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _new_folder(parent, name):
    """Makes `parent/name`, with a number behind it where another run has taken the name."""
    for number in range(1000):
        folder = os.path.join(parent, f"{name}-{number}" if number else name)
        try:
            os.makedirs(folder)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot make the output folder {folder}: {error.strerror}") from None
        return folder
    raise ConfigError(f"{parent} has a thousand runs named {name}")


def describe_scores(scores):
    return (
        f"Acc@1 {scores['acc1']:.2f} Acc@5 {scores['acc5']:.2f} loss {scores['loss']:.4f} "
        f"on {scores['images']} images"
    )
