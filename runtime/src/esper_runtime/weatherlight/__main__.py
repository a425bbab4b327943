"""`python -m esper_runtime.weatherlight`: PID 1 of the weatherlight container."""

import sys

from esper_runtime.sidecar.init import run_sidecar

if __name__ == "__main__":
    sys.exit(run_sidecar("weatherlight", worker="esper_runtime.weatherlight.worker"))
