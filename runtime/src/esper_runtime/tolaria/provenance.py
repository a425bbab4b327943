"""What made a checkpoint: code, model and device, short enough for every manifest."""

import sys

import torch
import xxhash

from esper_runtime.tolaria.state import TrainState


def context_of(entrypoint: str, state: TrainState, device: torch.device) -> dict[str, str]:
    """Digests are xxh3-64. The code's is that of the entrypoint's own file: what it imports is not followed."""
    known = {
        "entrypoint": entrypoint,
        "model": xxhash.xxh3_64_hexdigest(state.layout.encode()),
        "device": str(device) if device.type != "cuda" else f"{device} {torch.cuda.get_device_name(device)}",
        "python": sys.version.split()[0],
    }
    code = _code_of(entrypoint)
    return known if code is None else {**known, "code": code}


def _code_of(entrypoint: str) -> str | None:
    """None when the module has no file, or it cannot be read any more."""
    module = sys.modules.get(entrypoint.partition(":")[0])
    file = None if module is None else module.__file__
    if file is None:
        return None
    try:
        with open(file, "rb") as source:
            return xxhash.xxh3_64_hexdigest(source.read())
    except OSError:
        return None
