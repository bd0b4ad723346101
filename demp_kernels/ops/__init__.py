"""The ops: one file each, with docstring, checks, schema, fake implementation, autograd and dispatch."""
from __future__ import annotations

from . import activation, backend, channel_select, compact, norm_act, weight_noise

backend.load()

__all__ = ["activation", "backend", "channel_select", "compact", "norm_act", "weight_noise"]
