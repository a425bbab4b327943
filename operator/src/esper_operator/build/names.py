"""Names, labels and owners of everything that a run owns."""

from typing import Any

from esper_leyline import labels

from esper_operator.model import Manifest, Run

APPLICATION = "esper"
MANAGER = "esper-operator"
TRAINER_COMPONENT = "trainer"


def run_labels(run: Run) -> dict[str, str]:
    """On every child."""
    return {
        labels.NAME: APPLICATION,
        labels.MANAGED: MANAGER,
        labels.RUN: run.key.name,
        labels.RUN_UID: run.uid,
    }


def attempt_labels(run: Run, attempt: int) -> dict[str, str]:
    """On the Job of an attempt and on its pods."""
    return {**run_labels(run), labels.COMPONENT: TRAINER_COMPONENT, labels.ATTEMPT: str(attempt)}


def owner(run: Run) -> dict[str, Any]:
    """Deleting the run deletes the child."""
    return {
        "apiVersion": labels.API_VERSION,
        "kind": labels.KIND,
        "name": run.key.name,
        "uid": run.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def child(run: Run, api_version: str, kind: str, name: str, **content: Any) -> Manifest:
    """A child object with the run's labels and owner."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": run.key.namespace,
            "labels": run_labels(run),
            "ownerReferences": [owner(run)],
        },
        **content,
    }
