"""`esper checkpoint`: looks into a checkpoint directory or a copy of one. Needs no cluster, no run and no torch."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from esper_leyline.runconfig import Retention

from esper_runtime.cli.backend import BackendError
from esper_runtime.cli.export import DESCRIPTION, MODEL, move, staged
from esper_runtime.cli.output import Format, document, duration, say, table

if TYPE_CHECKING:
    from esper_runtime.checkpoint.catalog import Entry
    from esper_runtime.checkpoint.manifest import Manifest

app = typer.Typer(name="checkpoint", help="Look into a checkpoint directory.", no_args_is_help=True)

_COLUMNS = ("STEP", "EPOCH", "GENERATION", "SIZE", "AGE", "SAVED", "STATE", "METRICS")
_CHUNK = 1 << 20
_SHOWN_TRANSACTIONS = 10

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="A checkpoint volume, or a run's directory on it, or a copy.")
]
Step = Annotated[int | None, typer.Option(help="The checkpoint of this step; by default the newest good one.")]
Best = Annotated[bool, typer.Option("--best", help="The best one by --metric.")]
Metric = Annotated[str, typer.Option(help="Metric that decides which is best.")]
Highest = Annotated[bool, typer.Option("--highest", help="More of the metric is better, not less.")]
Output = Annotated[Format, typer.Option("-o", "--output", help="How to show it.")]


@app.command("ls")
def list_checkpoints(directory: Directory, output: Output = Format.TABLE) -> None:
    """List checkpoints, newest first.

    STATE is good, suspect (saved under suspicion) or corrupt, as far as the manifest and the sizes of the files tell;
    `esper checkpoint verify` reads every byte. SAVED is how it was verified when it was saved.
    """
    found = [_row(entry) for run in _runs(directory) for entry in _entries(run)]
    if output in (Format.JSON, Format.YAML):
        typer.echo(document(found, output))
        return
    now = time.time()
    typer.echo(table([_cells(row, now) for row in found], _COLUMNS) if found else f"no checkpoint below {directory}")


@app.command()
def verify(directory: Directory, step: Step = None) -> None:
    """Read every byte and compare it with the manifests.

    Names each file that is damaged; exit code 1 when there is one.
    """
    from esper_runtime.checkpoint.catalog import damages
    from esper_runtime.checkpoint.files import Disk

    disk, checked, bad = Disk(), 0, 0
    for run in _runs(directory):
        for entry in _entries(run):
            if step is not None and (entry.manifest is None or entry.manifest.step != step):
                continue
            checked += 1
            found = list(damages(entry, disk))
            bad += bool(found)
            for damage in found:
                typer.echo(f"corrupt  {damage}")
            if not found:
                typer.echo(f"good     {entry.where}")
    if not checked:
        raise BackendError(f"no checkpoint to verify below {directory}: `esper checkpoint ls {directory}` lists them")
    if bad:
        say(f"error: {bad} of {checked} checkpoints are damaged: a run goes on from the newest that is good")
        raise typer.Exit(1)


@app.command()
def show(directory: Directory, step: Step = None, output: Output = Format.YAML) -> None:
    """Show a checkpoint's manifest and what the run's log says of its saves."""
    run = _one_run(directory)
    entry = _chosen(run, step=step, best=False, metric="", highest=False)
    form = Format.JSON if output is Format.JSON else Format.YAML
    typer.echo(document({"checkpoint": _manifest(entry), "log": _log(run)}, form))


@app.command()
def export(
    directory: Directory,
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write to; made when absent.")],
    step: Step = None,
    best: Best = False,
    metric: Metric = "loss",
    highest: Highest = False,
) -> None:
    """Copy a checkpoint's model, verified.

    Writes model.safetensors, which any safetensors reader opens, and model.json, which describes it. A model in several
    files stays so; model.safetensors.index.json, which other tools read, says which tensor lies in which.
    """
    entry = _chosen(_one_run(directory), step=step, best=best, metric=metric, highest=highest)
    for path in _export(entry, destination):
        typer.echo(path)


# Finding


def _runs(directory: Path) -> list[Path]:
    """Directories of runs: `directory` itself, or those below it."""
    from esper_runtime.checkpoint.volume import attempts_below

    if not directory.is_dir():
        raise BackendError(f"{directory} is no directory: give a checkpoint volume, a run's directory on it, or a copy")
    if attempts_below(directory):
        return [directory.resolve()]
    found = [entry.resolve() for entry in sorted(directory.iterdir()) if entry.is_dir() and attempts_below(entry)]
    if not found:
        raise BackendError(f"{directory} holds no run: a run's directory has folders a00001, a00002, ... in it")
    return found


def _one_run(directory: Path) -> Path:
    found = _runs(directory)
    if len(found) > 1:
        names = ", ".join(run.name for run in found[:8])
        raise BackendError(f"{directory} holds {len(found)} runs ({names}): give the directory of one")
    return found[0]


def _entries(run: Path) -> "Iterator[Entry]":
    """Newest first. The run's UID is the name of its directory."""
    from esper_runtime.checkpoint.catalog import newest_first

    return newest_first(run, run.name)


def _chosen(run: Path, *, step: int | None, best: bool, metric: str, highest: bool) -> "Entry":
    from esper_runtime.checkpoint import retention
    from esper_runtime.checkpoint.catalog import generation_of

    entries = {entry.path: entry for entry in _entries(run) if entry.manifest is not None}
    if step is not None:
        return _first([e for e in entries.values() if _step(e) == step], f"{run} has no checkpoint of step {step}", run)
    known = [generation_of(entry.manifest, path) for path, entry in entries.items() if entry.manifest is not None]
    if best:
        rule = Retention(metric=metric, mode="Max" if highest else "Min")
        ranked = retention.best(known, rule, 1)
        return _first([entries[g.path] for g in ranked], f"no checkpoint in {run} has the metric {metric}", run)
    good = [entries[g.path] for g in known if not g.suspect]
    return _first(good or list(entries.values()), f"{run} has no checkpoint with a whole manifest", run)


def _first(found: "list[Entry]", otherwise: str, run: Path) -> "Entry":
    if not found:
        raise BackendError(f"{otherwise}: `esper checkpoint ls {run}` lists what there is")
    return found[0]


def _step(entry: "Entry") -> int | None:
    return None if entry.manifest is None else entry.manifest.step


# Showing


def _row(entry: "Entry") -> dict[str, Any]:
    found = entry.manifest
    if found is None:
        return {"generation": entry.where, "state": "corrupt", "problem": entry.problem}
    wrong = _given_away(entry, found)
    row: dict[str, Any] = {
        "generation": entry.where,
        "state": "corrupt" if wrong else "suspect" if found.suspect else "good",
        "step": found.step,
        "epoch": found.epoch,
        "sizeBytes": found.size_bytes,
        "files": len(found.files),
        "created": found.created,
        "verification": found.verification,
        "durability": str(found.durability),
        "metrics": dict(found.metrics),
    }
    return {**row, "problem": wrong} if wrong else row


def _given_away(entry: "Entry", found: "Manifest") -> str:
    """The first file whose name or size alone shows that the checkpoint is damaged."""
    from esper_runtime.checkpoint.catalog import misfits

    for name, why in misfits(entry):
        return f"{name}: {why}"
    for name, want in found.files.items():
        try:
            size = (entry.path / name).stat().st_size
        except FileNotFoundError:
            return f"{name}: missing"
        if size != want.size:
            return f"{name}: has {size} bytes instead of {want.size}"
    return ""


def _cells(row: dict[str, Any], now: float) -> list[str]:
    if "step" not in row:
        return ["", "", row["generation"], "", "", "", row["state"], row["problem"]]
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(row["metrics"].items()))
    return [
        str(row["step"]),
        str(row["epoch"]),
        row["generation"],
        f"{row['sizeBytes'] / 2**20:.1f} MiB",
        duration(max(0, int(now - row["created"]))),
        row["verification"],
        row["state"],
        row.get("problem", metrics),
    ]


def _manifest(entry: "Entry") -> dict[str, Any]:
    assert entry.manifest is not None
    shown: dict[str, Any] = json.loads(entry.manifest.render())
    return {"directory": str(entry.path), **shown}


def _log(run: Path) -> dict[str, Any]:
    from esper_runtime.checkpoint.volume import WAL_FILE
    from esper_runtime.checkpoint.wal import WalError, read_log

    path = run / WAL_FILE
    try:
        log = read_log(path)
    except FileNotFoundError:
        return {"problem": f"{path} is missing: the copy has only checkpoints"}
    except WalError as error:
        return {"problem": str(error)}
    told = json.loads(json.dumps(log.transactions.fields()))
    recent = told.pop("recent")[-_SHOWN_TRANSACTIONS:]
    return {
        "records": log.records,
        "sizeBytes": log.size_bytes,
        "tornBytes": log.torn_bytes,
        "state": log.state.fields(),
        "transactions": {**told, "open": log.transactions.open is not None, "recent": recent},
    }


# Copying


def _export(entry: "Entry", destination: Path) -> list[Path]:
    from esper_runtime.checkpoint import shards
    from esper_runtime.checkpoint.catalog import misfits

    found = entry.manifest
    assert found is not None
    files = {name: found.files[name] for name in shards.of_group(shards.MODEL, found.files)}
    if not files:
        raise BackendError(f"{entry.path} has no {MODEL}: it is no checkpoint of Esper's trainer")
    for name, why in misfits(entry):
        if shards.group_of(name) == shards.MODEL:
            raise BackendError(f"{entry.where}/{name} is damaged: {why}; take another checkpoint with --step")
    with staged(destination) as draft:
        for name, want in files.items():
            digest = _copy(entry.path / name, draft / name)
            if digest != want.xxh3_128:
                raise BackendError(
                    f"{entry.where}/{name} is damaged: digest {digest} is not {want.xxh3_128}; take another checkpoint "
                    "with --step"
                )
        index = None
        if len(files) > 1:
            index = shards.index({name: shards.header_of(draft / name) for name in files})
            (draft / shards.INDEX).write_bytes(index)
        description = {
            "runUID": found.run_uid,
            "step": found.step,
            "epoch": found.epoch,
            "metrics": dict(found.metrics),
            **shards.described(files, index),
        }
        (draft / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")
        return move(draft, destination)


def _copy(source: Path, draft: Path) -> str:
    """The digest of what was copied."""
    import xxhash

    state = xxhash.xxh3_128()
    try:
        with source.open("rb") as reader, draft.open("xb") as writer:
            while chunk := reader.read(_CHUNK):
                state.update(chunk)
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
    except FileNotFoundError as error:
        raise BackendError(f"{source} is missing: take another checkpoint with --step") from error
    return state.hexdigest()
