"""A run on one rank: the parts that training and evaluation share, and the evaluation program."""

import contextlib
import math
import os
import time

import paddle

import metrics
import utils
from compat import can_compile, can_recompute
from config import ConfigError
from datasets import EvalSampler, build_dataset, build_loader
from files import lock, remove_temporary_files, write_text
from gmlp import build_gmlp
from metrics import to_json
from ranks import stop
from ranks.host import default_workers, keep_freed_memory, local_ranks, report_folder
from training import engine, optim
from training.inference import CompiledModel
from transforms import build_batch_transform
from weights import checkpoint, pdparams
from weights.checkpoint import WeightsError
from weights.resample import resample_weights

_WORTH_COMPILING = 1000  # images per rank; making an S/16 takes what it saves on 200 of them


class Run:
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
        self._check_dashboard()
        paddle.seed(config.SEED)
        self.model = build_model(config)
        self.val_data = build_dataset(config, train=False)
        self.train_data = None if config.EVAL else build_dataset(config, train=True)
        self.start, self.start_path = self._load_start()
        self._load_pretrained()
        if config.EVAL or not config.TRAIN.RECOMPUTE:  # who recomputes has no memory to spare
            keep_freed_memory()
        self.folder = self._make_folder()
        report_folder(self.folder)
        self._claim_folder()
        if self._has_news():
            self.start, self.start_path = self._load_start()
        self.log = utils.setup_logging(self.folder, self.rank)
        self.metrics = metrics.MetricsFile(self.folder, self.rank)
        if self._has_dashboard:
            rows = self._rows_until_start()
            self.metrics.dashboard = metrics.VisualDL(self.folder, rows, self.log.warning)
        self.autocast = optim.build_autocast(self.amp, config.AMP_DTYPE)
        if config.AMP and not self.amp:
            device = f"GPU without {config.AMP_DTYPE}" if self.on_gpu else "CPU, without AMP"
            self.warnings.append(f"-amp: this is a {device}: running float32")
        self._log_start()

    @property
    def _has_dashboard(self):
        return self.config.VISUALDL and not self.config.EVAL and self.rank == 0

    def _check_dashboard(self):
        """Fails now, and not after minutes of loading, where the package is not there."""
        if self._has_dashboard:
            try:
                metrics.import_visualdl()
            except ImportError as error:
                raise ConfigError(
                    f"VISUALDL needs the package visualdl, which cannot be imported ({error}): "
                    "pip install visualdl==2.5.3, or leave VISUALDL False"
                ) from None

    def _rows_until_start(self):
        """What this folder's metrics.jsonl has from before the checkpoint that the run goes on."""
        try:
            rows = metrics.read_metrics(self.metrics.path)
        except FileNotFoundError:
            return []
        except ValueError as error:
            self.warnings.append(f"VISUALDL shows nothing from before this start: {error}")
            return []
        start = self.start or {}
        done = (start.get("epoch", 0), start.get("batch", 0), math.inf)
        return [row for row in rows if metrics.metrics_place(row) <= done]

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
        state = self._read_everywhere(path, require_checksum=resume == "auto")
        checkpoint.assign_weights(self.model, state["model"], path)
        return state, path

    def _read_everywhere(self, path, require_checksum):
        """A checkpoint on every rank: read by each, or sent by rank 0 to hosts without the file."""
        here = self.world_size > 1 and os.path.isfile(path) and pdparams.sha256(path)
        wanted = utils.broadcast_object(here)
        if not wanted:
            return self._read_checkpoint(path, require_checksum)
        if int(utils.all_reduce_sum(paddle.to_tensor(int(here == wanted)))) == self.world_size:
            return self._read_checkpoint(path, require_checksum)
        state = self._read_checkpoint(path, require_checksum) if self.rank == 0 else None
        self.warnings.append(
            f"{path} is not the same file on every host: rank 0 has sent its own to all ranks"
        )
        stop.barrier()  # reading a large file may have taken rank 0 long
        return utils.broadcast_object(state)

    def _read_checkpoint(self, path, require_checksum):
        """A checkpoint whose weights fit this model; nothing is changed before that is known."""
        state = checkpoint.read(path, require_checksum)
        for weights in filter(None, (state["model"], state.get("model_ema"))):
            checkpoint.check_weights(self.model, weights, path)
        return state

    def _find_newest(self):
        """The newest valid checkpoint of this model, or None; rank 0 searches, so all agree."""
        found = None
        self.seen = checkpoint.candidates(self.config.SAVE) if self.rank == 0 else {}
        for path in self.seen:
            try:
                state = checkpoint.read(path, require_checksum=True)
            except WeightsError as error:
                self.warnings.append(f"-resume auto: passed over {error}")
                continue
            if state.get("run", {}).get("model_name") == self.config.MODEL.NAME:
                found = path  # where its weights do not fit, it will be refused
                break
        stop.barrier()  # reading large files may have taken rank 0 long
        return utils.broadcast_object(found)

    def _has_news(self):
        """Whether the run that had the folder until now has saved once more since the search."""
        if self.config.MODEL.RESUME != "auto":
            return False
        news = self.rank == 0 and checkpoint.candidates(self.config.SAVE) != self.seen
        return utils.broadcast_object(news)

    def _load_pretrained(self):
        path = self.config.MODEL.PRETRAINED
        if self.config.EVAL and not path:
            raise ConfigError("-eval needs -pretrained FILE: there are no weights to evaluate")
        if not path or self.start:
            if self.config.TRAIN.FREEZE_BACKBONE and not self.start:
                self.warnings.append(
                    "TRAIN.FREEZE_BACKBONE without -pretrained: what is frozen is as initialized"
                )
            return
        tokens = self.model.patch_embed.num_tokens
        weights, side = resample_weights(checkpoint.load_weights(path), tokens, path)
        if side:
            new_side, pixels = math.isqrt(tokens), self.config.MODEL.MIXER.PATCH_SIZE
            self.warnings.append(
                f"{path} is for images of {side * pixels} pixels: its spatial projections are "
                f"resampled from {side} x {side} to {new_side} x {new_side} tokens "
                f"(DATA.IMAGE_SIZE {self.config.DATA.IMAGE_SIZE})"
            )
        if checkpoint.assign_weights(self.model, weights, path, not self.config.EVAL):
            self.warnings.append(
                f"the head in {path} has another number of classes than MODEL.NUM_CLASSES "
                f"{self.config.MODEL.NUM_CLASSES}: the head starts anew"
            )

    def _make_folder(self):
        """The run's folder, which rank 0 names for all; a resumed run goes on in its own."""
        if self.start_path and self.config.MODEL.RESUME == "auto":
            folder = os.path.dirname(self.start_path)
            os.makedirs(folder, exist_ok=True)  # on another host that does not share the disk
            return folder
        kind = "eval" if self.config.EVAL else "train"
        folder = None
        if self.rank == 0:
            folder = _new_folder(self.config.SAVE, f"{kind}-{time.strftime('%Y%m%d-%H-%M-%S')}")
        folder = utils.broadcast_object(folder)
        os.makedirs(folder, exist_ok=True)  # on another host
        return folder

    def _claim_folder(self):
        """Locks the run's folder for as long as this process lives, and tidies it."""
        if self.rank > 0:
            return
        try:
            self.lock = lock(os.path.join(self.folder, "log.txt"))
        except BlockingIOError:
            raise ConfigError(
                f"{self.folder}: another run is writing there: wait for its end, or give this one "
                "an -output of its own"
            ) from None
        except OSError as error:
            self.warnings.append(
                f"{self.folder} cannot be locked ({error.strerror}): start no second run there"
            )
        remove_temporary_files(self.folder)
        write_text(os.path.join(self.folder, "config.yaml"), self.config.dump())

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
        for warning in dict.fromkeys(self.warnings):
            self.log.warning(warning)

    def validate(self, model, title):
        """Evaluates a model on the whole validation list; see engine.validate."""
        batch_size = self.config.DATA.BATCH_SIZE_EVAL or self.config.DATA.BATCH_SIZE
        sampler = EvalSampler(len(self.val_data), batch_size, self.rank, self.world_size)
        transform = build_batch_transform(self.config, train=False)
        with contextlib.closing(self.loader(self.val_data, sampler)) as batches:
            bar = utils.progress_bar(batches, len(sampler), title, self.rank)
            return engine.validate(model, bar, transform, self.autocast)

    def compiled_model(self):
        """The model for an evaluation alone: on a CPU as CPU_INFERENCE says."""
        kind, images = self.config.CPU_INFERENCE, len(self.val_data) // self.world_size
        if self.on_gpu or kind == "layers" or (kind == "auto" and images <= _WORTH_COMPILING):
            return self.model
        if not can_compile():
            if kind != "auto":
                self.log.warning(f"CPU_INFERENCE {kind} needs Paddle 3: the layers compute it")
            return self.model
        dtype = "bfloat16" if kind == "bfloat16" else "float32"
        if dtype == "bfloat16" and not paddle.base.core.supports_bfloat16():
            self.log.warning("CPU_INFERENCE bfloat16: this CPU has no such instructions: float32")
            dtype = "float32"
        self.log.info(f"Paddle Inference computes it in {dtype} (CPU_INFERENCE {kind})")
        size = self.config.DATA.IMAGE_SIZE
        return CompiledModel(self.model, [self.config.DATA.IMAGE_CHANNELS, size, size], dtype)

    def loader(self, dataset, sampler):
        workers = self.config.DATA.NUM_WORKERS
        if workers < 0:
            workers = default_workers(self.on_gpu)
        return build_loader(dataset, sampler, workers, local_ranks())


def evaluate(run):
    """The `-eval` program: logs the accuracy, writes `eval.json`.  Returns the exit status, 0."""
    model = run.compiled_model()
    start = time.perf_counter()
    scores = run.validate(model, "eval")
    seconds = time.perf_counter() - start
    path = run.config.MODEL.PRETRAINED
    result = {
        **scores,
        "seconds": round(seconds, 3),
        "images_per_second": round(scores["images"] / seconds, 2),
        "weights": path,
        "weights_sha256": pdparams.sha256(path) if path else None,
    }
    run.log.info(describe_scores(scores))
    run.metrics.write(kind="eval", **result)
    if run.rank == 0:
        text = to_json(result, indent=2) + "\n"
        write_text(os.path.join(run.folder, "eval.json"), text)
    run.log.info(f"outputs in {run.folder}")
    return 0


def build_model(config):
    """The config's model; under TRAIN.FREEZE_BACKBONE its head alone trains, without dropout."""
    frozen = config.TRAIN.FREEZE_BACKBONE
    if frozen:
        config = config.clone()
        config.defrost()
        config.MODEL.DROPOUT = config.MODEL.DROPPATH = 0.0
    try:
        model = build_gmlp(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model.recompute = config.TRAIN.RECOMPUTE
    if model.recompute and not can_recompute():
        raise ConfigError(
            f"TRAIN.RECOMPUTE: Paddle {paddle.__version__} cannot do that on a CPU: take Paddle 3"
        )
    for name, param in model.named_parameters():
        param.stop_gradient = frozen and not name.startswith("head.")
    return model


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
