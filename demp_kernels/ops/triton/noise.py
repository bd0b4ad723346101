"""The noise of `reference.noise` in Triton: the integers exactly, the normals to about 1e-5."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(quad, column, stream, seed):
    """Philox4x32-10 with counter (quad low, quad high, column, stream): quad, column broadcast against each other."""
    zero = (quad * 0 + column * 0).to(tl.uint32)
    low = zero + quad.to(tl.uint32)
    high = zero + (quad.to(tl.int64) >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, zero + column.to(tl.uint32), zero + stream)


@triton.jit
def _radius(word):
    """sqrt(-2 ln u), u = ((word >> 8) + 1) 2^-24; by its series near u = 1, where the fast logarithm is not exact enough."""
    n = (word >> 8).to(tl.int32)
    v = (0xFFFFFF - n).to(tl.float32) * 5.9604644775390625e-08
    near_one = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    elsewhere = -tl.log((n + 1).to(tl.float32) * 5.9604644775390625e-08)
    return tl.sqrt(2.0 * tl.where(v < 0.015625, near_one, elsewhere))


@triton.jit
def _angle(word):
    """2 pi (word >> 8) 2^-24, less a whole turn from pi on: fast sine and cosine are good within +-pi."""
    return (word.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * 3.7450702829239286e-07


@triton.jit
def normals(quad, column, stream, seed):
    """The normals of positions 4 quad, 4 quad + 1, 4 quad + 2, 4 quad + 3 of a column."""
    x0, x1, x2, x3 = philox_words(quad, column, stream, seed)
    r0, r1 = _radius(x0), _radius(x2)
    a0, a1 = _angle(x1), _angle(x3)
    return r0 * tl.cos(a0), r0 * tl.sin(a0), r1 * tl.cos(a1), r1 * tl.sin(a1)


@triton.jit
def consecutive(z0, z1, z2, z3, SIZE: tl.constexpr):
    """Four (SIZE / 4,) blocks as one (SIZE,) block: z0[0], z1[0], z2[0], z3[0], z0[1], ..."""
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (SIZE,))
