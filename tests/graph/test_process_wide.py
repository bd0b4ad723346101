"""Settings of the whole process come back, however threads overlap."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from torch import Tensor, fx

from demp_kernels.graph.process_wide import without_compilation, without_fast_attention


def compiles() -> bool:
    graphs: list[fx.GraphModule] = []

    def count(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=count)(torch.ones(2))
    return bool(graphs)


@pytest.mark.parametrize(
    ("setting", "is_on"),
    [(without_compilation, compiles), (without_fast_attention, torch.backends.mha.get_fastpath_enabled)],
    ids=["compilation", "fast attention"],
)
def test_it_is_off_until_the_last_leaves(setting: Callable[[], AbstractContextManager[None]], is_on: Callable[[], bool]) -> None:
    assert is_on()
    first, second = ExitStack(), ExitStack()
    first.enter_context(setting())
    second.enter_context(setting())
    assert not is_on()
    first.close()
    assert not is_on(), "the second is still there"
    second.close()
    assert is_on()
    with pytest.raises(KeyError), setting():
        raise KeyError
    assert is_on()
