"""The last word: why the trainer ended, for the container's termination message.

The trainer leaves it in the run directory before it exits by itself; the supervisor completes it (a killed trainer
says nothing) and writes it where the kubelet looks, at most 2,048 bytes of JSON.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 2048
MAX_REASON_CHARACTERS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class LastWord:
    """`reason` is a member of esper_leyline.reasons.RunReason; steps are absent when unknown."""

    reason: str
    message: str = ""
    exit_code: int
    step: int | None = None
    saved_step: int | None = None
    epoch: int | None = None

    def to_json(self) -> bytes:
        """At most MAX_BYTES; a longer message loses its beginning, because the end of a traceback says most."""
        message = self.message
        while len(encoded := self._encode(message)) > MAX_BYTES:
            cut = max(1, (len(encoded) - MAX_BYTES) // 6)  # a character takes at most six bytes
            message = "…" + message[1 + cut :]
        return encoded

    def _encode(self, message: str) -> bytes:
        document: dict[str, Any] = {
            "reason": self.reason[:MAX_REASON_CHARACTERS],
            "message": message,
            "exitCode": self.exit_code,
            "step": self.step,
            "savedStep": self.saved_step,
            "epoch": self.epoch,
        }
        present = {key: value for key, value in document.items() if value is not None}
        # Lone surrogates (from undecodable file names in messages) have no UTF-8.
        return json.dumps(present, ensure_ascii=False).encode("utf-8", "replace")

    def write(self, path: Path) -> None:
        """Replaces `path` atomically. OSError when that is impossible."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_bytes(self.to_json())
        draft.replace(path)

    def write_in_place(self, path: Path) -> None:
        """Overwrites `path`, for a termination log, which is a mounted file and cannot be replaced."""
        path.write_bytes(self.to_json())


def read(path: Path) -> LastWord | None:
    """None when there is none, or none that can be understood (its writer may have been killed)."""
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return _of(document) if isinstance(document, dict) else None


def _of(document: Mapping[str, Any]) -> LastWord | None:
    reason, message, exit_code = document.get("reason"), document.get("message", ""), document.get("exitCode")
    if not (isinstance(reason, str) and isinstance(message, str) and isinstance(exit_code, int)):
        return None
    return LastWord(
        reason=reason,
        message=message,
        exit_code=exit_code,
        step=_count(document.get("step")),
        saved_step=_count(document.get("savedStep")),
        epoch=_count(document.get("epoch")),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
