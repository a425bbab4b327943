"""Where and as what this trainer process runs: its environment, read once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from esper_leyline import env
from esper_leyline.incidents import incident_at

from esper_runtime.sidecar.environment import Environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovering:
    """The death that this start recovers from, as the supervisor saw it."""

    cause: str
    detected_ns: int | None
    """CLOCK_MONOTONIC."""
    step: int | None
    incident: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Of one trainer process."""

    config_file: Path
    run_uid: str
    attempt: int
    rank: int
    run_dir: Path
    shm_dir: Path
    checkpoint_dir: Path
    code_dir: Path | None
    incarnation: int
    trainer_start: int
    recovering: Recovering | None

    def incidents(self) -> Iterator[str]:
        """Names for what goes wrong inside this trainer, one after the other."""
        here = (self.attempt, self.rank, self.incarnation, self.trainer_start)
        return (incident_at(self.run_uid, *here, number) for number in count(1))

    @property
    def recovers_from(self) -> str:
        """The incident that this start recovers from: the trainer before it in the pod, else the pod, else the attempt
        before. Of no meaning for a run's first start."""
        if self.recovering is not None and self.recovering.incident:
            return self.recovering.incident
        if self.incarnation > 1:
            return incident_at(self.run_uid, self.attempt, self.rank, self.incarnation - 1)
        return incident_at(self.run_uid, self.attempt - 1)

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Place":
        """SettingsError names the variable."""
        get = Environment(environ)
        cause = environ.get(env.RECOVERY_CAUSE)
        code_dir = environ.get(env.CODE_DIR)
        return cls(
            config_file=get.path(env.CONFIG_FILE),
            run_uid=get.text(env.RUN_UID),
            attempt=get.integer(env.ATTEMPT, at_least=1),
            rank=get.integer(env.RANK, 0),
            run_dir=get.path(env.RUN_DIR),
            shm_dir=get.path(env.SHM_DIR),
            checkpoint_dir=get.path(env.CHECKPOINT_DIR),
            code_dir=Path(code_dir) if code_dir else None,
            incarnation=get.integer(env.INCARNATION, 1, at_least=1),
            trainer_start=get.integer(env.TRAINER_START, 1, at_least=1),
            recovering=None
            if not cause
            else Recovering(
                cause=cause,
                detected_ns=get.integer(env.RECOVERY_DETECTED_NS) if environ.get(env.RECOVERY_DETECTED_NS) else None,
                step=get.integer(env.RECOVERY_STEP) if environ.get(env.RECOVERY_STEP) else None,
                incident=environ.get(env.RECOVERY_INCIDENT, ""),
            ),
        )
