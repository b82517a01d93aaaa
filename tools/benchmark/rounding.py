"""What the rounding of mixed precision does, simulated on a CPU: the subcommand `rounding`."""

import sys

import numpy as np
import paddle
from paddle.nn import functional as F

from tools import common
from config import get_config
from gmlp import build_gmlp
from tools.benchmark.mixed import simulated
from training.optim import Amp, build_optimizer

sys.path.append(str(common.ROOT / "tests"))
from golden import build, draw_images

DIGITS = common.ROOT / "demo" / "data" / "mnist_5k.csv.gz"
DIGITS_MODEL = common.ROOT / "configs" / "gmlp_digits.yaml"
LEARNING_RATE, LOSS_SCALE = 1e-3, 2.0**10  # fixed; the scale is float16's
AMPS = {
    f"{dtype}, LayerNorm in {dtype if norm else 'float32'}": Amp(dtype, norm)
    for dtype in ("bfloat16", "float16") for norm in (False, True)
}  # fmt: skip


def run(bench):
    steps, digits = bench.args.batches, read_digits()
    exact, losses = golden_logits(None), None
    results, cells = [], []
    for name, amp, seed in (
        ("float32", None, 0),
        *((name, amp, 0) for name, amp in AMPS.items()),
        ("float32, another seed", None, 1),
    ):
        error = np.linalg.norm(golden_logits(amp) - exact) / np.linalg.norm(exact)
        own, acc1 = train(digits, amp, steps, seed)
        losses = own if losses is None else losses
        difference, last = np.abs(own / losses - 1).mean(), own[-max(1, steps // 10) :].mean()
        results.append({"name": name, "error": float(error), "difference": float(difference)})
        results[-1].update(losses=own.tolist(), acc1=acc1)
        cells.append(
            {
                "": name,
                "error of logits": f"{error:.1e}" if amp else "",
                "last losses": f"{last:.3f}",
                "loss differs by": f"{difference:.1%}",
                "Acc@1": f"{acc1:.1f}",
            }
        )
    title = f"logits of S/16, relative; gmlp_digits after {steps} steps on the digits"
    bench.show(title, results, cells)


@paddle.no_grad()
def golden_logits(amp):
    """float32 [8, 1000], of the weights and images that the tests draw."""
    model, images = build("gmlp_s16_224"), paddle.to_tensor(draw_images(224, batch=8))
    with simulated(amp):
        return model(images).astype("float32").numpy()


def read_digits():
    """(float32 [5000, 3, 28, 28] from -1 to 1, int64 [5000]), shuffled."""
    rows = np.loadtxt(DIGITS, delimiter=",", dtype="float32")
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    images = np.repeat(rows[:, :-1].reshape(-1, 1, 28, 28) / 127.5 - 1, 3, axis=1)
    return images, rows[:, -1].astype("int64")


def train(digits, amp, steps, seed):
    """The losses of some steps on 4,000 digits, without augmentation, and the top-1 of the rest."""
    (images, labels), rng = digits, np.random.default_rng(seed)
    config, losses = get_config(DIGITS_MODEL), []
    paddle.seed(seed)
    model = build_gmlp(config)
    optimizer = build_optimizer(config, model, LEARNING_RATE)
    scale = LOSS_SCALE if amp and amp.dtype == "float16" else 1.0
    for _ in range(steps):
        batch = rng.integers(4000, size=config.DATA.BATCH_SIZE)
        with simulated(amp):
            logits = model(paddle.to_tensor(images[batch]))
        loss = F.cross_entropy(logits.astype("float32"), paddle.to_tensor(labels[batch]))
        (loss * scale).backward()
        for param in model.parameters():
            param.grad.set_value(param.grad / scale)
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    model.eval()
    with paddle.no_grad(), simulated(amp):
        logits = model(paddle.to_tensor(images[4000:])).astype("float32").numpy()
    return np.array(losses), 100 * float((logits.argmax(-1) == labels[4000:]).mean())
