"""The random generators of a process as plain values and tensors, for a checkpoint."""
from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["check_random_state", "random_state", "restore_random_state"]


def random_state() -> dict[str, Any]:
    """States of torch's generators (CPU, every CUDA device), of numpy's and of Python's global one."""
    state: Any = np.random.get_state()
    name, words, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(words.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def check_random_state(state: Any) -> None:
    """Raises ValueError if `state` is none that `random_state` gives; tried on generators that are thrown away."""
    try:
        if not isinstance(state, dict):
            raise TypeError(f"a dictionary is required, got {type(state).__name__}")
        torch.Generator().set_state(state["torch"])
        if not isinstance(state["cuda"], list) or not all(isinstance(of_device, torch.Tensor) for of_device in state["cuda"]):
            raise TypeError("cuda must be a list of tensors")
        if "numpy" in state:
            np.random.RandomState().set_state(_numpy_state(state["numpy"]))
        if "python" in state:
            random.Random().setstate(state["python"])
    except Exception as error:  # each generator refuses in its own words and classes
        raise ValueError(f"rng must be the states of random generators: {str(error).splitlines()[0]}") from error


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue where `random_state` was called. CUDA's states only where there are as many devices."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        np.random.set_state(_numpy_state(state["numpy"]))
    if "python" in state:
        random.setstate(state["python"])


def _numpy_state(saved: list[Any]) -> tuple[Any, ...]:
    name, words, *rest = saved
    if words.dtype != torch.int64:
        raise TypeError(f"numpy's words must be int64, got {words.dtype}")
    return (name, words.numpy().astype(np.uint32), *rest)
