"""python -m tests.faults [--minutes N] [--only NAME ...] [--fresh]: long campaigns of faults, resumable."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.campaign import Book, Campaign, Found, run, table
from tests.faults.clocks import Clocks
from tests.faults.corrupt import Corrupt
from tests.faults.drains import Drains
from tests.faults.kills import Kills
from tests.faults.nonfinite import NonFinite
from tests.faults.redis_kills import Redis
from tests.faults.volumes import Volumes


def campaigns() -> Sequence[Campaign]:
    return (Kills(), Corrupt(), NonFinite(), Drains(), Volumes(), Clocks(), Redis())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="*", default=[], help="names of campaigns")
    parser.add_argument("--fresh", action="store_true", help="forget earlier progress")
    arguments = parser.parse_args()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = cache / "esper" / "faults.json"
    if arguments.fresh:
        path.unlink(missing_ok=True)
    chosen = [c for c in campaigns() if not arguments.only or c.name in arguments.only]
    if not chosen:
        parser.error(f"known campaigns: {', '.join(c.name for c in campaigns())}")
    book = Book(path)
    scratch = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    try:
        run(chosen, book, budget_s=arguments.minutes * 60, scratch=scratch)
    except Found as found:
        print(table(chosen, book))
        print(f"faults: FOUND {found}", file=sys.stderr)
        return 1
    print(table(chosen, book))
    open_ones = [c.name for c in chosen if book.of(c.name).faults < c.goal]
    print(f"faults: goal not reached yet: {', '.join(open_ones)}; run again to go on" if open_ones else "faults: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
