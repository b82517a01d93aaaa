"""timm's golden vectors in tests/data, and a model that has their weights.

Weights and inputs are not stored: they are drawn with NumPy alone, by the recipe with which timm's
outputs were made (timm 1.0.31, PyTorch 2.13.0).
"""

from pathlib import Path

import numpy as np
import paddle

from config import get_config
from gmlp import build_gmlp

DATA = Path(__file__).resolve().parent / "data"
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def load(name):
    """The arrays of one golden file, as a dict."""
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def timm_shapes(golden):
    """timm's parameter names and shapes."""
    return {
        str(name): tuple(int(size) for size in str(shape).split(","))
        for name, shape in zip(golden["names"], golden["shapes"])
    }


def draw_weights(shapes, seed=2021):
    """The weights of the golden run, by timm's names and in PyTorch's layouts."""
    rng = np.random.RandomState(seed)
    weights = {}
    for name in sorted(shapes):
        noise = rng.standard_normal(shapes[name])
        if "norm.weight" in name:
            value = 1.0 + 0.1 * noise
        elif "norm.bias" in name:
            value = 0.1 * noise
        elif name.endswith("gate.proj.bias"):
            value = 1.0 + 0.1 * noise
        elif name.endswith(".bias"):
            value = 0.02 * noise
        elif name.endswith("gate.proj.weight"):
            value = 0.5 * noise / np.sqrt(noise.shape[1])
        else:
            value = noise / np.sqrt(np.prod(noise.shape[1:]))
        weights[name] = value.astype("float32")
    return weights


def draw_images(size, batch=2, seed=7):
    """The images of the golden run: float32 [batch, 3, size, size]."""
    rng = np.random.RandomState(seed)
    return rng.standard_normal((batch, 3, size, size)).astype("float32")


def paddle_name(name):
    """PaddleViT's name of timm's parameter."""
    return name.replace("stem.proj", "patch_embed.patch_embed").replace("blocks.", "mixer_layers.")


def to_paddle(weights):
    """timm's weights under Paddle's names and in Paddle's layouts (a Linear is [in, out])."""
    return {paddle_name(k): v.T.copy() if v.ndim == 2 else v for k, v in weights.items()}


def config_of(name):
    """The config of a golden model: a file in configs/, or timm's settings of the tiny one."""
    if name != "tiny":
        return get_config(CONFIGS / f"{name}.yaml")
    config = get_config()
    config.DATA.IMAGE_SIZE = 32
    config.MODEL.NUM_CLASSES = 10
    config.MODEL.DROPPATH = 0.0
    mixer = config.MODEL.MIXER
    mixer.PATCH_SIZE, mixer.EMBED_DIM, mixer.DEPTH, mixer.MLP_RATIO = 4, 16, 3, 6.0
    return config


def build(name, dtype="float32"):
    """The golden model in evaluation mode with the golden weights."""
    model = build_gmlp(config_of(name))
    state = to_paddle(draw_weights(timm_shapes(load(name))))
    missing, unexpected = model.set_state_dict({k: paddle.to_tensor(v) for k, v in state.items()})
    if missing or unexpected:
        raise AssertionError(f"names differ: {missing} {unexpected}")
    model.eval()
    return model.to(dtype=dtype)
