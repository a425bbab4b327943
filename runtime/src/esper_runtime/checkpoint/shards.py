"""How a group of tensors (model, optimizer, aux) is spread over files, as far as names tell. Needs no torch.

A group is one file, `model.safetensors`. One that would be larger than the limit is several, called as other tools
call them: `model-00001-of-00003.safetensors` and so on, each a whole safetensors file, no tensor in two of them.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from esper_runtime.checkpoint.manifest import FileDigest

MAX_FILE_BYTES = 1_000_000_000
"""The most that one file of tensors takes, its header included; a tensor that is larger has a file of its own.

A gigabyte is the design's number. What is damaged, or has to be copied again, is named to within so much; a reader
that goes file by file needs no more memory than that beside the model; and limits of filesystems, quotas and object
stores are far away. Much smaller files would pay for an fsync and a new start of the disk's queue again and again.
"""
SUFFIX = ".safetensors"
MODEL = "model"
"""The group that is exported."""
INDEX = f"{MODEL}{SUFFIX}.index.json"
"""Of an exported model in several files."""
LENGTH = struct.Struct("<Q")
"""Of the header, at the very beginning of a file."""
METADATA = "__metadata__"
"""What a header calls the one entry that is no tensor."""
_SHARD = re.compile(r"(?P<group>[^.]+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})")


def stems(group: str, count: int) -> Iterator[str]:
    """File names without suffix, in order."""
    if count == 1:
        yield group
    else:
        yield from (f"{group}-{number:05d}-of-{count:05d}" for number in range(1, count + 1))


def names(group: str, count: int) -> Iterator[str]:
    return (f"{stem}{SUFFIX}" for stem in stems(group, count))


def group_of(name: str) -> str:
    """The group that a file, with or without suffix, has a part of."""
    stem = name.removesuffix(SUFFIX)
    match = _SHARD.fullmatch(stem)
    return match["group"] if match else stem


def of_group(group: str, listed: Iterable[str]) -> list[str]:
    """The files of a group, in order."""
    return sorted(name for name in listed if name.endswith(SUFFIX) and group_of(name) == group)


def is_split(listed: Iterable[str]) -> bool:
    """Whether any group is more than one file."""
    return any(name.endswith(SUFFIX) and _SHARD.fullmatch(name.removesuffix(SUFFIX)) for name in listed)


def misfits(listed: Iterable[str], present: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(file, why) of what names alone give away: files that nobody lists, and groups that are not whole as listed."""
    known = set(listed)
    for group in sorted({group_of(name) for name in known if name.endswith(SUFFIX)}):
        yield from _incomplete(group, of_group(group, known))
    for name in sorted(present):
        # Hidden files are no part of anything: some systems put their own beside each file.
        if name.endswith(SUFFIX) and not name.startswith(".") and name not in known:
            yield name, "not in the manifest"


def _incomplete(group: str, parts: list[str]) -> Iterator[tuple[str, str]]:
    counts = {_count(part) for part in parts}
    if len(counts) > 1:
        yield parts[0], f"does not belong to the other parts of {group}: {', '.join(parts[1:8])}"
        return
    present, count = set(parts), counts.pop()
    missing = next((name for name in names(group, count) if name not in present), None)
    if missing is not None:
        yield missing, f"not in the manifest, which has {len(parts)} other parts of {group}"
    elif len(parts) > count:
        yield parts[-1], f"{group} has only {count} parts"


def _count(name: str) -> int:
    match = _SHARD.fullmatch(name.removesuffix(SUFFIX))
    return int(match["count"]) if match else 1


def header_of(path: Path) -> bytes:
    """The header of a safetensors file that is known to be whole."""
    with path.open("rb") as file:
        raw = file.read(LENGTH.size)
        return raw + file.read(LENGTH.unpack(raw)[0])


def index(headers: Mapping[str, bytes]) -> bytes:
    """What readers of split models want beside the files: which tensor lies in which; by file, their headers."""
    where: dict[str, str] = {}
    total = 0
    for name, header in headers.items():
        entries: dict[str, Any] = json.loads(header[LENGTH.size :])
        entries.pop(METADATA, None)
        where |= dict.fromkeys(entries, name)
        total += sum(end - begin for begin, end in (entry["data_offsets"] for entry in entries.values()))
    document = {"metadata": {"total_size": total}, "weight_map": where}
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def described(files: Mapping[str, "FileDigest"], index: bytes | None = None) -> dict[str, Any]:
    """What model.json says of an exported model's files: of the only one, or of the index and the files it names."""
    if index is None:
        [(name, digest)] = files.items()
        return {"file": name, "size": digest.size, "xxh3_128": digest.xxh3_128}
    parts = {name: {"size": digest.size, "xxh3_128": digest.xxh3_128} for name, digest in files.items()}
    return {"file": INDEX, "size": len(index), "xxh3_128": xxhash.xxh3_128_hexdigest(index), "files": parts}
