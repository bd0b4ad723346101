"""Carrying a plan out: everything that can fail first, then tensor by tensor."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.compact import compact as compact_op
from ..ops.compact import compact_ as compact_in_place_op
from ..ops.out_of_memory import is_out_of_memory
from ..reference import memory_format
from ..strided import avoid_broken_kernel
from .optimizer import StateCut
from .plan import Cut, Plan

__all__ = ["commit"]

MOVE_BYTES = 32 << 20
"""A new tensor of this size or more shrinks within its old memory: glibc maps fresh pages for it, whatever was freed before
(DEFAULT_MMAP_THRESHOLD_MAX), and the first touch of a page costs four times what copying it does. Smaller ones take the
memory that the batch before them gave back: resnet18's commit takes 12 ms of CPU time so, and 18 in place, since giving
back the pages behind costs 0.11 ms a MB; vgg16_bn's 153 ms in place, and 287 in new memory."""
BATCH_BYTES = 1 << 20
"""Smaller tensors are gathered together up to this many bytes, or up to the largest new tensor's."""


@dataclass
class _Job:
    """One tensor to be cut, and what takes its new content."""

    tensor: Tensor
    cut: Cut
    put: Callable[[Tensor], None]
    shape: tuple[int, ...]
    nbytes: int
    is_gradient: bool = False

    def replace(self, content: Tensor) -> None:
        """Put the new content in place, with strides of the old one's layout, and let go of the old one."""
        if content.dim() in (4, 5) and _one_order(content):
            content = content.as_strided(self.shape, _strides(self.tensor, self.shape))
        self.put(content)
        self.tensor = content


@torch.no_grad()
def commit(plan: Plan, states: Sequence[StateCut]) -> int:
    """Shrink parameters, buffers, gradients and optimiser state. Returns the bytes freed.

    Parameters and buffers stay the same objects, with hooks and requires_grad. Three kinds of tensors:

    - Those whose memory somebody else looks at (a saved activation graph, a view, a bucket of gradients, another
      process), that are not dense, or whose cut is no matter of rows and columns alone are gathered into new memory.
    - Large ones on the CPU shrink in place: what stays moves to the front, the pages behind go back to the system, and
      the new storage ends where the content does.
    - All others are gathered batch by batch, and each batch's old memory goes before the next one's is taken. The memory
      needed besides is that of one batch: at most the largest new tensor's, or a mebibyte.

    Whatever can run out of memory happens before the first change: the first kind's gathers, and taking one batch's worth
    of memory, which is given back at once. Should the memory for a later batch be gone all the same (another process took
    it), that batch shrinks in place, which needs none on the CPU, and a row's worth elsewhere.
    """
    jobs = _jobs(plan, states)
    own = [job for job in jobs if _own_memory(job.tensor, job.cut)]
    mine = {id(job) for job in own}
    shared = [job for job in jobs if id(job) not in mine]
    prepared = gather([(job.tensor, job.cut) for job in shared])
    moved = [job for job in own if job.tensor.device.type == "cpu" and job.nbytes >= MOVE_BYTES]
    moving = {id(job) for job in moved}
    limit = max([BATCH_BYTES, *(job.nbytes for job in own)])
    batches = list(_batches([job for job in own if id(job) not in moving], limit))
    for device in {job.tensor.device for job in own}:
        torch.empty(limit, dtype=torch.uint8, device=device)

    for cut in plan.cuts:
        cut.tensor.grad = None  # a parameter takes a content of another shape only without
    freed = 0
    for job, content in zip(shared, prepared):
        freed += job.tensor.nbytes - content.nbytes
        if not job.is_gradient:
            job.replace(content)
    if moved:
        compact_in_place_op(*_arguments(moved))
    for job in moved:
        freed += job.tensor.nbytes - job.nbytes
        job.replace(_front(job.tensor, job.shape))
    for batch in batches:
        freed += _exchange(batch)
    for job, content in zip(shared, prepared):
        if job.is_gradient:  # by now its parameter has the new shape, whichever way that went
            job.replace(content)
    torch.clear_autocast_cache()  # within an autocast it holds copies of weights as they were
    _finish(plan)
    return freed


def _jobs(plan: Plan, states: Sequence[StateCut]) -> list[_Job]:
    """Parameters and buffers, then gradients, then optimiser state: a gradient needs its parameter's new shape."""
    jobs = []

    def add(tensor: Tensor, cut: Cut, shape: tuple[int, ...], put: Callable[[Tensor], None], is_gradient: bool = False) -> None:
        jobs.append(_Job(tensor, cut, put, shape, math.prod(shape) * tensor.element_size(), is_gradient))

    for cut in plan.cuts:
        add(cut.tensor, cut, cut.shape, _content_of(cut.tensor))
    for cut in plan.cuts:
        if cut.tensor.grad is not None:
            add(cut.tensor.grad, cut, cut.shape, _gradient_of(cut.tensor), is_gradient=True)
    for state in states:
        add(state.state[state.key], state.cut, state.cut.shape, state.put)
    return jobs


def _content_of(tensor: Tensor) -> Callable[[Tensor], None]:
    return lambda content: replace_content(tensor, content)


def _gradient_of(parameter: Tensor) -> Callable[[Tensor], None]:
    return lambda gradient: setattr(parameter, "grad", gradient)


_NOTHING: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def replace_content(tensor: Tensor, content: Tensor) -> None:
    """Give a parameter or buffer another content and shape; object, hooks and flags stay."""
    if tensor.requires_grad:
        # A graph that is still alive (a loss kept for logging) holds the parameter's gradient accumulator with the old
        # shape, and autograd would hand it out again. It drops an accumulator only when dtype or device change.
        other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
        key = (other, tensor.device)
        if key not in _NOTHING:
            _NOTHING[key] = torch.empty(0, dtype=other, device=tensor.device)
        tensor.data = _NOTHING[key]
    tensor.data = content


_use_count = getattr(torch._C, "_storage_Use_Count", None)


def _own_memory(tensor: Tensor, cut: Cut) -> bool:
    """Whether nobody else sees the tensor's memory, and the cut can be made by moving rows and columns within it."""
    if cut.blocks is not None or max(cut.index) > 1 or _use_count is None:
        return False
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return False
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=memory_format(tensor))):
        return False
    storage = tensor.untyped_storage()
    # 2: the tensor and the Python object `storage`. A view or a graph's saved tensor counts one more.
    if _use_count(storage._cdata) != 2 or storage.nbytes() != tensor.nbytes:
        return False
    return not tensor.is_cpu or not (storage.is_shared() or tensor.is_pinned())


def _batches(jobs: Iterable[_Job], limit: int) -> Iterator[list[_Job]]:
    """Jobs in their order, cut into stretches of one device and at most `limit` bytes of new memory."""
    batch: list[_Job] = []
    size = 0
    for job in jobs:
        if batch and (size + job.nbytes > limit or job.tensor.device != batch[0].tensor.device):
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job.nbytes
    if batch:
        yield batch


def _arguments(jobs: Sequence[_Job]) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    return (
        [job.tensor.detach() for job in jobs],
        [_beside(job.tensor, job.cut.index.get(0)) for job in jobs],
        [_beside(job.tensor, job.cut.index.get(1)) for job in jobs],
    )


def _beside(tensor: Tensor, index: Tensor | None) -> Tensor | None:
    """A cut's index on the device of what is cut: optimiser state may lie elsewhere than its parameter (offloaded moments)."""
    return None if index is None else index.to(tensor.device)


def _exchange(batch: Sequence[_Job]) -> int:
    """Gather one batch and put it in place. Returns the bytes freed."""
    arguments = _arguments(batch)
    try:
        contents = compact_op(*arguments)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        compact_in_place_op(*arguments)
        contents = [_front(job.tensor.detach(), job.shape) for job in batch]
    freed = sum(job.tensor.nbytes for job in batch) - sum(content.untyped_storage().nbytes() for content in contents)
    arguments[0].clear()  # the old memory goes as its tensor takes the new content
    for job, content in zip(batch, contents):
        job.replace(content)
    return freed


def _strides(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor of this shape in the given one's layout."""
    return torch.empty(shape, device="meta", memory_format=_layout(tensor)).stride()


def _layout(tensor: Tensor) -> torch.memory_format:
    """The memory format, of a tensor that is in both the one that its strides say: convolutions look at these. If it
    depended on the way by which a weight came to its shape, a resumed run would round otherwise."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if channels_last is None or not _one_order(tensor):
        return memory_format(tensor)
    said = torch.empty(tensor.shape, device="meta", memory_format=channels_last).stride()
    plain = torch.empty(tensor.shape, device="meta").stride()
    return channels_last if tensor.stride() == said != plain else torch.contiguous_format


def _one_order(tensor: Tensor) -> bool:
    """Whether contiguous and channels_last are the same order of elements: one channel, or one place."""
    return tensor.is_contiguous() and (tensor.shape[1] == 1 or tensor.shape[2:].numel() == 1)


def _front(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The front of a tensor's memory as a tensor, on the CPU with a storage of just its size. The whole block lives as long
    as it, but what lies behind has no pages."""
    if tensor.device.type != "cpu":
        return tensor.detach().as_strided(tuple(shape), _strides(tensor, shape))
    whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
    front = whole.numpy()[: math.prod(shape) * tensor.element_size()]
    return torch.from_numpy(front).view(tensor.dtype).as_strided(tuple(shape), _strides(tensor, shape))


def _finish(plan: Plan) -> None:
    """Constants of removed units, selections, attributes, counters, and kernels that the widths rule out."""
    for shift in plan.shifts:
        shift.tensor[shift.at].add_(shift.by.to(shift.tensor.dtype))
    for change in plan.selections:
        change.module.keep_channels(change.out, change.skip)
    for module, attribute, value in plan.attributes:
        setattr(module, attribute, value)
    for module, kept in plan.counters:
        if kept is None:
            module.active = module.seen = None
        else:
            module.select_units(kept)
    for module in plan.modules:
        avoid_broken_kernel(module)


@dataclass
class _Piece:
    """One source of the `compact` op, and the shape in which its result is part of job `job`."""

    job: int
    source: Tensor
    rows: Tensor | None
    columns: Tensor | None
    shape: list[int] | None = None


def gather(jobs: Sequence[tuple[Tensor, Cut]]) -> list[Tensor]:
    """Cut each tensor, in one call of the `compact` op for each device. The new tensors share nothing with the old."""
    pieces: list[_Piece] = []
    for number, (tensor, cut) in enumerate(jobs):
        tensor = tensor.detach()
        if cut.blocks is not None:
            pieces += [_Piece(number, tensor, _beside(tensor, rows), _beside(tensor, columns)) for rows, columns in cut.blocks]
        elif max(cut.index) <= 1:
            rows, columns = (_beside(tensor, cut.index.get(dim)) for dim in (0, 1))
            pieces.append(_Piece(number, tensor, rows, columns))
        else:
            pieces.append(_further_back(number, tensor, {dim: index.to(tensor.device) for dim, index in cut.index.items()}))
    parts: list[list[Tensor]] = [[] for _ in jobs]
    for device in {piece.source.device for piece in pieces}:
        here = [piece for piece in pieces if piece.source.device == device]
        found = compact_op([p.source for p in here], [p.rows for p in here], [p.columns for p in here])
        for piece, result in zip(here, found):
            parts[piece.job].append(result if piece.shape is None else result.view(piece.shape))
    return [part[0] if len(part) == 1 else torch.cat(part) for part in parts]


def _further_back(number: int, tensor: Tensor, index: dict[int, Tensor]) -> _Piece:
    """A dimension further back than the second: the middle one of three is a column."""
    *others, last = sorted(index)
    for dim in others:
        tensor = tensor.index_select(dim, index[dim])
    before, after = tensor.shape[:last], tensor.shape[last + 1 :]
    flat = tensor.reshape(math.prod(before), tensor.shape[last], math.prod(after))
    return _Piece(number, flat, None, index[last], [*before, index[last].numel(), *after])
