"""norm_act's Triton kernels under Triton's interpreter, on CPU tensors: the table of every implementation."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
from norm_act_table import (  # noqa: F401
    test_norm_act,
    test_norm_act_float64,
    test_norm_act_noise,
    test_norm_act_of_nan_counts_as_active,
    test_norm_act_other_activations,
    test_norm_act_refuses,
    test_norm_act_statistics_far_from_zero,
    test_norm_act_without_parameters,
)

from demp_kernels.ops import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for the NaN the table asks for


@pytest.fixture(scope="module")
def ops() -> SimpleNamespace:
    return SimpleNamespace(device="cpu", normals=1e-5, **kernels.KERNELS)
