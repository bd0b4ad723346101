"""`SubsampledConv2d`: a strided 1x1 convolution without the kernel of oneDNN that is broken for narrow ones."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SubsampledConv2d", "avoid_broken_kernel"]

BLOCK = 16
"""Inputs from which on the kernel is right: the largest SIMD block, that of AVX-512. AVX2's is 8, but a model moves."""


class SubsampledConv2d(nn.Conv2d):
    """nn.Conv2d of kernel size 1 without padding and groups, computed at stride 1 on every stride-th pixel: the same
    function, attributes and `state_dict` keys.

    Why: uxlfoundation/oneDNN#6035, in torch 2.13 and 2.14. The weight gradient of a strided 1x1 convolution in
    channels_last, in float32 and bfloat16, writes past its workspace with fewer inputs than a SIMD block: it hangs, crashes
    or is wrong. channels_last is taken where input or weight suggests it, so NCHW would have to be forced on both; and it
    took 1.6 times this one's time and more (4 to 24 inputs, 128 images of 28x28, two busy cores with AVX-512, torch 2.14).

    Shapes: x (N, in_channels, H, W) or (in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # a pooling of single pixels: one pass forward and back, where slices in two dimensions take two passes back
        return F.conv2d(F.avg_pool2d(input, 1, self.stride), weight, bias)


def avoid_broken_kernel(module: nn.Module) -> None:
    """Make an nn.Conv2d that would run into the kernel a `SubsampledConv2d`, the same object; leave all others as they are.

    Grouped and padded ones, and those of 1-D and 3-D, take other kernels. A subclass is left alone: what its forward does
    is its own.
    """
    if (
        type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.stride != (1, 1) and module.groups == 1
        and module.padding in ((0, 0), "valid") and module.weight.shape[1] < BLOCK
    ):
        module.__class__ = SubsampledConv2d
