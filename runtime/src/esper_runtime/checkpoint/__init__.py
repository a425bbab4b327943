"""Durable state of a run on its checkpoint volume: generations of tensors, and a write-ahead log of facts.

`Store` writes and reads generations, `Writer` does so in a thread beside training, `Wal` keeps counters and fired
faults over all attempts. Wal and Volume need no torch and are imported alone by the supervisor, hence the lazy names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from esper_runtime.checkpoint.errors import (
    CheckpointDirError,
    CheckpointError,
    CorruptFileError,
    NoValidCheckpointError,
    SaveError,
    SupersededError,
)
from esper_runtime.checkpoint.volume import Volume
from esper_runtime.checkpoint.wal import Wal, WalError, WalState

if TYPE_CHECKING:
    from esper_runtime.checkpoint.generation import GenerationData, LoadedGeneration
    from esper_runtime.checkpoint.retention import Generation
    from esper_runtime.checkpoint.store import Store
    from esper_runtime.checkpoint.writer import SaveOutcome, Writer

__all__ = [
    "CheckpointDirError",
    "CheckpointError",
    "CorruptFileError",
    "Generation",
    "GenerationData",
    "LoadedGeneration",
    "NoValidCheckpointError",
    "SaveError",
    "SaveOutcome",
    "Store",
    "SupersededError",
    "Volume",
    "Wal",
    "WalError",
    "WalState",
    "Writer",
]

_LAZY = {
    "Generation": "retention",
    "GenerationData": "generation",
    "LoadedGeneration": "generation",
    "Store": "store",
    "SaveOutcome": "writer",
    "Writer": "writer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
