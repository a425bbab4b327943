"""Regenerates the committed generated files: protobuf stubs now, CRD and chart copies of it.

Run through scripts/generate. With --check nothing is written; the exit code says whether all is current.
"""

import argparse
import filecmp
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_FILES = sorted((ROOT / "proto/esper_leyline/v1").glob("*.proto"))
SERVICES = ("command.proto",)


def protobuf_stubs(out: Path) -> None:
    """Stubs of every .proto, and gRPC stubs of those that declare a service, below `out`/proto/src."""
    target = out / "proto/src"
    target.mkdir(parents=True, exist_ok=True)
    base = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"]
    names = [str(p) for p in PROTO_FILES]
    subprocess.run([*base, f"--python_out={target}", f"--pyi_out={target}", *names], check=True)
    services = [n for n in names if n.endswith(SERVICES)]
    subprocess.run([*base, f"--grpc_python_out={target}", *services], check=True)


GENERATORS: tuple[Callable[[Path], None], ...] = (protobuf_stubs,)


def generated(out: Path) -> list[Path]:
    """Runs every generator into `out`; returns the files made, relative to it."""
    for generate in GENERATORS:
        generate(out)
    return sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        stale = [
            path
            for path in generated(fresh)
            if not (ROOT / path).is_file() or not filecmp.cmp(fresh / path, ROOT / path, shallow=False)
        ]
        if check:
            for path in stale:
                print(f"stale: {path} (run scripts/generate)", file=sys.stderr)
            return 1 if stale else 0
        for path in stale:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_bytes((fresh / path).read_bytes())
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
