"""One run on several processes, as `torchrun --nproc-per-node N -m demp_kernels train ...` starts them.

A batch is that of the whole run: every rank draws the same one and takes its share of it, so that N processes take the
steps that one process would. BatchNorm's statistics are those of a rank's part of the batch, as DistributedDataParallel has
it (the running ones are rank 0's); with `sync_batchnorm` they are those of the whole batch. Dropout draws the same mask on
every rank, because a checkpoint holds the random state of one.
"""
from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import RecipeError

__all__ = ["Ranks", "Stopped", "announced", "current_ranks", "joined", "local_device"]

ANNOUNCED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes in the environment."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and has, behind the same step on every rank; what was known then is on record."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among how many. Where there is one, nothing is exchanged."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, length: int) -> slice:
        """This rank's part of a batch of `length`."""
        return slice(self.rank * length // self.count, (self.rank + 1) * length // self.count)

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank. The ranks wait for each other, on the host: no GPU has to."""
        if self.count == 1:
            return here
        somewhere = torch.tensor(int(here))
        dist.all_reduce(somewhere, op=dist.ReduceOp.MAX)
        return bool(somewhere)

    def gathered(self, value: Tensor) -> Tensor:
        """(count,): a scalar of each rank."""
        if self.count == 1:
            return value.reshape(1)
        values = [torch.empty_like(value) for _ in range(self.count)]
        dist.all_gather(values, value)
        return torch.stack(values)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """`model` in DistributedDataParallel."""
        return DistributedDataParallel(model) if self.count > 1 else model

    def no_exchange(self, model: nn.Module) -> AbstractContextManager[None]:
        """A backward pass of a `wrapped` model in it leaves the gradients those of this rank, to be added to."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def align_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers for all: the running statistics of each have followed its own share since the last forward."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The others begin when rank 0 is through: it may download or remove what they look at."""
        if not self.first:
            self.any(False)
        yield
        if self.first:
            self.any(False)


def current_ranks() -> Ranks:
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def announced() -> int:
    """How many processes the environment says this one is of. Raises RecipeError if it says so by halves."""
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise RecipeError(f"WORLD_SIZE must be a number of processes, got {os.environ['WORLD_SIZE']!r}") from error
    missing = [name for name in ANNOUNCED if name not in os.environ]
    if count > 1 and missing:
        raise RecipeError(f"WORLD_SIZE={count} must come with {', '.join(missing)}, as torchrun sets them, got none")
    return count


def local_device(device: torch.device) -> torch.device:
    """"cuda" is the GPU of this process: each one of a machine has its own."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if announced() > 1 else 0)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """In the process group that torchrun announces, if it does: NCCL between GPUs, gloo between CPUs.

    After an error the group is left as it is, since the others may be waiting in it: this process ends with the error, and
    torchrun ends the others. A stop is no error: all ranks come to it.
    """
    if announced() == 1:
        yield
        return
    if not dist.is_available():
        raise RecipeError(f"several processes need torch.distributed, which this torch ({torch.__version__}) is without")
    # a 1x1 kernel in channels_last comes out of a removal with the strides of the other layout, the same memory; gradients
    # are copied into the exchange's buckets in either case
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except Stopped:
        _leave()
        raise
    _leave()


def _leave() -> None:
    # Gloo's threads end with the last reference to the group, and a data-parallel wrapper has one for as long as its cycles
    # live. Left to the interpreter's end they run into it: now and then "terminate called" (SIGABRT).
    gc.collect()
    dist.destroy_process_group()
