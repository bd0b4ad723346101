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
def _cosine_sine(word):
    """cos and sin of 2 pi (word >> 8) 2^-24 to 1.5 ulp. tl.cos and tl.sin bring in libdevice's reduction of huge angles, which
    needs local memory (32 bytes a thread, seen with cuobjdump)."""
    turn = word & 0xFFFFFF00
    # both wrap around on purpose, which TRITON_DEBUG=1 would assert not to happen
    quadrant = tl.add(turn, 0x20000000, sanitize_overflow=False) >> 30
    rest = tl.sub(turn, quadrant << 30, sanitize_overflow=False).to(tl.int32, bitcast=True)
    t = rest.to(tl.float32) * 2.3283064365386963e-10  # [-1/8, 1/8) turns
    u = t * t
    sine = t * (6.28318548 + u * (-41.3416634 + u * (81.5923538 - u * 75.3935623)))
    cosine = 1.0 + u * (-19.7391682 + u * (64.9232254 - u * 83.6659012))
    odd = (quadrant & 1) == 1
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    return tl.where(((quadrant + 1) & 2) == 2, -c, c), tl.where((quadrant & 2) == 2, -s, s)


@triton.jit
def normals(quad, column, stream, seed):
    """The normals of positions 4 quad, 4 quad + 1, 4 quad + 2, 4 quad + 3 of a column."""
    x0, x1, x2, x3 = philox_words(quad, column, stream, seed)
    r0, r1 = _radius(x0), _radius(x2)
    c0, s0 = _cosine_sine(x1)
    c1, s1 = _cosine_sine(x3)
    return r0 * c0, r0 * s0, r1 * c1, r1 * s1


@triton.jit
def consecutive(z0, z1, z2, z3, SIZE: tl.constexpr):
    """Four (SIZE / 4,) blocks as one (SIZE,) block: z0[0], z1[0], z2[0], z3[0], z0[1], ..."""
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (SIZE,))
