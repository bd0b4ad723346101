"""Physical removal of dead units: plan, validate on fake tensors, commit."""
from __future__ import annotations

from .entry import compact
from .plan import CompactionError
from .recycle import recycle
from .report import CompactionReport
from .saved import widths_to_dict
from .shrink import shrink_to

__all__ = [
    "CompactionError", "CompactionReport", "compact", "recycle", "shrink_to", "widths_to_dict",
]
