"""What the supervisor knows from its environment and run.json. Everything wrong with them is exit code 78."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from esper_leyline import env, paths, ports
from esper_leyline.runconfig import RunConfig, RunConfigError, parse

from esper_runtime.sidecar.environment import Environment, SettingsError

TRAINER_MODULE = "esper_runtime.tolaria.trainer"
DEFAULT_GRACE_S = 30
KILL_BEFORE_GRACE_ENDS_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Of one supervisor. Durations in seconds."""

    run_config: RunConfig
    run_uid: str
    attempt: int
    rank: int
    world_size: int
    run_dir: Path
    checkpoint_dir: Path
    termination_log: Path | None
    http_port: int
    grace_s: float
    trainer_module: str = TRAINER_MODULE
    """What `python -m` runs as the trainer; tests put a smaller one here."""

    @classmethod
    def read(cls, environ: Mapping[str, str], *, trainer_module: str | None = None) -> "Settings":
        """SettingsError names the variable or the key of run.json."""
        get = Environment(environ)
        config_file = get.path(env.CONFIG_FILE)
        try:
            config = parse(config_file.read_text(encoding="utf-8"))
        except RunConfigError as error:
            raise SettingsError(f"{config_file}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{env.CONFIG_FILE}={config_file} cannot be read: {error}") from error
        termination_log = get.text(env.TERMINATION_LOG, "-")
        return cls(
            run_config=config,
            run_uid=get.text(env.RUN_UID),
            attempt=get.integer(env.ATTEMPT, at_least=1),
            rank=get.integer(env.RANK, 0),
            world_size=get.integer(env.WORLD_SIZE, 1, at_least=1),
            run_dir=get.path(env.RUN_DIR),
            checkpoint_dir=get.path(env.CHECKPOINT_DIR),
            termination_log=None if termination_log == "-" else Path(termination_log),
            http_port=get.integer(env.HTTP_PORT, ports.TOLARIA_HTTP),
            trainer_module=trainer_module or TRAINER_MODULE,
            grace_s=float(get.integer(env.GRACE_SECONDS, DEFAULT_GRACE_S, at_least=1)),
        )

    @property
    def drain_s(self) -> float:
        """How long the trainer may take after SIGTERM; what is left of the grace is the supervisor's own."""
        return max(self.grace_s - KILL_BEFORE_GRACE_ENDS_S, self.grace_s / 2)

    def in_run_dir(self, name: str) -> Path:
        return self.run_dir / name

    @property
    def trainer_page(self) -> Path:
        return self.run_dir / paths.TRAINER_PAGE
