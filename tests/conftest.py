"""Fixtures of several rooms."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from demp_kernels import functional


@pytest.fixture(scope="module", params=["tiny", "op"])
def tiny_or_op(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything twice: tiny inputs go to PyTorch's own ops and a count, and every size to the package's op."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "op":
            patch.setattr(functional, "_TINY", -1)
        yield
