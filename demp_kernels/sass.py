"""What a kernel's machine code (SASS, as cuobjdump prints it) says of its loops."""
from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["HotLoops", "widest"]

_CLASSES = {
    "memory": r"LDG|STG|LDS|STS|LD|ST|LDC|LDCU|ULDC|RED|REDG|ATOM|ATOMG|ATOMS|CCTL|MEMBAR|LDGSTS",
    "special": r"MUFU",
    "float": r"F[A-Z]+\d*|H[A-Z]+2\w*|D[A-Z]+|I2F\w*|F2I\w*|F2F\w*|FRND|UF\w+",
    "control": r"BRA|BRX|EXIT|BSSY|BSYNC|BREAK|WARPSYNC|CALL|RET|BAR|YIELD|NOP|JMP|VOTE\w*|SHFL|R2\w+|S2\w+|CS2R",
}
"""Classes of instructions by their names; all others are integer work, addresses and moves included. MUFU computes reciprocals,
roots, exponentials, logarithms, sines at a quarter of the rate or less."""


@dataclass(frozen=True)
class HotLoops:
    """The innermost loops with the widest loads. A loop is what a backward branch spans, so that what it only does in special
    cases (tails, other values) is counted too: upper bounds.

    counts: instructions by class. moved: bytes that its loads and stores of global memory move. atomics: on global memory.
    """

    counts: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    atomics: int = 0

    @property
    def instructions_a_byte(self) -> float | None:
        """Instructions of a thread for a byte that it moves. An H100 moves 15 bytes a clock in each multiprocessor (3.35 TB/s,
        132 of them, 1.7 GHz), which issues 128 threads' instructions in it: beyond 8.5, instructions are what limits a kernel
        there, not memory; an A100 (2.0 TB/s, 108, 1.4 GHz): 9.7. None without a loop."""
        return sum(self.counts.values()) / self.moved if self.moved else None

    @property
    def shares(self) -> dict[str, float]:
        """Of all instructions, by class."""
        total = sum(self.counts.values())
        return {name: self.counts[name] / total for name in ("memory", "integer", "float", "special", "control") if self.counts[name]}

    @classmethod
    def of(cls, code: list[str]) -> HotLoops:
        """code: the lines of a function, an instruction each, with addresses."""
        at = [int(found.group(1), 16) for line in code if (found := re.match(r"\s*/\*([0-9a-f]+)\*/", line))]
        most = widest(code, "LDG")
        loads = [a for a, line in zip(at, code) if _width(line, "LDG") == most > 0]
        loops = [
            (int(match.group(1), 16), a)
            for a, line in zip(at, code)
            if (match := re.search(r"\bBRA(?:\.\w+)*\s.*?(0x[0-9a-f]+)", line)) and int(match.group(1), 16) < a
        ]
        hot = set()
        for load in loads:
            around = [loop for loop in loops if loop[0] <= load <= loop[1]]
            if around:
                hot.add(min(around, key=lambda loop: loop[1] - loop[0]))
        lines = [line for a, line in zip(at, code) if any(begin <= a <= end for begin, end in hot)]
        return cls(
            Counter(_class(line) for line in lines),
            sum(_width(line, "LDG") + _width(line, "STG") for line in lines),
            sum(bool(re.search(r"\b(RED|REDG|ATOM|ATOMG)\.", line)) for line in lines),
        )


def widest(code: list[str], instruction: str) -> int:
    """Bytes of the widest access by instructions of this name, 0 without any."""
    return max((_width(line, instruction) for line in code), default=0)


def _width(line: str, instruction: str) -> int:
    match = re.search(rf"\b{instruction}(\.[\w.]*)", line)
    if match is None:
        return 0
    widths = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
    return next((width for mark, width in widths.items() if mark in match.group(1)), 4)


def _class(line: str) -> str:
    name = re.search(r"\*/\s+(?:@!?U?P\w+\s+)?(\w+)", line)
    operation = name.group(1) if name else ""
    return next((kind for kind, names in _CLASSES.items() if re.fullmatch(names, operation)), "integer")
