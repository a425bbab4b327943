"""Environment variables that the operator sets and the runtime reads. All paths come from here too.

A pod and a laptop differ only in the values: the builder takes a PathLayout, the runtime reads these.
"""

RUN = "ESPER_RUN"
"""metadata.name"""
NAMESPACE = "ESPER_NAMESPACE"
RUN_UID = "ESPER_RUN_UID"
ATTEMPT = "ESPER_ATTEMPT"
RANK = "ESPER_RANK"
"""Index of this worker, from the Job's completion index."""
WORLD_SIZE = "ESPER_WORLD_SIZE"
POD_NAME = "ESPER_POD_NAME"
POD_UID = "ESPER_POD_UID"
POD_IP = "ESPER_POD_IP"
NODE_NAME = "ESPER_NODE_NAME"
GRACE_SECONDS = "ESPER_GRACE_SECONDS"
"""terminationGracePeriodSeconds of the pod."""

CONFIG_FILE = "ESPER_CONFIG_FILE"
"""run.json: the rendered RunConfig (esper_leyline.runconfig)."""
RUN_DIR = "ESPER_RUN_DIR"
"""Memory volume shared by all containers: sockets, pages, journal, spool."""
SHM_DIR = "ESPER_SHM_DIR"
"""Memory volume of the trainer: snapshots."""
CHECKPOINT_DIR = "ESPER_CHECKPOINT_DIR"
CODE_DIR = "ESPER_CODE_DIR"
"""Files of runtime.codeConfigMapName; first on the Python path."""
KEYS_DIR = "ESPER_KEYS_DIR"
BUS_DIR = "ESPER_BUS_DIR"
EMERGENCY_DIR = "ESPER_EMERGENCY_DIR"
TERMINATION_LOG = "ESPER_TERMINATION_LOG"
"""File for the container's last word; /dev/termination-log in a pod."""
HTTP_PORT = "ESPER_HTTP_PORT"
"""Port of a sidecar's probes and metrics; weatherlight serves its report log there too. 0 = any free one."""
LOG_FORMAT = "ESPER_LOG_FORMAT"
"""json or text."""

# Set by the supervisor for the trainer process it starts; never by the operator.
INCARNATION = "ESPER_INCARNATION"
"""Starts of this container in this attempt, from 1."""
TRAINER_START = "ESPER_TRAINER_START"
"""Starts of the trainer process in this container, from 1."""
RECOVERY_CAUSE = "ESPER_RECOVERY_CAUSE"
"""RunReason of the death that this start recovers from; unset for the first start."""
RECOVERY_DETECTED_NS = "ESPER_RECOVERY_DETECTED_NS"
"""CLOCK_MONOTONIC when the supervisor noticed that death."""
RECOVERY_STEP = "ESPER_RECOVERY_STEP"
"""Last step in the dead trainer's heartbeat."""
RECOVERY_INCIDENT = "ESPER_RECOVERY_INCIDENT"
"""Name of that death (esper_leyline.incidents)."""

RESERVED = frozenset(
    {
        "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK",
        "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_NPROC_PER_NODE",
        RUN, NAMESPACE, RUN_UID, ATTEMPT, RANK, WORLD_SIZE, POD_NAME, POD_UID, POD_IP, NODE_NAME, GRACE_SECONDS,
        CONFIG_FILE, RUN_DIR, SHM_DIR, CHECKPOINT_DIR, CODE_DIR, KEYS_DIR, BUS_DIR, EMERGENCY_DIR,
        TERMINATION_LOG, HTTP_PORT, LOG_FORMAT,
    }
)  # fmt: skip
"""Names that a user's spec.runtime.env may not set. Every name with the prefix ESPER_ is refused as well."""
