"""Esper's operator. Read in this order: model, observe, decide, policy, build, status, apply, kube, watch, main.

Pure packages (importable without extras, used by the laptop runner too): api, model, observe, decide, policy,
build, status. Everything else needs the extra [controller].
"""
