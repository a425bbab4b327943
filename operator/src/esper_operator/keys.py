"""The seed of all run keys: a Secret in the operator's namespace, made once."""

import base64
import binascii
import os

from esper_leyline.labels import FIELD_MANAGER, MANAGED
from esper_leyline.signing import SEED_BYTES

from esper_operator.kube.api import SECRETS, KubeApi, Object
from esper_operator.kube.errors import AlreadyExists, NotFound

SEED = "seed"
"""Key of the Secret's data."""


class SeedError(Exception):
    """The Secret is there but holds no usable seed. It is never replaced: live runs may depend on it."""


async def load_or_make(api: KubeApi, *, namespace: str, name: str) -> bytes:
    """The seed. Replicas that start at once agree on the one that was created first."""
    try:
        return _seed(await api.get(SECRETS, name, namespace=namespace), name)
    except NotFound:
        pass  # the first start
    try:
        return _seed(await api.create(SECRETS, _manifest(namespace, name)), name)
    except AlreadyExists:
        return _seed(await api.get(SECRETS, name, namespace=namespace), name)


def _manifest(namespace: str, name: str) -> Object:
    return {
        "apiVersion": SECRETS.api_version,
        "kind": SECRETS.kind,
        "metadata": {"namespace": namespace, "name": name, "labels": {MANAGED: FIELD_MANAGER}},
        "immutable": True,
        "type": "Opaque",
        "data": {SEED: base64.b64encode(os.urandom(SEED_BYTES)).decode()},
    }


def _seed(secret: Object, name: str) -> bytes:
    try:
        seed = base64.b64decode((secret.get("data") or {}).get(SEED, ""), validate=True)
    except binascii.Error as error:
        raise SeedError(f"Secret {name}: key {SEED!r} is no base64") from error
    if len(seed) < SEED_BYTES:
        raise SeedError(
            f"Secret {name}: key {SEED!r} has {len(seed)} bytes, at least {SEED_BYTES} are needed; "
            "put a seed there, or delete the Secret while no run is alive"
        )
    return seed
