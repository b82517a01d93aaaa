"""Port gMLP weights between timm and Paddle, bit for bit.

    python tools/port_weights.py gmlp_s16_224.safetensors gmlp_s16_224.pdparams
    python tools/port_weights.py best_weights.pdparams mine.safetensors
    python tools/port_weights.py -verify gmlp_s16_224.safetensors gmlp_s16_224.pdparams
    python tools/port_weights.py -strip last.pdparams weights.pdparams

SOURCE holds a gMLP of any size, which is found from its tensors, under timm's names or PaddleViT's:
.safetensors, .pdparams, or a PyTorch file (.pth, .pt, .bin, .tar), which takes torch and is read
without running code from it.  Of a training checkpoint the averaged weights (EMA) are taken, where
it has them.  TARGET's suffix says what is written: .pdparams has PaddleViT's names and layouts,
.safetensors has timm's.  float16, float32 and float64 stay what they are; bfloat16 becomes float32,
which has all its values.

-strip makes bare weights of a training checkpoint.  -verify runs timm's own model beside this one,
in float64 on two random images; where logits are more than 1e-10 apart nothing is written.

Exit status: 0; 1 for what failed while running, as -verify may; 2 for what was asked wrongly.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import ConfigError, weights_in
from utils import cause, new_file, show_path
from weights import checkpoint, pdparams
from weights.pdparams import WeightsError

# Paddle comes in work(): -h and a wrong flag answer at once.

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")  # timm's train.py writes .pth.tar
_TORCH_PARTS = ("state_dict_ema", "model_ema", "state_dict", "model")  # in timm's order
_TIMM_PREFIXES = {"patch_embed.patch_embed.": "stem.proj.", "mixer_layers.": "blocks."}
_TOLERANCE = 1e-10


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help=".safetensors, .pdparams, a PyTorch file, or a run's folder",
    )
    add("target", metavar="TARGET", help="a new .pdparams (for Paddle) or .safetensors (for timm)")
    add("-strip", action="store_true", help="a training checkpoint's weights: .pdparams both")
    add("-verify", action="store_true", help="compare with timm's model (needs timm and torch)")
    add("-force", action="store_true", help="replace a TARGET that is there already")
    return parser


def work(args):
    """Ports what the arguments say."""
    args.source = weights_in(args.source)
    check_arguments(args)
    if args.verify:
        import_timm()
    common.import_paddle()
    weights = read(args.source, args.strip)
    from training.whose import describe

    model = find_model(weights, args.source)
    weights = {name: weights[name] for name in model.state_dict()}  # in the model's order
    if args.verify:
        verify(weights, model.sizes, args.source)
    write(args.target, weights)
    count = sum(array.size for array in weights.values())
    types = " and ".join(sorted({array.dtype.name for array in weights.values()}))
    print(f"{show_path(args.target)}: {len(weights)} tensors, {count:,} parameters, {types}")
    print(f"the model: {describe(model.sizes, args.source)}")


def check_arguments(args):
    """Refuses, in a sentence, what cannot be done whatever the files hold."""
    source, target = show_path(args.source), show_path(args.target)
    if not args.target.endswith((".pdparams", ".safetensors")):
        raise ConfigError(f"{target}: TARGET has to end in .pdparams or in .safetensors (for timm)")
    if os.path.lexists(args.target) and not args.force:
        raise ConfigError(f"{target}: is there already; -force replaces it")
    there = os.path.exists(args.target) and os.path.exists(args.source)
    if there and os.path.samefile(args.source, args.target):
        raise ConfigError(f"{target}: SOURCE and TARGET are one file")
    both = args.source.endswith(".pdparams") and args.target.endswith(".pdparams")
    both = both and not pdparams.is_of_pytorch(args.source)
    if args.strip and not both:
        raise ConfigError("-strip takes a .pdparams and writes a .pdparams")
    if both and not args.strip:
        raise ConfigError(
            f"{source}: SOURCE and TARGET are both .pdparams: there is nothing to port; -strip "
            "turns a training checkpoint into bare weights"
        )


def say(sentence):
    print(f"port_weights.py: {sentence}", file=sys.stderr)


def read(path, strip=False):
    """The weights in a file, under PaddleViT's names and in its layouts.

    Raises:
        WeightsError: the file is missing, damaged, or holds anything but weights.
        ConfigError: there is nothing to strip.
    """
    if path.endswith(_TORCH_SUFFIXES) or pdparams.is_of_pytorch(path):
        weights = read_torch(path)
    else:
        tree = pdparams.read(path)
        if strip and "model" not in tree:
            raise ConfigError(f"{show_path(path)}: has bare weights already: nothing to strip")
        weights = checkpoint.weights_of(tree, show_path(path), say)
    if any(name.startswith(tuple(_TIMM_PREFIXES.values())) for name in weights):
        weights = to_paddle(weights)
    return weights


def to_paddle(weights):
    """timm's weights under PaddleViT's names and in Paddle's layouts: a Linear is [in, out]."""
    return {_renamed(name, from_timm=True): _turned(array) for name, array in weights.items()}


def to_timm(weights):
    """The reverse of to_paddle."""
    return {_renamed(name, from_timm=False): _turned(array) for name, array in weights.items()}


def _renamed(name, from_timm):
    for ours, timms in _TIMM_PREFIXES.items():
        old, new = (timms, ours) if from_timm else (ours, timms)
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _turned(array):
    import numpy as np

    return np.ascontiguousarray(array.T) if array.ndim == 2 else array


def read_torch(path):
    """The weights in a PyTorch file under the names that they have there; bfloat16 as float32.

    Raises:
        WeightsError: as read.
        ConfigError: torch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{show_path(path)}: reading a PyTorch file needs torch ({error}): pip install "
            "torch, or give a .safetensors"
        ) from None
    try:
        open(path, "rb").close()  # torch.load has OSErrors for what is cut off, too
    except OSError as error:
        raise WeightsError(f"{show_path(path)}: cannot be read ({error.strerror})") from None
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # timm's train.py puts its arguments beside the weights
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of any type, by what the bytes happen to mean
        raise WeightsError(
            f"{show_path(path)}: is no intact PyTorch file, or holds more than tensors, which "
            "weights do not need: take another copy, and none that you do not trust"
        ) from None
    for part in _TORCH_PARTS:
        if isinstance(tree, dict) and isinstance(tree.get(part), dict):
            tree = tree[part]
            break
    is_dict = isinstance(tree, dict) and len(tree) > 0
    if not (is_dict and all(_is_weight(*item) for item in tree.items())):
        raise WeightsError(f"{show_path(path)}: holds no weights (names with tensors of floats)")
    # A tensor of one number may claim any shape, all of it that number.
    if sum(tensor.nbytes for tensor in tree.values()) > os.path.getsize(path):
        raise WeightsError(f"{show_path(path)}: claims more than its size: do not use this file")
    weights = {}
    for name, tensor in tree.items():
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        weights[name] = wide.detach().resolve_neg().contiguous().numpy()
    return checkpoint.without_wrappers(weights, show_path(path), say)


def _is_weight(name, tensor):
    """Whether this is a parameter that NumPy can have: no sparse, quantized or 8-bit tensor."""
    import torch

    return (
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    )


def find_model(weights, path):
    """The gMLP whose weights these are, as their shapes say.

    Raises:
        WeightsError: these are not a gMLP's; names the first differences.
    """
    from gmlp import GMLP

    model = GMLP(common.sizes_of(weights, path))
    checkpoint.check_weights(model, weights, show_path(path))
    return model


def write(path, weights):
    """Writes weights in the names and layouts of the path's suffix, whole or not at all."""
    if path.endswith(".pdparams"):
        import paddle

        pdparams.write(path, {name: paddle.to_tensor(array) for name, array in weights.items()})
        return
    try:
        from safetensors.numpy import save
    except ImportError:
        raise ConfigError(
            "writing a .safetensors needs a package: pip install safetensors"
        ) from None
    data = save(to_timm(weights), metadata={"format": "pt"})  # as timm's own files say
    with new_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def import_timm():
    """Raises ConfigError, with the cure, where timm cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm  # noqa: F401
            import torch  # noqa: F401
    except Exception as error:  # torchvision's C++ part raises a RuntimeError
        raise ConfigError(
            f"-verify: timm cannot be imported ({cause(error)}): pip install timm torch "
            "torchvision, all from one index such as https://download.pytorch.org/whl/cpu"
        ) from None


def verify(weights, sizes, path):
    """Compares this model with timm's, each with the weights in its own names and layouts.

    Raises:
        Failed: logits or features are further apart than rounding explains.
    """
    import numpy as np

    shape = [2, sizes.in_channels, sizes.image_size, sizes.image_size]
    images = np.random.default_rng(0).standard_normal(shape)
    gaps = {
        name: float(np.abs(ours - theirs).max())
        for name, ours, theirs in zip(
            ("logits", "features"),
            run_ours(weights, sizes, images),
            run_timm(to_timm(weights), sizes, images),
        )
    }
    text = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
    text = f"largest difference from timm, in float64 on two random images: {text}"
    if not all(gap <= _TOLERANCE for gap in gaps.values()):  # so that a NaN fails
        raise common.Failed(f"{show_path(path)}: {text}; above {_TOLERANCE}, nothing is written")
    print(text)


def run_ours(weights, sizes, images):
    """(logits, features) of this repository's model, float64 arrays."""
    import paddle

    from gmlp import GMLP
    from weights import assign_weights

    paddle.set_device("cpu")
    model = GMLP(sizes).to(dtype="float64")
    model.eval()
    assign_weights(model, weights, "")
    with paddle.no_grad():
        features = model.forward_features(paddle.to_tensor(images))
        return model.head(features).numpy(), features.numpy()


def run_timm(weights, sizes, images):
    """(logits, features) of timm's model, float64 arrays."""
    import torch
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock

    model = MlpMixer(  # what timm's gmlp_s16_224 is made of, for any size
        num_classes=sizes.num_classes,
        img_size=sizes.image_size,
        in_chans=sizes.in_channels,
        patch_size=sizes.patch_size,
        num_blocks=sizes.depth,
        embed_dim=sizes.dim,
        mlp_ratio=sizes.mlp_ratio,
        block_layer=SpatialGatingBlock,
        mlp_layer=GatedMlp,
    )
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    model.double().eval()
    with torch.no_grad():
        tokens = model.forward_features(torch.from_numpy(images))
        return model.forward_head(tokens).numpy(), tokens.mean(dim=1).numpy()


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
