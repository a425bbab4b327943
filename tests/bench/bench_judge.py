"""How the judge of training does on recorded loss curves, next to simpler rules, and what it costs per step.

.venv/bin/python tests/bench/bench_judge.py

False alarms are alarms in a run without trouble, or before anything was done to it. Delays are steps from the first
step of trouble (tests/support/curves.py says which that is) to the alarm, 0 being that step itself; a negative one was
seen before the loss had left its band, but after the cause. Half of the curves were held out while the shipped
judge was tuned.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_leyline.runconfig import Health
from esper_runtime.tolaria.judge import Call, Judge
from esper_runtime.tolaria.losses import LEAST_DEVIATION, LossWindow

from tests.bench.common import machine, row
from tests.support.curves import Curve, Detector, Label, first_alarm, load


def fifteen_times_the_mean() -> Detector:
    """One loss above 15 times its moving average."""
    mean = weight = 0.0

    def detect(step: int, loss: float, norm: float) -> bool:
        nonlocal mean, weight
        if not math.isfinite(loss) or (weight and loss > 15 * mean / weight):
            return True
        mean, weight = 0.98 * mean + 0.02 * loss, 0.98 * weight + 0.02
        return False

    return detect


def plain_z_score() -> Detector:
    """Three in a row more than 3 standard deviations above the mean of 100."""
    window: list[float] = []
    streak = 0

    def detect(step: int, loss: float, norm: float) -> bool:
        nonlocal streak
        if not math.isfinite(loss):
            return True
        high = len(window) >= 20 and loss > statistics.fmean(window) + 3 * statistics.pstdev(window)
        streak = streak + 1 if high else 0
        window.append(loss)
        del window[:-100]
        return streak >= 3

    return detect


def robust_z_score() -> Detector:
    """Three in a row with a robust z-score above 3 over 100, on a logarithmic scale: what Esper shipped before."""
    window = LossWindow(100)
    streak: list[float] = []

    def detect(step: int, loss: float, norm: float) -> bool:
        if not math.isfinite(loss):
            return True
        z = 0.0
        if len(window) >= 20:
            z = window.z_score(loss, logarithmic=window.positive, least=LEAST_DEVIATION)
        if z > 3.0:
            streak.append(loss)
            return len(streak) >= 3
        for spike in (*streak, loss):
            window.add(spike)
        streak.clear()
        return False

    return detect


def shipped(health: Health) -> Callable[[], Detector]:
    def make() -> Detector:
        judge = Judge(health)

        def detect(step: int, loss: float, norm: float) -> bool:
            return judge.check(step, loss, norm * norm, lambda: math.isfinite(norm)).call is Call.BAD

        return detect

    return make


DETECTORS: dict[str, Callable[[], Detector]] = {
    "15 x mean": fifteen_times_the_mean,
    "plain z": plain_z_score,
    "robust z": robust_z_score,
    "shipped": shipped(Health()),
    "with norm": shipped(Health(gradient_norm_action="Rollback")),
    "norm only": shipped(Health(gradient_norm_action="Rollback", loss_spike_action="Ignore")),
}
"""A loss or gradient that is not finite is an alarm for all of them."""


def show(title: str, curves: Sequence[Curve]) -> None:
    alarms = {name: [first_alarm(curve, make()) for curve in curves] for name, make in DETECTORS.items()}
    print(f"\n{title}\n  {'':28}{'curves':>8}" + "".join(f"{name:>11}" for name in DETECTORS))
    for label in Label:
        chosen = [i for i, curve in enumerate(curves) if curve.label is label]
        false = [sum(curves[i].false_alarm(found[i]) for i in chosen) for found in alarms.values()]
        print(f"  false alarms, {label:14}{len(chosen):8}" + "".join(f"{count:11}" for count in false))
    ill = [i for i, curve in enumerate(curves) if not curve.label.calm]
    seen = [sum(curves[i].seen_in_time(found[i]) for i in ill) for found in alarms.values()]
    print(f"  seen within 5 steps         {len(ill):8}" + "".join(f"{count:11}" for count in seen))
    for i in ill:
        curve = curves[i]
        cells = "".join(f"{_delay(curve, found[i]):>11}" for found in alarms.values())
        print(f"    {curve.name:26}{curve.trouble:8}{cells}")


def _delay(curve: Curve, alarm: int | None) -> str:
    if alarm is None:
        return "missed"
    return "false" if curve.false_alarm(alarm) else f"{alarm - curve.trouble:d}"


def cost(curves: Sequence[Curve], rounds: int) -> list[float]:
    """Microseconds of processor time per step, one value per round over all calm curves."""
    found = []
    for _ in range(rounds):
        spent = steps = 0.0
        for curve in curves:
            detect = shipped(Health(gradient_norm_action="Rollback"))()
            pairs = list(zip(curve.losses, curve.norms, strict=True))
            began = time.process_time()
            for step, (loss, norm) in enumerate(pairs, 1):
                detect(step, loss, norm)
            spent += time.process_time() - began
            steps += len(pairs)
        found.append(spent / steps * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    curves = load()
    print(machine())
    print(f"{len(curves)} curves, {sum(len(curve.losses) for curve in curves)} steps")
    show("Tuned on", [curve for curve in curves if not curve.held_out])
    show("Held out", [curve for curve in curves if curve.held_out])
    print("\nCost of one step, without its training")
    print(row("judge", cost([curve for curve in curves if curve.label.calm], arguments.rounds), unit="us"))


if __name__ == "__main__":
    main()
