"""Builds the parts of one trainer from its environment and run.json. The order here is the order of dependence."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from esper_leyline import paths
from esper_leyline.events import RunEvent
from esper_leyline.pages import Heartbeat, Page, PageError
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import RunConfig

from esper_runtime.checkpoint import Store, Wal, Writer
from esper_runtime.checkpoint.catalog import newest_first
from esper_runtime.schedules import Plan
from esper_runtime.tolaria import features, profiler, rng, start
from esper_runtime.tolaria.boundary import EpochEnd
from esper_runtime.tolaria.commands import Commands
from esper_runtime.tolaria.consult import Consult
from esper_runtime.tolaria.control import Control, Identity
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.entrypoint import UserCodeError, find, load, shortened
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.faults import Faults
from esper_runtime.tolaria.finish import Finish
from esper_runtime.tolaria.handshake import Boundary as Handshake
from esper_runtime.tolaria.judge import Judge
from esper_runtime.tolaria.learning_rate import LearningRate
from esper_runtime.tolaria.loop import Parts, locate
from esper_runtime.tolaria.memory import Memory
from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.packet import Packets
from esper_runtime.tolaria.place import Place
from esper_runtime.tolaria.provenance import context_of
from esper_runtime.tolaria.publish import Publisher
from esper_runtime.tolaria.rebuild import Rebuilds, as_command
from esper_runtime.tolaria.record import Author, Record
from esper_runtime.tolaria.rollback import Rollbacks
from esper_runtime.tolaria.snapshot import Snapshots
from esper_runtime.tolaria.stability import Standing
from esper_runtime.tolaria.state import RunClock, TrainState
from esper_runtime.tolaria.step import Step
from esper_runtime.tolaria.telemetry import Events, Heart
from esper_runtime.tolaria.update import update_of
from esper_runtime.workload import Workload, resolve_device

log = logging.getLogger(__name__)
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")

Between = Callable[[], Outcome | None]
"""Called between batches of held-out data: beats, and gives the Outcome of a stop."""


@dataclass(kw_only=True)
class Bench:
    """What exists before user code is touched, so that its failure can be reported."""

    place: Place
    config: RunConfig
    store: Store
    clock: RunClock
    facts: Facts
    heart: Heart
    events: Events
    record: Record
    metrics: Metrics
    stability: Standing
    laps: start.Laps
    began_ns: int
    last_beat_ns: int


def lay_out(place: Place, config: RunConfig) -> Bench:
    """Opens pages, journal and volume. CheckpointDirError when the volume cannot be used."""
    began_ns = time.monotonic_ns()
    last_beat_ns = _last_beat(place.run_dir)
    heart = Heart(place.run_dir)
    heart.beat()
    store = Store(
        place.checkpoint_dir,
        run_uid=place.run_uid,
        attempt=place.attempt,
        retention=config.checkpoint.retention,
        verification=config.checkpoint.verification,
    )
    store.prepare()
    clock = RunClock()
    wal = Wal(store.volume.wal_file)
    facts = Facts(wal, run_seconds=clock.seconds)
    store.keep_log(wal)
    store.deadline_s = config.rollback.full_deadline_seconds
    clock.at_least(max(facts.state.rollback_times, default=0.0))
    metrics = Metrics(place.run_dir)
    record = _record(place, store, metrics)
    events = Events(
        place.run_dir, counters=facts.counters, heart=heart, record=record, new_incident=place.incidents().__next__
    )
    stability = Standing(
        facts=facts, events=events, metrics=metrics, run_seconds=clock.seconds, restarted=place.trainer_start > 1
    )
    laps = _laps(place, began_ns)
    return Bench(
        place=place,
        config=config,
        store=store,
        clock=clock,
        facts=facts,
        heart=heart,
        events=events,
        record=record,
        metrics=metrics,
        stability=stability,
        laps=laps,
        began_ns=began_ns,
        last_beat_ns=last_beat_ns,
    )


def _record(place: Place, store: Store, metrics: Metrics) -> Record:
    def dropped(priority: str) -> None:
        metrics.add("tolaria.telemetry.dropped_total", priority=priority)

    author = Author(attempt=place.attempt, incarnation=place.incarnation, trainer_start=place.trainer_start)
    return Record(store.volume.record_file, author, on_dropped=dropped)


def _laps(place: Place, began_ns: int) -> start.Laps:
    """From the death that was noticed, where there was one."""
    died = place.recovering
    laps = start.Laps(began_ns if died is None or died.detected_ns is None else died.detected_ns)
    laps.mark("hand over", at_ns=began_ns)
    laps.mark("lay out")
    return laps


def _last_beat(run_dir: Path) -> int:
    """CLOCK_MONOTONIC of an earlier trainer's last beat in this pod; 0 without one."""
    with suppress(PageError):
        return Heartbeat.of(Page.open(run_dir / paths.TRAINER_PAGE).read()).beat_ns
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What the user's code gave, with its model in arenas."""

    workload: Workload
    device: torch.device
    state: TrainState


def seed_for(config: RunConfig) -> None:
    """Seeds everything with config["seed"], else with 0."""
    seed = config.config.get("seed")
    rng.seed_everything(seed if isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 else 0)


def build(bench: Bench) -> Built:
    """Runs the user's code and puts its model into arenas. UserCodeError when that is impossible."""
    config = bench.config
    seed_for(config)
    find(config.entrypoint, code_dir=bench.place.code_dir)
    seed_for(config)  # again: a spare has imported the module before
    workload = load(config.entrypoint, config.config, code_dir=bench.place.code_dir)
    torch.set_num_threads(workload.threads or default_threads())
    device = resolve_device(workload.device)
    try:
        state = _state(bench, workload, device)
    except (TypeError, ValueError) as error:
        raise UserCodeError(RunReason.USER_CODE_ERROR, f"{config.entrypoint}: {shortened(error)}") from error
    bench.store.context = context_of(config.entrypoint, state, device)
    return Built(workload=workload, device=device, state=state)


def _state(bench: Bench, workload: Workload, device: torch.device) -> TrainState:
    features.set_up_process(workload, device, bench.metrics)
    model = workload.model.to(device)
    model.train()
    loader = features.loader_of(workload, device, bench.metrics)
    loader.skipped.update(loader.position_of(number) for number in bench.facts.state.skipped_positions)
    loader.left_out.update(loader.position_of(number) for number in bench.facts.state.left_out_positions)
    state = TrainState(
        model=model,
        update=update_of(workload, model),
        loader=loader,
        judge=Judge(bench.config.health),
        clock=bench.clock,
        run_uid=bench.place.run_uid,
        learning_rate_scale=bench.facts.state.learning_rate_scale,
    )
    state.extras.update(features.extras_of(workload, loader, device))
    log.info("optimizer path: %s (%s)", state.update.path, state.update.why)
    return state


def assemble(bench: Bench, built: Built) -> Parts:
    """The parts, with the state restored to where training goes on."""
    workload, state = built.workload, built.state
    packets = _packets(bench, built)
    learning_rate = _learning_rate(bench, built)
    state.extras.update(stability=bench.stability, packets=packets, learning_rate=learning_rate)
    kept = _kept(bench, state)
    origin = _restore(bench, built, kept)
    control = _control(bench, state, kept)
    faults = _faults(bench)
    rollbacks = _rollbacks(bench, kept, on_rolled_back=faults.rolled_back)
    between = _between_batches(bench.heart, control)
    return Parts(
        control=control,
        step=_step(bench, built, learning_rate, faults, rollbacks, kept),
        rollbacks=rollbacks,
        memory=kept.memory,
        checkpoints=kept.checkpoints,
        heart=bench.heart,
        start=_start(bench, origin),
        epoch_end=_epoch_end(bench, built, kept, rollbacks, learning_rate, packets, between),
        publisher=_publisher(bench, built, origin),
        finish=_finish(bench, built, kept, between),
        epochs=workload.epochs,
    )


# Where good states are kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The two places that training can go back to."""

    memory: Memory
    checkpoints: Checkpoints


def _kept(bench: Bench, state: TrainState) -> Kept:
    checkpoints = Checkpoints(
        bench.store,
        Writer(bench.store),
        config=bench.config.checkpoint,
        facts=bench.facts,
        events=bench.events,
        beat=bench.heart.beat,
        metrics=bench.metrics,
        stability=bench.stability,
    )
    return Kept(memory=_memory(bench, state), checkpoints=checkpoints)


def _memory(bench: Bench, state: TrainState) -> Memory:
    place, checkpoint = bench.place, bench.config.checkpoint

    def open_snapshots() -> Snapshots:
        identity = f"{place.run_uid}/{place.attempt}/{state.layout}"
        return Snapshots(
            place.shm_dir,
            identity=identity,
            rank=place.rank,
            slots=checkpoint.memory_snapshots,
            max_bytes=checkpoint.memory_max_bytes,
        )

    opened = None if checkpoint.memory_mode == "Disabled" else open_snapshots
    return Memory(opened, config=checkpoint, events=bench.events, metrics=bench.metrics)


def _restore(bench: Bench, built: Built, kept: Kept) -> start.Origin:
    state = built.state
    origin = start.restore(
        state,
        memory=kept.memory,
        checkpoints=kept.checkpoints,
        resume_from=bench.config.checkpoint.resume_from,
        events=bench.events,
    )
    log.info("training starts from %s at step %d", origin.source, origin.step)
    locate(bench.heart, state, built.workload.epochs)
    return origin


# What acts on the state


def _learning_rate(bench: Bench, built: Built) -> LearningRate:
    """Steps of the whole training are planned with skipped batches included. UserCodeError for a bad schedule."""
    per_epoch = built.state.loader.batches_per_epoch
    return LearningRate(
        built.state.update,
        plan=Plan(built.workload.epochs * per_epoch, per_epoch),
        metrics=bench.metrics,
        events=bench.events,
        stability=bench.stability,
    )


def _step(
    bench: Bench, built: Built, learning_rate: LearningRate, faults: Faults, rollbacks: Rollbacks, kept: Kept
) -> Step:
    step = features.build_step(
        built.workload,
        built.state,
        faults,
        device=built.device,
        learning_rate=learning_rate,
        events=bench.events,
        metrics=bench.metrics,
        heart=bench.heart,
    )
    if bench.config.profiler is None:
        return step
    return profiler.profiled(
        step,
        bench.config.profiler,
        directory=bench.store.volume.run_dir / profiler.DIRECTORY,
        state=built.state,
        parts=((rollbacks, "roll_back", "rollback"), (kept.memory, "capture", "snapshot")),
        hooks=built.workload.compile == "off",
        events=bench.events,
        metrics=bench.metrics,
        stability=bench.stability,
    )


def _control(bench: Bench, state: TrainState, kept: Kept) -> Control:
    place = bench.place
    return Control(
        place.run_dir,
        identity=Identity(run_uid=place.run_uid, attempt=place.attempt, rank=place.rank),
        heart=bench.heart,
        events=bench.events,
        step=lambda: state.step,
        save=lambda: kept.checkpoints.save_now(state),
    )


def _faults(bench: Bench) -> Faults:
    return Faults(
        bench.config.faults,
        rank=bench.place.rank,
        facts=bench.facts,
        events=bench.events,
        spike_steps=bench.config.health.loss_spike_consecutive_steps,
    )


def _rollbacks(bench: Bench, kept: Kept, *, on_rolled_back: Callable[[], None]) -> Rollbacks:
    return Rollbacks(
        config=bench.config.rollback,
        memory=kept.memory,
        checkpoints=kept.checkpoints,
        facts=bench.facts,
        events=bench.events,
        metrics=bench.metrics,
        stability=bench.stability,
        on_rolled_back=on_rolled_back,
    )


# Begin and end


def _start(bench: Bench, origin: start.Origin) -> start.Start:
    return start.Start(
        bench.place,
        origin,
        events=bench.events,
        heart=bench.heart,
        laps=bench.laps,
        began_ns=bench.began_ns,
        last_beat_ns=bench.last_beat_ns,
    )


def _epoch_end(
    bench: Bench,
    built: Built,
    kept: Kept,
    rollbacks: Rollbacks,
    learning_rate: LearningRate,
    packets: Packets,
    between: Between,
) -> EpochEnd:
    place = bench.place
    return EpochEnd(
        workload=built.workload,
        config=bench.config,
        config_file=place.config_file,
        device=built.device,
        checkpoints=kept.checkpoints,
        memory=kept.memory,
        rollbacks=rollbacks,
        learning_rate=learning_rate,
        commands=_commands(bench, rollbacks, kept.memory),
        consult=_consult(bench),
        packets=packets,
        standing=bench.stability,
        registry=bench.metrics,
        events=bench.events,
        heart=bench.heart,
        between_batches=between,
    )


def _publisher(bench: Bench, built: Built, origin: start.Origin) -> Publisher:
    bench.record.append(
        RunEvent.STARTED,
        step=origin.step,
        source=origin.source,
        trainerStart=bench.place.trainer_start,
        device=str(built.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        optimizerPath=built.state.update.path,
        epochs=built.workload.epochs,
    )
    return Publisher(metrics=bench.metrics, record=bench.record, events=bench.events, device=built.device)


def _packets(bench: Bench, built: Built) -> Packets:
    return Packets(
        experiment=f"{bench.config.namespace}/{bench.config.name}",
        epochs=built.workload.epochs,
        device=built.device,
        metrics=bench.metrics,
    )


def _consult(bench: Bench) -> Consult:
    place = bench.place
    handshake = Handshake(
        place.run_dir, run_uid=place.run_uid, attempt=place.attempt, restarted=place.trainer_start > 1
    )
    return Consult(
        handshake=handshake, standing=bench.stability, metrics=bench.metrics, facts=bench.facts, events=bench.events
    )


def _commands(bench: Bench, rollbacks: Rollbacks, memory: Memory) -> Commands:
    volume = bench.store.volume

    def step_of_epoch(epoch: int) -> int | None:
        entries = (entry.manifest for entry in newest_first(volume.run_dir, volume.run_uid))
        # Later ones of the same number are from within the next epoch.
        return min((found.step for found in entries if found is not None and found.epoch == epoch), default=None)

    return Commands(
        rollbacks=rollbacks,
        facts=bench.facts,
        events=bench.events,
        metrics=bench.metrics,
        standing=bench.stability,
        step_of_epoch=step_of_epoch,
        rebuild=as_command(Rebuilds(memory=memory, metrics=bench.metrics, events=bench.events)),
    )


def _finish(bench: Bench, built: Built, kept: Kept, between: Between) -> Finish:
    return Finish(
        workload=built.workload,
        config=bench.config,
        device=built.device,
        checkpoints=kept.checkpoints,
        events=bench.events,
        heart=bench.heart,
        between_batches=between,
    )


def _between_batches(heart: Heart, control: Control) -> Between:
    def between() -> Outcome | None:
        heart.beat()
        return control.poll()

    return between


def default_threads() -> int:
    """CPUs this container may use, by affinity and cgroup quota; OMP_NUM_THREADS wins."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    usable = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = _CPU_MAX.read_text().split()
        if quota != "max":
            usable = min(usable, max(1, int(quota) // int(period)))
    return usable
