"""The file of a checkpoint: written whole or not at all, and read without running any code from it.

It is what `torch.save` writes, a zip archive, with a SHA-256 of everything before it in the archive's comment: torch reads
past flipped bits (its reader does not compare the archive's CRCs), and `torch.load` and `unzip` still open the file.
"""
from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["CheckpointError", "read_file", "write_file"]

FORMAT = "demp_kernels checkpoint"
VERSION = 2
SUFFIX = ".partial"
MAGIC = b"demp_kernels sha256 "
COMMENT = len(MAGIC) + hashlib.sha256().digest_size * 2
LENGTH_FIELD = 2
"""Bytes of the comment's length, the last ones of an archive without a comment."""


class CheckpointError(RuntimeError):
    """The file is damaged, foreign, or belongs to another model. Nothing was changed."""


def write_file(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with format and version to `path`: beside its final name, flushed to the disk, renamed.

    What killed processes left of earlier saves to `path` is removed first. Raises OSError, with `path` as it was before,
    if it cannot be written.
    """
    _remove_leftovers(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}{SUFFIX}"
    try:
        with temporary.open("xb") as file:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # tells other processes that this one is alive; a kill gives it up
            _write_archive(file, {"format": FORMAT, "version": VERSION, **content})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            text = f"{error.strerror}: the checkpoint was not written, what was at its place before is unchanged"
            raise OSError(error.errno, text, str(path)) from error
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can, of directories; the file itself is written
            os.fsync(directory)
    finally:
        os.close(directory)


def read_file(path: Path) -> dict[str, Any]:
    """The content of a file from `write_file`, brought to the present version; tensors are on the CPU.

    Raises FileNotFoundError and other OSErrors of opening; CheckpointError for a file that is damaged, foreign, or of a
    newer version.
    """
    with path.open("rb") as file:
        try:
            intact = _digest_fits(file)
            _check_archive(file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file fails anywhere in zipfile, in the unpickler or in torch
            text = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise CheckpointError(f"{path} is not a readable checkpoint: {text}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT}")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} has no valid version: it must be an integer of at least 1, got {version!r}")
    if version > VERSION:
        raise CheckpointError(f"{path} is of version {version}, this package reads up to {VERSION}")
    if version > 1 and not intact:
        raise CheckpointError(f"{path} is not a readable checkpoint: it has no SHA-256")
    for number in range(version, VERSION):
        content = MIGRATIONS[number](content)
    return content


DOS_FOLDER = 0x10
"""The attribute that makes a folder of an entry, whatever its name is."""


class _Hashed:
    """What torch.save writes into: hashes all but the last `LENGTH_FIELD` bytes, and remembers why a write failed, which
    torch tells as an internal error of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._tail = file, b""
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.failure = error
            raise
        end = max(0, len(view) - LENGTH_FIELD)
        if end:
            self.digest.update(self._tail)
            self.digest.update(view[:end])
            self._tail = bytes(view[end:])
        else:
            joined = self._tail + bytes(view)
            self.digest.update(joined[:-LENGTH_FIELD])
            self._tail = joined[-LENGTH_FIELD:]
        return len(view)

    def flush(self) -> None:
        self._file.flush()


def _write_archive(file: IO[bytes], content: dict[str, Any]) -> None:
    hashed: Any = _Hashed(file)
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # what reads the file asks for them
    try:
        torch.save(content, hashed)
    except RuntimeError:
        if hashed.failure is not None:
            raise hashed.failure from None
        raise
    finally:
        torch.serialization.set_crc32_options(checksums)
    file.seek(-LENGTH_FIELD, os.SEEK_END)
    file.write(struct.pack("<H", COMMENT) + MAGIC + hashed.digest.hexdigest().encode())


def _digest_fits(file: IO[bytes]) -> bool:
    """Whether the file has a digest. Raises ValueError if it is not that of what stands before it."""
    size = file.seek(0, os.SEEK_END)
    rest = size - COMMENT - LENGTH_FIELD
    if rest < 0:
        raise ValueError(f"{size} bytes are too few")
    file.seek(rest)
    end = file.read()
    if end[:LENGTH_FIELD] != struct.pack("<H", COMMENT) or not end[LENGTH_FIELD:].startswith(MAGIC):
        return False
    file.seek(0)
    digest = hashlib.sha256()
    while rest > 0:
        block = file.read(min(rest, 1 << 20))
        digest.update(block)
        rest -= len(block)
    if end[-digest.digest_size * 2 :] != digest.hexdigest().encode():
        raise ValueError("it is damaged: its SHA-256 does not fit")
    return True


def _check_archive(file: IO[bytes]) -> None:
    """Refuse an archive that would grow when it is read: torch.save packs nothing, so that reading a file takes no more memory
    than it has bytes. And one whose entries are not what its directory says: torch then takes what happens to be in memory for
    the rest of a tensor (seen with torch 2.14)."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
            raise ValueError("its entries are compressed")
        if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
            raise ValueError("its entries overlap")
        if any(entry.is_dir() or entry.external_attr & DOS_FOLDER for entry in entries):
            raise ValueError("it has folders as entries, of which nothing is read")
        # what is empty has the checksum 0, which testzip does not ask for
        empty = (entry.filename for entry in entries if not entry.file_size and entry.CRC)
        if (broken := next(empty, None) or archive.testzip()) is not None:
            raise ValueError(f"the checksum of {broken} does not fit")


def _remove_leftovers(path: Path) -> None:
    """Temporary files of saves to `path` whose process has ended: nobody holds their lock."""
    for leftover in path.parent.glob(f".{_literal(path.name)}.*{SUFFIX}"):
        try:
            with leftover.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        except OSError:
            continue  # being written, or gone already


def _literal(name: str) -> str:
    """`name` as a pattern of glob that matches itself alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had one optimiser, and of the random states only torch's."""
    optimizer = content.get("optimizer")
    return {
        **{name: value for name, value in content.items() if name not in ("optimizer", "cuda_rng")},
        "version": 2,
        "optimizers": [] if optimizer is None else [optimizer],
        "rng": {"torch": content.get("rng"), "cuda": content.get("cuda_rng")},
    }


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1}
"""Version -> what makes the content of the next one from it."""
