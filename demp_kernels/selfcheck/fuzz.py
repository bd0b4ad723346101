"""Checkpoints that are changed at random, by accident or by an enemy: does `load_checkpoint` ever do anything but load the file
or refuse it?

    damaged    bits flipped, bytes overwritten, cut, moved or doubled anywhere in the file
    sealed     the same, and then the SHA-256 made to fit again: what somebody writes who knows the format
    pickle     the same within the pickle of the archive alone, and opcodes put in that import and call
    content    a value of the content replaced by one of another kind, shape or size, left out, or doubled

After every refusal, which has to be a CheckpointError, the model, the optimiser, the controller and the random generators
must be as they were. After a load the model must hold what the file says, and run. While a file is read nothing may be
executed, written, deleted or connected to; Python's audit events tell.

Not seen: nonsense of the right kind, such as a negative number of steps; code that runs without an audit event (machine code
in torch's own reader, for which torch is trusted); files that take more memory than there is; readers other than this one.
The network is small, and the choice of bytes blind: nothing follows which branches of the reader a file reached.
"""
from __future__ import annotations

import hashlib
import io
import random
import struct
import sys
import sysconfig
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import prepare
from ..training import CheckpointError, DemP, load_checkpoint, save_checkpoint
from ..training.checkpoint_file import COMMENT, LENGTH_FIELD, MAGIC, read_file, write_file
from ..training.random_state import random_state, restore_random_state

__all__ = ["KINDS", "FuzzFigures", "fuzz_checkpoints"]

KINDS = ("damaged", "sealed", "pickle", "content")
PATIENCE = 20.0
"""Seconds that one small file may take."""
HOSTILE = (
    b"cos\nsystem\n(S'true'\ntR", b"cbuiltins\neval\n(S'1'\ntR", b"\x8c\x02os\x8c\x06system\x93", b"ctorch\nload\n(S'/'\ntR",
    b"cbuiltins\ngetattr\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"R", b"b", b"0", b"2", b"a", b"e", b"s", b"u", b"t", b"Q", b"(", b")", b"N", b"K\xff", b".",
)
"""Opcodes of pickle: imports and calls of harmful and of allowed names, and what moves the stack."""
FORBIDDEN = ("exec", "os.system", "os.exec", "os.posix_spawn", "os.remove", "os.rename", "subprocess.Popen", "socket.connect")

Run = tuple[nn.Module, torch.optim.Optimizer, DemP]
X = torch.linspace(-2, 2, 4 * 2 * 5 * 5).view(4, 2, 5, 5).sin()


@dataclass
class FuzzFigures:
    """tried: files, by kind. refused, loaded: what became of them. failures: anything else."""

    tried: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    refused: int = 0
    loaded: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        tried = ", ".join(f"{count} {kind}" for kind, count in self.tried.items())
        lines = [
            f"{sum(self.tried.values())} files ({tried}): {self.refused} refused with nothing changed, {self.loaded} loaded as they "
            f"were written, {len(self.failures)} otherwise"
        ]
        return "\n".join([*lines, *self.failures])


def fuzz_checkpoints(
    files: int = 4000, *, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> FuzzFigures:
    """Try `files` changed checkpoints, a quarter of each kind. About 30 a second on one core.

    Args:
        seed: of the changes; a failure names the number of its file, which is all it takes to make it again.
        say: told how it goes, every 500 files.
    """
    figures, before = FuzzFigures(), random_state()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's words on odd pickles and tensors: they are the point
            _fuzz(figures, Path(folder), files, seed, say)
    finally:
        restore_random_state(before)
    return figures


def _fuzz(figures: FuzzFigures, folder: Path, files: int, seed: int, say: Callable[[str], None]) -> None:
    good, path = folder / "good.pt", folder / "changed.pt"
    _write_good(good)
    load_checkpoint(good, *_build())  # imports what is imported late, so that the watch sees only what a file does
    whole, content = good.read_bytes(), read_file(good)
    run = _trained()
    state = _fingerprint(run)
    for number in range(files):
        chance, kind = random.Random(f"{seed}/{number}"), KINDS[number % len(KINDS)]
        if kind == "content":
            write_file(path, _replaced(content, chance))
        else:
            path.write_bytes(_changed(whole, kind, chance))
        figures.tried[kind] += 1
        outcome = _outcome(path, run, state)
        if outcome == "refused":
            figures.refused += 1
        elif outcome == "loaded" and (kind != "damaged" or path.read_bytes() == whole):
            figures.loaded += 1
        else:
            figures.failures.append(f"file {number} of seed {seed} ({kind}): {outcome}")
        if outcome != "refused":
            run = _trained()
            state = _fingerprint(run)
        if (number + 1) % 500 == 0:
            say(str(figures))


def _outcome(path: Path, run: Run, state: bytes) -> str:
    """ "refused", "loaded", or what went wrong."""
    start = time.monotonic()
    try:
        with _watched() as events:
            load_checkpoint(path, *run)
    except CheckpointError:
        outcome = "refused" if _fingerprint(run) == state else "it was refused, but something had been changed"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"{type(error).__name__} instead of a CheckpointError: {(str(error).splitlines() or [''])[0][:200]}"
    else:
        outcome = _wrongly_loaded(path, run) or "loaded"
    if events:
        return f"{events[0]} while it was read"
    return outcome if (seconds := time.monotonic() - start) < PATIENCE else f"it took {seconds:.0f} s"


def _wrongly_loaded(path: Path, run: Run) -> str:
    """What is wrong with a run that took the file; empty if nothing is."""
    model, optimizer, demp = run
    saved = read_file(path)["model"]
    for name, value in model.state_dict().items():
        if not torch.equal(_bits(saved[name].to(value.dtype)), _bits(value)):
            return f"{name} was loaded with other values than the file's"
    try:
        nn.functional.mse_loss(model(X), torch.zeros(4, 3)).backward()
        if all(state.get("step", 0) >= 0 for state in optimizer.state.values()):  # Adam divides by 1 - beta ** step
            optimizer.step()
        demp.report()
    except Exception as error:
        return f"it was loaded, and the next step failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return ""


# ---- what is fuzzed ---------------------------------------------------------------------------------------------


def _build() -> Run:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    model = prepare(net, X)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, DemP(model, optimizer, total_steps=9, prune_every=3, peak_penalty=0.01, seed=1)


def _trained(steps: int = 1) -> Run:
    """A run with moments and counters, which could be lost."""
    model, optimizer, demp = run = _build()
    for _ in range(steps):
        (nn.functional.mse_loss(model(X), torch.zeros(4, 3)) + demp.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        demp.step()
    return run


def _write_good(path: Path) -> None:
    """A checkpoint behind a removal, so that widths are in it."""
    run = _build()
    with torch.no_grad():
        norm = run[0].get_submodule("1")
        norm.weight[[1, 3]] = 0  # type: ignore[index, operator]
        norm.bias[[1, 3]] = -50  # type: ignore[index, operator]
        run[0].get_submodule("4").bias[2] = -50  # type: ignore[index, operator]
    model, optimizer, demp = run
    for _ in range(4):
        (nn.functional.mse_loss(model(X), torch.zeros(4, 3)) + demp.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        demp.step()
    save_checkpoint(path, model, optimizer, demp, extra={"epoch": 3, "best": [0.5, torch.ones(2)]})


def _fingerprint(run: Run) -> bytes:
    model, optimizer, demp = run
    digest = hashlib.sha256()
    units = {name: ids.tolist() for name, ids in demp.graph.unit_ids.items()}
    identity = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    parts = model.state_dict(), optimizer.state_dict(), demp.state_dict(), units, identity, model.training, random_state()
    _feed(digest, parts)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}{value.stride()}".encode())
        digest.update(_bits(value.detach()).numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


# ---- changes ----------------------------------------------------------------------------------------------------


def _changed(whole: bytes, kind: str, chance: random.Random) -> bytes:
    if kind == "damaged":
        return _mutated(whole, chance)
    archive = whole[: -COMMENT - LENGTH_FIELD]
    if kind == "sealed":
        return _sealed(_mutated(archive, chance))
    start, end = _pickle_of(whole)
    pickle = archive[start:end]
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.5:
            place = chance.randrange(len(pickle) + 1)
            new = chance.choice(HOSTILE)
            gone = len(new) if chance.random() < 0.7 else 0  # over what is there, or between
            pickle = pickle[:place] + new + pickle[place + gone :]
        else:
            pickle = _mutated(pickle, chance)
    # The lengths in the archive are those of before: bytes are cut off or filled with the opcode that ends a pickle.
    return _sealed(archive[:start] + pickle[: end - start].ljust(end - start, b".") + archive[end:])


def _mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        size, place = len(changed), chance.randrange(len(changed) + 1)
        length = min(chance.choice((1, 2, 4, 8, 64, 700)), size - place)
        how = chance.randrange(6)
        if how == 0 and length:
            changed[place] ^= 1 << chance.randrange(8)
        elif how == 1 and length:
            changed[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif how == 2:
            changed[place : place + length] = chance.randbytes(length)
        elif how == 3:
            del changed[place : place + length]
        elif how == 4:
            other = chance.randrange(size + 1)
            changed[other:other] = changed[place : place + length]
        elif chance.random() < 0.2:
            del changed[place:]
    return bytes(changed)


def _sealed(archive: bytes) -> bytes:
    """An archive without its comment's length, with the SHA-256 that the reader asks for."""
    return archive + struct.pack("<H", COMMENT) + MAGIC + hashlib.sha256(archive).hexdigest().encode()


def _pickle_of(whole: bytes) -> tuple[int, int]:
    """Where the pickle is in the file."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
    name, more = struct.unpack_from("<HH", whole, entry.header_offset + 26)
    start = entry.header_offset + 30 + name + more
    return start, start + entry.file_size


def _replaced(content: Any, chance: random.Random, top: bool = True) -> Any:
    """A copy with one value changed, somewhere."""
    if isinstance(content, (dict, list)) and content and (top or chance.random() < 0.9):
        copied: Any = content.copy()
        key = chance.choice(list(content)) if isinstance(content, dict) else chance.randrange(len(content))
        how = chance.random()
        if how < 0.05:
            del copied[key]
        elif how < 0.1 and isinstance(content, dict):
            copied[chance.choice(("", "other", 0, -1, None))] = content[key]
        elif how < 0.1:
            copied.append(content[key])
        else:
            copied[key] = _replaced(content[key], chance, top=False)
        return copied
    if isinstance(content, Tensor) and chance.random() < 0.7:
        return _another_tensor(content, chance)
    return chance.choice((
        None, True, -1, 0, 7, 2**31, 2**70, -0.5, float("nan"), float("inf"), "", "text", [], [1], {}, {"a": [1]}, (), (1, 2),
        torch.zeros(()), torch.zeros(3), torch.zeros(0, dtype=torch.int64), torch.ones(2, 2, device="meta"), 1j,
    ))


def _another_tensor(value: Tensor, chance: random.Random) -> Tensor:
    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t.double(), lambda t: t.int(), lambda t: t.half(), lambda t: t.bool(), lambda t: t.to(torch.complex64),
        lambda t: t.flatten()[:-1], lambda t: t.unsqueeze(0), lambda t: torch.cat([t.flatten(), t.flatten()]),
        lambda t: t.to("meta"), lambda t: torch.zeros_like(t), lambda t: -t, lambda t: torch.full_like(t, 100),
        lambda t: t.double().log().to(t.dtype), lambda t: t.expand(2, *t.shape), lambda t: t.to_sparse(), lambda t: t.flip(0) if t.dim() else t,
        lambda t: t.clone().requires_grad_(t.is_floating_point()),
    )
    return chance.choice(changes)(value)


# ---- what a file does while it is read --------------------------------------------------------------------------

_events: list[str] | None = None
_hooked = False


@contextmanager
def _watched() -> Any:
    """Collects the audit events that reading a file must not cause. The hook stays: Python cannot take one away."""
    global _events, _hooked
    if not _hooked:
        sys.addaudithook(_note)
        _hooked = True
    found: list[str] = []
    _events = found
    try:
        yield found
    finally:
        _events = None


def _is_late_import(code: Any) -> bool:
    """Python and torch import some of their own modules when they are needed first; a file cannot name them."""
    own = (sysconfig.get_path("stdlib"), str(Path(torch.__file__).parent))
    return getattr(code, "co_name", "") == "<module>" and str(code.co_filename).startswith(own)


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is None:
        return
    if event == "open":
        _, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3):
            _events.append(f"{arguments[0]} was opened to be written")
    elif event in FORBIDDEN and not (event == "exec" and _is_late_import(arguments[0])):
        _events.append(f"{event} of {arguments[0] if arguments else ''}")
