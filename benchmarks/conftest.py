"""`pytest benchmarks`: every case of `demp bench` as a pytest-benchmark.

What pytest-benchmark times is this package; its alternatives (a copy, eager PyTorch, torch.compile) run in turns with it, in
the setup of each round, and stand in `extra_info` of --benchmark-json as milliseconds and as ratios.
"""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from demp_kernels.bench.cases import Case, Scope, retained_graphs
from demp_kernels.bench.machine import last_level_cache
from demp_kernels.bench.suites import SUITES
from demp_kernels.bench.timing import Timing, block_seconds, calls_a_block
from demp_kernels.build_info import tune_allocator


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("demp_kernels")
    group.addoption("--quick", action="store_true", help="a few small cases without torch.compile")
    group.addoption("--full", action="store_true", help="every layout x dtype x size")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--no-tune", action="store_true", help="leave the C library's allocator as it is")
    group.addoption("--device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--turns", type=int, default=20, help="rounds of each case (default: 20)")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--no-tune"):
        tune_allocator()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        device = torch.device(option("--device"))
        scope = Scope(
            last_level_cache(device), on_gpu=device.type == "cuda", full=option("--full"), quick=option("--quick")
        )
        stem = metafunc.module.__name__.rpartition(".")[2].removeprefix("bench_")
        cases = SUITES[stem](scope)
        metafunc.parametrize("case", cases, ids=[case.key for case in cases])


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Measure a case: this package by pytest-benchmark, the others in turns with it."""
    option = request.config.getoption
    device = torch.device(option("--device"))
    with_compile = not (option("--no-compile") or option("--quick"))

    def run(case: Case) -> None:
        with retained_graphs():
            calls = case.variants(device, compile=with_compile and case.compile)
            demp = calls.pop("demp")
            counts = {name: calls_a_block(call, device) for name, call in calls.items()}
            count = calls_a_block(demp, device)
            samples: dict[str, list[float]] = {name: [] for name in calls}

            def others() -> None:
                for name, call in calls.items():
                    samples[name].append(block_seconds(call, counts[name], device) / counts[name])

            def block() -> None:
                for _ in range(count):
                    demp()
                if device.type == "cuda":
                    torch.cuda.synchronize()

            benchmark.group = f"{case.op} {case.direction}"
            benchmark.pedantic(block, setup=others, rounds=option("--turns"))
        torch.compiler.reset()
        if benchmark.stats is None:  # --benchmark-disable
            return
        own = benchmark.stats.stats.median / count
        benchmark.extra_info |= {"calls_a_round": count, "demp_ms": own * 1e3, "gb_per_s": case.bytes / own / 1e9}
        for name, seconds in samples.items():
            benchmark.extra_info[f"{name}_ms"] = Timing.of(seconds).median * 1e3
            benchmark.extra_info[f"demp_over_{name}"] = own / Timing.of(seconds).median

    return run
