"""The `esper` command, also installed as `kubectl-esper`: one set of verbs for runs on a cluster and on this machine.

`main` declares the commands and imports nothing heavy; what a command needs is imported when it runs. `backend` is
the protocol that both places implement, `output` how resources are shown, `live` the view of a run in progress.
"""
