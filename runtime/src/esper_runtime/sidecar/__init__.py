"""What every sidecar stands on: a small PID 1, the frame of its worker, probes and logs.

A sidecar is two processes. PID 1 (`init`, standard library only) starts the worker, brings it back when it dies and
passes SIGTERM on; the worker does the work. So a crash costs a second at most and not the kubelet's back-off::

    # esper_runtime/kasmina/__main__.py: what `python -m esper_runtime.kasmina` runs
    import sys

    from esper_runtime.sidecar.init import run_sidecar

    sys.exit(run_sidecar("kasmina", worker="esper_runtime.kasmina.worker"))

    # esper_runtime/kasmina/worker.py
    async def serve(environment: Environment, stop: asyncio.Event) -> None:
        run_dir = environment.path(env.RUN_DIR)  # SettingsError, exit code 78, when it is not set
        async with ProbeServer("kasmina", environment, ready=lambda: "" if keys else "keys are not loaded") as probes:
            ...
            await stop.wait()  # set by SIGTERM; return within stop_timeout_s of run_sidecar

    if __name__ == "__main__":
        sys.exit(run_worker("kasmina", serve))

Modules: `init` (run_sidecar), `worker` (run_worker), `environment` (Environment, SettingsError), `http` (ProbeServer),
`logs` (configure), `keyfile` (keys that are followed), `supervision` (parts that are started again), `narrator` (events
of its own), `emergency` (taking part in a halt). Packages of sidecars must import nothing in their `__init__`, so that
PID 1 stays small.
"""
