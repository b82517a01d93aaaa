"""What changes the weights: the optimizer, the learning rate of a step, one update, the EMA."""

import contextlib
import functools
import math
from typing import NamedTuple

import paddle


def decayed_parameters(model):
    """The names (`param.name`) of the parameters that weight decay applies to.

    Biases and LayerNorm's weights are left out: everything with one axis.  Paddle's AdamW asks by
    `param.name` ("linear_0.w_0"), not by the structured name ("head.weight").
    """
    return {param.name for param in model.parameters() if param.ndim > 1}


# By TRAIN.LR_SCHEDULE: the share of BASE_LR - END_LR that is left (1 to 0), as a function of the
# share of the steps after warm-up that are done (0 to 1).
SCHEDULES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


class LearningRate:
    """The learning rate as a function of the number of optimizer steps done.

    Linear from `start` at step 0 to `base` at step `warmup`, then down to `end` at step `total` as
    TRAIN.LR_SCHEDULE says.  A function of the step alone, where Paddle's CosineAnnealingDecay goes
    from one value to the next and adds up rounding: resuming needs no more than the step.

    Args:
        train: the TRAIN node of a config.
        images_per_step: images of one optimizer step: batch x accumulated batches x ranks.
        steps_per_epoch: optimizer steps.
    """

    def __init__(self, train, images_per_step, steps_per_epoch):
        scale = images_per_step / train.LINEAR_SCALED_LR if train.LINEAR_SCALED_LR else 1.0
        self.start, self.base = train.WARMUP_START_LR * scale, train.BASE_LR * scale
        self.end = train.END_LR * scale
        self.warmup = train.WARMUP_STEPS
        if self.warmup is None:
            self.warmup = round(train.WARMUP_EPOCHS * steps_per_epoch)
        self.total = train.NUM_EPOCHS * steps_per_epoch
        self.name = train.LR_SCHEDULE

    def __call__(self, step):
        if step < self.warmup:
            return self.start + (self.base - self.start) * step / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.end + (self.base - self.end) * SCHEDULES[self.name](progress)

    def __str__(self):
        return (
            f"learning rate {self.start:g} to {self.base:g} in {self.warmup} steps, "
            f"then to {self.end:g} ({self.name})"
        )


def build_schedule(learning_rate):
    """Paddle's scheduler for a function of the number of optimizer steps done."""
    # LambdaDecay multiplies its base rate by the function, which gives the rate itself here.
    return paddle.optimizer.lr.LambdaDecay(1.0, learning_rate)


def layer_scales(model, decay):
    """What each parameter's learning rate is multiplied by under layer-wise decay.

    As in BEiT and MAE: 1 for the head and the norm before it, `decay` for the last block, and once
    more `decay` for each block below and for the patch embedding.

    Returns:
        Parameter names to numbers.
    """
    depth = model.sizes.depth

    def layer(name):
        first, second = name.split(".")[:2]
        if first == model.blocks_name:
            return 1 + int(second)
        return 0 if name.startswith(f"{model.stem_name}.") else depth + 1

    return {name: decay ** (depth + 1 - layer(name)) for name, _ in model.named_parameters()}


def _adamw(train, decayed, **common):
    return paddle.optimizer.AdamW(
        beta1=train.OPTIMIZER.BETAS[0],
        beta2=train.OPTIMIZER.BETAS[1],
        epsilon=train.OPTIMIZER.EPS,
        weight_decay=train.WEIGHT_DECAY,
        apply_decay_param_fun=lambda name: name in decayed,
        **common,
    )


# By TRAIN.OPTIMIZER.NAME: functions of (the TRAIN node, decayed_parameters' names, and what every
# optimizer of Paddle's takes: learning_rate, parameters, grad_clip).
OPTIMIZERS = {"AdamW": _adamw}


def build_optimizer(config, model, learning_rate):
    """TRAIN.OPTIMIZER, with clipping by the global norm.

    Args:
        config: its TRAIN is read.
        model: the parameters; biases and norms are not decayed.  With LAYER_DECAY each gets its
            share of the learning rate as an attribute.
        learning_rate: a number, or a scheduler of Paddle's.
    """
    train = config.TRAIN
    if train.LAYER_DECAY:
        # AdamW's own lr_ratio is refused on CPU, and parameter groups are clipped each by itself.
        scales = layer_scales(model, train.LAYER_DECAY)
        for name, param in model.named_parameters():
            param.optimize_attr["learning_rate"] = scales[name]
    return OPTIMIZERS[train.OPTIMIZER.NAME](
        train,
        decayed_parameters(model),
        learning_rate=learning_rate,
        parameters=model.parameters(),
        grad_clip=paddle.nn.ClipGradByGlobalNorm(train.GRAD_CLIP) if train.GRAD_CLIP else None,
    )


class Amp(NamedTuple):
    """Mixed precision: its type, "float16" or "bfloat16", and whether LayerNorm gives that too."""

    dtype: str  # of matrix products and convolutions
    layer_norm: bool = False  # otherwise float32


def build_autocast(amp):
    """A function that makes the context in which a model runs: an Amp, or None for none."""
    if not amp:
        return contextlib.nullcontext
    # Paddle has LayerNorm on its list of what computes in float32.  Taken off it, the kernel still
    # sums in float32, and keeps weight and bias so (paddle/fluid/eager/amp_auto_cast.h: of its
    # inputs x alone is cast): a quarter less memory traffic in a step.
    options = {"custom_white_list": {"layer_norm"}} if amp.layer_norm else {}
    return functools.partial(paddle.amp.auto_cast, level="O1", dtype=amp.dtype, **options)


def build_scaler(amp):
    """Loss scaling for float16; for bfloat16, or None, a scaler that does nothing."""
    scales = bool(amp) and amp.dtype == "float16"
    return paddle.amp.GradScaler(enable=scales, init_loss_scaling=2.0**16)


_NAME_IN_2_6 = "_cache_founf_inf"


class Updater:
    """One optimizer step from accumulated gradients, and what has to move with it.

    Attributes:
        step: optimizer steps done; a step that loss scaling skipped does not count.
    """

    def __init__(self, optimizer, schedule, scaler, ema):
        self.optimizer, self.schedule = optimizer, schedule
        self.scaler, self.ema = scaler, ema
        self.step = 0

    def scale(self, loss):
        return self.scaler.scale(loss)

    def update(self):
        """Unscales, clips (inside the optimizer) and applies the gradients, then clears them.

        A step whose float16 gradients overflowed changes no weight; then the EMA, the learning
        rate and the step counter stay too.
        """
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.clear_grad()
        if not self._was_skipped():
            self.ema.update()
            self.move_to(self.step + 1)

    def _was_skipped(self):
        """Whether the scaler has skipped the step, which it has no public way to ask.

        For float16 it reads one flag on the host in step() and keeps it; reading the flag's tensor
        would wait for the device a second time.
        """
        if not self.scaler.is_enable():
            return False
        name = "_cache_found_inf" if hasattr(self.scaler, "_cache_found_inf") else _NAME_IN_2_6
        return bool(getattr(self.scaler, name))

    def move_to(self, step):
        """Sets the number of steps done, and with it the learning rate."""
        self.step = step
        self.schedule.step(step)


class EMA:
    """Exponential moving average of a model's parameters.

    Attributes:
        average: a model of the same shape that holds the average, for validation.
        name: what the average is called in logs.

    Args:
        model: the model that trains.
        average: a second model of the same build; its parameters are overwritten.
        decay: share of the old average that an update keeps.
        on_cpu: keep the average in host memory.
    """

    name = "ema"

    def __init__(self, model, average, decay, on_cpu=False):
        self.model, self.average, self.decay = model, average, decay
        self.place = "cpu" if on_cpu else paddle.get_device()
        average.set_state_dict(model.state_dict())
        average.to(device=self.place)
        # As a Tensor beside the average: a number would be copied to the GPU at every call.
        self.weight = paddle.to_tensor(
            1.0 - decay, paddle.get_default_dtype(), place=average.parameters()[0].place
        )
        average.eval()
        for param in average.parameters():
            param.stop_gradient = True

    @paddle.no_grad()
    def update(self):
        for mean, param in zip(self.average.parameters(), self.model.parameters()):
            if str(mean.place) != str(param.place):  # two Places of one device can be unequal
                param = param.to(self.place)
            mean.lerp_(param, self.weight)

    @contextlib.contextmanager
    def on_device(self):
        """The average on the device that computes, for as long as the context lasts."""
        self.average.to(device=paddle.get_device())
        try:
            yield self.average
        finally:
            self.average.to(device=self.place)


class NoEMA:
    """Without an EMA: the average is the model itself."""

    name = "model"

    def __init__(self, model):
        self.average = model

    def update(self):
        pass
