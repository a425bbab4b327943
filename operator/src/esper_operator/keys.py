"""The seed of all run keys: a Secret in the operator's namespace, made once, and the generation of keys in force.

The generation is kept as an annotation of that Secret, because it must never fall: pods that were given newer keys
would believe nobody any more.
"""

import base64
import binascii
import logging
import os

from esper_leyline.labels import FIELD_MANAGER, KEY_GENERATION, MANAGED
from esper_leyline.signing import SEED_BYTES

from esper_operator.kube.api import SECRETS, KubeApi, Object
from esper_operator.kube.errors import AlreadyExists, NotFound

logger = logging.getLogger(__name__)

SEED = "seed"
"""Key of the Secret's data."""


class SeedError(Exception):
    """The Secret is there but holds no usable seed. It is never replaced: live runs may depend on it."""


class GenerationError(Exception):
    """The keys that are asked for are not the next ones."""


async def load_or_make(api: KubeApi, *, namespace: str, name: str, generation: int = 1) -> tuple[bytes, int]:
    """The seed, and the generation of keys in force from now on: `generation`, or what was in force if that is more.

    Replicas that start at once agree on the seed that was created first. GenerationError for a leap of more than one.
    """
    secret = await _load(api, namespace, name, generation)
    seed, before = _seed(secret, name), _generation(secret, name)
    if generation < before:
        logger.warning("keys of generation %d are asked for; %d stay in force: keys never go back", generation, before)
    if generation <= before:
        return seed, before
    if generation > before + 1:
        raise GenerationError(
            f"keys of generation {generation} are asked for and {before} are in force; pods know only the next ones: "
            f"ask for {before + 1} first, and for the ones after it when every pod has had two minutes"
        )
    body = {"metadata": {"annotations": {KEY_GENERATION: str(generation)}}}
    await api.patch(SECRETS, name, namespace=namespace, body=body)
    logger.info("keys of generation %d are in force", generation)
    return seed, generation


async def _load(api: KubeApi, namespace: str, name: str, generation: int) -> Object:
    try:
        return await api.get(SECRETS, name, namespace=namespace)
    except NotFound:
        pass  # the first start
    try:
        return await api.create(SECRETS, _manifest(namespace, name, generation))
    except AlreadyExists:
        return await api.get(SECRETS, name, namespace=namespace)


def _manifest(namespace: str, name: str, generation: int) -> Object:
    return {
        "apiVersion": SECRETS.api_version,
        "kind": SECRETS.kind,
        "metadata": {
            "namespace": namespace,
            "name": name,
            "labels": {MANAGED: FIELD_MANAGER},
            "annotations": {KEY_GENERATION: str(generation)},
        },
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


def _generation(secret: Object, name: str) -> int:
    found = (secret["metadata"].get("annotations") or {}).get(KEY_GENERATION, "1")
    if not found.isdecimal() or int(found) < 1:
        raise SeedError(f"Secret {name}: annotation {KEY_GENERATION} is {found[:64]!r}; it must be a number from 1")
    return int(found)
