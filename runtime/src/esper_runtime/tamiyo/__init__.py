"""The Tamiyo sidecar: one signed decision per epoch boundary, by rules.

`policy` holds the rules (pure: memory and facts in, memory and decision out), `command` turns a decision into an
AdaptationCommand, `service` signs and answers on `<run dir>/tamiyo.sock`, `worker` is the process. A decision is
advice: Kasmina verifies it and Tolaria acts on it, never Tamiyo.
"""
