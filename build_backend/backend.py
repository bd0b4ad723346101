"""PEP 517 backend: `setuptools.build_meta` that sees the target environment's site-packages.

pip builds in an isolated environment, before it installs dependencies. With `requires = ["torch"]` it
would fetch a second torch, of several gigabytes and maybe of another version than the one the package
will run with. pip runs these hooks with the target environment's own interpreter and hides only its
site-packages, so this backend appends them again and asks pip for what is missing there, and only that.
"""
from __future__ import annotations

import os
import site
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import toolchain


def _show_target_environment() -> None:
    """Append the target environment's site-packages; what pip put before them still wins."""
    folders = site.getsitepackages() + [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:  # not a virtual environment: user installs count too
        folders.append(site.getusersitepackages())
    for folder in folders:
        if os.path.isdir(folder) and folder not in sys.path:
            site.addsitedir(folder)  # reads .pth files, which editable installs of torch use


def _missing_requirements() -> list[str]:
    missing = []
    # 77.0.3 reads `license = "BSD-3-Clause"`, writes wheels without the `wheel` package, and is what torch
    # itself has required since 2.13.
    if toolchain.release_of(_installed("setuptools")) < (77, 0):
        missing.append("setuptools>=77.0.3")
    # Without a compiler nothing is built, and the headers in torch would be of no use.
    if toolchain.find_cxx() and toolchain.release_of(_installed("torch")) < toolchain.OLDEST_TORCH:
        missing.append("torch>=" + ".".join(map(str, toolchain.OLDEST_TORCH)))
    return missing


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "0"


_show_target_environment()


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _missing_requirements()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _missing_requirements()


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [need for need in _missing_requirements() if not need.startswith("torch")]


# Spelled out, and importing late: pip looks for these hooks before it has installed what the ones above
# ask for, and a fresh Python 3.12 environment has no setuptools.


def prepare_metadata_for_build_wheel(*args: Any, **kwargs: Any) -> str:
    from setuptools import build_meta

    return build_meta.prepare_metadata_for_build_wheel(*args, **kwargs)


def prepare_metadata_for_build_editable(*args: Any, **kwargs: Any) -> str:
    from setuptools import build_meta

    return build_meta.prepare_metadata_for_build_editable(*args, **kwargs)


def build_wheel(*args: Any, **kwargs: Any) -> str:
    from setuptools import build_meta

    return build_meta.build_wheel(*args, **kwargs)


def build_editable(*args: Any, **kwargs: Any) -> str:
    from setuptools import build_meta

    return build_meta.build_editable(*args, **kwargs)


def build_sdist(*args: Any, **kwargs: Any) -> str:
    from setuptools import build_meta

    return build_meta.build_sdist(*args, **kwargs)
