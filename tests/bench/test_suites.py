"""Cases: what is in them, that every alternative runs and does the same work, that they become rows."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from demp_kernels.bench.cases import VARIANTS, Case, Scope, random, shape_for
from demp_kernels.bench.runner import Budget, run_case, thread_counts, threads
from demp_kernels.bench.suites import SUITES
from demp_kernels.bench.suites.activation import ActivationCase
from demp_kernels.bench.suites.dispatch import DispatchCase
from demp_kernels.bench.suites.norm_act import NormActCase
from demp_kernels.bench.timing import measure
from demp_kernels.ops import backend

CPU = torch.device("cpu")
CACHE = 2**25
QUICK = [case for cases in SUITES.values() for case in cases(Scope(CACHE, quick=True))]
SMALL = (2, 8, 4, 4)


def test_sizes_go_from_cached_to_four_times_the_cache() -> None:
    assert Scope(2**25).sizes == (2**16, 2**20, 2**23, 2**25, 2**27)
    assert Scope(36 * 2**20).sizes[-1] == 2**27, "rounded to a power of two"
    assert Scope(2**40).sizes[-1] == Scope.LARGEST
    assert Scope(2**21).sizes == tuple(sorted(set(Scope(2**21).sizes)))


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "nc", "ntc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_shapes_have_the_wanted_bytes(layout: str, dtype: torch.dtype) -> None:
    for size in (2**16, 2**20, 2**27):
        shape = shape_for(layout, dtype, size)
        found = torch.Size(shape).numel() * dtype.itemsize
        assert found == size or (found == 2 * size and size == 2**16), "a single image of float64 is twice the smallest size"
    x = random(shape_for(layout, dtype, 2**16), layout, dtype, CPU)
    assert x.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@pytest.mark.parametrize("scope", [Scope(CACHE), Scope(CACHE, full=True), Scope(CACHE, on_gpu=True)], ids=["star", "full", "gpu"])
@pytest.mark.parametrize("op", SUITES)
def test_cases_are_distinct_and_cover_what_is_asked(op: str, scope: Scope) -> None:
    cases = SUITES[op](scope)
    assert len({case.key for case in cases}) == len(cases)
    assert {case.op for case in cases} == {op}
    if scope.on_gpu:
        assert torch.float64 not in {case.dtype for case in cases}
    if op == "activation":
        assert {case.layout for case in cases} == {"nchw", "channels_last", "nc", "ntc"}
        assert {case.direction for case in cases} >= {"forward", "backward"}
        assert {case.noise for case in cases} == {False, True}
        usual = [c for c in cases if (c.function, c.layout, c.dtype, c.direction, c.noise) == ("relu", "nchw", torch.float32, "forward", False)]
        assert {case.input_bytes for case in usual} >= set(scope.sizes)


@pytest.mark.parametrize("case", QUICK, ids=[case.key for case in QUICK])
def test_alternatives_run(case: Case) -> None:
    calls = case.variants(CPU, compile=False)
    assert {"copy", "copy_into", "eager", "demp"} <= set(calls) <= set(VARIANTS)
    for call in calls.values():
        call()
        call()


@pytest.mark.parametrize("direction", ["forward", "backward", "in_place"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_activation_alternatives_do_the_same_work(direction: str, layout: str) -> None:
    calls = ActivationCase("relu", layout, torch.float32, SMALL, direction).variants(CPU, compile=False)
    eager, demp = calls["eager"](), calls["demp"]()
    for a, b in zip(eager, demp, strict=True):
        assert torch.equal(a, b)
    plain = calls["plain"]()
    assert torch.equal(plain[0] if direction == "backward" else plain, demp[0])


@pytest.mark.parametrize("function", ["bn+relu", "bn+add+relu"])
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_norm_act_alternatives_do_the_same_work(function: str, direction: str) -> None:
    calls = NormActCase(function, "nchw", torch.float32, SMALL, direction).variants(CPU, compile=False)
    wanted = calls["plain"]()
    for name in ("eager", "demp_unfused", "demp"):
        found = calls[name]()
        pairs = [(wanted, found)] if direction == "forward" else zip(wanted, found, strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bytes_of_backward_count_what_tells_the_sign() -> None:
    case = ActivationCase("relu", "nchw", torch.float32, SMALL, "backward")
    assert case.bytes == 3 * case.input_bytes
    assert replace(case, noise=True).bytes == 2 * case.input_bytes + case.elements // 8
    assert replace(case, direction="forward").bytes == case.copy_bytes == 2 * case.input_bytes
    both = NormActCase("bn+relu", "nchw", torch.float32, SMALL, "both")
    assert both.bytes == 8 * both.input_bytes


def test_rows_of_a_case(machine) -> None:
    case = ActivationCase("relu", "nchw", torch.float32, SMALL, "forward")
    rows = run_case(case, machine, CPU, Budget(0.02, compile=False))
    assert [row.variant for row in rows] == ["copy", "copy_into", "plain", "eager", "demp"]
    for row in rows:
        assert (row.op, row.shape, row.dtype, row.threads) == ("activation", "2x8x4x4", "float32", torch.get_num_threads())
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.peak_bytes == 0 if row.variant == "copy_into" else row.peak_bytes >= case.input_bytes


def test_compiled_alternatives_are_measured(machine) -> None:
    case = ActivationCase("relu", "nchw", torch.float32, SMALL, "backward")
    rows = {row.variant for row in run_case(case, machine, CPU, Budget(0.02, memory=False))}
    assert {"compile", "demp_compile"} <= rows


def test_a_compiler_that_fails_costs_its_rows_only(machine, monkeypatch, caplog) -> None:
    def broken(self, device, *, compile):
        def fail() -> None:
            raise RuntimeError("no compiler")

        return {"copy": lambda: None, "demp": lambda: None, "compile": fail}

    monkeypatch.setattr(ActivationCase, "variants", broken)
    case = ActivationCase("relu", "nchw", torch.float32, SMALL, "forward")
    assert [row.variant for row in run_case(case, machine, CPU, Budget(0.01, memory=False))] == ["copy", "demp"]
    assert "no row for compile: no compiler" in caplog.text


def test_thread_counts() -> None:
    assert [thread_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif("_C" not in backend.loaded, reason="no compiled kernels")
@pytest.mark.parametrize(("direction", "limit"), [("forward", 10), ("both", 6)])
def test_dispatch_costs_a_few_of_pytorch_s(direction: str, limit: float) -> None:
    """Far from the 3.2 and 2.4 that `demp bench dispatch` measured: a call that ends in the reference takes over 15."""
    calls = DispatchCase("relu", "nchw", torch.float32, (2, 8, 2, 2), direction).variants(CPU, compile=False)
    timings = measure({name: calls[name] for name in ("plain", "demp")}, seconds=0.05, device=CPU)
    assert timings["demp"].p20 < limit * timings["plain"].p20
