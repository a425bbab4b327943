"""The commands of README.md, as a reader would copy them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commands(heading: str) -> list[str]:
    """Command lines of the `sh` blocks below `heading` ("" for what stands before the first one), comments removed."""
    text = (ROOT / "README.md").read_text()
    sections = re.split(r"^## (.*)$", text, flags=re.M)
    body = sections[0] if not heading else sections[sections.index(heading) + 1]
    lines = "\n".join(re.findall(r"^```sh\n(.*?)^```$", body, re.M | re.S)).splitlines()
    return [line for raw in lines if (line := re.sub(r"\s+# .*$", "", raw).strip())]


def headings_with_commands() -> set[str]:
    text = (ROOT / "README.md").read_text()
    found = {heading for heading in re.findall(r"^## (.*)$", text, re.M) if commands(heading)}
    return found | ({""} if commands("") else set())


def manifest() -> str:
    """The resource that README shows whole."""
    found = re.search(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert found is not None
    return found[1]
