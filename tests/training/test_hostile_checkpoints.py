"""Files that are damaged, foreign or written by an enemy: a CheckpointError, no code run, and nothing changed."""
from __future__ import annotations

import copy
import fcntl
import hashlib
import os
import random
import resource
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import demp_kernels as dk
from demp_kernels.training.checkpoint_file import COMMENT, MAGIC, read_file, write_file

Run = tuple[nn.Module, torch.optim.Optimizer, dk.DemP]
X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def build() -> Run:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    model = dk.prepare(net, X)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, dk.DemP(model, optimizer, total_steps=9, prune_every=3, peak_penalty=0.01, seed=1)


def train(run: Run, steps: int) -> None:
    model, optimizer, demp = run
    for _ in range(steps):
        (nn.functional.cross_entropy(model(X), Y) + demp.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        demp.step()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network that has lost units, behind a removal."""
    run = build()
    with torch.no_grad():
        run[0].get_submodule("0").bias[[1, 4]] = -50
        run[0].get_submodule("1").weight[[1, 4]] = 0
        run[0].get_submodule("1").bias[[1, 4]] = -50
    train(run, 4)
    assert run[2].report().live == 10
    path = tmp_path_factory.mktemp("checkpoint") / "run.pt"
    dk.save_checkpoint(path, *run, extra={"mine": [1, 2]})
    return path


def everything(run: Run) -> dict[str, Any]:
    model, optimizer, demp = run
    units = {name: ids.tolist() for name, ids in demp.graph.unit_ids.items()}
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "demp": demp.state_dict()}
    return copy.deepcopy({**parts, "units": units, "rng": torch.get_rng_state()})


@pytest.fixture(scope="module")
def refused() -> Callable[..., None]:
    run = build()
    train(run, 1)  # so that there are moments and counters which could be lost
    before = everything(run)

    def check(path: Path, text: str | None = None) -> None:
        with pytest.raises(dk.CheckpointError, match=text):
            dk.load_checkpoint(path, *run)
        torch.testing.assert_close(everything(run), before, rtol=0, atol=0)

    return check


def sealed(archive: bytes) -> bytes:
    """An archive without a comment, with the SHA-256 that the reader asks for."""
    digest = hashlib.sha256(archive[:-2]).hexdigest().encode()
    return archive[:-2] + struct.pack("<H", COMMENT) + MAGIC + digest


def test_the_good_file_loads(good: Path) -> None:
    run = build()
    assert dk.load_checkpoint(good, *run) == {"mine": [1, 2]}
    assert run[2].steps_done == 4 and run[2].report().live == 10
    assert torch.load(good, weights_only=True)["format"] == "demp_kernels checkpoint"


def test_cut_short_anywhere(good: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    whole, path = good.read_bytes(), tmp_path / "cut.pt"
    for length in [*range(0, len(whole), len(whole) // 80), *range(len(whole) - 110, len(whole))]:
        path.write_bytes(whole[:length])
        refused(path, "not a readable checkpoint")


def test_a_flipped_bit_anywhere(good: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    whole, path, chance = good.read_bytes(), tmp_path / "flipped.pt", random.Random(0)
    for place in [chance.randrange(8 * len(whole)) for _ in range(150)] + [8 * (len(whole) - 1 - n) for n in range(90)]:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        refused(path, "not a readable checkpoint")


def test_other_bytes(tmp_path: Path, refused: Callable[..., None]) -> None:
    path = tmp_path / "other.pt"
    for content in (b"", b"PK", b"\x80\x02garbage", os.urandom(5000), sealed(b"PK\x05\x06" + bytes(18))):
        path.write_bytes(content)
        refused(path, "not a readable checkpoint")
    torch.save({"model": 1}, path)
    refused(path, "is not a demp_kernels checkpoint")
    torch.save([1], path, _use_new_zipfile_serialization=False)
    refused(path, "not a readable checkpoint")


class Mine:
    """Its unpickling would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["extra", "model", "format"])
def test_code_in_the_pickle_never_runs(good: Path, tmp_path: Path, refused: Callable[..., None], place: str) -> None:
    trace, path = tmp_path / "it-ran", tmp_path / "mine.pt"
    write_file(path, {**read_file(good), place: Mine(trace)})
    refused(path, "not a readable checkpoint")
    assert not trace.exists()


def test_a_zip_bomb(good: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    packed, path = tmp_path / "packed.zip", tmp_path / "bomb.pt"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        target.writestr("archive/data/99", bytes(20_000_000))
    path.write_bytes(sealed(packed.read_bytes()))
    assert path.stat().st_size < 100_000
    refused(path, "its entries are compressed")


def test_a_tensor_that_is_not_what_the_archive_says(good: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    """With a digest that fits: only the entry's own checksum tells."""
    with zipfile.ZipFile(good) as archive:
        entry = next(entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size > 16)
        content = archive.read(entry)
    whole = good.read_bytes()[: -COMMENT - 2]
    place = whole.index(content, entry.header_offset)
    changed = whole[:place] + bytes([content[0] ^ 1]) + whole[place + 1 :]
    path = tmp_path / "entry.pt"
    path.write_bytes(sealed(changed + bytes(2)))
    refused(path, "the checksum of .* does not fit")


@pytest.mark.parametrize(("places", "value", "text"), [
    ((24,), 0, "compressed"), ((20, 24), 0, "the checksum of .* does not fit"), ((38,), 0x10, "folders as entries"),
], ids=["size", "sizes", "folder"])  # fmt: skip
def test_an_entry_of_which_nothing_is_read(
    good: Path, tmp_path: Path, refused: Callable[..., None], places: tuple[int, ...], value: int, text: str
) -> None:
    """places: of its sizes, or attributes, in the directory. torch allocates the tensor, and its values are what memory held."""
    with zipfile.ZipFile(good) as archive:
        entry = next(entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size > 16)
    changed = bytearray(good.read_bytes()[: -COMMENT - 2])
    place = changed.rindex(entry.filename.encode()) - 46  # the directory is behind the entries
    assert changed[place : place + 4] == b"PK\x01\x02"
    for field in places:
        changed[place + field : place + field + 4] = struct.pack("<I", value)
    path = tmp_path / "empty.pt"
    path.write_bytes(sealed(bytes(changed) + bytes(2)))
    refused(path, text)


def test_checksums_are_written_whatever_torch_is_set_to(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        dk.save_checkpoint(tmp_path / "file.pt", build()[0])
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    dk.load_checkpoint(tmp_path / "file.pt", build()[0])


def replaced(content: Any, keys: tuple[Any, ...], value: Any) -> Any:
    if not keys:
        return value
    copied = copy.copy(content)
    copied[keys[0]] = replaced(content[keys[0]], keys[1:], value)
    return copied


FIELDS: list[tuple[Any, ...]] = [
    ("format",), ("version",), ("units",), ("model",), ("optimizers",), ("demp",), ("rng",), ("extra",),
    ("units", "kept"), ("units", "sizes"), ("units", "kept", "0.weight:0"), ("units", "sizes", "0.weight:0"),
    ("model", "0.weight"), ("model", "1.num_batches_tracked"), ("optimizers", 0), ("optimizers", 0, "state"),
    ("optimizers", 0, "param_groups"), ("optimizers", 0, "param_groups", 0), ("optimizers", 0, "state", 0),
    ("optimizers", 0, "param_groups", 0, "params"), ("optimizers", 0, "param_groups", 0, "lr"),
    ("optimizers", 0, "param_groups", 0, "betas"), ("demp", "steps_done"), ("demp", "total_steps"),
    ("demp", "noise_seed"), ("demp", "total_units"), ("demp", "counters"), ("demp", "counters", "2"),
    ("demp", "counters", "2", "active"), ("demp", "counters", "2", "seen"), ("demp", "history"), ("demp", "history", 0),
    ("demp", "history", 0, "step"), ("rng", "torch"), ("rng", "numpy"), ("rng", "python"), ("rng", "cuda"),
]
WRONG: list[Any] = [
    None, True, -7, 2.5, "text", [], [3], {}, {"a": 1}, torch.zeros(3), torch.zeros(3, dtype=torch.int64),
    torch.empty(2, 2, device="meta"), torch.zeros(1).expand(2**40), torch.eye(2).to_sparse(),
    torch.zeros(2, dtype=torch.complex64),
]
ALLOWED = {
    ("demp",): [None], ("optimizers",): [[]], ("extra",): [{}, {"a": 1}], ("optimizers", 0, "state"): [{}],
    ("optimizers", 0, "state", 0): [{}], ("demp", "counters"): [{}], ("demp", "history"): [[]],
    ("optimizers", 0, "param_groups", 0, "lr"): [-7, 2.5], ("rng", "cuda"): [[]],
}
"""What is right in its place, or nobody's business."""


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("keys", FIELDS, ids=lambda keys: ".".join(map(str, keys)))
def test_wrong_types_in_every_field(
    good: Path, tmp_path: Path, refused: Callable[..., None], keys: tuple[Any, ...]
) -> None:
    content, path = read_file(good), tmp_path / "wrong.pt"
    tried = 0
    for value in WRONG:
        if any(type(value) is type(right) and value == right for right in ALLOWED.get(keys, []) if right is not None):
            continue
        if value is None and None in ALLOWED.get(keys, []):
            continue
        write_file(path, replaced(content, keys, value))
        refused(path)
        tried += 1
    assert tried >= len(WRONG) - 2


@pytest.mark.parametrize(
    ("keys", "value", "text"),
    [
        (("version",), 3, "of version 3, this package reads up to 2"),
        (("version",), 0, "must be an integer of at least 1, got 0"),
        (("model", "0.weight"), torch.zeros(8, 6), r"0.weight must have shape \(6, 6\), got \(8, 6\)"),
        (("units", "sizes", "0.weight:0"), 9, "had 9 entries, the model's has 8"),
        (("units", "kept", "0.weight:0"), torch.arange(5), "do not fit its other tensors"),
        (("units", "kept", "0.weight:0"), torch.tensor([0, 1, 2, 3, 5, 900]), "0.weight:0 do not fit"),
        (("demp", "total_steps"), 8, "total_steps must be that of the saved run, 8, got 9"),
        (("demp", "steps_done"), -1, "steps_done must be at least 0, got -1"),
        (("demp", "counters", "2", "active"), torch.zeros(8, dtype=torch.int64), "has 8 units for 2, the model 6"),
        (("optimizers", 0, "state", 0, "exp_avg"), torch.zeros(8, 6), r"exp_avg of parameter 0 must have shape \(6, 6\)"),
        (("optimizers", 0, "state", 0, "exp_avg"), None, "must have a tensor 'exp_avg', got NoneType"),
        (("optimizers", 0, "state", 0, "step"), torch.zeros((), dtype=torch.complex64), "must be real as the parameter is"),
        (("optimizers", 0, "state", 0, "step"), torch.zeros(2), r"must have a number of steps 'step', got torch.float32 of shape \(2,\)"),
        (("optimizers", 0, "state", 0, "exp_avg"), torch.zeros(36), r"must have 'exp_avg' of shape \(6, 6\), got torch.float32 of shape \(36,\)"),
        (("optimizers", 0, "state", 0, "exp_avg_sq"), torch.zeros(6).expand(6, 6), "must have an element of its own in each place"),
        (("demp", "counters", "2", "seen"), torch.zeros((), dtype=torch.int64, device="meta"), "must be a dense tensor with values"),
        (("optimizers", 0, "param_groups", 0, "params"), [0, 1], "must have 8 parameters in their order"),
    ],
)
def test_what_does_not_fit_says_so(
    good: Path, tmp_path: Path, refused: Callable[..., None], keys: tuple[Any, ...], value: Any, text: str
) -> None:
    path = tmp_path / "wrong.pt"
    write_file(path, replaced(read_file(good), keys, value))
    refused(path, text)


def test_another_model_and_another_optimizer(good: Path) -> None:
    torch.manual_seed(0)
    other = dk.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), X)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(dk.CheckpointError, match="does not fit"):
        dk.load_checkpoint(good, other)
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    model = build()[0]
    two = [torch.optim.SGD([p], lr=0.1) for p in list(model.parameters())[:2]]
    with pytest.raises(dk.CheckpointError, match="a state for each optimiser, got 1 for 2"):
        dk.load_checkpoint(good, model, two)
    assert model.get_submodule("0").weight.shape == (8, 6)


def test_version_1_is_read(good: Path, tmp_path: Path) -> None:
    content = read_file(good)
    rng, (optimizer,) = content["rng"]["torch"], content.pop("optimizers")
    torch.save({**content, "version": 1, "optimizer": optimizer, "rng": rng, "cuda_rng": []}, tmp_path / "old.pt")
    old, new = build(), build()
    dk.load_checkpoint(tmp_path / "old.pt", *old)
    dk.load_checkpoint(good, *new)
    torch.testing.assert_close(everything(old), everything(new), rtol=0, atol=0)


def test_a_full_disk_keeps_the_last_file_and_says_so(good: Path, tmp_path: Path) -> None:
    run = build()
    path = tmp_path / "run.pt"
    dk.save_checkpoint(path, *run)
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # a limit on the size of files stops a write in the middle as a full disk does
        for size in (0, 700, len(before) // 2, len(before) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match="was not written, what was at its place before is unchanged"):
                dk.save_checkpoint(path, *run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    dk.load_checkpoint(path, *run)


def test_leftovers_of_killed_saves_go_with_the_next_one(tmp_path: Path) -> None:
    names = [".run.pt.dead.partial", ".run.pt.alive.partial", ".other.pt.dead.partial"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    with (tmp_path / names[1]).open("rb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        dk.save_checkpoint(tmp_path / "run.pt", *build())
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["run.pt", *names[1:]])


def test_all_random_generators_go_on(tmp_path: Path) -> None:
    import numpy as np

    run = build()
    draw = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: E731
    dk.save_checkpoint(tmp_path / "run.pt", *run)
    expected = draw()
    draw()
    dk.load_checkpoint(tmp_path / "run.pt", *run)
    assert draw() == expected


def test_moments_take_the_memory_format_of_their_parameters(tmp_path: Path) -> None:
    def conv(layout: torch.memory_format) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=layout)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.arange(2 * 3 * 36.0).sin().view(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, second = conv(torch.contiguous_format), conv(torch.channels_last)
    step(*first)
    dk.save_checkpoint(tmp_path / "run.pt", *first)
    dk.load_checkpoint(tmp_path / "run.pt", *second)
    step(*first)
    step(*second)
    torch.testing.assert_close(first[0].state_dict(), second[0].state_dict(), rtol=1e-4, atol=1e-5)
