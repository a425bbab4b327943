"""Weatherlight, the sidecar between a pod and the world.

Outwards it turns the pod's journal and pages into numbered, signed reports, keeps them, publishes them to Oona and
serves them to whoever pulls. Inwards it verifies emergency signals from Oona and from the mounted ConfigMap and writes
the newest one to the emergency page. It decides nothing, and the trainer never waits for it.

Read in this order: `reports` (events to reports), `reportlog` (what survives), `recorder` (numbered, signed, kept),
`tail` (the journal), `signals` (which signal counts), `emergency` (signal to page), `link` (the supervisor), `outlet`
(reports to Oona and HTTP), `telemetry` and `coalesce` (events to Oona), `bus` (the connection), `watch` and `mode`
(what is wrong), `preflight`, `worker` (assembly).
"""
