"""A run on one rank: the parts of training and evaluation, before the first batch.

Model, data, start, folder, log: everything that can be refused is refused here.
"""

import functools
import os
import platform
import shutil
import subprocess
import time

import numpy as np
import paddle
import PIL

from config import ConfigError, changed
from datasets import build_dataset
from gmlp import build_gmlp, can_recompute
from ranks.collective import all_reduce_max, broadcast_object, init_distributed
from ranks.host import choose_workers, keep_freed_memory, local_ranks, threads
from ranks.loader import build_loader
from ranks.report import report_folder
from ranks.watchdog import watchdog
from training import optim, resume
from training.real import RealLabels
from training.whose import whose
from utils import (
    DataError,
    MetricsFile,
    cause,
    lock,
    new_file,
    read_names,
    remove_temporary_files,
    replace_text,
    setup_logging,
    show,
    show_path,
)
from weights import WeightsError, load_into, pdparams
from weights.checkpoint import NotThisModel


class Run:
    """The parts of a run that training and evaluation share.

    Attributes:
        config: the merged config.
        rank, world_size: this process among all.
        on_gpu: whether the model runs on a GPU.
        model, train_data, val_data: what their names say; train_data is None in an evaluation.
        real: the RealLabels of val_data where DATA.REAL_LABELS names them, else None.
        start: the resume.Start that the run goes on from.
        weights_digest: the SHA-256 of the file of MODEL.PRETRAINED, where that was loaded.
        folder: where this run's files go.
        log, metrics: a logging.Logger, a MetricsFile.
        amp: the optim.Amp that was asked for and that the device can; None without.
        autocast: makes the context in which the model runs.
    """

    def __init__(self, config):
        """Builds everything up to the first batch.

        Args:
            config: the merged config; it is not changed.

        Raises:
            ConfigError, DataError, WeightsError: what the user asked for cannot be had.
        """
        self.config = config
        watchdog.start(config.HANG_MINUTES)
        self.rank, self.world_size = init_distributed()
        self.on_gpu = paddle.get_device().startswith("gpu")
        self._choose_algorithms()
        self.warnings = []  # for the log, once there is one
        self.amp = self._choose_amp()
        self.autocast = optim.build_autocast(self.amp)
        paddle.seed(config.SEED)
        self.model = build_model(config)
        try:
            self.val_data = build_dataset(config, train=False)
            self.train_data = None if config.EVAL else build_dataset(config, train=True)
            self.real = self._real_labels()
        except DataError:
            self._refuse_other_weights()  # labels that do not fit may only mean a wrong -cfg
            raise
        said = []
        self.start = resume.find_start(config, self.model, self.rank, said.append)
        self._load_pretrained()
        if config.EVAL or not config.TRAIN.RECOMPUTE:  # who recomputes has no memory to spare
            keep_freed_memory()
        self.folder = self._make_folder()
        self._claim_folder()
        report_folder(self.folder)
        if resume.is_outdated(self.rank, self.start):
            said.clear()
            self.start = resume.find_start(
                config, self.model, self.rank, said.append, folder=self.folder
            )
        self.warnings += said
        self.log = setup_logging(self.folder, self.rank)
        self.metrics = MetricsFile(self.folder, self.rank)
        self._log_start()
        watchdog.log_to(self.log)

    def _choose_algorithms(self):
        """Has cuDNN sum in an order that does not change; a CPU's Paddle does not know the flag.

        It is for the gradient of the patch embedding's weight: the rest of a step needs none.
        """
        if self.on_gpu and self.config.DETERMINISTIC:
            paddle.set_flags({"FLAGS_cudnn_deterministic": True})

    def _choose_amp(self):
        config, dtype = self.config, self.config.AMP_DTYPE
        if not config.AMP:
            return None
        if not self.on_gpu:
            self.warnings.append("-amp has no effect: a CPU has no AMP: running float32")
            return None
        supported = {
            "float16": paddle.amp.is_float16_supported,
            "bfloat16": paddle.amp.is_bfloat16_supported,
        }
        if paddle.__version__.startswith("2."):
            self.warnings.append(
                "-amp with Paddle 2.6 computes most of the model in float32: take Paddle 3 "
                "(docs/install.md)"
            )
        if dtype == "auto":  # in evaluation the same on all GPUs, as is then the accuracy
            has_bfloat16 = not config.EVAL and supported["bfloat16"]()
            dtype = "bfloat16" if has_bfloat16 else "float16"
        if not supported[dtype]():
            self.warnings.append(f"-amp has no effect: this GPU has no {dtype}: running float32")
            return None
        old_numpy = np.lib.NumpyVersion(np.__version__) < "2.4.0"
        if dtype == "float16" and not (config.EVAL or old_numpy):
            raise ConfigError(
                f"AMP_DTYPE float16 cannot run with NumPy {np.__version__}, where Paddle's loss "
                "scaling fails at the first overflow: pip install 'numpy<2.4', or take bfloat16 "
                "where the GPU has it"
            )
        return amp_of(config, dtype)

    def _real_labels(self):
        path = self.config.DATA.REAL_LABELS
        if not (path and self.config.EVAL):
            return None
        return RealLabels(path, self.val_data.images, self.config.MODEL.NUM_CLASSES)

    def _refuse_other_weights(self):
        """Raises NotThisModel where the weights that are asked for are another model's."""
        path = self.config.MODEL.PRETRAINED or self.config.MODEL.RESUME
        if path and path != "auto":
            try:
                load_into(self.model, path, allow_new_head=not self.config.EVAL)
            except WeightsError as error:
                if isinstance(error, NotThisModel):
                    raise

    def _load_pretrained(self):
        config, path = self.config, self.config.MODEL.PRETRAINED
        if config.EVAL and not path:
            raise ConfigError("-eval needs -pretrained FILE: there are no weights to evaluate")
        if self.start.path:
            return
        if path:
            self.warnings += self._load_same_file(path)
        elif config.TRAIN.FREEZE_BACKBONE:
            self.warnings.append(
                "TRAIN.FREEZE_BACKBONE without -pretrained: the frozen backbone has random weights"
            )

    def _load_same_file(self, path):
        """Loads weights, the same on all ranks, from a file that a training may replace meanwhile.

        Returns:
            load_into's sentences.

        Raises:
            WeightsError: the file is never the same twice, or not on all hosts.
        """
        for _ in range(10):
            before = pdparams.sha256(path) if os.path.isfile(path) else None  # load_into says so
            said = load_into(self.model, path, allow_new_head=not self.config.EVAL)
            self.weights_digest = broadcast_object(before)
            is_other = not before == pdparams.sha256(path) == self.weights_digest
            if not all_reduce_max(int(is_other)):
                return said
        raise WeightsError(
            f"{show_path(path)}: this file is replaced while it is read, or is another one on each "
            "host"
        )

    def _make_folder(self):
        """The run's folder, which rank 0 names for all; a resumed run goes on in its own."""
        if self.start.in_place:
            folder = os.path.dirname(self.start.path)
            os.makedirs(folder, exist_ok=True)  # on another host that does not share the disk
            return folder
        kind = "eval" if self.config.EVAL else "train"
        folder = None
        if self.rank == 0:
            folder = _new_folder(self.config.SAVE, f"{kind}-{time.strftime('%Y%m%d-%H-%M-%S')}")
        folder = broadcast_object(folder)
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
                f"{self.folder}: another run is writing there: wait until it ends, or give this "
                "run another -output"
            ) from None
        except OSError as error:
            self.warnings.append(
                f"{self.folder} cannot be locked ({error.strerror}): do not start a second run "
                "in it"
            )
        remove_temporary_files(self.folder)
        settings = self.config.clone()
        settings.defrost()
        settings.MODEL.RESUME = None  # the file evaluates what comes of the run, and repeats it
        settings.DATA.DATA_PATH = os.path.abspath(settings.DATA.DATA_PATH)  # from any folder
        replace_text(os.path.join(self.folder, "config.yaml"), settings.dump())
        self._copy_class_names()

    def _copy_class_names(self):
        """The data set's classes.txt, which from then on names the classes of this run's model."""
        path = os.path.join(self.config.DATA.DATA_PATH, "classes.txt")
        if not os.path.isfile(path):  # most data sets have none
            return
        try:
            count, classes = len(read_names(path)), self.config.MODEL.NUM_CLASSES
        except DataError as error:
            self.warnings.append(f"the classes have no names: {error}")
            return
        if count == classes:
            with new_file(os.path.join(self.folder, "classes.txt")) as temporary:
                shutil.copyfile(path, temporary)
        elif not self.config.EVAL:
            self.warnings.append(
                f"{show_path(path)} has {count:,} names, and the model {classes:,} classes: give "
                f"-num_classes {count}"
            )

    def _log_start(self):
        parameters = sum(int(param.size) for param in self.model.parameters())
        for line in describe_machine(self.world_size):
            self.log.info(line)
        if self.amp:
            norm = self.amp.dtype if self.amp.layer_norm else "float32"
            self.log.info(f"mixed precision in {self.amp.dtype}, LayerNorm in {norm}")
        self.log.info(f"{self.config.MODEL.NAME}: {parameters:,} parameters")
        settings = [f"{key} {show(value)}" for key, value in changed(self.config).items()]
        self.log.info(f"settings that differ from config.py: {', '.join(settings)}")
        self.log.info(f"config:\n{self.config.dump().rstrip()}", extra={"file_only": True})
        if self.config.MODEL.PRETRAINED and not self.start.path:
            self.log.info(f"weights from {self.config.MODEL.PRETRAINED}")
        for warning in dict.fromkeys(self.warnings):
            self.log.warning(warning)

    @functools.cached_property
    def list_digest(self):
        """What tells the training images and labels from others; see ImageSource.digest."""
        return self.train_data.images.digest(self.config.DATA.DATA_PATH)

    def loader(self, dataset, sampler):
        """The batches of a sampler; see ranks.loader.build_loader."""
        workers = choose_workers(self.config.DATA.NUM_WORKERS, self.on_gpu)
        return build_loader(dataset, sampler, workers, self.config.DATA.IMAGE_SIZE, local_ranks())


def amp_of(config, dtype):
    """The optim.Amp of a type, "float16" or "bfloat16", as AMP_LAYER_NORM says."""
    by_type = {"auto": dtype == "bfloat16", "amp": True, "float32": False}
    return optim.Amp(dtype, by_type[config.AMP_LAYER_NORM])


def build_model(config):
    """The config's model; under TRAIN.FREEZE_BACKBONE its head alone trains, without dropout."""
    try:
        model = build_gmlp(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model.recompute = config.TRAIN.RECOMPUTE
    model.whose = whose  # for weights that do not fit
    if model.recompute and not can_recompute():
        raise ConfigError(
            f"TRAIN.RECOMPUTE: Paddle {paddle.__version__} cannot do that on a CPU: take Paddle 3"
        )
    if config.TRAIN.FREEZE_BACKBONE:
        model.freeze_backbone()
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


def describe_machine(world_size):
    """Lines about versions, device, ranks and threads for the start of a log."""
    device = paddle.get_device()
    if device.startswith("gpu"):
        device += f" ({paddle.device.cuda.get_device_name()})"

    return [
        f"python {platform.python_version()}, paddle {paddle.__version__}, "
        f"numpy {np.__version__}, pillow {PIL.__version__}, {platform.platform()}",
        f"device {device}, {world_size} rank(s), {threads()} thread(s) per rank",
        f"git revision {git_revision()}",
    ]


def git_revision():
    """The commit of this source tree, with "+" where files differ from it, or why there is none."""
    folder = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    # A clone that belongs to somebody else is read too: its code is what runs here.
    git = ["git", "-c", f"safe.directory={folder}", "--no-optional-locks", "-C", folder]
    # A git hook, for one, has variables that name another repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def output(*words):
        command = [*git, *words]
        done = subprocess.run(command, capture_output=True, check=True, env=env)
        return os.fsdecode(done.stdout)  # the path of a clone may be no UTF-8

    try:
        # Not the revision of some other repository that this folder happens to lie in.
        top = output("rev-parse", "--show-toplevel").strip()
        if os.path.realpath(top) != folder:
            return "unknown (not a git checkout)"
        differs = output("status", "--porcelain", "--untracked-files=no")
        return output("rev-parse", "HEAD").strip() + ("+" if differs else "")
    except subprocess.CalledProcessError as error:
        if not os.path.exists(os.path.join(folder, ".git")):
            return "unknown (not a git checkout)"
        return f"unknown ({' '.join(os.fsdecode(error.stderr).split()[:40])})"
    except OSError as error:
        return f"unknown (git cannot be run: {cause(error)})"
