"""All alerts and recorded series, in groups."""

from esper_runtime.nissa.alerts.bus import BUS
from esper_runtime.nissa.alerts.operator import OPERATOR
from esper_runtime.nissa.alerts.recovery import RECOVERY
from esper_runtime.nissa.alerts.sidecars import SIDECARS
from esper_runtime.nissa.alerts.training import TRAINING
from esper_runtime.nissa.model import Alert, Group, Recording
from esper_runtime.nissa.slos import OBJECTIVES

GROUPS: tuple[Group, ...] = (TRAINING, RECOVERY, SIDECARS, BUS, OPERATOR, OBJECTIVES)
ALERTS: tuple[Alert, ...] = tuple(alert for group in GROUPS for alert in group.alerts)
RECORDINGS: tuple[Recording, ...] = tuple(recording for group in GROUPS for recording in group.recordings)
