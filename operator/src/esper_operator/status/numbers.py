"""Progress, counters and checkpoint state of a report, in the resource's units."""

from datetime import datetime, timedelta

from esper_leyline.phases import RecoveryKind
from esper_leyline.reasons import RunReason
from esper_leyline.v1.report_pb2 import Counters, RunReport
from esper_leyline.v1.report_pb2 import Progress as WireProgress

from esper_operator.api.runstatus import MAX_METRICS, RestoreFailures
from esper_operator.api.v1alpha1 import Metric, Progress, Topology
from esper_operator.status import bounds
from esper_operator.status.draft import Draft

MAX_CORRUPT_FILES = 8


def fold_progress(draft: Draft, report: RunReport, time: datetime) -> None:
    """Epoch, step, loss, metrics, speed. Nothing is written while neither step, epoch nor metrics change."""
    if not report.HasField("progress"):
        return
    told, old = report.progress, draft.progress
    metrics = _metrics(told) or old.metrics
    epoch, step, total = bounds.count(told.epoch), bounds.count(told.step), bounds.count(told.total_steps)
    if (epoch, step, metrics) == (old.epoch, old.step, old.metrics) and total == (old.total_steps or 0):
        return
    draft.progress = Progress(
        epoch=epoch,
        total_epochs=bounds.count(told.total_epochs) or old.total_epochs,
        step=step,
        total_steps=total or old.total_steps,
        percentage=min(100, step * 100 // total) if total else old.percentage,
        estimated_remaining_seconds=_remaining(draft, step, total, time),
        loss=bounds.decimal(told.loss) if told.HasField("loss") else old.loss,
        samples_per_second=bounds.decimal(told.samples_per_second)
        if told.HasField("samples_per_second")
        else old.samples_per_second,
        last_heartbeat_time=time,
        goodput_percentage=bounds.percentage(told.goodput) if told.HasField("goodput") else old.goodput_percentage,
        metrics=metrics,
    )
    if told.parameter_count:
        topology = draft.topology or Topology()
        draft.topology = topology.changed(parameter_count=bounds.count(told.parameter_count))


def complete_progress(draft: Draft) -> None:
    """Training that is complete is 100 %, whatever was skipped on the way."""
    draft.progress = draft.progress.changed(percentage=100, estimated_remaining_seconds=0)


def _metrics(told: WireProgress) -> tuple[Metric, ...]:
    named = {m.name[:64]: bounds.decimal(m.value) for m in told.metrics if m.name}
    return tuple(Metric(name=name, value=named[name]) for name in sorted(named)[:MAX_METRICS])


def _remaining(draft: Draft, step: int, total: int, time: datetime) -> int | None:
    """At the speed since the progress that was last written in this attempt; both times are the runtime's own."""
    if not total or step >= total:
        return 0 if total else None
    base, observed = draft.old.progress, draft.old.observed_report
    same = observed is not None and observed.attempt == draft.number
    if not same or base is None or base.last_heartbeat_time is None or step <= (base.step or 0):
        return draft.progress.estimated_remaining_seconds
    took = (time - base.last_heartbeat_time).total_seconds()
    return bounds.nearest(took / (step - (base.step or 0)) * (total - step))


def fold_counters(draft: Draft, report: RunReport) -> None:
    """Totals since the run began. They never go back, whatever becomes of the volume that they are kept on."""
    if not report.HasField("counters"):
        return
    told = report.counters
    in_place = max(draft.restarts.in_place, bounds.count(told.in_place_restarts))
    if in_place > draft.restarts.in_place:
        total = draft.restarts.total + in_place - draft.restarts.in_place
        draft.restarts = draft.restarts.changed(total=total, in_place=in_place)
    rollbacks = max(draft.rollbacks.total, bounds.count(told.rollbacks))
    skipped = max(draft.rollbacks.skipped_batches, bounds.count(told.skipped_batches))
    if (rollbacks, skipped) != (draft.rollbacks.total, draft.rollbacks.skipped_batches):
        counted = _in_window(draft) + rollbacks - draft.rollbacks.total
        draft.rollbacks = draft.rollbacks.changed(total=rollbacks, counted=counted, skipped_batches=skipped)
    _fold_restores(draft, told)
    signals = max(draft.rejections.signals, bounds.count(told.rejected_signals))
    commands = max(draft.rejections.commands, bounds.count(told.rejected_commands))
    if (signals, commands) != (draft.rejections.signals, draft.rejections.commands):
        draft.rejections = draft.rejections.changed(signals=signals, commands=commands)
    failures = bounds.count(told.checkpoint_failures)
    if failures > (draft.checkpoint.failures or 0):
        draft.checkpoint = draft.checkpoint.changed(failures=failures)


def _fold_restores(draft: Draft, told: Counters) -> None:
    old = draft.rollbacks.restore_failures or RestoreFailures()
    new = RestoreFailures(
        no_checkpoint=max(old.no_checkpoint, bounds.count(told.restores_without_checkpoint)),
        integrity_failed=max(old.integrity_failed, bounds.count(told.restores_failed_integrity)),
        deadline_exceeded=max(old.deadline_exceeded, bounds.count(told.restores_over_deadline)),
        apply_failed=max(old.apply_failed, bounds.count(told.restores_failed_apply)),
    )
    if new != old:
        draft.rollbacks = draft.rollbacks.changed(restore_failures=new)


def _in_window(draft: Draft) -> int:
    """rollbacks.counted before this report: from 0 again after rollback.windowSeconds without one."""
    last = draft.last_recovery
    if last is None or last.completed_time is None or last.kind is not RecoveryKind.IN_PROCESS:
        return draft.rollbacks.counted
    window = timedelta(seconds=draft.seen.run.spec.rollback.window_seconds)
    return draft.rollbacks.counted if draft.now - last.completed_time < window else 0


def fold_checkpoint(draft: Draft, report: RunReport) -> None:
    """What lies on the checkpoint volume, and what is wrong with it."""
    which = "saved" if report.WhichOneof("event") == "saved" else "checkpoint"
    if not report.HasField(which):
        return
    told = report.saved if which == "saved" else report.checkpoint
    old = draft.checkpoint
    corrupt = tuple(name[:512] for name in told.corrupt_files[:MAX_CORRUPT_FILES])
    draft.checkpoint = old.changed(
        latest_step=bounds.count(told.latest_step) if told.HasField("latest_step") else old.latest_step,
        latest_verified_step=bounds.count(told.latest_verified_step)
        if told.HasField("latest_verified_step")
        else old.latest_verified_step,
        best_step=bounds.count(told.best_step) if told.HasField("best_step") else old.best_step,
        count=told.count,
        total_bytes=bounds.count(told.total_bytes),
        last_saved_time=bounds.moment(told.last_saved_time, draft.now)
        if told.HasField("last_saved_time")
        else old.last_saved_time,
        last_stall_milliseconds=bounds.nearest(told.last_stall_ms)
        if told.HasField("last_stall_ms")
        else old.last_stall_milliseconds,
        feasible=told.feasible if told.HasField("feasible") else old.feasible,
        last_error=bounds.message(told.last_error) or None,
        corrupt_files=corrupt,
    )
    for name in corrupt:
        if name not in old.corrupt_files:
            draft.say(RunReason.CHECKPOINT_CORRUPT, f"{name}; an older one is used", warning=True, action="Report")
    error = told.last_error
    if error and bounds.message(error) != old.last_error:
        message = f"checkpoint not saved: {error}; training goes on, make room on the volume or mend it"
        draft.say(RunReason.CHECKPOINT_FAILED, bounds.message(message), warning=True, action="Report")
