"""The two Secrets of a run: its keys, and the way to Redis. No trainer ever mounts either."""

import base64
from collections.abc import Mapping

from esper_leyline import labels, paths, signing
from esper_leyline.signing import Role, SigningKey

from esper_operator.build import names
from esper_operator.model import Child, Manifest, Run, Settings


def keys(run: Run, settings: Settings) -> Child:
    """<run>-keys: derived from the operator's seed, so that losing it loses nothing; written once per generation."""
    seed, generation = settings.key_seed, settings.key_generation
    content = {
        signing.OPERATOR_PUBLIC: signing.announced(seed, run.uid, Role.OPERATOR, generation),
        signing.REPORT_PRIVATE: SigningKey.derive(seed, run.uid, Role.REPORT, generation).to_text(),
        signing.TAMIYO_PRIVATE: SigningKey.derive(seed, run.uid, Role.TAMIYO, generation).to_text(),
        signing.TAMIYO_PUBLIC: signing.announced(seed, run.uid, Role.TAMIYO, generation),
    }
    manifest = _secret(run, labels.keys_secret_name(run.key.name), content)
    manifest["metadata"]["annotations"] = {labels.KEY_GENERATION: str(generation)}
    return Child(manifest=manifest, create_only=True, key_generation=generation)


def bus(run: Run, settings: Settings) -> tuple[Child, ...]:
    """<run>-bus: follows the operator's settings. None when there is no Redis.

    With users per run nothing in it opens more than what this run may do.
    """
    if not settings.bus_url:
        return ()
    username, password = settings.bus_username, settings.bus_password
    if settings.bus_per_run_users:
        username = labels.bus_user_name(run.uid)
        password = signing.bus_password(settings.key_seed, run.uid, settings.key_generation)
    content = {
        paths.BUS_URL: settings.bus_url,
        paths.BUS_USERNAME: username,
        paths.BUS_PASSWORD: password,
        paths.BUS_CA: settings.bus_ca,
    }
    given = {key: value for key, value in content.items() if value}
    return (Child(manifest=_secret(run, labels.bus_secret_name(run.key.name), given)),)


def _secret(run: Run, name: str, content: Mapping[str, str]) -> Manifest:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in content.items()}
    return names.child(run, "v1", "Secret", name, type="Opaque", data=data)
