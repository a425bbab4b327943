"""Tolaria's supervisor: PID 1 of the container, small, without torch, alive when the trainer is not.

Read in this order: `policy` (what a death means; pure), `hang` (when silence is a hang; pure), `core` (both put
together with halts and drains; pure), `loop` (the one thread that waits and acts). Beside them: `settings`, `child`
(how the trainer starts), `spare`, `account` (what is told of deaths and ends), `events` (the journal), `lines` (the
run's record), `totals` (its log), `link` (weatherlight), `probe` (/livez, /metrics), `oom`.
"""
