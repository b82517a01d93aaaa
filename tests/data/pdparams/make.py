"""Writes the files beside it, with Paddle 2.6.2 and NumPy 1.26 (Python 3.10):

python -m venv p262 && p262/bin/pip install paddlepaddle==2.6.2 "numpy<2" setuptools
p262/bin/python tests/data/pdparams/make.py
"""

from pathlib import Path

import numpy as np
import paddle

HERE = Path(__file__).parent


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
