"""Workloads that ship with the runtime image: real data, no downloads."""
