"""Other libraries that remove channels, on the networks of `demp bench compaction`, where they are installed."""
from __future__ import annotations

import time
import warnings
from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["PEERS", "Peer", "peers_of"]

Peer = Callable[[], float]
"""Removes half of the channels of a new network. Returns the seconds of its analysis, grouping and removal."""


def peers_of(build: Callable[[], nn.Module], images: Tensor) -> dict[str, Peer]:
    """Those of `PEERS` that are installed and can do it, each tried once.

    build: makes the network anew. images: what it takes.
    """
    found = {}
    for name, make in PEERS.items():
        try:
            run = make(build, images)
            run()
        except Exception:  # not there, or whatever it fails on: its column stays empty for this model
            continue
        found[name] = run
    return found


def _torch_pruning(build: Callable[[], nn.Module], images: Tensor) -> Peer:
    import torch_pruning

    def run() -> float:
        model = build().eval()
        heads = [module for module in model.modules() if _is_head(module)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            pruner = torch_pruning.pruner.BasePruner(
                model, images, importance=torch_pruning.importance.MagnitudeImportance(p=1), pruning_ratio=0.5,
                ignored_layers=heads,
            )
            pruner.step()
            return time.perf_counter() - start

    return run


def _torch_kirigami(build: Callable[[], nn.Module], images: Tensor) -> Peer:
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Pruner

    def run() -> float:
        model = build().eval()
        start = time.perf_counter()
        graph = DependencyGraph.build(model, args=(images,))
        every_other = [
            graph.parameter(f"{name}.weight").axis(0).select(range(1, module.weight.shape[0], 2))
            for name, module in model.named_modules()
            if (isinstance(module, nn.Conv2d) and module.groups == 1) or (isinstance(module, nn.Linear) and not _is_head(module))
        ]
        pruner = Pruner(model, graph=graph)
        pruner.apply(pruner.plan_remove(every_other))
        return time.perf_counter() - start

    return run


def _is_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == 1000


PEERS: dict[str, Callable[[Callable[[], nn.Module], Tensor], Peer]] = {
    "torch_pruning": _torch_pruning, "torch_kirigami": _torch_kirigami,
}
"""Neither touches an optimiser. Torch-Pruning scores channels by magnitude; torch-kirigami is told which ones go, since its
own choice of half of resnet18's channels was not done after 150 s (0.2.1)."""
