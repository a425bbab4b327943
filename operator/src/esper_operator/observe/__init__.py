"""Raw Kubernetes objects in, frozen values out. The only code that reads raw dicts.

Nothing here raises on a malformed object: what is no pod or Job of a run is None, a spec that does not parse becomes
problems, a broadcast that does not parse becomes a problem of its key. `attempt` and `halting` answer questions about
an Observation that both policies and status ask.
"""

from esper_operator.observe.acceptance import secrets_named
from esper_operator.observe.emergency import broadcasts, signal_record
from esper_operator.observe.objects import children_of, claim, job, pod, run, secret

__all__ = ["broadcasts", "children_of", "claim", "job", "pod", "run", "secret", "secrets_named", "signal_record"]
