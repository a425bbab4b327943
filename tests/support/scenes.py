"""Runs in the states that many tests begin with."""

from esper_operator.testing.builders import Scene, a_run


def phases(scene: Scene) -> list[str]:
    return [entry["to"] for entry in scene.status["history"]]


def condition(scene: Scene, kind: str) -> tuple[str, str]:
    found = next(c for c in scene.status["conditions"] if c["type"] == kind)
    return found["status"], found["reason"]


def running(attempt: int = 1, **spec: object) -> Scene:
    """A run that trains in `attempt`, at step 20 with a checkpoint at 10."""
    scene = a_run(**spec).reconciled()
    while scene.attempt < attempt:
        scene = scene.having(pods=()).with_pods().failed(70).reconciled().later(400).reconciled()
        scene = scene.without_jobs().reconciled()
    scene = scene.having(pods=()).with_pods(attempt=attempt).reconciled()
    scene = scene.later(1).reporting("RUNNING", step=1, moved=("STARTING", "RUNNING"), reason="Training")
    return scene.reporting("RUNNING", step=20, checkpoint=10).reconciled()
