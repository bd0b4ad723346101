"""The build itself: what it finds, what it asks pip for, when it compiles again, and how it fails."""
from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BACKEND = Path(__file__).resolve().parent.parent / "build_backend"
TOOLS = ("CXX", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BACKEND))
    for name in TOOLS:
        monkeypatch.delenv(name, raising=False)


def module(name: str) -> ModuleType:
    """A module of the build backend, which is on sys.path only while a test runs."""
    return importlib.import_module(name)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.14.1+cu130", (2, 14)), ("2.11.0a0+git1234", (2, 11)), ("13.0", (13, 0)), ("77", (77, 0)), ("0", (0, 0))],
)
def test_release(version: str, release: tuple[int, int]) -> None:
    assert module("toolchain").release_of(version) == release


@pytest.mark.parametrize(("version", "newest"), [("12.6", "9.0+PTX"), ("12.8", "10.0+PTX"), ("13.0", "10.0+PTX")])
def test_default_architectures_are_those_that_nvcc_knows(version: str, newest: str, tmp_path: Path) -> None:
    toolchain = module("toolchain")
    listed = toolchain.default_cuda_architectures(toolchain.Nvcc(tmp_path / "nvcc", version, tmp_path))
    assert listed.split(";")[0] == "7.5" and listed.split(";")[-1] == newest
    assert toolchain.cuda_architecture_flags(listed)[0] == "-gencode=arch=compute_75,code=sm_75"


def test_compiler_named_by_cxx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolchain = module("toolchain")
    compiler = program(tmp_path / "my-c++", "echo 'my compiler 1.0'\n")
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    assert toolchain.find_cxx() == [str(compiler), "-m64"]
    assert toolchain.describe_compiler(toolchain.find_cxx()) == "my compiler 1.0"
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(toolchain.Unavailable, match="CXX=/nonexistent/c\\+\\+ cannot be run"):
        toolchain.require_cxx()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolchain = module("toolchain")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_cxx() is None
    with pytest.raises(toolchain.Unavailable, match="no C\\+\\+ compiler"):
        toolchain.require_cxx()


def test_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolchain = module("toolchain")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('the build does not import torch')\n")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.2'\ncuda = None\n")
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(toolchain.Unavailable, match="torch >= 2.11.*torch 2.10.2"):
        toolchain.find_torch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(toolchain.Unavailable, match="torch was not installed"):
        toolchain.find_torch()


def toolkit(home: Path, release: str) -> Path:
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    return program(home / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.1'\n")


def torch_with(cuda: str | None) -> object:
    return module("toolchain").Torch("2.14.0", cuda, Path("include"), Path("lib"))


def test_nvcc_behind_a_wrapper_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A script on PATH that calls nvcc has no headers beside it; the toolkit it calls is found another way."""
    toolchain = module("toolchain")
    real = toolkit(tmp_path / "cuda-13.1", "13.1")
    program(tmp_path / "shims" / "nvcc", f'exec {real} "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(toolchain, "glob", lambda pattern: [str(real)])
    found = toolchain.find_nvcc(torch_with("13.0"))
    assert found.home in (real.parent.parent, Path("/usr/local/cuda").resolve())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda-13.1"))
    assert toolchain.find_nvcc(torch_with("13.0")) == toolchain.Nvcc(real, "13.1", real.parent.parent)


def test_nvcc_of_another_major_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolchain = module("toolchain")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    toolkit(tmp_path, "11.8")
    with pytest.raises(toolchain.Unavailable, match="needs CUDA 99, but .*nvcc is CUDA 11.8"):
        toolchain.find_nvcc(torch_with("99.0"))
    with pytest.raises(toolchain.Unavailable, match="build without CUDA"):
        toolchain.find_nvcc(torch_with(None))


def test_cuda_architectures() -> None:
    toolchain = module("toolchain")
    assert toolchain.cuda_architecture_flags("8.0;10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    assert toolchain.cuda_architecture_flags("9.0a 12.0") == [
        "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_120,code=sm_120"
    ]
    with pytest.raises(toolchain.Unavailable, match="TORCH_CUDA_ARCH_LIST.*'Hopper'"):
        toolchain.cuda_architecture_flags("8.0;Hopper")


# --- what pip is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "compiler", "asked"),
    [
        ({"setuptools": "80.9", "torch": "2.14.1+cu130"}, True, []),
        ({"setuptools": "80.9"}, True, ["torch>=2.11"]),
        ({"setuptools": "80.9", "torch": "2.10.0"}, True, ["torch>=2.11"]),
        ({"setuptools": "80.9"}, False, []),  # nothing to compile with: torch's headers would be of no use
        ({"setuptools": "65.5.0", "torch": "2.11.0"}, True, ["setuptools>=77.0.3"]),
        ({}, False, ["setuptools>=77.0.3"]),
    ],
)
def test_build_requirements(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], compiler: bool, asked: list[str]
) -> None:
    backend = module("backend")
    monkeypatch.setattr(backend, "_installed", lambda name: installed.get(name, "0"))
    monkeypatch.setattr(backend.toolchain, "find_cxx", lambda: ["c++"] if compiler else None)
    assert backend.get_requires_for_build_editable() == asked
    assert backend.get_requires_for_build_wheel() == asked
    assert backend.get_requires_for_build_sdist() == [need for need in asked if "torch" not in need]


def test_hooks_are_there_without_setuptools(tmp_path: Path) -> None:
    """pip looks for build_editable before it has installed anything that the backend asks for."""
    (tmp_path / "setuptools.py").write_text("raise ImportError('no setuptools here')\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(BACKEND)!r}]\n"
        "import backend\n"
        "assert all(hasattr(backend, hook) for hook in ('build_editable', 'build_wheel', 'build_sdist'))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    if module("toolchain").find_cxx() is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "value.h").write_text("#define VALUE 1\n")
    (tmp_path / "csrc" / "uses.cpp").write_text('#include "value.h"\nextern "C" int value() { return VALUE; }\n')
    (tmp_path / "csrc" / "alone.cpp").write_text('extern "C" int alone() { return 5; }\n')
    return tmp_path


def library(project: Path, *flags: str) -> object:
    cxx = module("toolchain").require_cxx()
    sources = sorted((project / "csrc").glob("*.cpp"))
    return module("native").Library("lib", "lib.so", sources, [*cxx, "-fPIC", *flags], [*cxx])


def build(project: Path, capfd: pytest.CaptureFixture[str], *flags: str) -> tuple[object, list[str]]:
    """The outcome, and the sources that were compiled for it."""
    capfd.readouterr()
    outcome = module("native").build([library(project, *flags)], project, project / "build")["lib"]
    printed = capfd.readouterr().out.splitlines()
    return outcome, sorted(line.split("/")[-1] for line in printed if line.startswith("compiling"))


def test_compiles_only_what_changed(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    built, compiled = build(project, capfd)
    assert compiled == ["alone.cpp", "uses.cpp"]
    assert ctypes.CDLL(str(built)).value() == 1
    assert build(project, capfd)[1] == []
    (project / "csrc" / "value.h").write_text("#define VALUE 2\n")
    built, compiled = build(project, capfd)
    assert compiled == ["uses.cpp"]
    assert ctypes.CDLL(str(shutil.copy(built, project / "second.so"))).value() == 2
    assert build(project, capfd, "-DOTHER")[1] == ["alone.cpp", "uses.cpp"]
    (project / "csrc" / "value.h").unlink()
    outcome, compiled = build(project, capfd, "-DOTHER")
    assert compiled == ["uses.cpp"]
    assert "value.h" in str(outcome)


def test_failure_carries_every_error(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "csrc" / "first.cpp").write_text("int first = missing_name;\n")
    (project / "csrc" / "second.cpp").write_text("int second = other_name;\n")
    outcome, _ = build(project, capfd)
    assert isinstance(outcome, module("toolchain").Unavailable)
    assert "missing_name" in str(outcome)
    assert "other_name" in str(outcome)


def test_compiler_that_cannot_run(project: Path) -> None:
    native = module("native")
    broken = native.Library("lib", "lib.so", [project / "csrc" / "alone.cpp"], [str(project / "no-compiler")], ["false"])
    assert "no-compiler" in str(native.build([broken], project, project / "build")["lib"])
