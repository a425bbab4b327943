"""`esper report`: what became of a run, from its record alone: as text, or as a page that needs nothing else."""

from pathlib import Path
from statistics import median

from esper_leyline import paths

from esper_runtime.checkpoint.volume import RECORD_FILE
from esper_runtime.cli.backend import BackendError
from esper_runtime.cli.output import clock_time, say, table
from esper_runtime.cli.story import Epoch, Story, story_of
from esper_runtime.tolaria.record import read

MAX_ROWS = 24
"""Of one table; the middle of a longer one is left out."""


def report(target: str, *, html: Path | None, namespace: str | None, state: Path | None) -> str:
    """The text of the report; with `html` also a page. BackendError when there is no record."""
    path = find_record(target, namespace=namespace, state=state)
    story = story_of(read(path))
    if not story.began:
        raise BackendError(f"{path}: holds no line yet")
    name = path.parent.name
    if html is not None:
        from esper_runtime.cli.page import page

        html.write_text(page(name, story), encoding="utf-8")
        say(f"wrote {html}")
    return text(name, story)


def find_record(target: str, *, namespace: str | None, state: Path | None) -> Path:
    """The record of a run of this machine by name, or below a directory: its state, or a copy of its volume."""
    given = Path(target)
    if state is None and given.exists():
        return _below(given)
    from esper_runtime.cli.local_backend import LocalBackend

    return _below(LocalBackend(namespace=namespace, state=state).find(target).checkpoints)


def _below(place: Path) -> Path:
    if place.is_file():
        return place
    patterns = (RECORD_FILE, f"*/{RECORD_FILE}", f"checkpoints/*/{RECORD_FILE}")
    found = sorted(path for pattern in patterns for path in place.glob(pattern))
    if not found:
        raise BackendError(
            f"{place}: there is no {RECORD_FILE} there: give the run's directory, its state, or a copy of its volume"
        )
    if len(found) > 1:
        owner = place / paths.CLAIM_MARKER
        mine = [path for path in found if owner.is_file() and path.parent.name == owner.read_text().strip()]
        if len(mine) != 1:
            runs = ", ".join(str(path.parent) for path in found[:8])
            raise BackendError(f"{place}: holds the records of {len(found)} runs: give one of {runs}")
        found = mine
    return found[0]


# Text


def text(name: str, story: Story) -> str:
    """The report for a terminal."""
    blocks = [summary(name, story)]
    if story.moves:
        rows = [[n, f"{s:.1f}", percent(share), str(count)] for n, s, share, count in phases(story)]
        blocks.append(table(rows, ("PHASE", "SECONDS", "SHARE", "TIMES")))
    if story.deaths:
        columns = ("TIME", "TRAINER FAILED", "EXIT", "STEP", "HOW", "STACKS")
        blocks.append(table(shortened(death_rows(story)), columns))
    if story.backs:
        header = ("TIME", "RECOVERY", "CAUSE", "TIER", "FROM", "TO", "DETECTED", "RECOVERED")
        blocks.append(table(shortened(recovery_rows(story)), header))
    if story.epochs:
        names = metric_names(story.epochs)
        rows = shortened(epoch_rows(story.epochs, names))
        blocks.append(table(rows, ("EPOCH", "STEP", *(n.upper().replace("_", " ") for n in names), "SAMPLES/S")))
    if story.troubles:
        rows = [[event, str(count)] for event, count in story.troubles.most_common(MAX_ROWS)]
        blocks.append(table(rows, ("WARNINGS AND ERRORS", "COUNT")))
    return "\n\n".join(blocks)


def summary(name: str, story: Story) -> str:
    """What is asked first, a line each."""
    return "\n".join(f"{head + ':':<13} {said}" for head, said in facts(name, story))


def facts(name: str, story: Story) -> list[tuple[str, str]]:
    """(what, how it stands), the most important first."""
    found = [
        ("Run", f"{name}, {_many(story.attempts, 'attempt')}, {_many(story.trainers, 'trainer process', 'es')}"),
        ("Time", f"{clock_time(story.began)} to {clock_time(story.ended)}, {story.seconds:.1f} s"),
        ("End", story.end or f"none is recorded; it stood at step {story.last_step}"),
    ]
    if story.goodput is not None:
        share = f"{percent(story.goodput)}, {story.forward_seconds:.1f} s of training that was kept"
        found.append(("Goodput", share))
    if story.committed:
        stalls = [stall for stall in story.committed.values() if stall is not None]
        stalled = f", training held up {median(stalls):.1f} ms (median), {max(stalls):.1f} ms at most" if stalls else ""
        newest = f"the newest of step {max(story.committed)}, {story.checkpoint_bytes / 2**20:.1f} MiB kept"
        found.append(("Checkpoints", f"{len(story.committed)} committed, {newest}{stalled}"))
    if story.boundary_ms:
        times = f"{median(story.boundary_ms):.2f} ms (median), {max(story.boundary_ms):.2f} ms at most"
        found.append(("Boundaries", f"{len(story.boundary_ms)}, {times}"))
    missing = [f"{count} because {why}" for why, count in story.missing.items() if count]
    if missing:
        found.append(("Missing", f"lines of the record: {', '.join(missing)}"))
    return found


def phases(story: Story) -> list[tuple[str, float, float, int]]:
    """(phase, seconds, share of the whole, times), in the order of their first coming; the start has no transition."""
    seconds: dict[str, float] = {story.moves[0].before: story.moves[0].at}
    times: dict[str, int] = {story.moves[0].before: 1}
    for move in story.moves:
        seconds[move.after] = seconds.get(move.after, 0.0) + move.seconds
        times[move.after] = times.get(move.after, 0) + 1
    whole = story.seconds or 1.0
    return [(name, spent, spent / whole, times[name]) for name, spent in seconds.items()]


def death_rows(story: Story) -> list[list[str]]:
    """The first line of what is known; the record has the rest."""
    return [
        [
            clock_time(death.time),
            death.reason,
            "" if death.exit_code is None else str(death.exit_code),
            str(death.step),
            death.message.partition("\n")[0],
            death.evidence,
        ]
        for death in story.deaths
    ]


def recovery_rows(story: Story) -> list[list[str]]:
    return [
        [
            clock_time(back.time),
            back.kind,
            back.cause,
            back.tier,
            str(back.from_step),
            str(back.to_step),
            f"{back.detect_ms:.1f} ms",
            f"{back.recover_ms:.1f} ms",
        ]
        for back in story.backs
    ]


def metric_names(epochs: list[Epoch]) -> list[str]:
    """Losses first, six at most."""
    names = {name for epoch in epochs for name in epoch.metrics}
    return sorted(names, key=lambda name: (name not in ("train_loss", "validation_loss"), name))[:6]


def epoch_rows(epochs: list[Epoch], names: list[str]) -> list[list[str]]:
    return [
        [
            str(epoch.number),
            str(epoch.step),
            *(f"{epoch.metrics[name]:.6g}" if name in epoch.metrics else "" for name in names),
            "" if epoch.samples_per_second is None else f"{epoch.samples_per_second:.0f}",
        ]
        for epoch in epochs
    ]


def shortened(rows: list[list[str]]) -> list[list[str]]:
    """MAX_ROWS at most: the first and the last ones, and how many are between."""
    if len(rows) <= MAX_ROWS:
        return rows
    half = MAX_ROWS // 2
    left_out = ["…", f"{len(rows) - 2 * half} more", *[""] * (len(rows[0]) - 2)]
    return [*rows[:half], left_out, *rows[-half:]]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _many(count: int, word: str, plural: str = "s") -> str:
    return f"{count} {word}{'' if count == 1 else plural}"
