"""The torch-free host module `_host`, and what stands in where it was not built."""
from __future__ import annotations

from dataclasses import dataclass

from . import build_record

try:
    from . import _host

    import_error = ""
except ImportError as error:
    _host = None  # type: ignore[assignment]
    file = build_record.library_file("_host")
    import_error = f"{file.name} cannot be loaded: {error}" if file else build_record.missing_reason("_host")


@dataclass(frozen=True)
class AllocatorTuning:
    """Whether `tune_allocator` took; true where it did."""

    applied: bool
    reason: str
    """Why not; empty when applied."""

    def __bool__(self) -> bool:
        return self.applied


def tune_allocator() -> AllocatorTuning:
    """Make the C library keep freed memory for the next large tensor, for the rest of the process.

    By default glibc takes every block above a threshold (32 MiB at most) fresh from the kernel and gives it back when it
    is freed, so the large activations of each training step fault in page by page. This sets M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD and M_TOP_PAD high. The price: the process does not return the memory of its largest step until
    it ends. Affects tensors on the CPU only. Does nothing, and says why, on other C libraries (musl), with another
    allocator preloaded, or where the host module was not built.

    Where the kernel gives huge pages on request (/sys/kernel/mm/transparent_hugepage/enabled: madvise), setting
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the process starts makes glibc ask for them: 2% of a ResNet-18 step, a
    quarter of the time of ops that are limited by memory (Zen 4 in a virtual machine).
    """
    if _host is None:
        return AllocatorTuning(False, f"the host module is not there: {import_error}")
    return AllocatorTuning(*_host.tune_allocator())


def simd_level() -> str:
    """The instruction set that the CPU kernels choose here: avx512, avx2, neon, portable, or unknown."""
    return "unknown" if _host is None else _host.simd_level()


def cpu_features() -> dict[str, bool]:
    """CPU features that matter to the kernels, by name; empty where the host module was not built."""
    return {} if _host is None else _host.cpu_features()
