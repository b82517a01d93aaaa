"""gMLP image classifier ("Pay Attention to MLPs", https://arxiv.org/abs/2105.08050).

    from config import get_config
    from gmlp import build_gmlp

    model = build_gmlp(get_config("configs/gmlp_s16_224.yaml"))
    logits = model(images)  # [batch, 3, 224, 224] -> [batch, 1000]

The function is timm 1.0.31's `gmlp_s16_224` (and its Ti and B relatives), the parameter names are
PaddleViT's, so that its published weights load unchanged.  Every part is built from `Sizes`.
"""

import inspect
import math
import operator
from typing import NamedTuple

import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.nn import initializer as init

# The gate's LayerNorm keeps the framework's default epsilon in timm, all others use 1e-6.  Taking
# 1e-6 there too moves S/16's logits by 7e-6.
NORM_EPSILON = 1e-6
GATE_NORM_EPSILON = 1e-5


def lecun_normal(fan_in):
    """Truncated normal (at two standard deviations) of variance 1 / fan_in."""
    # Truncation at +-2 leaves a unit normal a standard deviation of 0.8796.
    std = math.sqrt(1 / fan_in) / 0.87962566103423978
    if "a" in inspect.signature(init.TruncatedNormal).parameters:
        return init.TruncatedNormal(std=std, a=-2 * std, b=2 * std)
    return init.TruncatedNormal(std=std)  # Paddle 2.6 takes no bounds: two standard deviations


def linear(in_features, out_features, weight_init, bias_init, layer=nn.Linear):
    return layer(
        in_features,
        out_features,
        weight_attr=paddle.ParamAttr(initializer=weight_init),
        bias_attr=paddle.ParamAttr(initializer=bias_init),
    )


class PatchEmbedding(nn.Layer):
    """Cuts images into patches and projects each: [batch, channels, H, W] -> [batch, tokens, dim].

    Raises:
        ValueError: images of another height or width than `image_size` (the spatial projections
            have one weight for each pair of tokens, so the number of tokens is fixed).
    """

    def __init__(self, sizes):
        super().__init__()
        self.image_size = sizes.image_size
        fan_in = sizes.in_channels * sizes.patch_size**2
        self.patch_embed = nn.Conv2D(
            sizes.in_channels,
            sizes.dim,
            kernel_size=sizes.patch_size,
            stride=sizes.patch_size,
            weight_attr=paddle.ParamAttr(initializer=lecun_normal(fan_in)),
            bias_attr=paddle.ParamAttr(initializer=init.Constant(0.0)),
        )

    def forward(self, images):
        if list(images.shape[2:]) != [self.image_size, self.image_size]:
            raise ValueError(
                f"images are {list(images.shape[2:])} pixels (height, width), "
                f"the model was built for DATA.IMAGE_SIZE {self.image_size}"
            )
        x = self.patch_embed(images)  # [batch, dim, H / patch, W / patch]
        return x.flatten(2).transpose([0, 2, 1])


class HalvedLinear(nn.Linear):
    """A Linear whose output comes as two halves, each [..., out_features / 2].

    Splitting one output would copy both halves, and their gradients.
    """

    def forward(self, x):
        # Slices: Paddle Inference 3.3 errs on paddle.chunk of a weight for a batch of 1.
        half = self.weight.shape[1] // 2
        first = F.linear(x, self.weight[:, :half], self.bias[:half])
        return first, F.linear(x, self.weight[:, half:], self.bias[half:])


class TokenLinear(nn.Linear):
    """A Linear along the tokens: [batch, in_features, channels] -> [batch, out_features, channels].

    The weight stands on the left of the product, which spares two transposed copies.
    """

    def forward(self, x):
        product = paddle.matmul(self.weight, x, transpose_x=True)
        # nn.Linear casts its bias too; a float32 bias would make the result float32 under AMP.
        return product + self.bias.astype(product.dtype).unsqueeze(-1)


class SpatialGatingUnit(nn.Layer):
    """u * f(v): one half of the channels gates the other across tokens (paper, section 2.1).

    f normalizes v and projects it along the token axis with one matrix for all channels; at
    initialization f(v) is 1, so that the unit passes u on.
    Two [batch, tokens, channels / 2] -> [batch, tokens, channels / 2]
    """

    def __init__(self, sizes):
        super().__init__()
        tokens = sizes.num_tokens
        self.norm = nn.LayerNorm(sizes.hidden_dim // 2, epsilon=GATE_NORM_EPSILON)
        self.proj = linear(tokens, tokens, init.Normal(std=1e-6), init.Constant(1.0), TokenLinear)

    def forward(self, u, v):
        return u * self.proj(self.norm(v))


class GatedChannelMLP(nn.Layer):
    """Channel projection, GELU, spatial gating, channel projection.  Keeps [batch, tokens, dim]."""

    def __init__(self, sizes):
        super().__init__()
        dim, hidden_dim = sizes.dim, sizes.hidden_dim
        weight_init, bias_init = init.XavierUniform(), init.Normal(std=1e-6)
        self.fc1 = linear(dim, hidden_dim, weight_init, bias_init, HalvedLinear)
        self.gate = SpatialGatingUnit(sizes)
        self.fc2 = linear(hidden_dim // 2, dim, weight_init, bias_init)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x):
        u, v = self.fc1(x)
        u, v = self.dropout(F.gelu(u)), self.dropout(F.gelu(v))
        return self.dropout(self.fc2(self.gate(u, v)))


class DropPath(nn.Layer):
    """Stochastic depth: zeroes a sample's residual branch with probability `rate` in training.

    The branches that stay are scaled by 1 / (1 - rate), so evaluation needs no correction.  In 16
    bits that scale is rounded, and a branch stays with the probability that belongs to it.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        one_per_sample = [x.shape[0]] + [1] * (x.ndim - 1)
        scale = paddle.full(one_per_sample, 1 / (1 - self.rate), dtype=x.dtype)
        mask = paddle.bernoulli(1 / scale.astype("float32"))
        return x * (scale * mask.astype(x.dtype))


class GMLPBlock(nn.Layer):
    """One gMLP block with its shortcut.  Keeps [batch, tokens, dim]."""

    def __init__(self, sizes):
        super().__init__()
        self.norm = nn.LayerNorm(sizes.dim, epsilon=NORM_EPSILON)
        self.mlp_channels = GatedChannelMLP(sizes)
        self.drop_path = DropPath(sizes.drop_path)

    def forward(self, x):
        shortcut = x
        return shortcut + self.drop_path(self.mlp_channels(self.norm(x)))


class GMLP(nn.Layer):
    """The classifier: float images [batch, channels, size, size] -> logits [batch, num_classes].

    Attributes:
        sizes: what it was built from.
        recompute: whether training keeps only each block's input and computes the block again in
            the backward pass: less memory, the same gradients.
        stem_name, blocks_name, head_name, gate_name: the parts' names within the parameters' names;
            gate_name is a block's spatial projection.
    """

    stem_name, blocks_name, head_name = "patch_embed.patch_embed", "mixer_layers", "head"
    gate_name = "mlp_channels.gate.proj"

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.patch_embed = PatchEmbedding(sizes)
        self.mixer_layers = nn.Sequential(*(GMLPBlock(sizes) for _ in range(sizes.depth)))
        self.norm = nn.LayerNorm(sizes.dim, epsilon=NORM_EPSILON)
        self.head = linear(sizes.dim, sizes.num_classes, init.Constant(0.0), init.Constant(0.0))
        self.recompute = False

    def forward_features(self, images):
        """Features before the head, averaged over tokens: [batch, dim]."""
        x = self.patch_embed(images)
        for block in self.mixer_layers:
            x = recomputed(block, x) if self.recompute and self.training else block(x)
        return self.norm(x).mean(axis=1)

    def forward(self, images):
        return self.head(self.forward_features(images))

    def freeze_backbone(self):
        """Freezes everything but the head, and switches dropout and stochastic depth off."""
        for name, param in self.named_parameters():
            param.stop_gradient = not name.startswith(f"{self.head_name}.")
        for layer in self.sublayers():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
            elif isinstance(layer, DropPath):
                layer.rate = 0.0


class Sizes(NamedTuple):
    """Everything that tells one gMLP from another; all parts of the model are built from it."""

    image_size: int  # height and width of the images, pixels
    in_channels: int
    num_classes: int
    patch_size: int  # height and width of a patch, pixels
    dim: int  # channels of a token between blocks
    depth: int  # blocks
    mlp_ratio: float  # channels of a token inside a block / dim
    dropout: float = 0.0  # rate after each channel projection
    drop_path: float = 0.0  # stochastic-depth rate, the same in every block (as in timm's gMLP)

    @property
    def num_tokens(self):
        return (self.image_size // self.patch_size) ** 2

    @property
    def hidden_dim(self):
        """Channels of a token inside a block; even, as the gate halves them."""
        return int(self.dim * self.mlp_ratio)

    @classmethod
    def from_config(cls, config):
        """The sizes in a config; raises ValueError, with the key, where they make no model."""
        return cls(*operator.attrgetter(*SIZE_KEYS)(config)).checked()

    @classmethod
    def from_weights(cls, weights):
        """The sizes of the model whose weights these are, as their shapes say; without dropout.

        A model of these sizes has about as many numbers as the shapes say.

        Args:
            weights: parameter names to arrays.

        Raises:
            ValueError: these are no gMLP's; says what is missing or cannot be.
        """
        blocks = {name.split(".")[1] for name in weights if name.startswith(f"{GMLP.blocks_name}.")}

        def shape_in_all(name):
            names = (f"{GMLP.blocks_name}.{i}.{name}.weight" for i in range(len(blocks)))
            (shape,) = {weights[name].shape for name in names}
            return shape

        try:
            dim, in_channels, patch_size, width = weights[f"{GMLP.stem_name}.weight"].shape
            dim_inside, hidden_dim = shape_in_all("mlp_channels.fc1")
            num_tokens, tokens_out = shape_in_all(GMLP.gate_name)
            dim_last, num_classes = weights[f"{GMLP.head_name}.weight"].shape
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from None
        except ValueError:
            raise ValueError(
                "a shape has the wrong number of axes, or is not the same in all blocks"
            ) from None
        squares = (patch_size, num_tokens) == (width, tokens_out)
        squares = squares and math.isqrt(num_tokens) ** 2 == num_tokens
        if not (squares and dim == dim_inside == dim_last > 0):
            raise ValueError("its shapes do not fit together")
        ratio = hidden_dim / dim
        if int(dim * ratio) != hidden_dim:  # by rounding
            ratio = math.nextafter(ratio, math.inf)
        side = math.isqrt(num_tokens) * patch_size
        return cls(side, in_channels, num_classes, patch_size, dim, len(blocks), ratio).checked()

    def checked(self):
        """Itself; raises ValueError, with the key, where these sizes make no model."""
        for key, value in zip(SIZE_KEYS[:6], self):
            if value < 1:
                raise ValueError(f"{key} is {value}, it must be at least 1")
        for key, rate in (("MODEL.DROPOUT", self.dropout), ("MODEL.DROPPATH", self.drop_path)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{key} is {rate}, it must be at least 0 and below 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"DATA.IMAGE_SIZE {self.image_size} is not a multiple of "
                f"MODEL.MIXER.PATCH_SIZE {self.patch_size}"
            )
        if not 2 <= self.dim * self.mlp_ratio < 2**31 or self.hidden_dim % 2:
            raise ValueError(
                f"MODEL.MIXER.MLP_RATIO {self.mlp_ratio} x MODEL.MIXER.EMBED_DIM {self.dim} gives "
                f"{self.dim * self.mlp_ratio:g} hidden channels; the spatial gating unit needs an "
                "even number"
            )
        return self


# The config's key of each of the Sizes, in their order.
SIZE_KEYS = (
    "DATA.IMAGE_SIZE", "DATA.IMAGE_CHANNELS", "MODEL.NUM_CLASSES", "MODEL.MIXER.PATCH_SIZE",
    "MODEL.MIXER.EMBED_DIM", "MODEL.MIXER.DEPTH", "MODEL.MIXER.MLP_RATIO", "MODEL.DROPOUT",
    "MODEL.DROPPATH",
)  # fmt: skip


def recomputed(block, x):
    """block(x), which the backward pass computes once more instead of keeping what is inside."""
    # Imported where it is used: fleet takes a second.
    from paddle.distributed.fleet.utils import recompute

    # Otherwise a parameter's gradient is ready more than once, which DataParallel refuses.
    return recompute(block, x, use_reentrant=False)


def can_recompute():
    """Whether recompute() works on the current device: Paddle 2.6 needs a GPU for it."""
    return paddle.get_device() != "cpu" or not paddle.__version__.startswith("2.")


def build_gmlp(config):
    """The GMLP that a config describes (its SIZE_KEYS), with timm's initialization.

    Raises:
        ValueError: sizes that make no model; the message names the key.
    """
    return GMLP(Sizes.from_config(config))
