"""Removes from the operator's environment what only developers of its libraries need: their tests and manuals."""

import shutil
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
freed = 0
for folder in [
    *site.glob("kubernetes/docs"),
    *site.glob("kubernetes/test"),
    *site.glob("kubernetes/**/test"),
    *site.glob("*/tests"),
]:
    if folder.is_dir():
        freed += sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        shutil.rmtree(folder)
print(f"trimmed {freed / 1e6:.1f} MB")
