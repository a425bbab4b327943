"""What an attempt is started with, as hashes: tells an edit that must wait from one already in force."""

import hashlib
import json

from esper_operator.api.base import Model
from esper_operator.api.v1alpha1 import Launched, Spec


def launched(spec: Spec) -> Launched:
    """status.launched of an attempt that starts with `spec`."""
    return Launched(
        runtime_hash=_digest(spec.runtime),
        workers_hash=_digest(spec.workers),
        storage_hash=_digest(spec.checkpoint.storage),
    )


def _digest(section: Model) -> str:
    text = json.dumps(section.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
