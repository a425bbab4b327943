"""What can go wrong before and beside a run, by what the user can do about it.

LocalError            says what to do; exit code 1
├─ ManifestError      the manifest cannot be used; exit code 2
├─ StateError         the state directory is unreadable or belongs to something else
└─ RunnerActive       another `esper run` works on the same state
"""

from pathlib import Path


class LocalError(Exception):
    """A message for the user: what is wrong, where, and what would mend it."""


class ManifestError(LocalError):
    """One line per problem, each naming the field and the remedy."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class StateError(LocalError):
    """The state directory cannot be used."""


class RunnerActive(LocalError):
    """The run is being driven by another process."""

    def __init__(self, root: Path, pid: int | None) -> None:
        who = "another process" if pid is None else f"process {pid}"
        super().__init__(
            f"{root}: {who} runs this already; wait for it, stop it with Ctrl-C there, "
            "or use another directory with --state"
        )
        self.pid = pid
