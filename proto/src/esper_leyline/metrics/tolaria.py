"""Of one trainer process, and of the supervisor that serves them beside its own."""

from esper_leyline.metrics.model import Metric, MetricKind, each

BOUNDARY_BUCKETS_MS = (1.0, 2.0, 5.0, 10.0, 12.0, 15.0, 18.0, 25.0, 30.0, 50.0, 100.0, 250.0, 1000.0, 2000.0)
"""18 and 30 are the objectives of a whole boundary and of a command's part of it."""
ROLLBACK_BUCKETS_MS = (1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 5000.0, 12000.0)

_G, _C, _H = MetricKind.GAUGE, MetricKind.COUNTER, MetricKind.HISTOGRAM

TOLARIA: tuple[Metric, ...] = (
    # Training
    Metric("tolaria.training.loss", _G, "loss", "Mean training loss of the epoch closed last"),
    Metric("tolaria.training.accuracy", _G, "ratio", "Training accuracy, where the workload measures it"),
    Metric("tolaria.training.latency_ms", _G, "ms", "Wall time of the epoch closed last"),
    Metric("tolaria.train.samples_per_s", _G, "1/s", "Samples trained per second in the epoch closed last"),
    Metric("tolaria.train.step_ms", _G, "ms", "Mean time of a step in the epoch closed last"),
    Metric("tolaria.train.input_wait_ms", _G, "ms", "Mean wait for a batch per step"),
    Metric("tolaria.train.h2d_copy_ms", _G, "ms", "Mean time of a batch's copy to the device"),
    Metric("tolaria.epochs.total", _C, "1", "Epochs closed"),
    Metric("tolaria.epochs.failed", _C, "1", "Epochs closed after a failed boundary"),
    Metric("tolaria.validation.loss", _G, "loss", "Validation loss"),
    Metric("tolaria.validation.accuracy", _G, "ratio", "Validation accuracy"),
    Metric("tolaria.validation.latency_ms", _G, "ms", "Time of the last validation"),
    Metric("tolaria.grad.norm_l2", _G, "1", "L2 norm of the last gradient"),
    Metric("tolaria.grad.clipped_total", _C, "1", "Gradients that were clipped"),
    Metric("tolaria.amp.skipped_steps_total", _C, "1", "Steps that the gradient scaler left out"),
    # Features that are really active
    Metric("tolaria.train.compile_enabled", _G, "bool", "torch.compile is active"),
    Metric("tolaria.train.amp_enabled", _G, "bool", "Automatic mixed precision is active"),
    Metric("tolaria.train.tf32_enabled", _G, "bool", "TF32 is active"),
    Metric("tolaria.train.foreach_enabled", _G, "bool", "The optimizer runs its foreach form"),
    Metric("tolaria.train.pin_memory", _G, "bool", "Batches come from pinned memory"),
    Metric("tolaria.train.graph_enabled", _G, "bool", "CUDA graphs are active"),
    Metric("tolaria.graph.capture_ms", _G, "ms", "Capture time of the last CUDA graph"),
    Metric("tolaria.graph.replay_ms", _G, "ms", "Last replay"),
    Metric("tolaria.graph.stage_copy_ms", _G, "ms", "Host to device copy before the last replay"),
    Metric("tolaria.graph.replays_total", _C, "1", "Replays"),
    Metric("tolaria.profiler.enabled", _G, "bool", "The profiler records"),
    Metric("tolaria.profiler.traces_emitted_total", _C, "1", "Traces written"),
    Metric("tolaria.profiler.traces_failed_total", _C, "1", "Traces that could not be written"),
    # Boundary, breakers, modes
    Metric("tolaria.epoch_hook.latency_ms", _G, "ms", "Time of the last boundary; budget 18"),
    Metric("tolaria.hook.latency_ms", _G, "ms", "The same, under its older name"),
    *(
        Metric(f"tolaria.boundary.{part}_ms", _H, "ms", f"Boundary time: {part}", buckets=BOUNDARY_BUCKETS_MS)
        for part in ("total", "assembly", "tamiyo", "apply", "guard")
    ),
    Metric(
        "tolaria.boundary.breaches_total",
        _C,
        "1",
        "Boundaries over budget, by the part that was over its own",
        ("part",),
        known=each(("assembly", "tamiyo", "apply", "guard")),
    ),
    Metric("tolaria.breaker.state", _G, "state", "1 closed, 2 open, 3 half-open", ("name",)),
    Metric("tolaria.mode.conservative", _G, "bool", "Conservative mode"),
    Metric("tolaria.conservative.seconds_total", _C, "s", "Time in conservative mode"),
    Metric("tolaria.timeout.tamiyo_total", _C, "1", "Calls to Tamiyo over the hard deadline"),
    Metric("tolaria.timeout.kasmina_total", _C, "1", "Calls to Kasmina over the hard deadline"),
    Metric("tolaria.timeout.tamiyo_last_ms", _G, "ms", "Last call to Tamiyo; 0 after a timeout"),
    Metric("tolaria.timeout.kasmina_last_ms", _G, "ms", "Last call to Kasmina; 0 after a timeout"),
    Metric("tolaria.emergency.level", _G, "level", "0 none to 4 halt"),
    Metric("tolaria.emergency.transitions_total", _C, "1", "Changes of the level", ("from", "to", "reason")),
    Metric("tolaria.emergency.halts_total", _C, "1", "Halts by the runtime's own decision"),
    Metric("tolaria.emergency.halt", _G, "bool", "Halted by the runtime's own decision"),
    Metric(
        "tolaria.command.handled_total",
        _C,
        "1",
        "Commands by what became of them: applied, refused or duplicate",
        ("type", "result"),
    ),
    # Learning rate, optimizer
    Metric("tolaria.lr_controller.enabled", _G, "bool", "A schedule other than constant is active"),
    Metric("tolaria.lr_controller.current_lr", _G, "lr", "Learning rate", ("group",)),
    Metric("tolaria.lr_controller.violations_total", _C, "1", "Foreign changes of a learning rate", ("group",)),
    Metric("tolaria.opt.rebuilds_total", _C, "1", "Rebuilds of the optimizer"),
    Metric("tolaria.opt.rebuild_failures_total", _C, "1", "Rebuilds after which the old optimizer was kept"),
    Metric("tolaria.opt.rebuild_skipped_total", _C, "1", "Rebuilds refused by the storm guard or an open breaker"),
    Metric("tolaria.opt.rebuild_latency_ms", _G, "ms", "Last rebuild; budget 10"),
    Metric("tolaria.opt.state_preserved_ratio", _G, "ratio", "Share of state kept by the last rebuild"),
    # Snapshots, checkpoints, rollback
    Metric("tolaria.rollback.fast_size_bytes", _G, "B", "Memory snapshots"),
    Metric("tolaria.rollback.snapshots_total", _C, "1", "Memory snapshots taken"),
    Metric("tolaria.rollback.snapshot_rejected_total", _C, "1", "Memory snapshots refused: not finite, or too large"),
    Metric("tolaria.rollback.fast_hits_total", _C, "1", "Rollbacks from memory"),
    Metric("tolaria.rollback.fast_misses_total", _C, "1", "Rollbacks that found no usable snapshot"),
    Metric("tolaria.rollback.attempts_total", _C, "1", "Attempts to restore", ("tier", "result", "reason")),
    Metric("tolaria.rollback.duration_ms", _H, "ms", "Restores by tier", ("tier",), ROLLBACK_BUCKETS_MS),
    Metric("tolaria.rollback.restore_latency_ms", _G, "ms", "Last restore"),
    Metric("tolaria.rollback.failures_total", _C, "1", "Attempts to restore that failed"),
    Metric("tolaria.rollback.deadline_exceeded_total", _C, "1", "Attempts to restore that took too long"),
    Metric("tolaria.checkpoint.duration_s", _G, "s", "Last save"),
    Metric("tolaria.checkpoint.bytes", _G, "B", "Size of the last save"),
    Metric("tolaria.checkpoint.generation", _G, "1", "Number of the newest generation"),
    Metric("tolaria.checkpoint.age_s", _G, "s", "Since the last save that succeeded"),
    Metric("tolaria.checkpoint.last_good_epoch", _G, "1", "Epoch of the newest good checkpoint"),
    Metric("tolaria.checkpoint.failures_total", _C, "1", "Saves that failed"),
    Metric(
        "tolaria.checkpoint.durability_mode", _G, "mode", "How writes are made durable: 1 O_DSYNC, 2 fsync, 0 unknown"
    ),
    Metric(
        "tolaria.telemetry.dropped_total",
        _C,
        "1",
        "Telemetry dropped by a bound",
        ("priority",),
        known=each(("LOW", "NORMAL", "HIGH", "CRITICAL")),
    ),
    # The names of the design's first page; its tolaria_rollback_duration_ms is the histogram above
    Metric("tolaria.epochs_completed_total", _C, "1", "Epochs closed"),
    Metric("tolaria.rollbacks_initiated_total", _C, "1", "Rollbacks begun"),
    Metric("tolaria.rollbacks_succeeded_total", _C, "1", "Rollbacks done"),
    Metric("tolaria.lr_violations_total", _C, "1", "Foreign changes of a learning rate"),
    Metric("tolaria.current_loss", _G, "loss", "Training loss"),
    Metric("tolaria.current_accuracy", _G, "ratio", "Accuracy"),
    Metric("tolaria.memory_usage_gb", _G, "GiB", "Memory of the trainer, or of its device"),
    Metric("tolaria.epoch_duration_seconds", _G, "s", "Epoch closed last"),
    Metric("tolaria.checkpoint_duration_seconds", _G, "s", "Last save"),
)

SUPERVISOR: tuple[Metric, ...] = (
    Metric("tolaria.trainer_starts_total", _C, "1", "Starts of the trainer in this container"),
    Metric("tolaria.in_place_restarts_total", _C, "1", "Restarts after a death"),
    Metric("tolaria.hangs_total", _C, "1", "Hangs noticed"),
    Metric("tolaria.trainer_step", _G, "1", "Step of the newest heartbeat"),
    Metric("tolaria.trainer_silent_seconds", _G, "s", "Watched time since the newest heartbeat"),
    Metric("tolaria.weatherlight_connected", _G, "bool", "1 while connected to weatherlight"),
    Metric("tolaria.incarnation", _G, "1", "Starts of this container in this attempt"),
    Metric("tolaria.spare_ready", _G, "bool", "1 while a spare trainer waits"),
    Metric("tolaria.spare_starts_total", _C, "1", "Spare trainers begun"),
    Metric(
        "tolaria.trainer_restart_seconds", _G, "s", "Last restart, from the noticed death to the first step after it"
    ),
)
