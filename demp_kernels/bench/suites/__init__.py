"""Which cases of each op are measured: `SUITES[stem](scope)`."""
from __future__ import annotations

from collections.abc import Callable

from ..cases import Case, Scope
from . import activation, channel_select, compact, dispatch, norm_act, weight_noise

__all__ = ["SUITES"]

SUITES: dict[str, Callable[[Scope], list[Case]]] = {
    "activation": activation.cases,
    "norm_act": norm_act.cases,
    "weight_noise": weight_noise.cases,
    "compact": compact.cases,
    "channel_select": channel_select.cases,
    "dispatch": dispatch.cases,
}
