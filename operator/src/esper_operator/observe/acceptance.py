"""Why a run may not start, from all that was seen; the condition Accepted and the policy of that name share it."""

from collections.abc import Iterator

from esper_leyline import labels
from esper_leyline.reasons import RunReason

from esper_operator.api.v1alpha1 import Spec
from esper_operator.model import Observation, Problem
from esper_operator.observe.attempt import current_job, number

GENERATED_SECRETS = tuple(name("") for name in (labels.keys_secret_name, labels.bus_secret_name))
"""How the names of Secrets end that the operator makes for runs."""


def problems_of(seen: Observation) -> tuple[Problem, ...]:
    """The spec's own problems, then those that only other objects show."""
    return (*seen.run.problems, *_claim(seen), *_source(seen), *_secrets(seen))


def _claim(seen: Observation) -> Iterator[Problem]:
    storage = seen.run.spec.checkpoint.storage
    if seen.claim_user and current_job(seen) is None:
        claim = storage.claim_name or labels.claim_name(seen.run.key.name)
        where = f"claim {claim}" + (f", subPath {storage.sub_path}" if storage.sub_path else "")
        message = f"{where} is in use by run {seen.claim_user}: give this run another claimName or subPath"
        yield Problem("spec.checkpoint.storage", message, RunReason.CHECKPOINT_CLAIM_IN_USE)


def _source(seen: Observation) -> Iterator[Problem]:
    source = seen.run.spec.checkpoint.resume_from
    if source is not None and seen.resume is None and number(seen) == 0:
        where = f"run {source.run_name} does not exist in namespace {seen.run.key.namespace}"
        message = f"{where}: create it or remove resumeFrom"
        yield Problem("spec.checkpoint.resumeFrom.runName", message, RunReason.RESUME_SOURCE_NOT_FOUND)


def _secrets(seen: Observation) -> Iterator[Problem]:
    """A trainer runs user code: it must get no key that signs for another run, now or as soon as there is one."""
    found = {secret.name: secret for secret in seen.secrets}
    for field, name in secrets_named(seen.run.spec):
        secret = found.get(name)
        if secret is None:
            continue
        if secret.owner:
            yield Problem(field, f"{name} holds credentials of {secret.owner}: name another Secret")
        elif not secret.found and name.endswith(GENERATED_SECRETS):
            message = f"{name} does not exist, and a run may get its credentials under such a name"
            yield Problem(field, f"{message}: create the Secret first, or give it another name")


def secrets_named(spec: Spec) -> Iterator[tuple[str, str]]:
    """(field, name) of each Secret that the trainer is to see."""
    for i, variable in enumerate(spec.runtime.env):
        if variable.secret_key_ref is not None:
            yield f"spec.runtime.env[{i}].secretKeyRef.name", variable.secret_key_ref.name
    for i, volume in enumerate(spec.workers.pod.volumes):
        if volume.secret_name is not None:
            yield f"spec.workers.pod.volumes[{i}].secretName", volume.secret_name
