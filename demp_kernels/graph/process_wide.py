"""Settings that torch has one of for the whole process, changed for a while by any number of threads."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["without_compilation", "without_fast_attention"]


class _Shared:
    """A setting that the first thread changes and the last one restores. If each restored what it had found, the one that
    came second and left last would leave the first one's change for good.

    change: changes it, and returns what restores it.
    """

    def __init__(self, change: Callable[[], Callable[[], object]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._users = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._restore = self._change()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._restore()


def _run_eagerly() -> Callable[[], object]:
    stack = ExitStack()
    stack.enter_context(torch.compiler.set_stance("force_eager"))
    return stack.close


def _take_slow_attention() -> Callable[[], object]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


without_compilation = _Shared(_run_eagerly)
"""Models under torch.compile run as they are written."""
without_fast_attention = _Shared(_take_slow_attention)
"""Attention goes the way that it goes in training: its fused one for inference checks no widths."""
