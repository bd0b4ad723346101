"""Training with DemP: schedule, penalty, liveness, the controller, checkpoints."""
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .controller import DemP
from .fsdp import compact_sharded
from .penalty import PENALTY_NORMS, PENALTY_TARGETS
from .report import DemPEvent, DemPReport
from .schedule import SCHEDULES
from .sharded import load_sharded, save_sharded
from .steering import Steering

__all__ = [
    "CheckpointError", "DemP", "DemPEvent", "DemPReport", "PENALTY_NORMS", "PENALTY_TARGETS", "SCHEDULES",
    "Steering", "compact_sharded", "load_checkpoint", "load_sharded", "save_checkpoint", "save_sharded",
]
