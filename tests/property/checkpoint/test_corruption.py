"""Every damage is noticed, wrong weights are never loaded, the previous generation is used and the file named."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from esper_leyline.runconfig import Retention
from esper_runtime.checkpoint import NoValidCheckpointError, Store
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES

from tests.support.checkpoints import SPLIT_FILES, TINY, same_tensors, training_state

UID = "uid-1"
STEPS = (10, 20, 30)
WHOLE_FILES = ("model.safetensors", "optimizer.safetensors", "aux.safetensors", "state.json", "manifest.json")
LAYOUTS = {"whole": (MAX_FILE_BYTES, WHOLE_FILES), "in parts": (TINY, SPLIT_FILES)}
SEED = 20_26


@dataclass(frozen=True)
class Damage:
    """One way to spoil the newest generation."""

    kind: str
    file: str
    spoil: Callable[[bytes], bytes | None]
    """New content of the file; None removes it."""


def random_damages(originals: dict[str, bytes], older: dict[str, bytes], count: int) -> Iterator[Damage]:
    """Endless kinds in a fixed order; each differs from the original in at least one byte."""
    rng = random.Random(SEED)
    made = 0
    while made < count:
        for file, raw in originals.items():
            others = [content for name, content in originals.items() if name != file]
            at, bit = rng.randrange(len(raw)), 1 << rng.randrange(8)
            start, length = rng.randrange(len(raw)), rng.choice((1, 16, 512, 4096))
            cut = rng.randrange(len(raw))
            extra, other = rng.randbytes(rng.randint(1, 4096)), rng.choice(others)
            noise = rng.randbytes(min(length, len(raw) - start))
            candidates = {
                "bit flip": raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :],
                "truncated": raw[:cut],
                "zeroed": raw[:start] + bytes(len(raw[start : start + length])) + raw[start + length :],
                "overwritten": raw[:start] + noise + raw[start + length :],
                "extended": raw + extra,
                "torn and padded": raw[:cut] + bytes(len(raw) - cut),
                "another file's": other,
                "an older generation's": older[file],
                "a byte lost": raw[:at] + raw[at + 1 :],
                "a byte doubled": raw[:at] + raw[at : at + 1] + raw[at:],
            }
            for kind, content in candidates.items():
                if content != raw:
                    made += 1
                    yield Damage(kind, file, lambda _, content=content: content)


def fixed_damages(files: Iterable[str]) -> Iterator[Damage]:
    for file in files:
        yield Damage("missing", file, lambda _: None)
        yield Damage("empty", file, lambda _: b"")
        yield Damage("all zero", file, lambda raw: bytes(len(raw)))


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    """How the generations are laid out."""
    return str(request.param)


@pytest.fixture
def files(layout: str) -> tuple[str, ...]:
    return LAYOUTS[layout][1]


@pytest.fixture
def volume(tmp_path: Path, layout: str) -> Path:
    """Three generations of steps 10, 20 and 30."""
    store = Store(tmp_path, run_uid=UID, attempt=1, retention=Retention(keep_latest=9), verification="None",
                  clock=lambda: 1_700_000_000.0, max_file_bytes=LAYOUTS[layout][0])  # fmt: skip
    store.prepare()
    for step in STEPS:
        store.save(training_state(step, elements=200))
    return tmp_path


def contents(volume: Path, number: int) -> dict[str, bytes]:
    generation = volume / UID / "a00001" / f"gen-{number:010d}"
    return {path.name: path.read_bytes() for path in sorted(generation.iterdir())}


def check(volume: Path, damage: Damage, original: bytes) -> None:
    path = volume / UID / "a00001/gen-0000000003" / damage.file
    content = damage.spoil(original)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    loaded = Store(volume, run_uid=UID, attempt=1).load_newest()
    path.write_bytes(original)
    what = f"{damage.kind} of {damage.file}"
    assert loaded is not None, what
    assert loaded.step == 20, what
    assert len(loaded.corrupt) == 1, what
    assert loaded.corrupt[0].startswith(f"a00001/gen-0000000003/{damage.file}: "), what
    assert same_tensors(loaded.tensors, training_state(20, elements=200).tensors), what
    assert loaded.state == training_state(20, elements=200).state, what


def run(volume: Path, count: int) -> Counter[str]:
    originals, older = contents(volume, 3), contents(volume, 2)
    kinds: Counter[str] = Counter()
    for damage in (*fixed_damages(originals), *random_damages(originals, older, count)):
        check(volume, damage, originals[damage.file])
        kinds[damage.kind] += 1
    untouched = Store(volume, run_uid=UID, attempt=1).load_newest()
    assert untouched is not None
    assert (untouched.step, untouched.corrupt) == (30, ()), "the checks themselves must leave a good generation good"
    return kinds


@pytest.mark.slow
@pytest.mark.row("T17")
def test_thousands_of_damaged_checkpoints_are_all_noticed(volume: Path, files: tuple[str, ...]):
    """ESPER_TEST_DAMAGES=10000 runs the number that goals.md asks for."""
    assert contents(volume, 3).keys() == set(files)
    count = int(os.environ.get("ESPER_TEST_DAMAGES", "2000"))
    kinds = run(volume, count)
    assert kinds.total() >= count
    print(f"{kinds.total()} damaged checkpoints, all noticed: {dict(kinds)}")


def test_every_byte_of_the_manifest_matters(volume: Path):
    """Also those that no parser would miss, such as spaces."""
    original = contents(volume, 3)["manifest.json"]
    for at in range(len(original)):
        spoiled = original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :]
        path = volume / UID / "a00001/gen-0000000003/manifest.json"
        path.write_bytes(spoiled)
        loaded = Store(volume, run_uid=UID, attempt=1).load_newest()
        assert loaded is not None
        assert loaded.step == 20, at
        assert loaded.corrupt[0].startswith("a00001/gen-0000000003/manifest.json: "), at


def test_swapped_generations_are_noticed(volume: Path):
    own = volume / UID / "a00001"
    (own / "gen-0000000003").rename(own / "aside")
    (own / "gen-0000000001").rename(own / "gen-0000000003")
    (own / "aside").rename(own / "gen-0000000001")
    loaded = Store(volume, run_uid=UID, attempt=1).load_newest()
    assert loaded is not None
    assert loaded.step == 20
    assert "moved or copied here" in loaded.corrupt[0]


def test_damage_everywhere_is_told_file_by_file(volume: Path, files: tuple[str, ...]):
    rng = random.Random(SEED)
    own = volume / UID / "a00001"
    for number in (1, 2, 3):
        path = own / f"gen-{number:010d}" / rng.choice(files)
        raw = bytearray(path.read_bytes())
        raw[rng.randrange(len(raw))] ^= 0x10
        path.write_bytes(raw)
    with pytest.raises(NoValidCheckpointError) as caught:
        Store(volume, run_uid=UID, attempt=1).load_newest()
    assert [message.split("/")[1] for message in caught.value.corrupt] == [f"gen-{n:010d}" for n in (3, 2, 1)]


def test_a_partial_directory_under_its_final_name_is_no_generation(volume: Path, files: tuple[str, ...]):
    """As a filesystem without ordered renames could leave it."""
    own = volume / UID / "a00001"
    for kept in range(len(files)):
        partial = own / "gen-0000000004"
        partial.mkdir()
        for file in files[:kept]:
            shutil.copy(own / "gen-0000000003" / file, partial / file)
        loaded = Store(volume, run_uid=UID, attempt=1).load_newest()
        assert loaded is not None
        assert loaded.step == 30
        assert loaded.corrupt == ("a00001/gen-0000000004/manifest.json: missing",)
        shutil.rmtree(partial)
