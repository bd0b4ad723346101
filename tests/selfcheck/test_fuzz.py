"""A short run of the checkpoint fuzzer, and that it sees what it looks for. The long form is `demp selfcheck`'s."""
from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demp_kernels.selfcheck import fuzz

FILES = int(os.environ.get("DEMP_FUZZED_FILES", "120"))


def test_changed_files_are_refused_or_loaded(record_property: Callable[[str, object], None]) -> None:
    figures = fuzz.fuzz_checkpoints(FILES, seed=int(os.environ.get("DEMP_FUZZ_SEED", "0")))
    assert not figures.failures, str(figures)
    assert sum(figures.tried.values()) == figures.refused + figures.loaded == FILES
    assert figures.refused > FILES // 2 and figures.loaded > 0  # both ends of the reader were reached
    record_property("files tried", FILES)


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (lambda *run: exec("1"), "exec of <code object"),
        (lambda path, *run: Path(path).with_suffix(".trace").write_text(""), "was opened to be written while it was read"),
        (lambda path, model, *run: model.get_submodule("0").weight.data.zero_(), "was loaded with other values than the file's"),
        (lambda *run: {}["missing"], "KeyError instead of a CheckpointError"),
    ],
    ids=["runs code", "writes", "loads what is not in the file", "another error"],
)
def test_a_reader_that_does_wrong_is_caught(monkeypatch: pytest.MonkeyPatch, reader: Callable[..., Any], text: str) -> None:
    honest, calls = fuzz.load_checkpoint, []

    def planted(*arguments: Any) -> Any:
        calls.append(1)
        return honest(*arguments) if len(calls) == 1 else reader(*arguments)

    monkeypatch.setattr(fuzz, "load_checkpoint", planted)
    # a file of the content's kind is read again where it was taken for loaded, so it has to be a right one
    monkeypatch.setattr(fuzz, "_changed", lambda whole, kind, chance: whole)
    figures = fuzz.fuzz_checkpoints(1)
    assert len(figures.failures) == 1 and text in figures.failures[0], figures


def test_a_refusal_that_changed_something_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = fuzz.load_checkpoint, []

    def planted(path: Path, model: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            model.get_submodule("0").weight.data[0] += 1
            raise fuzz.CheckpointError("no")
        return honest(path, model, *rest)

    monkeypatch.setattr(fuzz, "load_checkpoint", planted)
    assert "something had been changed" in fuzz.fuzz_checkpoints(1).failures[0]


def test_sealed_files_reach_the_unpickler(tmp_path: Path) -> None:
    """Otherwise their SHA-256 alone would refuse them all."""
    fuzz._write_good(tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    assert fuzz._sealed(whole[: -fuzz.COMMENT - fuzz.LENGTH_FIELD]) == whole
    start, end = fuzz._pickle_of(whole)
    assert whole[start : start + 2] == b"\x80\x02" and whole[end - 1 : end] == b"."
    changed = [fuzz._changed(whole, "pickle", random.Random(seed)) for seed in range(20)]
    assert len(set(changed)) > 15 and all(one[:start] == whole[:start] for one in changed)
