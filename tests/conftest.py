"""Fixtures of several rooms."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from demp_kernels import functional


@pytest.fixture(scope="module", params=["tiny", "op"])
def tiny_or_op(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything twice: tiny inputs go to PyTorch's own ops and a count, and every size to the package's op."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "op":
            patch.setattr(functional, "_TINY", -1)
        yield


@pytest.fixture
def simd_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AVX-512, whatever this one has: inputs of strided 1x1 convolutions stay in blocks of 16."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
