"""Group, kind, labels, annotations and names of child objects."""

GROUP = "esper.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "EsperTrainingRun"
PLURAL = "espertrainingruns"
SINGULAR = "espertrainingrun"
SHORT_NAMES = ("esperruns", "esperrun", "etr")

FIELD_MANAGER = "esper-operator"
MANAGED_BY = "esper.dev/operator"
"""Value of spec.managedBy that means: this operator."""

RUN = "esper.dev/run"
"""Label on every child: metadata.name of its run. Owner references decide; the label only selects."""
RUN_UID = "esper.dev/run-uid"
ATTEMPT = "esper.dev/attempt"
COMPONENT = "app.kubernetes.io/component"
NAME = "app.kubernetes.io/name"
MANAGED = "app.kubernetes.io/managed-by"

CONFIG_HASH = "esper.dev/config-hash"
"""Annotation on <run>-config and on pods (touched so that the kubelet refreshes mounts at once)."""
APPLIED_HASH = "esper.dev/applied-hash"
"""Annotation on children that the operator applies: digest of what it last applied, so that it need not again."""
KEY_GENERATION = "esper.dev/key-generation"
"""Annotation on the seed Secret and on <run>-keys: number of the keys in force; it only rises."""
SIGNAL = "esper.dev/signal"
"""Annotation on pods: '<term>.<seq>' of the newest emergency signal; the touch of emergency leg 3."""
DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
QUEUE_NAME = "kueue.x-k8s.io/queue-name"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"

EMERGENCY_CONFIG_MAP = "esper-emergency"
"""Broadcasts by label selector; lives in the operator's namespace."""

TOLARIA = "tolaria"
TAMIYO = "tamiyo"
KASMINA = "kasmina"
WEATHERLIGHT = "weatherlight"
SIDECARS = (WEATHERLIGHT, KASMINA, TAMIYO)
"""In the order they are declared; termination runs the other way (the last word gets out)."""


def job_name(run: str, attempt: int) -> str:
    return f"{run}-a{attempt}"


def config_map_name(run: str) -> str:
    return f"{run}-config"


def emergency_config_map_name(run: str) -> str:
    return f"{run}-emergency"


def keys_secret_name(run: str) -> str:
    return f"{run}-keys"


def bus_secret_name(run: str) -> str:
    return f"{run}-bus"


BUS_USER_PREFIX = "run-"


def bus_user_name(run_uid: str) -> str:
    """Of the run's own user in Redis."""
    return f"{BUS_USER_PREFIX}{run_uid}"


def claim_name(run: str) -> str:
    return f"{run}-checkpoints"


def service_name(run: str) -> str:
    return run
