"""What a report says of the machine."""
import platform
from pathlib import Path

import pytest

from demp_kernels.recipes.machine import processor

X86 = "processor\t: {0}\nvendor_id\t: AuthenticAMD\ncpu family\t: 23\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"


def other_name() -> str:
    return platform.processor() or platform.machine()


@pytest.mark.parametrize(("text", "expected"), [
    (X86.format(0) + "\n" + X86.format(1), "AMD EPYC (family 23 model 1)"),
    ("model name\t: Some CPU @ 2.00GHz\n", "Some CPU @ 2.00GHz"),
    (ARM, other_name()),
    ("", other_name()),
])
def test_processor_tells_generations_of_one_name_apart(monkeypatch, text, expected):
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert processor() == expected


def test_processor_without_cpuinfo(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert processor() == other_name()
