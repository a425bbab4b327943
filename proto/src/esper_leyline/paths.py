"""Where things lie: mount points in a pod and file names below them."""

from dataclasses import dataclass

GID = 10000
"""fsGroup and primary group of every container."""
UIDS = {"tolaria": 10001, "kasmina": 10002, "tamiyo": 10003, "weatherlight": 10004}
OPERATOR_UID = 65532
UMASK = 0o007


@dataclass(frozen=True, kw_only=True, slots=True)
class PathLayout:
    """Absolute directories as the containers see them. The default is a pod's; a laptop run passes its own."""

    run: str = "/run/esper"
    shm: str = "/dev/shm"
    checkpoints: str = "/checkpoints"
    config: str = "/etc/esper/config"
    code: str = "/etc/esper/code"
    keys: str = "/etc/esper/keys"
    bus: str = "/etc/esper/bus"
    emergency: str = "/etc/esper/emergency"
    tmp: str = "/tmp"
    termination_log: str = "/dev/termination-log"


POD = PathLayout()

# Below PathLayout.config (ConfigMap <run>-config).
RUN_CONFIG = "run.json"

# Below PathLayout.emergency (ConfigMap <run>-emergency): base64 of a BusEnvelope with an EmergencySignal.
EMERGENCY_SIGNAL = "signal"

# Below PathLayout.keys: what each container mounts is listed in esper_leyline.signing.KEY_ITEMS.

# Below PathLayout.bus (Secret <run>-bus); absent files mean: no Redis for this run.
BUS_URL = "url"
BUS_USERNAME = "username"
BUS_PASSWORD = "password"
BUS_CA = "ca.crt"

# Below PathLayout.run. One writer each.
TRAINER_PAGE = "trainer.page"
"""Heartbeats: a slot per local trainer process (esper_leyline.pages)."""
SUPERVISOR_PAGE = "supervisor.page"
EMERGENCY_PAGE = "emergency.page"
"""Written by weatherlight, read by the trainer once per step."""
JOURNAL = "journal"
"""RuntimeEvents of this pod (esper_leyline.journal); O_APPEND, written by supervisor and trainer."""
WEATHERLIGHT_SOCKET = "weatherlight.sock"
"""Stream socket; tolaria's supervisor holds one connection open for its whole life, so its end is seen at once."""
KASMINA_SOCKET = "kasmina.sock"
TAMIYO_SOCKET = "tamiyo.sock"
WEATHERLIGHT_STATE = "weatherlight"
"""Directory: report log and applied signals, kept over a restart of weatherlight."""

LAST_WORD = "last-word.json"
"""The trainer's own account of a failure, taken by the supervisor into the termination message."""
TRAINER_METRICS = "trainer.prom"
"""The trainer's metrics as Prometheus text, replaced whole; served by the supervisor's /metrics."""
STACK_DUMP = "stacks.txt"
"""All-thread dump of a hung trainer, written by faulthandler on SIGUSR1."""

# Below PathLayout.shm.
SNAPSHOT_PREFIX = "esper-snapshot"

# Below PathLayout.checkpoints.
CLAIM_MARKER = "claimed-by"
"""Names the run UID that owns this directory."""


def attempt_dir(run_uid: str, attempt: int) -> str:
    """Directory of one attempt, relative to the checkpoint root. A writer writes only below its own."""
    return f"{run_uid}/a{attempt:05d}"


EXPORT_DIR = "export"
"""Below <root>/<run-uid>/: the exported model, model.safetensors (or parts of it and an index) with model.json."""
