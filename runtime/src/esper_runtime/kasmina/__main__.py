"""`python -m esper_runtime.kasmina`: PID 1 of the kasmina container."""

import sys

from esper_runtime.sidecar.init import run_sidecar

sys.exit(run_sidecar("kasmina", worker="esper_runtime.kasmina.worker"))
