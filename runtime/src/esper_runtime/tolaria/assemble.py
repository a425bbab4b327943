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
from esper_leyline.pages import Heartbeat, Page, PageError
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import RunConfig

from esper_runtime.checkpoint import Store, Wal, Writer
from esper_runtime.tolaria import rng, start
from esper_runtime.tolaria.boundary import EpochEnd
from esper_runtime.tolaria.commands import Commands
from esper_runtime.tolaria.control import Control, Identity
from esper_runtime.tolaria.data import Loader
from esper_runtime.tolaria.durable import Checkpoints
from esper_runtime.tolaria.entrypoint import UserCodeError, load, shortened
from esper_runtime.tolaria.facts import Facts
from esper_runtime.tolaria.faults import Faults
from esper_runtime.tolaria.finish import Finish
from esper_runtime.tolaria.handshake import Boundary as Handshake
from esper_runtime.tolaria.judge import Judge
from esper_runtime.tolaria.loop import Parts
from esper_runtime.tolaria.memory import Memory
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.place import Place
from esper_runtime.tolaria.rollback import Rollbacks
from esper_runtime.tolaria.snapshot import Snapshots
from esper_runtime.tolaria.state import RunClock, TrainState
from esper_runtime.tolaria.step import Step
from esper_runtime.tolaria.telemetry import Events, Heart
from esper_runtime.tolaria.update import Update
from esper_runtime.workload import Workload, resolve_device

log = logging.getLogger(__name__)
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


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
    facts = Facts(Wal(store.volume.wal_file), run_seconds=clock.seconds)
    clock.at_least(max(facts.state.rollback_times, default=0.0))
    events = Events(place.run_dir, counters=facts.counters, heart=heart)
    return Bench(
        place=place,
        config=config,
        store=store,
        clock=clock,
        facts=facts,
        heart=heart,
        events=events,
        began_ns=began_ns,
        last_beat_ns=last_beat_ns,
    )


def _last_beat(run_dir: Path) -> int:
    """CLOCK_MONOTONIC of an earlier trainer's last beat in this pod; 0 without one."""
    with suppress(PageError):
        return Heartbeat.of(Page.open(run_dir / paths.TRAINER_PAGE).read()).beat_ns
    return 0


def build(bench: Bench) -> tuple[Workload, torch.device, TrainState]:
    """Runs the user's code and puts its model into arenas. UserCodeError when that is impossible."""
    config = bench.config
    seed = config.config.get("seed")
    rng.seed_everything(seed if isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 else 0)
    workload = load(config.entrypoint, config.config, code_dir=bench.place.code_dir)
    torch.set_num_threads(workload.threads or default_threads())
    device = resolve_device(workload.device)
    try:
        state = _state(bench, workload, device)
    except (TypeError, ValueError) as error:
        raise UserCodeError(RunReason.USER_CODE_ERROR, f"{config.entrypoint}: {shortened(error)}") from error
    return workload, device, state


def _state(bench: Bench, workload: Workload, device: torch.device) -> TrainState:
    model = workload.model.to(device)
    model.train()
    groups = workload.parameter_groups
    optimizer = workload.optimizer(model.parameters() if groups is None else groups(model))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"Workload.optimizer returned {type(optimizer).__name__}; it must return a torch optimizer")
    loader = Loader(
        workload.train,
        batch_size=workload.batch_size,
        seed=workload.seed,
        device=device,
        shuffle=workload.shuffle,
        drop_last=workload.drop_last,
        transform=workload.transform,
    )
    loader.skipped.update(loader.position_of(number) for number in bench.facts.state.skipped_positions)
    state = TrainState(
        model=model,
        update=Update(model, optimizer),
        loader=loader,
        judge=Judge(bench.config.health),
        clock=bench.clock,
        run_uid=bench.place.run_uid,
        learning_rate_scale=bench.facts.state.learning_rate_scale,
    )
    log.info("optimizer path: %s (%s)", state.update.path, state.update.why)
    return state


def assemble(bench: Bench, workload: Workload, device: torch.device, state: TrainState) -> Parts:
    """The parts, with the state restored to where training goes on."""
    place, config, events, facts, heart = bench.place, bench.config, bench.events, bench.facts, bench.heart
    total_steps = workload.epochs * state.loader.batches_per_epoch
    heart.total_steps = total_steps
    checkpoints = Checkpoints(
        bench.store, Writer(bench.store), config=config.checkpoint, facts=facts, events=events, beat=heart.beat
    )
    memory = _memory(bench, state)
    origin = start.restore(
        state,
        memory=memory,
        checkpoints=checkpoints,
        resume_from=config.checkpoint.resume_from,
        events=events,
    )
    log.info("training starts from %s at step %d", origin.source, origin.step)
    heart.progress(step=state.step, epoch=min(state.epoch + 1, workload.epochs), loss=state.loss)
    control = Control(
        place.run_dir,
        identity=Identity(run_uid=place.run_uid, attempt=place.attempt, rank=place.rank),
        heart=heart,
        events=events,
        step=lambda: state.step,
        save=lambda: checkpoints.save_now(state),
    )
    faults = Faults(
        config.faults,
        rank=place.rank,
        facts=facts,
        events=events,
        spike_steps=config.health.loss_spike_consecutive_steps,
    )
    rollbacks = Rollbacks(
        config=config.rollback,
        memory=memory,
        checkpoints=checkpoints,
        facts=facts,
        events=events,
        on_rolled_back=faults.rolled_back,
    )
    between = _between_batches(heart, control)
    epoch_end = EpochEnd(
        workload=workload,
        config=config,
        config_file=place.config_file,
        device=device,
        checkpoints=checkpoints,
        memory=memory,
        rollbacks=rollbacks,
        commands=Commands(rollbacks=rollbacks, facts=facts, events=events),
        handshake=Handshake(
            place.run_dir, run_uid=place.run_uid, attempt=place.attempt, restarted=place.trainer_start > 1
        ),
        facts=facts,
        events=events,
        heart=heart,
        between_batches=between,
    )
    finish = Finish(
        workload=workload,
        config=config,
        device=device,
        checkpoints=checkpoints,
        events=events,
        heart=heart,
        between_batches=between,
    )
    return Parts(
        control=control,
        step=Step(workload, state, faults, total_steps=total_steps),
        rollbacks=rollbacks,
        memory=memory,
        checkpoints=checkpoints,
        heart=heart,
        start=start.Start(
            place, origin, events=events, heart=heart, began_ns=bench.began_ns, last_beat_ns=bench.last_beat_ns
        ),
        epoch_end=epoch_end,
        finish=finish,
        epochs=workload.epochs,
    )


def _memory(bench: Bench, state: TrainState) -> Memory:
    place, checkpoint = bench.place, bench.config.checkpoint
    identity = f"{place.run_uid}/{place.attempt}/{state.layout}"

    def open_snapshots() -> Snapshots:
        return Snapshots(place.shm_dir, identity=identity, rank=place.rank)

    if checkpoint.memory_mode == "Disabled":
        return Memory(None, config=checkpoint, events=bench.events)
    return Memory(open_snapshots, config=checkpoint, events=bench.events)


def _between_batches(heart: Heart, control: Control) -> Callable[[], Outcome | None]:
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
