"""The Triton kernels under Triton's interpreter, on CPU tensors: the table of every implementation."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from op_table import (  # noqa: F401
    SEED,
    test_activation,
    test_activation_float64,
    test_activation_noise_does_not_depend_on_layout_or_seed_sign,
    test_activation_refuses,
    test_channel_select,
    test_compact,
    test_compact_over_a_long_list,
    test_compact_refuses,
    test_relu_of_infinity,
    test_weight_noise,
    test_weight_noise_over_a_long_list,
    test_weight_noise_refuses,
)

from demp_kernels import reference
from demp_kernels.ops import triton as kernels
from demp_kernels.ops.triton.noise import philox_words

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for the NaN and overflow the table asks for


@pytest.fixture(scope="module")
def ops() -> SimpleNamespace:
    return SimpleNamespace(device="cpu", normals=1e-5, long_list=20, **kernels.KERNELS)


@triton.jit
def _write_words(quad, column, stream, seed, out):
    x0, x1, x2, x3 = philox_words(tl.load(quad), tl.load(column), tl.load(stream).to(tl.uint32), tl.load(seed))
    tl.store(out, x0.to(tl.int64))
    tl.store(out + 1, x1.to(tl.int64))
    tl.store(out + 2, x2.to(tl.int64))
    tl.store(out + 3, x3.to(tl.int64))


def test_philox_words() -> None:
    """The integers are the reference's, bit for bit, in every word of the counter."""
    for words in [(0, 0, 0), (1, 2, 3), (2**32 - 1, 7, 1), (2**32, 2**32 - 1, 2**32 - 1), (2**61, 5, 0)]:
        out = torch.zeros(4, dtype=torch.int64)
        _write_words[(1,)](*[torch.tensor([w]) for w in words], torch.tensor([SEED]), out)
        quad, column, stream = words
        counter = [torch.tensor([w]) for w in (quad & 0xFFFFFFFF, quad >> 32, column, stream)]
        wanted = reference.philox(counter, [torch.tensor([SEED & 0xFFFFFFFF]), torch.tensor([SEED >> 32])])
        assert out.tolist() == [int(w) for w in wanted]
