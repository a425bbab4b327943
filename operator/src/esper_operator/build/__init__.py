"""What a run consists of in Kubernetes, as manifests. Pure and total: a run without problems always builds.

Read in this order: names, config, secrets, service, volumes, sidecars, pod, job. `decide` calls `children` and `job`;
the laptop runner turns the same manifests into directories and processes.
"""

from esper_operator.build import config, secrets, service, volumes
from esper_operator.build.job import job
from esper_operator.model import Child, Run, Settings

__all__ = ["children", "job"]


def children(run: Run, settings: Settings, resume_uid: str | None = None) -> tuple[Child, ...]:
    """Everything that a run owns besides its Jobs, in the order of creation.

    resume_uid is the UID of the run that checkpoint.resumeFrom names.
    """
    return (
        secrets.keys(run, settings),
        *secrets.bus(run, settings),
        config.run_config(run, resume_uid),
        config.emergency(run),
        *volumes.claim(run),
        service.service(run),
    )
