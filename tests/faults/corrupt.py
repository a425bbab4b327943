"""Damaged checkpoints and log tails (fault row 9): found every time, never loaded, the one before is used and named."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from esper_runtime.checkpoint import GenerationData, NoValidCheckpointError, Store, Wal
from esper_runtime.checkpoint.errors import CorruptFileError
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES
from esper_runtime.checkpoint.wal import Kind, WalError, WalState

UID = "corrupt-run"
GENERATIONS = 3
RECORDS = 12
PER_SHOT = 50
LIMITS = (MAX_FILE_BYTES, 6000)
"""Of a file, in turn: groups in one file, and groups of two tensors in two."""

Damage = Callable[[random.Random, bytes, bytes], bytes]
"""(dice, content, another file's content) -> damaged content."""


def flip(dice: random.Random, content: bytes, _: bytes) -> bytes:
    changed = bytearray(content)
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def truncate(dice: random.Random, content: bytes, _: bytes) -> bytes:
    return content[: dice.randrange(len(content))]


def zero(dice: random.Random, content: bytes, _: bytes) -> bytes:
    begin = dice.randrange(len(content))
    end = min(len(content), begin + dice.choice((1, 16, 512, 4096)))
    return content[:begin] + bytes(end - begin) + content[end:]


def tear(dice: random.Random, content: bytes, other: bytes) -> bytes:
    """The beginning of this file, the rest of another one: a write that was overtaken."""
    cut = dice.randrange(len(content))
    return content[:cut] + other[cut : len(content)].ljust(len(content) - cut, b"\0")


def swap(_: random.Random, __: bytes, other: bytes) -> bytes:
    return other


def extend(dice: random.Random, content: bytes, _: bytes) -> bytes:
    return content + dice.randbytes(dice.choice((1, 64, 4096)))


DAMAGES: dict[str, Damage] = {f.__name__: f for f in (flip, truncate, zero, tear, swap, extend)}


def lose(_: random.Random, target: Path) -> None:
    target.unlink()


def exchange(dice: random.Random, target: Path) -> None:
    """With another file of the same checkpoint."""
    other = dice.choice(sorted(path for path in target.parent.iterdir() if path != target))
    aside = target.rename(target.with_name("aside"))
    other.rename(target)
    aside.rename(other)


def add(dice: random.Random, target: Path) -> None:
    """A file of tensors that the manifest does not know."""
    source = target.with_name(dice.choice(sorted(path.name for path in target.parent.glob("*.safetensors"))))
    group = source.name.partition("-")[0].removesuffix(".safetensors")
    shutil.copy(source, target.with_name(f"{group}-00003-of-0000{dice.choice((2, 3))}.safetensors"))


MIXED: dict[str, Callable[[random.Random, Path], None]] = {f.__name__: f for f in (lose, exchange, add)}


class Corrupt:
    name = "corrupt"
    goal = 10_000

    def shoot(self, number: int, directory: Path) -> "Counter[str]":
        dice = random.Random(number)
        root = directory / "pristine"
        weights = make(root, number)
        counts: Counter[str] = Counter()
        for _ in range(PER_SHOT):
            scratch = directory / "damaged"
            shutil.copytree(root, scratch)
            if dice.random() < 0.7:
                counts[damage_checkpoint(dice, scratch, weights)] += 1
            else:
                counts[damage_log(dice, scratch)] += 1
            counts["faults"] += 1
            shutil.rmtree(scratch)
        return counts


def make(root: Path, seed: int) -> list[torch.Tensor]:
    """A run with some generations and a log; the weights by generation."""
    root.mkdir()
    store = Store(root, run_uid=UID, attempt=1, max_file_bytes=LIMITS[seed % len(LIMITS)])
    store.prepare()
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for step in range(1, GENERATIONS + 1):
        weight = torch.randn(40, 30, generator=generator)
        weights.append(weight)
        store.save(
            GenerationData(
                epoch=1,
                step=step,
                tensors={
                    "model": {"bias": weight[0].clone(), "weight": weight},
                    "optimizer": {"moment": weight * 2, "other": weight * 3},
                    "aux": {},
                },
                state={"step": step},
                metrics={"loss": 1.0 / step},
            )
        )
    wal = Wal(store.volume.wal_file)
    for step in range(RECORDS):
        wal.append(Kind.SKIP, positions=[step])
    wal.close()
    return weights


def damage_checkpoint(dice: random.Random, root: Path, weights: list[torch.Tensor]) -> str:
    """Damages one file of the newest generation, or loses it, and loads."""
    generations = sorted((root / UID / "a00001").glob("gen-*"))
    newest, other = generations[-1], dice.choice(generations[:-1])
    target = newest / dice.choice(sorted(path.name for path in newest.iterdir()))
    name = dice.choice(sorted([*DAMAGES, *MIXED]))
    if name in MIXED:
        MIXED[name](dice, target)
    else:
        before = target.read_bytes()
        after = DAMAGES[name](dice, before, (other / target.name).read_bytes())
        if after == before:  # zeros were zeroed, or a file equals its neighbour
            target.unlink()
            name = "missing"
        else:
            target.write_bytes(after)
    store = Store(root, run_uid=UID, attempt=2)
    store.prepare()
    try:
        loaded = store.load_newest()
    except (NoValidCheckpointError, CorruptFileError) as error:
        raise AssertionError(f"{name} of {target.name}: the sound older checkpoints were not used: {error}") from error
    assert loaded is not None
    assert loaded.step == GENERATIONS - 1, f"{name} of {target.name}: step {loaded.step} was loaded"
    right = weights[GENERATIONS - 2]
    model, moments = loaded.tensors["model"], loaded.tensors["optimizer"]
    same = model["weight"].equal(right) and model["bias"].equal(right[0])
    same = same and moments["moment"].equal(right * 2) and moments["other"].equal(right * 3)
    assert same, f"{name} of {target.name}: wrong weights were loaded"
    assert any(newest.name in corrupt for corrupt in loaded.corrupt), f"{name} of {target.name} is not named"
    return f"checkpoint {name}"


def damage_log(dice: random.Random, root: Path) -> str:
    """Damages the log; what is read must be one of the states that it really had, and writing must go on."""
    path = root / UID / "wal.log"
    content = path.read_bytes()
    name = dice.choice(("flip", "truncate", "zero", "extend"))
    path.write_bytes(DAMAGES[name](dice, content, b""))
    wal = Wal(path)
    try:
        state = wal.replay()
        _require_a_prefix(state, name)
        after = wal.append(Kind.SKIP, positions=[1000])
        assert after.skipped_batches == state.skipped_batches + 1
    except WalError as error:
        raise AssertionError(f"log {name}: {error}") from error
    finally:
        wal.close()
    again = Wal(path)
    assert again.replay() == after, f"log {name}: what was appended after the repair is lost"
    again.close()
    return f"log {name}"


def _require_a_prefix(state: WalState, name: str) -> None:
    count = state.skipped_batches
    assert state.skipped_positions == tuple(range(count)), f"log {name}: {state.skipped_positions} was never its state"
