"""Names of incidents: whatever tells of one carries the same id, so that one search finds it all.

A halt is named by its signal. A rollback, and the death of a trainer, a pod or an attempt, is named by where in the
run's life it happened; so everybody who knows the place knows the name, and nobody has to pass it on.
"""

import hashlib
from typing import Final

FIELD: Final = "incident"
"""In JSON logs, and in the fields of a line of the run's record."""
ANNOTATION: Final = "esper.dev/incident"
"""Of a Kubernetes Event."""


def incident_at(run_uid: str, *place: int) -> str:
    """32 hexadecimal digits for a place in a run's life: attempt; rank; incarnation of its pod; start of the trainer
    in it; number of the rollback in that trainer. A shorter place names the end of what its last number counts."""
    return hashlib.sha256("/".join([run_uid, *map(str, place)]).encode()).hexdigest()[:32]
