"""python -m tests.drills [NAME ...] [--write FILE]: real faults in real runs, and the alerts that tell of them."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.drills import bus, orders, pod, table
from tests.drills.drill import Drill, clock, finish, play, reference
from tests.drills.stage import Run, staged
from tests.support.prometheus import MISSING, tool

DRILLS: Sequence[Drill] = (*bus.DRILLS, *orders.DRILLS, *pod.DRILLS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(d.name for d in DRILLS)}")
    parser.add_argument("--write", type=Path, help="the page to write, when all have passed")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {drill.name for drill in DRILLS}
    if unknown:
        parser.error(f"there is no drill {', '.join(sorted(unknown))}")
    if tool("prometheus") is None:
        parser.error(MISSING)
    chosen = [drill for drill in DRILLS if not arguments.names or drill.name in arguments.names]
    print(clock(), flush=True)
    rows, failed = _played(chosen)
    print(table.page(rows))
    if arguments.write and not failed:
        arguments.write.write_text(table.page(rows))
    print(f"drills: FAILED {', '.join(failed)}" if failed else "drills: done", file=sys.stderr)
    return 1 if failed else 0


def _played(chosen: Sequence[Drill]) -> tuple[list[list[str]], list[str]]:
    rows: list[list[str]] = []
    failed = []
    with tempfile.TemporaryDirectory(prefix="esper-drills-") as scratch:
        expected = reference(Run(Path(scratch, "reference")))
        for drill in chosen:
            began = time.monotonic()
            try:
                found = _one(drill, Path(scratch, drill.name), expected)
                rows += found
                print(f"{drill.name}: {time.monotonic() - began:.0f} s: {found}", flush=True)
            except AssertionError as error:
                failed.append(drill.name)
                print(f"{drill.name}: FAILED: {error}", file=sys.stderr, flush=True)
    return rows, failed


def _one(drill: Drill, directory: Path, expected: object) -> list[list[str]]:
    with staged(directory, Run(directory, spec=drill.spec)) as stage:
        result = play(drill, stage)
        end = finish(stage, expected if drill.same_end else None)
    return table.row(result, end)


if __name__ == "__main__":
    sys.exit(main())
