"""`esper list` and `esper status`."""

import sys

from esper_leyline.phases import Phase

from esper_runtime.cli.backend import Backend
from esper_runtime.cli.live import View, view
from esper_runtime.cli.output import Format, describe, find, say, show, width_of

FINISHED = frozenset({Phase.SUCCEEDED, Phase.FAILED})


def list_runs(backend: Backend, form: Format, *, all_namespaces: bool) -> None:
    found = backend.runs(all_namespaces=all_namespaces)
    if not found and form in (Format.TABLE, Format.WIDE):
        say("no runs found")
        return
    text = show(found, form, namespaces=all_namespaces)
    if text:
        print(text)


def show_status(backend: Backend, name: str, form: Format, *, watch: bool) -> None:
    if not watch:
        resource = backend.get(name)
        table = form is Format.TABLE
        print(describe(resource, width=width_of(sys.stdout)) if table else show([resource], form, single=True))
        return
    _follow(backend, name, form)


def _follow(backend: Backend, name: str, form: Format) -> None:
    """Until the run is finished or deleted. Machine formats print a document per change."""
    machine = form in (Format.JSON, Format.YAML, Format.NAME)
    shown: View = view(sys.stdout)
    version = None
    with shown:
        for resource in backend.watch(name):
            if (now := find(resource, "metadata", "resourceVersion")) == version:
                continue
            version = now
            if machine:
                print(show([resource], form, single=True), flush=True)
            else:
                shown.update(resource)
            if find(resource, "status", "phase") in FINISHED:
                return
    if not machine:
        say(f"{name} is gone")
