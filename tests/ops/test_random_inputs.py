"""Every op on random inputs against its reference in float64: counts equal, bits equal where nothing is computed.

Values with NaN, infinities, denormals and huge ones; contiguous, channels_last, permuted, sliced, offset and expanded; sizes
from 0 on; 1, 2 and 5 threads. DEMP_RANDOM_INPUTS sets how many inputs each test tries; a failure prints what made its tensors.

Not seen: other devices (tests/gpu), tensors above MOST elements (test_large_outputs.py, test_counts.py), a reference that is
wrong itself (test_activation.py and test_norm_act.py hold it against PyTorch).
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from random_inputs import FLOATS, Recipe, assert_near, assert_same, bits, recipes, try_inputs
from torch import Tensor

from demp_kernels import functional, reference
from demp_kernels.ops.activation import forward as op
from demp_kernels.ops.activation import is_usable
from demp_kernels.ops.compact import compact, compact_

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu")
NORMALS = 4 * 5.8 * 2**-24
"""The error of the kernels' normals: 4 ulp of the largest there can be."""
ANY = (*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128)
SEEDS = st.integers(-(2**63), 2**63 - 1)
Record = Callable[[str, object], None]


def call(activation: str, x: Tensor, slope: float, channel_dim: int, noise_std: float, seed: int) -> tuple[Tensor, Tensor]:
    arguments = (channel_dim, noise_std, seed)
    if activation == "leaky_relu":
        return functional.leaky_relu(x, slope, *arguments)
    if activation.startswith("gelu"):
        return functional.gelu(x, "tanh" if activation == "gelu_tanh" else "none", *arguments)
    return getattr(functional, activation)(x, *arguments)


def assert_activation_near(activation: str, got: Tensor, exact: Tensor, size: Tensor | float, noise_std: float = 0.0) -> None:
    """size: of what goes in, where the error is relative to that: 1 + tanh(u) and the like cancel where they go to 0."""
    if activation in ("relu", "leaky_relu"):
        return assert_near(got, exact, 0.0, noise_std * NORMALS)
    error = 1e-12 if got.dtype == torch.float64 else 4e-6
    return assert_near(got, exact, error, error / 2 * size + noise_std * NORMALS)


def test_activations(record_property: Record) -> None:
    def check(recipe: Recipe, grad: Recipe, activation: str, slope: float, channel: int, noise_std: float, seed: int) -> None:
        channel %= len(recipe.shape)
        x = recipe.make()
        exact, count, _ = reference.activation_forward(
            x.double(), activation, slope, channel, noise_std, torch.tensor([seed]) if noise_std else None
        )
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y, active = call(activation, leaf, slope, channel, noise_std, seed)
        assert torch.equal(active, count)
        if is_usable(x, channel):  # the op itself, which tiny tensors go around
            seeds = torch.tensor([seed]) if noise_std else None
            direct, again, _ = op(x, activation, slope, channel, noise_std, seeds)
            assert_same(direct, y.detach())
            assert torch.equal(again, count)
        size = torch.where(x.isfinite(), x.double().abs().clamp(max=30), 0)
        assert_activation_near(activation, y.detach(), exact, size, noise_std)

        g = Recipe(recipe.shape, recipe.dtype, grad.layout, grad.values, grad.seed).make()
        y.backward(g)
        if activation in ("relu", "leaky_relu"):
            wanted = torch.where(~(x <= 0), g.double(), g.double() * slope if activation == "leaky_relu" else 0)
        else:
            wanted = reference.activation_backward(g.double(), x.double(), torch.empty(0), activation, slope)
        known = torch.ones_like(x, dtype=torch.bool)
        if activation == "gelu_tanh":  # where x * x overflows, its gradient is NaN, as PyTorch's is
            known = x.double().abs() < torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).max ** 0.5 / 30
        if activation not in ("relu", "leaky_relu"):  # infinity times a slope that float64 alone can tell from 0
            assert not leaf.grad[~g.isfinite()].isfinite().any()
            known &= g.isfinite()
        assert_activation_near(activation, leaf.grad[known], wanted[known], g.double().abs()[known])

        if activation == "relu" or (activation == "leaky_relu" and slope > 0):
            over = x if recipe.layout != "expanded" else x.contiguous()
            again = {"relu": functional.relu_, "leaky_relu": lambda t, *a: functional.leaky_relu_(t, slope, *a)}[activation]
            result, active = again(over, channel, noise_std, seed)
            assert_same(over, y.detach())
            assert result.data_ptr() == over.data_ptr() and torch.equal(active, count)

    try_inputs(
        record_property,
        st.tuples(
            recipes(), recipes((1, 1)), st.sampled_from(ACTIVATIONS), st.sampled_from([0.01, 1.0, 0.0, -0.5, 3.0]), st.integers(0, 4),
            st.sampled_from([0.0, 0.0, 0.7, 1e-4, 50.0]), SEEDS,
        ),
        check,
    )


def test_weight_noise(record_property: Record) -> None:
    def check(made: list[Recipe], masks: list[int], std: float, seed: int) -> None:
        tensors = [recipe.make() for recipe in made]
        before, live = [t.clone() for t in tensors], []
        for t, mask in zip(tensors, masks):
            rows = t.shape[0] if t.dim() else 1
            # none, all of them drawn, a mask that is a view with strides
            drawn = torch.rand(2 * rows, generator=torch.Generator().manual_seed(mask)) < 0.5
            live.append([None, drawn[:rows], drawn[::2]][mask % 3])
        functional.weight_noise_(tensors, std, live, seed)
        wanted = [t.double().clone() for t in before]
        reference.weight_noise_(wanted, live, std, torch.tensor([seed]))
        for t, old, new, rows in zip(tensors, before, wanted, live):
            assert_near(t, new, 0.0, std * NORMALS)
            if rows is not None:
                dead = ~rows if t.dim() else ~rows.view(())
                assert torch.equal(t[dead].signbit() | t[dead].isnan(), old[dead].signbit() | old[dead].isnan())
                assert_same(t[dead], old[dead])

    layouts = ("contiguous", "channels last", "permuted", "sliced", "offset")
    lists = st.integers(0, 5).flatmap(lambda n: st.tuples(
        st.lists(recipes((0, 5), layouts=layouts), min_size=n, max_size=n), st.lists(st.integers(0, 99), min_size=n, max_size=n)
    ))
    drawn = st.tuples(lists, st.sampled_from([0.0, 0.5, 1e-5, 1e3]), SEEDS)
    try_inputs(record_property, drawn.map(lambda d: (*d[0], *d[1:])), check)


def kept(size: int, seed: int, ascending: bool) -> Tensor | None:
    """Which of `size` stay: None, none, or some; unless ascending in any order and repeated."""
    generator = torch.Generator().manual_seed(seed)
    kind = int(torch.randint(5, (), generator=generator))
    if kind == 0:
        return None
    if kind == 1 or size == 0:
        return torch.empty(0, dtype=torch.int64)
    if ascending or kind == 2:
        return (torch.rand(size, generator=generator) < 0.6).nonzero().view(-1)
    index = torch.randint(size, (2 * size,), generator=generator)
    return index[::2] if kind == 3 else index[:size]


def test_compact(record_property: Record) -> None:
    def check(made: list[Recipe], seed: int) -> None:
        sources = [recipe.make() for recipe in made]
        for ascending, use in ((False, sources), (True, [t for t in sources if _is_dense(t)])):
            rows = [kept(t.shape[0], seed + i, ascending) for i, t in enumerate(use)]
            columns = [kept(t.shape[1], seed + 7 * i, ascending) if t.dim() > 1 else None for i, t in enumerate(use)]
            wanted = reference.compact(use, rows, columns)
            got = compact(use, rows, columns)
            for a, b in zip(got, wanted):
                assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
                assert not a.numel() or all(p == q or size == 1 for p, q, size in zip(a.stride(), b.stride(), a.shape))
            if ascending:
                compact_(use, rows, columns)
                for t, b in zip(use, wanted):
                    assert torch.equal(bits(t.as_strided(b.shape, b.stride(), t.storage_offset())), bits(b))

    lists = st.lists(recipes((1, 5), dtypes=ANY), max_size=4)
    try_inputs(record_property, st.tuples(lists, st.integers(0, 2**32)), check)


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=reference.memory_format(t))


def test_channel_select(record_property: Record) -> None:
    def check(recipe: Recipe, channel: int, more: int, seed: int) -> None:
        x, dim = recipe.make(), channel % len(recipe.shape)
        channels, generator = recipe.shape[dim], torch.Generator().manual_seed(seed)
        index = torch.randperm(channels, generator=generator)[: max(channels - more, 0)]
        index = torch.cat([index, torch.full((more,), -1)])[torch.randperm(index.numel() + more, generator=generator)]
        inverse = torch.full((channels,), -1)
        inverse[index[index >= 0]] = torch.arange(index.numel())[index >= 0]
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(x.is_floating_point() or x.is_complex())
        y = functional.channel_select(leaf, index, inverse, dim if channel % 2 else dim - x.dim())
        wanted = reference.channel_select(x, index, dim)
        assert y.shape == wanted.shape and torch.equal(bits(y.detach()), bits(wanted))
        if leaf.requires_grad:
            g = filled_like(wanted, generator)
            y.backward(g)
            assert torch.equal(bits(leaf.grad), bits(reference.channel_select(g, inverse, dim)))

    drawn = st.tuples(recipes((1, 5), dtypes=ANY), st.integers(0, 9), st.integers(0, 6), st.integers(0, 2**32))
    try_inputs(record_property, drawn, check)


def filled_like(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def test_norm_act(record_property: Record) -> None:
    def check(
        recipe: Recipe, others: Recipe, activation: str, given: tuple[bool, bool, bool], shift: float, noise_std: float, seed: int
    ) -> None:
        shape, channels = recipe.shape, recipe.shape[1]
        x = (recipe.make(torch.float64) + shift).to(recipe.dtype)
        if x.numel() == channels:
            return  # one value a channel is refused
        generator = torch.Generator().manual_seed(others.seed)
        parameter_type = [x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32][others.seed % 2]
        weight, bias = (torch.randn(channels, generator=generator).to(parameter_type) if there else None for there in given[:2])
        residual = Recipe(shape, x.dtype, others.layout, "normal", others.seed).make() if given[2] else None
        y, active, mean, var = functional.norm_act(x, weight, bias, residual, activation, 0.1, 1e-5, noise_std, seed)

        # A channel with NaN or infinity in it is NaN in all, and alive.
        dims = [d for d in range(x.dim()) if d != 1]
        values = x.transpose(0, 1).flatten(1)
        lost = ~values.isfinite().all(1)
        if x.numel():
            assert y[:, lost].isnan().all() and not mean[lost].isfinite().any() and var[lost].isnan().all()
        assert (active[lost] == x.numel() // max(channels, 1)).all()
        # So is one whose variance overflows, unless all its values are the same.
        most = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).max ** 0.5 / 1e3
        over = ~lost & (values.double().abs() > most).any(1)
        for channel in over.nonzero().flatten().tolist():
            assert int(active[channel]) == values.shape[1] or (values[channel] == values[channel, 0]).all()
        keep = ~(lost | over)
        x, weight, bias, residual, y, mean, var = (
            None if t is None else (t[:, keep] if t.dim() > 1 else t[keep]) for t in (x, weight, bias, residual, y, mean, var)
        )
        bound = NormActBound(x, weight, bias, residual, activation)
        assert_near(mean, bound.mean, 0.0, bound.mean_error)
        assert_near(var, bound.var, 0.0, bound.var_error)
        if not x.numel():
            assert not active[keep].any()
            return
        certain, live = bound.z.abs() > bound.z_error, ~(bound.z <= 0)
        assert ((active[keep] - live.sum(dims)).abs() <= (~certain).sum(dims)).all()
        xi = reference.noise(x.numel() // x.shape[1], channels, 0, torch.tensor([seed]))[:, keep]
        noise = noise_std * xi.view(shape[0], *shape[2:], x.shape[1]).movedim(-1, 1)
        clean = reference._value(bound.z, activation, 0.1)
        # where the sign is rounding's, so is whether there is noise
        error = 1.2 * bound.z_error + 4e-6 * bound.z.abs().clamp(1e-3, 30) + noise_std * NORMALS + torch.where(certain, 0, noise.abs())
        assert_near(y, clean + noise * live, 0.0, error)

    drawn = st.tuples(
        recipes(values=("normal", "constant", "special")), recipes((1, 1)), st.sampled_from(ACTIVATIONS),
        st.tuples(st.booleans(), st.booleans(), st.booleans()), st.sampled_from([0.0, 0.0, 3.0, -100.0, 1e4]),
        st.sampled_from([0.0, 0.0, 0.5]), SEEDS,
    )
    try_inputs(record_property, drawn, check)


class NormActBound:
    """norm_act in float64, and how far off its statistics and z may be in the wide type.

    Every difference x - mean has an error of a few eps of the channel's largest |x| (mean's own rounding); the rest are
    relative errors of a few eps.
    """

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        exact = [None if t is None else t.double() for t in (x, weight, bias, residual)]
        self.mean, self.var = reference.norm_act_statistics(exact[0])
        largest = exact[0].abs().amax([d for d in range(x.dim()) if d != 1]) if x.numel() else self.mean
        # in float64 the reference rounds as often as the op does
        self.mean_error = (16 if x.dtype == torch.float64 else 2) * eps * largest
        self.var_error = 32 * eps * self.var + 4 * self.mean_error * self.var.sqrt() + 4 * self.mean_error**2
        self.z = reference._normalised(*exact, self.mean, self.var, 1e-5)
        scale = (torch.ones_like(self.var) if weight is None else exact[1].abs()) / (self.var + 1e-5).sqrt()
        relative = 16 * eps + self.var_error / (self.var + 1e-5)
        column = lambda t: t.view(1, -1, *[1] * (x.dim() - 2))  # noqa: E731
        distance = (exact[0] - column(self.mean)).abs()
        added = sum(t.abs() for t in (None if bias is None else column(exact[2]), exact[3]) if t is not None)
        self.z_error = column(scale) * (column(relative) * distance + 2 * column(self.mean_error)) + 4 * eps * (self.z.abs() + added)
