"""The machinery behind `demp bench` and `benchmarks/`: what every op costs beside eager PyTorch, torch.compile and a copy.

    command       flags of `demp bench`; what is run in which order
    report        sheets in the terminal, as Markdown, in the README; plots: figures
    sheets        rows -> tables; goals: what is wanted of the rows
    step          a whole training step of a ResNet-18; compaction: the removal of known dead units
    suites        which cases of an op are measured, one file an op, under the op's stem
    runner        cases -> rows, with progress
    cases, timing, rows, machine   what a case is, how it is timed, what is kept of it, where it was run

Each uses only those below it. Nothing outside this room imports it but the command line.
"""
from __future__ import annotations
