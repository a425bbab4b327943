"""One table of all figures that have a goal: python -m tests.bench.summary [DIRECTORY]."""

import json
import sys
from pathlib import Path


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "bench-results")
    print(f"{'goal':5} {'measured':>10} {'limit':>8} {'n':>5}  figure")
    for path in sorted(directory.glob("*.json")):
        document = json.loads(path.read_text())
        for figure in document["figures"]:
            if figure["limit"] is None:
                continue
            mark = " " if figure["judged"] <= figure["limit"] else "!"
            name = ": ".join(filter(None, (figure["section"], figure["name"])))
            measured = f"{figure['judged']:.3f}{figure['unit'] if figure['unit'] == 'x' else ''}"
            print(f"{figure['goal']:5} {measured:>10} {figure['limit']:>8g} {figure['n']:>5} {mark} {name}")


if __name__ == "__main__":
    main()
