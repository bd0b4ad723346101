"""Philox4x32-10 against the published vectors, and the noise made of it."""
from __future__ import annotations

import math

import pytest
import torch

from demp_kernels import host, reference

# Random123 (Salmon et al., SC 2011), kat_vectors: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    words = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(w) for w in words) == result
    if host._host is not None:
        assert tuple(host._host.philox4x32_10(key, counter)) == result


def test_box_muller_reaches_the_ends_of_its_range() -> None:
    lowest, highest = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    largest = math.sqrt(48 * math.log(2))  # u0 = 2^-24
    z0, z1, z2, z3 = reference.box_muller([lowest, lowest, highest, highest])
    assert float(z0) == pytest.approx(largest) and float(z1) == 0
    assert float(z2) == 0 and float(z3) == 0  # u0 = 1


def test_noise_has_the_coordinates_of_its_definition() -> None:
    seed = torch.tensor([0x0123456789ABCDEF])
    z = reference.noise(11, 5, 3, seed)
    for position, column in [(0, 0), (3, 4), (4, 1), (10, 2)]:
        words = reference.philox(
            [torch.tensor(w) for w in (position // 4, 0, column, 3)], [torch.tensor(0x89ABCDEF), torch.tensor(0x01234567)]
        )
        assert z[position, column] == reference.box_muller(words)[position % 4]
