"""Wrong calls of the public Python API: the exception, the argument it names, and that nothing changed.

What only an op's kernels can tell (every backend, same words) is in tests/cuda/op_table.py; the command line's in
tests/recipes/test_train.py; damaged files in tests/training/test_hostile_checkpoints.py.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import demp_kernels as dk

F = dk.functional
X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
DTYPES = "float32, bfloat16, float16 or float64, got"

NO_TENSORS: dict[str, tuple[Any, type, str]] = {
    "None": (None, TypeError, "must be a tensor, got NoneType"),
    "list": ([1.0], TypeError, "must be a tensor, got list"),
    "number": (1.0, TypeError, "must be a tensor, got float"),
    "array": (X.numpy(), TypeError, "must be a tensor, got ndarray"),
    "sparse": (X.to_sparse(), ValueError, "must be a dense tensor, got sparse_coo"),
    "csr": (torch.eye(3).to_sparse_csr(), ValueError, "must be a dense tensor, got sparse_csr"),
    "nested": (torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(3, 3)]), ValueError, "must be a dense tensor, got a nested"),
    "mkldnn": (X.to_mkldnn(), ValueError, "must be a dense tensor, got _mkldnn"),
}
WRONG_DTYPES = {
    "int32": X.int(), "bool": X > 0, "complex64": X.to(torch.complex64), "float8_e4m3fn": X.to(torch.float8_e4m3fn),
    "quint8": torch.quantize_per_tensor(X, 0.1, 0, torch.quint8),
}
FUNCTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "relu": ("activation: x", F.relu),
    "relu_": ("activation: x", F.relu_),
    "leaky_relu": ("activation: x", F.leaky_relu),
    "leaky_relu_": ("activation: x", F.leaky_relu_),
    "gelu": ("activation: x", F.gelu),
    "silu": ("activation: x", F.silu),
    "norm_act": ("norm_act: x", F.norm_act),
    "weight_noise_": (r"weight_noise_: tensors\[0\]", lambda x: F.weight_noise_([x], 0.1)),
}
RESIDUALS = {
    **{name: case for name, case in NO_TENSORS.items() if name != "None"},
    "dtype": (X.double(), ValueError, "must be like x"),
    "shape": (X[:, :2], ValueError, "must be like x"),
    "device": (X.to("meta"), ValueError, "must be on cpu, got meta"),
}


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def mask(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool, **options)


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_dense_tensor(function: str, kind: str) -> None:
    argument, call = FUNCTIONS[function]
    value, error, text = NO_TENSORS[kind]
    with pytest.raises(error, match=f"^{argument} {text}"):
        call(value)


@pytest.mark.parametrize("dtype", WRONG_DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_dtypes(function: str, dtype: str) -> None:
    argument, call = FUNCTIONS[function]
    with pytest.raises(ValueError, match=f"^{argument} must be {DTYPES} {dtype}"):
        call(WRONG_DTYPES[dtype])


@pytest.mark.parametrize("kind", RESIDUALS)
def test_residuals(kind: str) -> None:
    value, error, text = RESIDUALS[kind]
    with pytest.raises(error, match=f"^norm_act: residual {text}"):
        F.norm_act(X, residual=value)


@pytest.mark.parametrize("name", ["x", "index", "inverse"])
@pytest.mark.parametrize("kind", [kind for kind in NO_TENSORS if kind != "csr"])
def test_channel_select(name: str, kind: str) -> None:
    value, error, text = NO_TENSORS[kind]
    right = {"x": X, "index": torch.tensor([0]), "inverse": torch.tensor([0, -1, -1])}
    with pytest.raises(error, match=f"^channel_select: {name} ({text}|must be a 1-D int64 tensor)"):
        F.channel_select(**{**right, name: value})


CALLS: list[tuple[str, Callable[[], Any], type, str]] = [
    # functions: numbers and seeds
    ("dim", lambda: F.relu(X, 9), ValueError, "activation: channel_dim must be"),
    ("dim below", lambda: F.relu(X, -9), ValueError, "activation: channel_dim must be"),
    ("dim float", lambda: F.relu(X, 1.5), TypeError, "activation: channel_dim must be an integer, got 1.5"),
    ("dim text", lambda: F.silu(X, "a"), TypeError, "activation: channel_dim must be an integer, got 'a'"),
    ("dim None", lambda: F.gelu(X, channel_dim=None), TypeError, "activation: channel_dim must be an integer, got None"),
    ("dims", lambda: F.relu(torch.randn(3)), ValueError, r"activation: x must have a channel dimension, got shape \(3,\)"),
    ("scalar", lambda: F.relu_(torch.tensor(1.0)), ValueError, r"activation: x must have a channel dimension, got shape \(\)"),
    ("noise", lambda: F.relu(X, 1, -1.0), ValueError, "activation: noise_std must be finite and >= 0, got -1"),
    ("noise nan", lambda: F.relu(X, 1, float("nan")), ValueError, "activation: noise_std must be finite and >= 0, got nan"),
    ("noise inf", lambda: F.relu(X, 1, float("inf")), ValueError, "activation: noise_std must be finite and >= 0, got inf"),
    ("noise text", lambda: F.relu(X, 1, "a"), TypeError, "activation: noise_std must be a number, got 'a'"),
    ("noise None", lambda: F.relu_(X.clone(), 1, None), TypeError, "activation: noise_std must be a number, got None"),
    ("seed text", lambda: F.relu(X, 1, 0.1, "a"), TypeError, "activation: seed must be an integer, got 'a'"),
    ("seed float", lambda: F.relu(X, 1, 0.1, 1.5), TypeError, "seed must be an integer, got 1.5"),
    ("seed large", lambda: F.relu(X, 1, 0.1, 2**70), ValueError, "activation: seed must fit into 64 bits"),
    ("seed shape", lambda: F.relu(X, 1, 0.1, torch.tensor(3)), ValueError, r"activation: seed must be int64 of shape \(1,\)"),
    ("seeds", lambda: F.relu(X, 1, 0.1, torch.tensor([1, 2])), ValueError, r"activation: seed must be int64 of shape \(1,\)"),
    ("seed dtype", lambda: F.relu(X, 1, 0.1, torch.tensor([1.0])), ValueError, "activation: seed must be int64"),
    ("slope text", lambda: F.leaky_relu(X, "a"), TypeError, "activation: slope must be a number, got 'a'"),
    ("slope None", lambda: F.leaky_relu_(X.clone(), None), TypeError, "activation: slope must be a number, got None"),
    ("slope nan", lambda: F.leaky_relu(X, float("nan")), ValueError, "activation: slope must be finite, got nan"),
    ("slope inf", lambda: F.leaky_relu_(X.clone(), float("inf")), ValueError, "activation: slope must be finite, got inf"),
    ("norm slope nan", lambda: F.norm_act(X, activation="leaky_relu", slope=float("nan")), ValueError,
     "norm_act: slope must be finite, got nan"),
    ("slope 0", lambda: F.leaky_relu_(X.clone(), 0.0), ValueError, "activation: slope must be > 0 in place, got 0"),
    ("approximate", lambda: F.gelu(X, "erf"), ValueError, "gelu: approximate must be none or tanh, got erf"),
    ("overlap", lambda: F.relu_(torch.randn(1, 3, 1, 1).expand(4, 3, 5, 5)), RuntimeError, "more than one element"),
    ("norm one value", lambda: F.norm_act(torch.randn(1, 3)), ValueError, "norm_act: x must have more than one value"),
    ("norm dims", lambda: F.norm_act(torch.randn(3)), ValueError, r"norm_act: x must have shape \(N, C, \*\)"),
    ("norm weight", lambda: F.norm_act(X, torch.ones(4)), ValueError, r"norm_act: weight must have shape \(3,\)"),
    ("norm bias", lambda: F.norm_act(X, None, torch.ones(3).int()), ValueError, r"norm_act: bias must have shape \(3,\) and dtype"),
    ("norm activation", lambda: F.norm_act(X, activation="tanh"), ValueError, "norm_act: activation must be one of relu"),
    ("norm eps", lambda: F.norm_act(X, eps=0.0), ValueError, "norm_act: eps must be finite and > 0, got 0"),
    ("norm eps text", lambda: F.norm_act(X, eps="a"), TypeError, "norm_act: eps must be a number, got 'a'"),
    ("norm noise", lambda: F.norm_act(X, noise_std=-1.0), ValueError, "norm_act: noise_std must be finite and >= 0, got -1"),
    ("weights std", lambda: F.weight_noise_([X.clone()], -1.0), ValueError, "weight_noise_: std must be"),
    ("weights std text", lambda: F.weight_noise_([X.clone()], "a"), TypeError, "weight_noise_: std must be a number, got 'a'"),
    ("weights live", lambda: F.weight_noise_([X.clone()], 0.1, [mask(3)]), ValueError, r"weight_noise_: live\[0\]"),
    ("weights lives", lambda: F.weight_noise_([X.clone()], 0.1, []), ValueError, "weight_noise_: live"),
    ("select dim", lambda: F.channel_select(torch.randn(3), torch.tensor([0]), torch.tensor([0])), ValueError,
     "channel_select: channel_dim must be a dimension of x"),
    ("select index", lambda: F.channel_select(X, torch.tensor([0.0]), torch.tensor([0, -1, -1])), ValueError,
     "channel_select: index must be a 1-D int64 tensor"),
    # modules
    ("module noise", lambda: dk.DemPReLU(noise_std=-1), ValueError, "DemPReLU: noise_std must be >= 0 and finite, got -1"),
    ("module noise nan", lambda: dk.DemPSiLU(noise_std=float("nan")), ValueError, "DemPSiLU: noise_std must be >= 0 and finite"),
    ("module noise inf", lambda: dk.DemPGELU(noise_std=float("inf")), ValueError, "DemPGELU: noise_std must be >= 0 and finite"),
    ("module noise text", lambda: dk.DemPReLU(noise_std="a"), TypeError, "DemPReLU: noise_std must be a number, got 'a'"),
    ("module dim", lambda: dk.DemPReLU(channel_dim=1.5), TypeError, "DemPReLU: channel_dim must be an integer, got 1.5"),
    ("module slope nan", lambda: dk.DemPLeakyReLU(float("nan")), ValueError, "DemPLeakyReLU: negative_slope must be finite, got nan"),
    ("module slope", lambda: dk.DemPLeakyReLU("x"), TypeError, "DemPLeakyReLU: negative_slope must be a number, got 'x'"),
    ("module approximate", lambda: dk.DemPGELU("erf"), ValueError, "DemPGELU: approximate must be 'none' or 'tanh', got 'erf'"),
    ("module input", lambda: dk.DemPReLU()(torch.randn(3)), ValueError, "activation: x must have a channel dimension"),
    ("fused activation", lambda: dk.DemPBatchNormAct2d(3, activation="tanh"), ValueError, "DemPBatchNormAct2d: activation must be one of"),
    ("fused plain", lambda: dk.DemPBatchNormAct2d(3, activation=nn.ReLU()), ValueError, "DemPBatchNormAct2d: activation must be a DemP"),
    ("fused 3-D", lambda: dk.DemPBatchNormAct2d(3)(torch.randn(2, 3, 4)), ValueError, r"expected 4D input \(got 3D input\)"),
    ("fused channels", lambda: dk.DemPBatchNormAct2d(4)(X), ValueError, "norm_act: weight must have shape"),
    ("selection", lambda: dk.SelectiveAdd().set_selection(torch.tensor([0.0])), ValueError, "SelectiveAdd: index must be a 1-D int64"),
    ("selection range", lambda: dk.SelectiveAdd().set_selection(torch.tensor([3]), 2), ValueError, "SelectiveAdd: index must lie in"),
    # preparation and the way back
    *[(f"prepare {type(m).__name__}", lambda m=m: dk.prepare(m, X), TypeError, "prepare: model must be an nn.Module, got")
      for m in (None, "net", X, nn.ReLU)],
    *[(f"swap {type(m).__name__}", lambda m=m: dk.swap_activations(m), TypeError, "swap_activations: model must be an nn.Module, got")
      for m in (None, "net", X, nn.ReLU)],
    *[(f"finalize {type(m).__name__}", lambda m=m: dk.finalize(m), TypeError, "finalize: model must be an nn.Module, got")
      for m in (None, "net", X, nn.ReLU)],
    *[(f"prepare inputs {type(i).__name__}", lambda i=i: dk.prepare(net(), i), TypeError, "example_inputs must be a tensor or a")
      for i in (None, "a", (), {"x": X})],
    ("prepare shape", lambda: dk.prepare(net(), torch.randn(2, 5, 8, 8)), dk.PrepareError, "does not run on the example inputs"),
    ("prepare dtype", lambda: dk.prepare(net(), X.long()), dk.PrepareError, "does not run on the example inputs"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, text", [pytest.param(*case[1:], id=case[0]) for case in CALLS])
def test_calls(call: Callable[[], Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        call()


class Subject:
    """A prepared network with an optimiser that has state, and what they were."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = dk.prepare(net(), X)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(X).sum().backward()
        self.optimizer.step()
        self.name = next(iter(dk.UnitGraph.trace(self.model, X).units))
        self._before = self._all()

    def _all(self) -> Any:
        gradients = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        modes = [module.training for module in self.model.modules()]
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), gradients, modes))

    def check_unchanged(self) -> None:
        after = self._all()
        assert after[3] == self._before[3]
        torch.testing.assert_close(after[:3], self._before[:3], rtol=0, atol=0)


@pytest.fixture
def subject() -> Subject:
    return Subject()


COMPACT: list[tuple[str, dict[str, Any], type, str]] = [
    ("unknown", {"dead": {"other": mask(8)}}, ValueError, "dead: names must be activations of the model"),
    ("length", {"dead": {"NAME": mask(7)}}, ValueError, r"must have shape \(8,\), got \(7,\)"),
    ("dims", {"dead": {"NAME": mask(8, 1)}}, ValueError, r"must have shape \(8,\), got \(8, 1\)"),
    ("dtype", {"dead": {"NAME": torch.zeros(8)}}, TypeError, "must be a bool tensor, got torch.float32"),
    ("list", {"dead": {"NAME": [True] * 8}}, TypeError, "must be a bool tensor, got list"),
    ("None", {"dead": {"NAME": None}}, TypeError, "must be a bool tensor, got NoneType"),
    ("meta", {"dead": {"NAME": mask(8, device="meta")}}, ValueError, "must be a dense tensor with values"),
    ("sparse", {"dead": {"NAME": mask(8).to_sparse()}}, ValueError, "must be a dense tensor with values"),
    ("no mapping", {"dead": [1]}, TypeError, "dead must map names of activations to bool tensors, got list"),
    ("text", {"dead": "all"}, TypeError, "dead must map names of activations to bool tensors, got str"),
    ("optimizer", {"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, a list of them or None, got str"),
    ("optimizers", {"optimizer": ["adam"]}, TypeError, "optimizer must be a torch.optim.Optimizer, a list of them or None, got str"),
    ("model for optimizer", {"optimizer": nn.ReLU()}, TypeError, "optimizer must be a torch.optim.Optimizer"),
    *[(f"round_to {v}", {"round_to": v}, ValueError, "round_to must be an integer >= 1, got") for v in (0, -8, 1.5, "x", None, True)],
    *[(f"min_units {v}", {"min_units": v}, ValueError, "min_units must be an integer >= 1, got") for v in (0, 1.5, None, True)],
    ("graph", {"graph": 1}, TypeError, "graph must be a UnitGraph, got int"),
    ("followers", {"followers": 1}, TypeError, "followers must be a module or a list of modules, got int"),
    ("follower", {"followers": ["ema"]}, TypeError, "followers must be a module or a list of modules, got str"),
    ("graph of another", {"graph": dk.UnitGraph.trace(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(2, 3)),
                          "dead": {"1": mask(5) | (torch.arange(5) < 2)}}, ValueError, "graph must be that of the model"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, text", [pytest.param(*case[1:], id=case[0]) for case in COMPACT])
def test_compact(subject: Subject, options: dict[str, Any], error: type, text: str) -> None:
    given = {"optimizer": subject.optimizer, "dead": {subject.name: torch.arange(8) < 3}, **options}
    if isinstance(given["dead"], dict):
        given["dead"] = {subject.name if name == "NAME" else name: value for name, value in given["dead"].items()}
    with pytest.raises(error, match=text):
        dk.compact(subject.model, **given)
    subject.check_unchanged()


DEMP: list[tuple[str, list[Any], type, str]] = [
    ("total_steps", [0, -1], ValueError, "must be >= 1 and finite, got"),
    ("total_steps", [1.5, "a", None, True], TypeError, "must be an integer >= 1, got"),
    ("peak_penalty", [-1, float("nan"), float("inf")], ValueError, "must be >= 0.0 and finite, got"),
    ("peak_penalty", ["a", None], TypeError, "must be a number >= 0.0, got"),
    ("peak_noise", [-1, float("nan"), float("inf")], ValueError, "must be >= 0.0 and finite, got"),
    ("peak_noise", ["a"], TypeError, "must be a number >= 0.0, got"),
    ("prune_every", [0, -2], ValueError, "must be >= 1 and finite, got"),
    ("prune_every", [1.5, "a", None], TypeError, "must be an integer >= 1, got"),
    ("prune_after", [-1], ValueError, "must be >= 0 and finite, got"),
    ("prune_after", [1.5], TypeError, "must be an integer >= 0, got"),
    ("ramp_steps", [0, -3], ValueError, "must be >= 1 and finite, got"),
    ("ramp_steps", [1.5, "a"], TypeError, "must be an integer >= 1, got"),
    ("schedule", ["x", None, 3], ValueError, "must be one of one_cycle"),
    ("criterion", ["x", None], ValueError, "must be one of window, scan, got"),
    ("criterion", ["scan"], ValueError, "requires scan_batches, got None"),
    ("penalty_norm", ["x", None], ValueError, "must be one of l1, l2, positive, got"),
    ("penalty_on", ["x", None], ValueError, "must be one of scales"),
    ("min_units", [0], ValueError, "must be >= 1 and finite, got"),
    ("seed", ["a", 1.5], TypeError, "must be an integer, got"),
    ("seed", [2**70], ValueError, "must fit into 64 bits, got"),
    ("on_dead", ["x", None], ValueError, "must be one of remove, recycle, report, got"),
    ("optimizer", [None, "adam", ["adam"], nn.ReLU()], TypeError, "must be a torch.optim.Optimizer or a list of them, got"),
    ("model", [None, "net", nn.ReLU], TypeError, "must be an nn.Module, got"),
]


@pytest.mark.parametrize("name, value, error, text", [(n, v, e, t) for n, values, e, t in DEMP for v in values])
def test_demp(subject: Subject, name: str, value: Any, error: type, text: str) -> None:
    given = {"model": subject.model, "optimizer": subject.optimizer, "total_steps": 3, name: value}
    with pytest.raises(error, match=f"{name}.*{text}"):
        dk.DemP(given.pop("model"), given.pop("optimizer"), **given)
    subject.check_unchanged()


@pytest.mark.parametrize(
    "call, error, text",
    [
        pytest.param(lambda s, p: dk.save_checkpoint(None, s.model), TypeError, "os.PathLike", id="path None"),
        pytest.param(lambda s, p: dk.save_checkpoint(3, s.model), TypeError, "os.PathLike", id="path number"),
        pytest.param(lambda s, p: dk.save_checkpoint(p / "no" / "a.pt", s.model), FileNotFoundError, "not written", id="no folder"),
        pytest.param(lambda s, p: dk.save_checkpoint(p, s.model), IsADirectoryError, "not written", id="a folder"),
        pytest.param(lambda s, p: dk.save_checkpoint(p / "a.pt", "m"), TypeError, "model must be an nn.Module, got str", id="model"),
        pytest.param(lambda s, p: dk.save_checkpoint(p / "a.pt", s.model, "o"), TypeError, "optimizer must be", id="optimizer"),
        pytest.param(lambda s, p: dk.save_checkpoint(p / "a.pt", s.model, None, "d"), TypeError, "demp must be a DemP", id="demp"),
        pytest.param(lambda s, p: dk.load_checkpoint(p / "a.pt", s.model), FileNotFoundError, "a.pt", id="no file"),
        pytest.param(lambda s, p: dk.load_checkpoint(p, s.model), OSError, "directory", id="load a folder"),
        pytest.param(lambda s, p: dk.shrink_to(None, {}), TypeError, "model must be an nn.Module, got NoneType", id="shrink None"),
        pytest.param(lambda s, p: dk.shrink_to(s.model, [1]), TypeError, "state_dict must be a mapping of tensors, got list", id="shrink list"),
        pytest.param(lambda s, p: dk.shrink_to(s.model, {}), dk.CompactionError, "must have 0.weight", id="shrink empty"),
    ],
)  # fmt: skip
def test_files(subject: Subject, tmp_path: Path, call: Callable[[Subject, Path], Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        call(subject, tmp_path)
    subject.check_unchanged()
    assert list(tmp_path.iterdir()) == []
