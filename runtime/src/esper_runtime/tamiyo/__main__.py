"""`python -m esper_runtime.tamiyo`: PID 1 of the tamiyo container."""

import sys

from esper_runtime.sidecar.init import run_sidecar

sys.exit(run_sidecar("tamiyo", worker="esper_runtime.tamiyo.worker"))
