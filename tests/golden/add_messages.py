"""Adds golden bytes for the messages that have none yet. See README.md here."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.golden import GOLDEN, entry, filled, message_types


def main() -> None:
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name, kind in message_types().items():
        if name not in known:
            known[name] = entry(filled(kind))
            print(f"added {name}")
    GOLDEN.write_text(json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
