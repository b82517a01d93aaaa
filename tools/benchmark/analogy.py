"""What decides a training step's speed on a GPU, written in PyTorch: an analogy.

    python tools/benchmark/analogy.py              # on a machine with a GPU, torch and timm

Nothing of this repository runs here but its formulation: the same block under autocast, with one
thing changed at a time, beside timm's gmlp_s16_224.  All variants are in one process and take
turns; a step is forward, loss, backward, clipping and AdamW on images that are on the GPU already.
docs/performance.md has the table.
"""

import argparse
import statistics
import sys

import torch
from torch import nn
from torch.nn import functional as F

STEPS = 6  # of a turn; the first one does not count


class LayerNorm(nn.LayerNorm):
    """LayerNorm as autocast has it, in float32; or, `in_amp`, in the type of mixed precision.

    The kernel keeps its statistics in float32 either way.
    """

    def __init__(self, width, epsilon, in_amp):
        super().__init__(width, epsilon)
        self.in_amp = in_amp

    def forward(self, x):
        if not self.in_amp:
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """A gMLP block as gmlp.py has it, [batch, tokens, dim] -> the same."""

    def __init__(self, tokens, dim, ratio, how):
        super().__init__()
        self.how, hidden = how, ratio * dim
        self.norm = LayerNorm(dim, 1e-6, how["norm in AMP's type"])
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden // 2, dim)
        self.gate_norm = LayerNorm(hidden // 2, 1e-5, how["norm in AMP's type"])
        self.proj = nn.Linear(tokens, tokens)
        nn.init.normal_(self.proj.weight, std=1e-6)
        nn.init.ones_(self.proj.bias)

    def forward(self, x):
        normed = self.norm(x)
        if self.how["fc1 in one product"]:
            u, v = F.gelu(self.fc1(normed)).chunk(2, dim=-1)
        else:
            half = self.fc1.out_features // 2
            weight, bias = self.fc1.weight, self.fc1.bias
            u = F.gelu(F.linear(normed, weight[:half], bias[:half]))
            v = F.gelu(F.linear(normed, weight[half:], bias[half:]))
        v = self.gate_norm(v)
        if self.how["tokens transposed"]:
            v = self.proj(v.transpose(-1, -2)).transpose(-1, -2)
        else:
            product = torch.matmul(self.proj.weight, v)
            v = product + self.proj.bias.to(product.dtype).unsqueeze(-1)
        return x + self.fc2(u * v)


class GMLP(nn.Module):
    """S/16: float images [batch, 3, 224, 224] -> logits [batch, 1000]."""

    def __init__(self, how, tokens=196, dim=256, depth=30, ratio=6, classes=1000):
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, dim, 16, 16)
        self.blocks = nn.Sequential(*(Block(tokens, dim, ratio, how) for _ in range(depth)))
        self.norm = LayerNorm(dim, 1e-6, how["norm in AMP's type"])
        self.head = nn.Linear(dim, classes)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        # Paddle's convolution adds a float32 bias, so that the residual stream is float32 there.
        if not self.how["16-bit residuals"]:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.head(self.norm(self.blocks(x)).mean(1))


PLAIN = dict.fromkeys(
    ("norm in AMP's type", "16-bit residuals", "fc1 in one product", "tokens transposed"), False
)


def variants():
    """Names to (model, AdamW's options)."""
    import timm

    fused = {"fused": True}
    yield "as it is", GMLP(PLAIN), fused
    for name in ("norm in AMP's type", "fc1 in one product", "tokens transposed"):
        yield name, GMLP({**PLAIN, name: True}), fused
    both = {**PLAIN, "norm in AMP's type": True, "16-bit residuals": True}
    yield "norm in AMP's type, 16-bit residuals", GMLP(both), fused
    yield "AdamW tensor by tensor", GMLP(PLAIN), {"foreach": False}
    yield "timm", timm.create_model("gmlp_s16_224"), fused


class Trainer:
    """One variant's training step."""

    def __init__(self, model, options, dtype):
        self.model, self.dtype = model.cuda().train(), dtype
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, weight_decay=0.05, eps=1e-6, **options
        )

    def step(self, images, targets):
        with torch.autocast("cuda", self.dtype):
            logits = self.model(images)
        loss = torch.sum(-targets * F.log_softmax(logits.float(), dim=-1), dim=-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def milliseconds(self, images, targets):
        """Of each of a turn's steps but the first."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS)]
        for mark in marks:
            self.step(images, targets)
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("-batch_size", type=int, default=256, metavar="N")
    parser.add_argument("-turns", type=int, default=5, metavar="N")
    parser.add_argument("-amp_dtype", default="bfloat16", choices=["bfloat16", "float16"])
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.amp_dtype)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 224, 224, device="cuda")
    targets = torch.softmax(torch.randn(args.batch_size, 1000, device="cuda"), dim=-1)
    trainers, times, memory = {}, {}, {}
    for name, model, options in variants():
        trainers[name], times[name] = Trainer(model, options, dtype), []
        trainers[name].milliseconds(images, targets)  # kernels are chosen
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainers[name].step(images, targets)
        memory[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(args.turns):
        for name, trainer in trainers.items():
            times[name].append(statistics.median(trainer.milliseconds(images, targets)))
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, batch {args.batch_size}, "
          f"autocast to {args.amp_dtype}\n")  # fmt: skip
    print("| | ms a step (lowest to highest) | images/s | as it is / this | GB added by a step |")
    print("| --- | ---: | ---: | ---: | ---: |")
    base = times["as it is"]
    for name, own in times.items():
        middle, ratio = statistics.median(own), statistics.median(a / b for a, b in zip(base, own))
        print(f"| {name} | {middle:.1f} ({min(own):.1f} to {max(own):.1f}) "
              f"| {1000 * args.batch_size / middle:,.0f} | {ratio:.2f} "
              f"| {memory[name] / 1e9:.1f} |")  # fmt: skip
    print("\n" + differences(images[:32], dtype))


@torch.no_grad()
def differences(images, dtype):
    """What rounding does to the logits of one model, with and without 16-bit norms."""
    both = {**PLAIN, "norm in AMP's type": True, "16-bit residuals": True}
    hows = {"as it is": PLAIN, "norm in AMP's type": {**PLAIN, "norm in AMP's type": True},
            "and 16-bit residuals": both}  # fmt: skip
    reference = GMLP(PLAIN).cuda().eval()
    for block in reference.blocks:  # as after training: the gates do something
        nn.init.normal_(block.proj.weight, std=0.5 / 14)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact = reference.double()(images.double())
    reference.float()
    parts = []
    for name, how in hows.items():
        model = GMLP(how).cuda().eval()
        model.load_state_dict(reference.state_dict())
        with torch.autocast("cuda", dtype):
            error = (model(images).double() - exact).norm() / exact.norm()
        parts.append(f"{name} {error:.1e}")
    return "relative error of the logits (random weights): " + ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
