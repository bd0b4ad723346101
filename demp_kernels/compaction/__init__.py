"""Physical removal of dead units: plan, validate on fake tensors, commit."""
from __future__ import annotations

from .entry import apply_saved, compact
from .plan import CompactionError
from .recycle import recycle
from .report import CompactionReport
from .saved import plan_to_dict
from .shrink import shrink_to

__all__ = [
    "CompactionError", "CompactionReport", "apply_saved", "compact", "plan_to_dict", "recycle", "shrink_to",
]
