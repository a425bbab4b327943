"""The two Secrets of a run: its keys, and the way to Redis. No trainer ever mounts either."""

import base64
from collections.abc import Mapping

from esper_leyline import labels, paths, signing
from esper_leyline.signing import Role, SigningKey

from esper_operator.build import names
from esper_operator.model import Child, Manifest, Run, Settings


def keys(run: Run, settings: Settings) -> Child:
    """<run>-keys: create-only, derived from the operator's seed, so that losing it loses nothing."""

    def derive(role: Role) -> SigningKey:
        return SigningKey.derive(settings.key_seed, run.uid, role, settings.key_generation)

    operator, report, tamiyo = derive(Role.OPERATOR), derive(Role.REPORT), derive(Role.TAMIYO)
    content = {
        signing.OPERATOR_PUBLIC: operator.public_text(),
        signing.REPORT_PRIVATE: report.to_text(),
        signing.TAMIYO_PRIVATE: tamiyo.to_text(),
        signing.TAMIYO_PUBLIC: tamiyo.public_text(),
    }
    return Child(manifest=_secret(run, labels.keys_secret_name(run.key.name), content), create_only=True)


def bus(run: Run, settings: Settings) -> tuple[Child, ...]:
    """<run>-bus: follows the operator's settings. None when there is no Redis."""
    if not settings.bus_url:
        return ()
    content = {
        paths.BUS_URL: settings.bus_url,
        paths.BUS_USERNAME: settings.bus_username,
        paths.BUS_PASSWORD: settings.bus_password,
        paths.BUS_CA: settings.bus_ca,
    }
    given = {key: value for key, value in content.items() if value}
    return (Child(manifest=_secret(run, labels.bus_secret_name(run.key.name), given)),)


def _secret(run: Run, name: str, content: Mapping[str, str]) -> Manifest:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in content.items()}
    return names.child(run, "v1", "Secret", name, type="Opaque", data=data)
