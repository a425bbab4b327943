"""Weatherlight's settings: its environment, read once at the start, and where its keys are."""

from dataclasses import dataclass
from pathlib import Path

from esper_leyline import env, paths, signing
from esper_leyline.signing import SigningKey

from esper_runtime.sidecar.environment import Environment
from esper_runtime.sidecar.init import RESTARTS
from esper_runtime.sidecar.keyfile import KeyFile, private_key
from esper_runtime.weatherlight.reports import Identity


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    identity: Identity
    run_dir: Path
    state_dir: Path
    keys_dir: Path
    bus_dir: Path
    emergency_dir: Path
    report_key: KeyFile[SigningKey]
    restarts: int = 0
    """Workers of this container that ended before this one."""

    @classmethod
    def load(cls, environment: Environment) -> "Settings":
        """SettingsError names the variable or key file that is missing or malformed."""
        run_dir = environment.path(env.RUN_DIR)
        keys_dir = environment.path(env.KEYS_DIR)
        return cls(
            identity=Identity(
                run_uid=environment.text(env.RUN_UID),
                run=f"{environment.text(env.NAMESPACE)}/{environment.text(env.RUN)}",
                attempt=environment.integer(env.ATTEMPT, at_least=1),
                rank=environment.integer(env.RANK, 0),
                pod_name=environment.text(env.POD_NAME, ""),
                node_name=environment.text(env.NODE_NAME, ""),
            ),
            run_dir=run_dir,
            state_dir=run_dir / paths.WEATHERLIGHT_STATE,
            keys_dir=keys_dir,
            bus_dir=environment.path(env.BUS_DIR),
            emergency_dir=environment.path(env.EMERGENCY_DIR),
            report_key=private_key(keys_dir / signing.REPORT_PRIVATE),
            restarts=environment.integer(RESTARTS, 0),
        )
