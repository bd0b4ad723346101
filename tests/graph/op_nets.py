"""Tiny networks, one an op: stem, activation `act` with eight units, the op, a head. The table of test_op_table.py."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

UNITS = 8
EVEN = (0, 2, 4, 6)
PAIRED = (1, 3, 5, 7)
"""Units 1 and 3 of both halves."""
INTERLEAVED = (0, 1, 4, 5)
"""Units 0 and 1 of both halves: what goes together in two groups, two chunks, a channel shuffle."""
FIRST = (0, 1, 2, 3)


class Net(nn.Module):
    """head(op(act(stem(x)))), the op given as a function of the module and the activation's output."""

    def __init__(self, op: Callable[[nn.Module, Tensor], Tensor], stem: nn.Module, head: nn.Module, **layers: object) -> None:
        super().__init__()
        self.stem, self.act, self.head = stem, nn.ReLU(), head
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(self, self.act(self.stem(x)))
        return self.head(y.flatten(2).mean(2) if y.dim() > 2 else y)


@dataclass
class Case:
    """make: the network. shape: of its input. dead: units made zero. removed: how many of them go. why: where none goes,
    what the report says (a part of it). draws: whether a training forward draws random numbers."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dead: tuple[int, ...] = EVEN
    why: str = ""
    draws: bool = False

    @property
    def removed(self) -> int:
        return 0 if self.why else len(self.dead)


CASES: dict[str, Case] = {}
Op = Callable[[nn.Module, Tensor], Tensor]
Layers = Callable[[], dict[str, object]]


def images(
    name: str, op: Op, outputs: int = UNITS, layers: Layers = dict, *, dead: tuple[int, ...] = EVEN, why: str = "", draws: bool = False
) -> None:
    """A case on (2, 3, 8, 8): a convolution makes the units, in dimension 1; the op leaves `outputs` channels."""

    def make() -> nn.Module:
        return Net(op, nn.Conv2d(3, UNITS, 3, padding=1), nn.Linear(outputs, 3), **layers())

    CASES[name] = Case(make, (2, 3, 8, 8), dead, why, draws)


def series(name: str, op: Op, outputs: int = UNITS, layers: Layers = dict, *, why: str = "") -> None:
    """A case on (2, 3, 12), units in dimension 1."""

    def make() -> nn.Module:
        return Net(lambda m, y: op(m, y).mean(2), nn.Conv1d(3, UNITS, 3, padding=1), nn.Linear(outputs, 3), **layers())

    CASES[name] = Case(make, (2, 3, 12), why=why)


def volumes(name: str, op: Op, outputs: int = UNITS, layers: Layers = dict) -> None:
    """A case on (2, 3, 6, 6, 6), units in dimension 1."""
    CASES[name] = Case(
        lambda: Net(op, nn.Conv3d(3, UNITS, 3, padding=1), nn.Linear(outputs, 3), **layers()), (2, 3, 6, 6, 6)
    )


def tokens(
    name: str, op: Op, outputs: int = UNITS, layers: Layers = dict, *, dead: tuple[int, ...] = EVEN, why: str = "", draws: bool = False
) -> None:
    """A case on (2, 5, 6): a linear layer makes the units, in the last dimension."""

    def make() -> nn.Module:
        return Net(lambda m, y: op(m, y).mean(1), nn.Linear(6, UNITS), nn.Linear(outputs, 3), **layers())

    CASES[name] = Case(make, (2, 5, 6), dead, why, draws)


def layer(module: Callable[[], nn.Module]) -> Layers:
    return lambda: {"k": module()}


def weight(*shape: int) -> Layers:
    return lambda: {"w": nn.Parameter(torch.randn(shape))}


def through(m: nn.Module, y: Tensor) -> Tensor:
    return m.k(y)


def then_conv(m: nn.Module, y: Tensor) -> Tensor:
    return m.after(m.k(y))


def norm_and_conv(norm: Callable[[], nn.Module]) -> Layers:
    return lambda: {"k": norm(), "after": nn.Conv2d(UNITS, 6, 1)}


def halves(y: Tensor) -> Tensor:
    first, second = y.split(4, 1)
    return first + second


def gated(first: Tensor, second: Tensor) -> Tensor:
    return first * second.sigmoid()


# --- convolutions ----------------------------------------------------------------------------------------------------
series("conv1d", through, 6, layer(lambda: nn.Conv1d(UNITS, 6, 3, padding=1)))
images("conv2d", through, 6, layer(lambda: nn.Conv2d(UNITS, 6, 3, 2, 1)))
images("conv2d padding same", through, 6, layer(lambda: nn.Conv2d(UNITS, 6, 3, padding="same", dilation=2)))
images("conv2d reflected", through, 6, layer(lambda: nn.Conv2d(UNITS, 6, 3, padding=1, padding_mode="reflect")))
volumes("conv3d", through, 6, layer(lambda: nn.Conv3d(UNITS, 6, 3, padding=1)))
images("conv2d functional", lambda m, y: F.conv2d(y, m.w), 6, weight(6, UNITS, 1, 1))
series("conv_transpose1d", through, 6, layer(lambda: nn.ConvTranspose1d(UNITS, 6, 3)))
images("conv_transpose2d", through, 6, layer(lambda: nn.ConvTranspose2d(UNITS, 6, 3, 2)))
volumes("conv_transpose3d", through, 6, layer(lambda: nn.ConvTranspose3d(UNITS, 6, 2)))
images("grouped", through, 6, layer(lambda: nn.Conv2d(UNITS, 6, 3, groups=2)), dead=INTERLEAVED)
images("grouped, one group dead", through, 6, layer(lambda: nn.Conv2d(UNITS, 6, 3, groups=2)), dead=FIRST, why="keep equal sizes")
images("grouped transposed", through, 6, layer(lambda: nn.ConvTranspose2d(UNITS, 6, 3, groups=2)), dead=INTERLEAVED)
images("depthwise", through, 8, layer(lambda: nn.Conv2d(UNITS, 8, 3, groups=UNITS, bias=False)))
images("depthwise x3", through, 24, layer(lambda: nn.Conv2d(UNITS, 24, 3, groups=UNITS, bias=False)))
images("depthwise x2 with a bias", through, 16, layer(lambda: nn.Conv2d(UNITS, 16, 3, groups=UNITS)), why="conv2d.default in k")
images("depthwise transposed", through, 16, layer(lambda: nn.ConvTranspose2d(UNITS, 16, 3, groups=UNITS, bias=False)))
tokens("linear", through, 6, layer(lambda: nn.Linear(UNITS, 6)))
tokens("linear with a parameter that is a vector", lambda m, y: F.linear(y, m.w).unsqueeze(-1), 1, lambda: {"w": nn.Parameter(torch.randn(UNITS))}, why="linear.default")
tokens("bilinear", lambda m, y: m.k(y, y.sum(-1, keepdim=True)), 6, layer(lambda: nn.Bilinear(UNITS, 1, 6)), why="bilinear.default in k")

# --- normalisation ---------------------------------------------------------------------------------------------------
images("batch_norm", then_conv, 6, norm_and_conv(lambda: nn.BatchNorm2d(UNITS)), why="batch_norm.default in k")
images("batch_norm, no statistics", then_conv, 6, norm_and_conv(lambda: nn.BatchNorm2d(UNITS, track_running_stats=False)), why="batch_norm.default in k")
images("sync_batch_norm", then_conv, 6, norm_and_conv(lambda: nn.SyncBatchNorm(UNITS)), why="batch_norm.default in k")
images("group_norm", then_conv, 6, norm_and_conv(lambda: nn.GroupNorm(2, UNITS)), dead=FIRST, why="group_norm.default in k")
images("instance_norm", then_conv, 6, norm_and_conv(lambda: nn.InstanceNorm2d(UNITS)))
images("instance_norm with affine", then_conv, 6, norm_and_conv(lambda: nn.InstanceNorm2d(UNITS, affine=True)), why="instance_norm.default in k")
images("instance_norm with statistics", then_conv, 6, norm_and_conv(lambda: nn.InstanceNorm2d(UNITS, track_running_stats=True)), why="instance_norm.default in k")
tokens("layer_norm", through, 8, layer(lambda: nn.LayerNorm(UNITS)), why="layer_norm.default in k")
tokens("rms_norm", through, 8, layer(lambda: nn.RMSNorm(UNITS)), why="rms_norm.default in k")
images("local_response_norm", lambda m, y: F.local_response_norm(y, 3), why="pad.default in the model")

# --- activations and arithmetic --------------------------------------------------------------------------------------
images("prelu", through, 8, layer(lambda: nn.PReLU(UNITS)))
images("prelu, one slope", through, 8, layer(nn.PReLU))
images("add", lambda m, y: y + m.k(y), 8, layer(lambda: nn.Conv2d(UNITS, UNITS, 1)), why="add.Tensor in the model")
images("add to itself", lambda m, y: y + y.flip(-1))
images("sub a constant", lambda m, y: y - 1.0, why="sub.Tensor in the model")
images("gate", lambda m, y: y * m.k(y.mean((2, 3), keepdim=True)).sigmoid(), 8, layer(lambda: nn.Conv2d(UNITS, UNITS, 1)))
images("spatial gate", lambda m, y: y * m.k(y).sigmoid(), 8, layer(lambda: nn.Conv2d(UNITS, 1, 1)))
images("product of two activations", lambda m, y: y * m.k(y).relu(), 8, layer(lambda: nn.Conv2d(UNITS, UNITS, 1)))
images("square", lambda m, y: y * y)
images("division", lambda m, y: y / (1 + y.abs()))
images("scale by a parameter", lambda m, y: y * m.w, 8, weight(UNITS, 1, 1))
images("maximum", lambda m, y: torch.maximum(y, m.k(y)), 8, layer(lambda: nn.Conv2d(UNITS, UNITS, 1)), why="maximum.default in the model")
images("softmax over units", lambda m, y: y.softmax(1), why="softmax.int in the model")
images("softmax over space", lambda m, y: y.flatten(2).softmax(2).view_as(y), why="softmax.int in the model")
images("glu", lambda m, y: F.glu(y, 1), 4, dead=INTERLEAVED)

# --- joins, parts and shuffles ---------------------------------------------------------------------------------------
images("cat", lambda m, y: torch.cat([y, m.k(y)], 1), 12, layer(lambda: nn.Conv2d(UNITS, 4, 1)))
images("stack", lambda m, y: torch.stack([y, 2 * y], 2).sum(2))
images("stack along units", lambda m, y: torch.stack([y, 2 * y], 1).flatten(1, 2), 16)
images("chunk", lambda m, y: gated(*y.chunk(2, 1)), 4, dead=INTERLEAVED)
images("chunk, each to its own layer", lambda m, y: m.a(y.chunk(2, 1)[0]) + m.b(y.chunk(2, 1)[1]), 6, lambda: {
    "a": nn.Conv2d(4, 6, 1), "b": nn.Conv2d(4, 6, 1)}, dead=INTERLEAVED)
images("split in halves", lambda m, y: halves(y), 4, dead=INTERLEAVED, why="split.Tensor in the model")
images("split by the width", lambda m, y: gated(*y.split(y.shape[1] // 2, 1)), 4, dead=INTERLEAVED)
images("split in unequal parts", lambda m, y: torch.cat(y.split([2, 6], 1), 1), why="split_with_sizes.default in the model")
images("slice that counts from the width", lambda m, y: y[:, : y.shape[1] - 4], 4, dead=INTERLEAVED, why="slice.Tensor in the model")
images("slice", lambda m, y: y[:, :4], 4, why="slice.Tensor in the model")
images("slices by the width", lambda m, y: gated(y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]), 4, dead=INTERLEAVED)
images("every second unit", lambda m, y: y[:, ::2], 4, why="slice.Tensor in the model")
images("select", lambda m, y: y * y[:, 3:4], why="mul.Tensor in the model")
images("index", lambda m, y: y[:, [1, 0, 3, 2, 5, 4, 7, 6]], why="index.Tensor in the model")
images("unbind", lambda m, y: torch.stack(y.unbind(1), 1), why="unbind.int in the model")
images("flip of units", lambda m, y: y.flip(1))
images("roll of units", lambda m, y: y.roll(2, 1), why="roll.default in the model")
images("cumsum over units", lambda m, y: y.cumsum(1), why="cumsum.default in the model")
images("cumsum over space", lambda m, y: y.cumsum(2))
images("channel shuffle", through, 8, layer(lambda: nn.ChannelShuffle(2)), dead=INTERLEAVED)
images("channel shuffle by views", lambda m, y: y.view(2, 2, -1, 8, 8).transpose(1, 2).reshape(y.shape), dead=INTERLEAVED)
images("pixel shuffle", through, 2, layer(lambda: nn.PixelShuffle(2)), dead=FIRST)
images("pixel unshuffle", through, 32, layer(lambda: nn.PixelUnshuffle(2)))
images("unfold", lambda m, y: F.unfold(y, 3).unsqueeze(-1), 72, why="im2col.default in the model")
images("repeat", lambda m, y: y.repeat(1, 2, 1, 1), 16)
images("repeat_interleave", lambda m, y: y.repeat_interleave(2, 1), 16)

# --- shapes ----------------------------------------------------------------------------------------------------------
images("flatten", lambda m, y: m.k(y.flatten(1)), 6, layer(lambda: nn.Linear(UNITS * 64, 6)))
images("view by the batch", lambda m, y: m.k(y.view(y.shape[0], -1)), 6, layer(lambda: nn.Linear(UNITS * 64, 6)))
images("view, written down", lambda m, y: m.k(y.view(2, 512)), 6, layer(lambda: nn.Linear(UNITS * 64, 6)), why="sizes are written down in view.default in the model")
images("reshape", lambda m, y: y.reshape(2, -1, 16, 4))
images("permute", lambda m, y: m.k(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 6, layer(lambda: nn.Linear(UNITS, 6)))
images("transpose", lambda m, y: m.k(y.transpose(1, 3)).transpose(1, 3), 6, layer(lambda: nn.Linear(UNITS, 6)))
images("movedim", lambda m, y: m.k(y.movedim(1, -1)).movedim(-1, 1), 6, layer(lambda: nn.Linear(UNITS, 6)))
images("squeeze", lambda m, y: y.mean(3, keepdim=True).squeeze(3).unsqueeze(3))
images("expand", lambda m, y: y.mean((2, 3), keepdim=True).expand(-1, -1, 3, 3))
images("contiguous", lambda m, y: y.contiguous(memory_format=torch.channels_last))

# --- reductions, pooling, padding ------------------------------------------------------------------------------------
images("mean", lambda m, y: m.k(y.mean((2, 3))), 6, layer(lambda: nn.Linear(UNITS, 6)))
images("sum over units", lambda m, y: y.sum(1, keepdim=True), 1)
images("mean over units", lambda m, y: y.mean(1, keepdim=True), 1, why="mean.dim in the model")
images("largest over units", lambda m, y: y.amax(1, keepdim=True), 1, why="amax.default in the model")
images("largest over space", lambda m, y: y.amax((2, 3), keepdim=True))
images("max with indices", lambda m, y: y.max(2).values[..., None])
images("variance", lambda m, y: y.var((2, 3), keepdim=True))
images("max_pool", lambda m, y: F.max_pool2d(y, 3, 2, 1))
images("avg_pool", lambda m, y: F.avg_pool2d(y, 3, 2, 1))
images("adaptive_avg_pool", lambda m, y: F.adaptive_avg_pool2d(y, 3))
images("adaptive_max_pool", lambda m, y: F.adaptive_max_pool2d(y, 3))
images("lp_pool", lambda m, y: F.lp_pool2d(y, 2, 2), why="pow.Tensor_Scalar in the model")
images("norm over units", lambda m, y: y.norm(dim=1, keepdim=True), 1)
images("normalised units", lambda m, y: F.normalize(y, dim=1), why="div.Tensor in the model")
images("mean over units by hand", lambda m, y: y.sum(1, keepdim=True) / y.shape[1], 1, why="a number in div.Tensor in the model")
images("scaled by the width", lambda m, y: m.k(y) * y.shape[1] ** -0.5, 6, layer(lambda: nn.Conv2d(UNITS, 6, 1)), why="a number in mul.Tensor in the model")
images("interpolate", lambda m, y: F.interpolate(y, scale_factor=2, mode="bilinear"))
images("interpolate, nearest", lambda m, y: F.interpolate(y, size=5))
images("grid_sample", lambda m, y: F.grid_sample(y, torch.zeros(2, 3, 3, 2, dtype=y.dtype), align_corners=False))
images("pad", lambda m, y: F.pad(y, (1, 2, 1, 0)))
images("pad with ones", lambda m, y: F.pad(y, (1, 1), value=1.0), why="pad.default in the model")
images("pad, reflected", lambda m, y: F.pad(y, (1, 1, 1, 1), mode="reflect"))
images("pad of units", lambda m, y: F.pad(y, (0, 0, 0, 0, 0, 2)), 10, why="pad.default in the model")

# --- matrix products -------------------------------------------------------------------------------------------------
tokens("matmul", lambda m, y: y @ m.w, 6, weight(UNITS, 6))
tokens("matmul, units on the right", lambda m, y: (m.w @ y.transpose(1, 2)).transpose(1, 2), 6, weight(6, UNITS))
tokens("einsum", lambda m, y: torch.einsum("ntc,oc->nto", y, m.w), 6, weight(6, UNITS))
tokens("einsum of activations", lambda m, y: torch.einsum("ntc,nsc->nts", y, y), 5)
tokens("bmm of activations", lambda m, y: y @ y.transpose(1, 2), 5)
tokens("addmm", lambda m, y: torch.addmm(m.b, y.flatten(0, 1), m.w).view(2, 5, -1), 6, lambda: {
    "b": nn.Parameter(torch.randn(6)), "w": nn.Parameter(torch.randn(UNITS, 6))})
tokens("tied decoder", lambda m, y: F.linear(y, m.stem.weight.t()), 6)

# --- transformers and recurrences ------------------------------------------------------------------------------------
tokens("mlp of a transformer", lambda m, y: m.k(y) + y.sum(-1, keepdim=True), 6, layer(lambda: nn.Sequential(
    nn.Linear(UNITS, 12), nn.GELU(), nn.Linear(12, 6))))
tokens("attention", lambda m, y: m.k(y, y, y, need_weights=False)[0], 8, layer(lambda: nn.MultiheadAttention(
    UNITS, 2, batch_first=True)), why="in k (op_nets.py")
tokens("scaled dot product", lambda m, y: F.scaled_dot_product_attention(m.q(y), m.k(y), m.v(y)), 6, lambda: {
    name: nn.Linear(UNITS, 6) for name in "qkv"})
tokens("scaled dot product of units", lambda m, y: F.scaled_dot_product_attention(y, y, y), why="scaled_dot_product_attention.default in the model")
tokens("encoder layer", lambda m, y: m.k(m.a(y)), 6, lambda: {
    "a": nn.Linear(UNITS, 6), "k": nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True)})
tokens("lstm, two ways, two layers", lambda m, y: m.k(y)[0], 12, layer(lambda: nn.LSTM(
    UNITS, 6, 2, batch_first=True, bidirectional=True)))
tokens("lstm", lambda m, y: m.k(y)[0], 6, layer(lambda: nn.LSTM(UNITS, 6, batch_first=True)))
tokens("gru", lambda m, y: m.k(y)[0], 6, layer(lambda: nn.GRU(UNITS, 6, batch_first=True)))

# --- parametrisations, dropout, reuse --------------------------------------------------------------------------------
images("weight_norm", through, 6, layer(lambda: parametrizations.weight_norm(nn.Conv2d(UNITS, 6, 3))), why="conv2d.default in k")
images("weight_norm, old", through, 6, layer(lambda: nn.utils.weight_norm(nn.Conv2d(UNITS, 6, 3))), why="conv2d.default in k")
images("spectral_norm", through, 6, layer(lambda: parametrizations.spectral_norm(nn.Conv2d(UNITS, 6, 3))), why="conv2d.default in k")
tokens("orthogonal", through, 6, layer(lambda: parametrizations.orthogonal(nn.Linear(UNITS, 6))), why="linear.default in k")
images("dropout", through, 8, layer(nn.Dropout), draws=True)
images("dropout2d", through, 8, layer(nn.Dropout2d), draws=True)
images("alpha_dropout", through, 8, layer(nn.AlphaDropout), why="alpha_dropout.default in k", draws=True)
images("functional dropout", lambda m, y: F.dropout(y, 0.5, m.training), draws=True)
images("reused layer", lambda m, y: m.k(m.k(y).relu()), 8, layer(lambda: nn.Conv2d(UNITS, UNITS, 1)), why="units of relu")
images("reused activation", lambda m, y: m.act(m.k(y)), 8, layer(lambda: nn.Conv2d(UNITS, UNITS, 1)))
images("in place", lambda m, y: m.k(y.mul_(2).relu_()), 6, layer(lambda: nn.Conv2d(UNITS, 6, 1)))
images("functional layers", lambda m, y: F.relu(F.conv2d(F.avg_pool2d(y, 2), m.w, padding=1)), 6, weight(6, UNITS, 3, 3))
