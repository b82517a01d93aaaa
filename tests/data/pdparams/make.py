"""Writes the files beside it, with Paddle 2.6.2 and NumPy 1.26 (Python 3.10):

python -m venv p262 && p262/bin/pip install paddlepaddle==2.6.2 "numpy<2" setuptools
p262/bin/python tests/data/pdparams/make.py
"""

import copy
import sys
from pathlib import Path

import numpy as np
import paddle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))

from gmlp import GMLP, Sizes  # noqa: E402


def flatten(tree, prefix=""):
    """{"model/0.weight": array, …}, so that np.savez can hold the tree."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flatten(value, f"{prefix}{key}/"))
        elif value is not None:
            leaves[prefix + key] = np.array(value)
    return leaves


paddle.seed(1)
model = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 2), paddle.nn.Flatten(), paddle.nn.Linear(4, 3))
scheduler = paddle.optimizer.lr.CosineAnnealingDecay(0.1, 10)
optimizer = paddle.optimizer.AdamW(scheduler, parameters=model.parameters())
model(paddle.ones([1, 3, 2, 2])).sum().backward()
optimizer.step()
scheduler.step()
# The keys of PaddleViT's checkpoints, and values that take other paths through pickle.
checkpoint = {
    "model": model.state_dict(),
    "model_ema": None,
    "optimizer": optimizer.state_dict(),
    "epoch": 3,
    "lr_scheduler": scheduler.state_dict(),
    "amp_grad_scaler": {},
    "bfloat16": paddle.to_tensor([0.5, -2.0]).astype("bfloat16"),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "empty": np.zeros((0, 3), "float32"),
    "scalar": np.float32(0.25),
    "zero_dimensions": paddle.to_tensor(7, dtype="int64"),
}
for protocol in (2, 3, 4):
    paddle.save(model.state_dict(), str(HERE / f"weights_{protocol}.pickle"), protocol=protocol)
    paddle.save(checkpoint, str(HERE / f"training_{protocol}.pickle"), protocol=protocol)
np.savez_compressed(HERE / "weights.npz", **flatten(model.state_dict()))
np.savez_compressed(HERE / "training.npz", **flatten(checkpoint))

# What PaddleViT's main_multi_gpu.py saves, of a run two steps long, and its weights a step later.
for _ in range(5):  # its names are not those of a process that makes one model alone
    paddle.nn.Linear(2, 2), paddle.nn.Conv2D(1, 1, 1), paddle.nn.LayerNorm(2)
model = GMLP(Sizes(8, 3, 3, patch_size=4, dim=8, depth=1, mlp_ratio=2.0))
model.head.weight.set_value(paddle.randn([8, 3]))  # not zeros: gradients reach every parameter
average = copy.deepcopy(model)
warmup = paddle.optimizer.lr.LinearWarmup(
    paddle.optimizer.lr.CosineAnnealingDecay(0.01, 10), 2, start_lr=0.001, end_lr=0.01
)
decayed = {param.name for param in model.parameters() if param.ndim > 1}
optimizer = paddle.optimizer.AdamW(
    warmup,
    parameters=model.parameters(),
    weight_decay=0.05,
    apply_decay_param_fun=lambda name: name in decayed,
    grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
)


def step(seed):
    images = np.random.RandomState(seed).standard_normal((4, 3, 8, 8)).astype("float32")
    model(paddle.to_tensor(images)).square().mean().backward()
    optimizer.step()
    optimizer.clear_grad()
    warmup.step()


step(1)
for mean, param in zip(average.parameters(), model.parameters()):
    mean.set_value(0.9 * mean + 0.1 * param)
step(2)
checkpoint = {
    "model": model.state_dict(),
    "model_ema": average.state_dict(),
    "optimizer": optimizer.state_dict(),
    "epoch": 2,
    "lr_scheduler": warmup.state_dict(),
    "amp_grad_scaler": {  # as GradScaler().state_dict() is on a GPU
        "scale": np.array([1024.0], "float32"),
        **{"incr_ratio": 2.0, "decr_ratio": 0.5, "incr_every_n_steps": 1000},
        **{"decr_every_n_nan_or_inf": 2, "incr_count": 5, "decr_count": 1},
        "use_dynamic_loss_scaling": True,
    },
}
lacking, extra = f"{model.head.weight.name}_moment2_0", "linear_99.w_0_moment1_0"
states = {"paddlevit": checkpoint["optimizer"]}
states["paddlevit_fewer"] = {k: v for k, v in states["paddlevit"].items() if k != lacking}
states["paddlevit_more"] = {**states["paddlevit"], extra: paddle.ones([2, 2])}
for name, state in states.items():
    paddle.save({**checkpoint, "optimizer": state}, str(HERE / f"{name}.pickle"))
step(3)
np.savez_compressed(HERE / "paddlevit.npz", **flatten(model.state_dict()))
