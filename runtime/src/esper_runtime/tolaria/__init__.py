"""Tolaria: the training runtime. `python -m esper_runtime.tolaria` is its supervisor, PID 1 of the container.

This package imports nothing here, so that the supervisor starts without torch.
"""
