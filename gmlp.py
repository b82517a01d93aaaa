"""gMLP image classifier ("Pay Attention to MLPs", https://arxiv.org/abs/2105.08050).

    from config import get_config
    from gmlp import build_gmlp

    model = build_gmlp(get_config("configs/gmlp_s16_224.yaml"))
    logits = model(images)  # [batch, 3, 224, 224] -> [batch, 1000]

The function is timm 1.0.31's `gmlp_s16_224` (and its Ti and B relatives), the parameter names are
PaddleViT's, so that its published weights load unchanged.
"""

import math

import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.nn import initializer as init

from compat import recompute, truncated_normal

# The gate's LayerNorm keeps the framework's default epsilon in timm, all others use 1e-6.  Taking
# 1e-6 there too moves S/16's logits by 7e-6.
NORM_EPSILON = 1e-6
GATE_NORM_EPSILON = 1e-5


def lecun_normal(fan_in):
    """Truncated normal (at two standard deviations) of variance 1 / fan_in."""
    # Truncation at +-2 leaves a unit normal a standard deviation of 0.8796.
    std = math.sqrt(1 / fan_in) / 0.87962566103423978
    return truncated_normal(std)


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

    def __init__(self, image_size, patch_size, in_channels, dim):
        super().__init__()
        self.image_size = image_size
        self.num_tokens = (image_size // patch_size) ** 2
        self.patch_embed = nn.Conv2D(
            in_channels,
            dim,
            kernel_size=patch_size,
            stride=patch_size,
            weight_attr=paddle.ParamAttr(initializer=lecun_normal(in_channels * patch_size**2)),
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
    """A Linear that gives each half of its output features by itself: two [..., out_features / 2].

    Cut from one result they would be copied, the gradients' too.
    """

    def forward(self, x):
        # Slices, because Paddle Inference 3.3 errs on chunks of a weight where the batch is 1.
        half = self.weight.shape[1] // 2
        parts = slice(half), slice(half, None)
        return tuple(F.linear(x, self.weight[:, part], self.bias[part]) for part in parts)


class TokenLinear(nn.Linear):
    """A Linear along the tokens: [batch, in_features, channels] -> [batch, out_features, channels].

    The weight stands on the left of the product, which spares two transposed copies.
    """

    def forward(self, x):
        product = paddle.matmul(self.weight, x, transpose_x=True)
        # In the product's type, as nn.Linear does it: else mixed precision goes on in float32.
        return product + self.bias.astype(product.dtype).unsqueeze(-1)


class SpatialGatingUnit(nn.Layer):
    """u * f(v): one half of the channels gates the other across tokens (paper, section 2.1).

    f normalizes v and projects it along the token axis with one matrix for all channels; at
    initialization f(v) is 1, so that the unit passes u on.
    Two [batch, tokens, channels / 2] -> [batch, tokens, channels / 2]
    """

    def __init__(self, channels, num_tokens):
        super().__init__()
        self.norm = nn.LayerNorm(channels // 2, epsilon=GATE_NORM_EPSILON)
        self.proj = linear(
            num_tokens, num_tokens, init.Normal(std=1e-6), init.Constant(1.0), TokenLinear
        )

    def forward(self, u, v):
        return u * self.proj(self.norm(v))


class GatedChannelMLP(nn.Layer):
    """Channel projection, GELU, spatial gating, channel projection.  Keeps [batch, tokens, dim]."""

    def __init__(self, dim, hidden_dim, num_tokens, dropout):
        super().__init__()
        self.fc1 = linear(
            dim, hidden_dim, init.XavierUniform(), init.Normal(std=1e-6), HalvedLinear
        )
        self.gate = SpatialGatingUnit(hidden_dim, num_tokens)
        self.fc2 = linear(hidden_dim // 2, dim, init.XavierUniform(), init.Normal(std=1e-6))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        u, v = (self.dropout(F.gelu(half)) for half in self.fc1(x))
        return self.dropout(self.fc2(self.gate(u, v)))


class DropPath(nn.Layer):
    """Stochastic depth: zeroes a sample's residual branch with probability `rate` in training.

    The branches that stay are scaled by 1 / (1 - rate), so evaluation needs no correction.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = paddle.bernoulli(paddle.full([x.shape[0]] + [1] * (x.ndim - 1), keep, dtype=x.dtype))
        return x * (mask / keep)


class GMLPBlock(nn.Layer):
    """One gMLP block with its shortcut.  Keeps [batch, tokens, dim]."""

    def __init__(self, dim, hidden_dim, num_tokens, dropout, drop_path):
        super().__init__()
        self.norm = nn.LayerNorm(dim, epsilon=NORM_EPSILON)
        self.mlp_channels = GatedChannelMLP(dim, hidden_dim, num_tokens, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        shortcut = x
        return shortcut + self.drop_path(self.mlp_channels(self.norm(x)))


class GMLP(nn.Layer):
    """The classifier: float images [batch, channels, size, size] -> logits [batch, num_classes].

    Args:
        image_size: height and width of the images in pixels.
        patch_size: height and width of a patch in pixels; divides image_size.
        in_channels: channels of the images.
        num_classes: number of logits.
        dim: channels of a token between blocks.
        depth: number of blocks.
        hidden_dim: channels inside a block; even, as the gate halves them.
        dropout: rate after each channel projection.
        drop_path: stochastic-depth rate, the same in every block (as in timm's gMLP).

    Attributes:
        recompute: whether training keeps of each block its input alone and computes the rest again
            in the backward pass: less memory, the same gradients.
    """

    def __init__(
        self,
        image_size,
        patch_size,
        in_channels,
        num_classes,
        dim,
        depth,
        hidden_dim,
        dropout=0.0,
        drop_path=0.0,
    ):
        super().__init__()
        self.patch_embed = PatchEmbedding(image_size, patch_size, in_channels, dim)
        num_tokens = self.patch_embed.num_tokens
        self.mixer_layers = nn.Sequential(
            *(GMLPBlock(dim, hidden_dim, num_tokens, dropout, drop_path) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim, epsilon=NORM_EPSILON)
        self.head = linear(dim, num_classes, init.Constant(0.0), init.Constant(0.0))
        self.recompute = False

    def forward_features(self, images):
        """Features before the head, averaged over tokens: [batch, dim]."""
        x = self.patch_embed(images)
        for block in self.mixer_layers:
            x = recompute(block, x) if self.recompute and self.training else block(x)
        return self.norm(x).mean(axis=1)

    def forward(self, images):
        return self.head(self.forward_features(images))


def build_gmlp(config):
    """The model that a config describes, with timm's initialization.

    Args:
        config: a node with DATA.IMAGE_SIZE, DATA.IMAGE_CHANNELS, MODEL.NUM_CLASSES, MODEL.DROPOUT,
            MODEL.DROPPATH and MODEL.MIXER.{PATCH_SIZE, EMBED_DIM, DEPTH, MLP_RATIO}.

    Raises:
        ValueError: sizes that make no model; the message names the key.
    """
    mixer = config.MODEL.MIXER
    sizes = {
        "DATA.IMAGE_SIZE": config.DATA.IMAGE_SIZE,
        "DATA.IMAGE_CHANNELS": config.DATA.IMAGE_CHANNELS,
        "MODEL.NUM_CLASSES": config.MODEL.NUM_CLASSES,
        "MODEL.MIXER.PATCH_SIZE": mixer.PATCH_SIZE,
        "MODEL.MIXER.EMBED_DIM": mixer.EMBED_DIM,
        "MODEL.MIXER.DEPTH": mixer.DEPTH,
    }
    for key, value in sizes.items():
        if value < 1:
            raise ValueError(f"{key} is {value}, it must be at least 1")
    for key, rate in (
        ("MODEL.DROPOUT", config.MODEL.DROPOUT),
        ("MODEL.DROPPATH", config.MODEL.DROPPATH),
    ):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{key} is {rate}, it must be at least 0 and below 1")
    if config.DATA.IMAGE_SIZE % mixer.PATCH_SIZE:
        raise ValueError(
            f"DATA.IMAGE_SIZE {config.DATA.IMAGE_SIZE} is not a multiple of "
            f"MODEL.MIXER.PATCH_SIZE {mixer.PATCH_SIZE}"
        )
    hidden_dim = int(mixer.EMBED_DIM * mixer.MLP_RATIO)
    if hidden_dim < 2 or hidden_dim % 2:
        raise ValueError(
            f"MODEL.MIXER.MLP_RATIO {mixer.MLP_RATIO} x MODEL.MIXER.EMBED_DIM {mixer.EMBED_DIM} "
            f"gives {hidden_dim} hidden channels; the spatial gating unit needs an even number"
        )
    return GMLP(
        image_size=config.DATA.IMAGE_SIZE,
        patch_size=mixer.PATCH_SIZE,
        in_channels=config.DATA.IMAGE_CHANNELS,
        num_classes=config.MODEL.NUM_CLASSES,
        dim=mixer.EMBED_DIM,
        depth=mixer.DEPTH,
        hidden_dim=hidden_dim,
        dropout=config.MODEL.DROPOUT,
        drop_path=config.MODEL.DROPPATH,
    )
