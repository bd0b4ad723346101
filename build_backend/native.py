"""Compiles and links the shared libraries of the package.

Objects are rebuilt when their command line or any file they include changed (the compiler writes the
list of those), all cores are used, and a library is replaced in one step, so that running processes keep
the one they have loaded.
"""
from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from toolchain import Unavailable


@dataclass(frozen=True)
class Library:
    """One shared library: what to compile, how, and the file it becomes."""

    name: str  # "_C"
    filename: str  # "_C.so"
    sources: list[Path]
    compile: list[str]  # compiler and flags, without the source
    link: list[str]  # linker driver and flags, without objects and output
    link_after: list[str] = field(default_factory=list)  # libraries, which must follow the objects


def build(libraries: list[Library], root: Path, scratch: Path) -> dict[str, Path | Unavailable]:
    """Build the libraries under `scratch`: for each name its file, or the compiler's words on why there is none.

    All sources share one pool of compiler processes, so that no core waits for the last source of a library.
    """
    results: dict[str, Path | Unavailable] = {}
    with ThreadPoolExecutor(max_workers=_jobs()) as pool:
        pending = []
        for library in libraries:
            (scratch / library.name).mkdir(parents=True, exist_ok=True)
            pending.append([pool.submit(_compile, library, source, root, scratch) for source in library.sources])
        for library, compilations in zip(libraries, pending):
            failures = [str(done.exception()) for done in compilations if isinstance(done.exception(), Unavailable)]
            try:
                if failures:
                    raise Unavailable("\n".join(failures))
                results[library.name] = _link(library, [done.result() for done in compilations], scratch)
            except Unavailable as reason:
                results[library.name] = reason
    return results


def _link(library: Library, objects: list[Path], scratch: Path) -> Path:
    output = scratch / library.name / library.filename
    command = [*library.link, "-shared", "-o", str(output), *map(str, objects), *library.link_after]
    if not _is_current(output, command, objects):
        started_ns = time.time_ns()
        _run(command, f"linking {library.filename}")
        _remember(output, command, started_ns)
    return output


def _jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else len(os.sched_getaffinity(0))


def _compile(library: Library, source: Path, root: Path, scratch: Path) -> Path:
    target = scratch / library.name / (str(source.relative_to(root)).replace(os.sep, "__") + ".o")
    depfile = target.with_suffix(".d")
    command = [*library.compile, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(target)]
    if not _is_current(target, command, _dependencies(depfile, source)):
        _say(f"compiling {source.relative_to(root)}")
        started_ns = time.time_ns()
        _run(command, str(source.relative_to(root)))
        _remember(target, command, started_ns)
    return target


def _dependencies(depfile: Path, source: Path) -> list[Path]:
    """The files a make rule "target: a b \\ c" lists; the source alone if there is no rule yet."""
    if not depfile.is_file():
        return [source]
    rule = depfile.read_text().replace("\\\n", " ").partition(":")[2]
    return [Path(name) for name in shlex.split(rule)]


def _is_current(target: Path, command: list[str], inputs: list[Path]) -> bool:
    try:
        stamp = json.loads(_stamp(target).read_text())
        # Against the start of the last build, not its end: a file saved while it was compiled is not in it.
        return (
            target.is_file()
            and stamp["command"] == command
            and all(path.stat().st_mtime_ns < stamp["started_ns"] for path in inputs)
        )
    except (OSError, ValueError, KeyError):  # something is missing or was left half written
        return False


def _remember(target: Path, command: list[str], started_ns: int) -> None:
    _stamp(target).write_text(json.dumps({"command": command, "started_ns": started_ns}))


def _stamp(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{what}: {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise Unavailable(f"{what}: {Path(command[0]).name} failed:\n{done.stderr.strip()}")
    if done.stderr.strip():
        _say(done.stderr.strip())


def _say(text: str) -> None:
    # The newline goes in the same write: print() writes it apart, and another thread's line can come between.
    print(text + "\n", end="", flush=True)
