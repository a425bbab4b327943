"""Fault drills: each does real harm to a real run on this machine, and watches the shipped alerts see it and forget it.

python -m tests.drills [NAME ...] [--write docs/drills.md]

A drill is a fault and the alerts that must tell of it. `stage` has the run, its real Prometheus and the keeper of its
Redis; `drill` plays one and holds it to its promises: every alert fires within a minute of the harm and clears once it
is mended, all steps are trained, no report is lost, and the final state has the bits of a run that nothing befell.
"""
