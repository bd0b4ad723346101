"""What a case is: one op on one input, with everything it is compared with."""
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["DTYPES", "VARIANTS", "Case", "Scope", "channel_dim", "compiled", "gradient_call", "random", "retained_graphs", "shape_for"]

Call = Callable[[], Any]

VARIANTS = {
    "copy": "an allocated copy: x.clone()",
    "copy_into": "a copy into memory that is there: y.copy_(x)",
    "plain": "PyTorch's op without counting and noise: torch.relu, BatchNorm2d + ReLU",
    "eager": "the same work in eager PyTorch: relu, (x > 0).sum, noise from randn_like",
    "compile": "that eager code under torch.compile",
    "demp": "this package",
    "demp_unfused": "this package, activation and normalisation as two ops",
    "demp_compile": "this package under torch.compile, where the op stays opaque",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    sizes: bytes of x, from cache-sized to four times the last-level cache. full: every combination of layout, dtype and
    size instead of a star around float32 NCHW. quick: a handful of small cases without torch.compile.
    """

    cache_bytes: int
    on_gpu: bool = False
    full: bool = False
    quick: bool = False

    LARGEST: ClassVar[int] = 2**30
    """Bytes of x at most: servers with hundreds of megabytes of cache would need more memory than is worth it."""

    @property
    def sizes(self) -> tuple[int, ...]:
        cache = 2 ** round(math.log2(self.cache_bytes))
        wanted = (2**16, 2**20, cache // 4, cache, 4 * cache)
        return tuple(sorted({min(size, self.LARGEST) for size in wanted}))

    @property
    def small(self) -> int:
        """Fits a core's own cache."""
        return 2**20

    @property
    def large(self) -> int:
        """Fits no cache."""
        return self.sizes[-1]


@dataclass(frozen=True)
class Case(ABC):
    """One op on one input. `key` and the fields go into the rows."""

    op: ClassVar[str]
    cold: ClassVar[bool] = True
    """On a GPU every timed call finds the caches without its operands."""
    function: str
    layout: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    direction: str
    noise: bool = False
    compile: bool = True
    """Whether torch.compile is among the alternatives where it is asked for."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def input_bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def copy_bytes(self) -> int:
        """Read and written by the copy: of x, where nothing else is said."""
        return 2 * self.input_bytes

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Read and written by the op: each input and each output once (or as often as its formula needs)."""

    @abstractmethod
    def variants(self, device: torch.device, *, compile: bool) -> dict[str, Call]:
        """The alternatives as calls without arguments, by names of `VARIANTS`, inputs made ready on `device`."""

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def dtype_text(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def key(self) -> str:
        noise = "+noise" if self.noise else ""
        return f"{self.op}-{self.function}{noise}-{self.direction}-{self.layout}-{self.dtype_text}-{self.shape_text}"


# --- inputs ----------------------------------------------------------------------------------------------------------


def shape_for(layout: str, dtype: torch.dtype, size: int) -> tuple[int, ...]:
    """A usual shape of about `size` bytes in that layout: (N, 64, 32, 32) or (N, 64, 16, 16), (N, 1024), (N, T, C)."""
    elements = max(size // dtype.itemsize, 1)
    if layout == "nc":
        return max(elements // 1024, 1), 1024
    if layout == "ntc":
        tokens, width = (128, 512) if elements >= 2**18 else (32, 256)
        return max(elements // (tokens * width), 1), tokens, width
    side = 32 if elements >= 2**18 else 16
    return max(elements // (64 * side * side), 1), 64, side, side


def random(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normals in that layout."""
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def channel_dim(layout: str) -> int:
    return -1 if layout == "ntc" else 1


# --- calls -----------------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def gradient_call(output: Tensor, inputs: list[Tensor], grad: Tensor) -> Call:
    """A backward pass that can be repeated, autograd's own overhead included."""
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


@contextmanager
def retained_graphs() -> Iterator[None]:
    """Let compiled backward passes run more than once: by default they may overwrite what they saved."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield
