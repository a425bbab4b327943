"""A trainer without torch for tests of the supervisor: beats, steps, and does what FAKE_TRAINER tells it to.

FAKE_TRAINER is JSON: a list with one object per start (the last one repeats). Keys: `steps` (how many to make from
`from`), `exit` (code at the end), `signal` (to itself at the end), `drain_s` (how long SIGTERM takes; null = ignored),
`last_word` (object), `stay` (beat on for ever at the end), `freeze` (stop beating at the end), `phase`.

FAKE_WARM is what a spare does beforehand: `fail` (the import does), `hang` (it never ends), `exit` (the process does).
"""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from esper_leyline import env, paths
from esper_leyline.pages import MAX_SLOTS, Heartbeat, Page
from esper_leyline.v1 import report_pb2 as pb

BEAT_S = 0.02


def warm() -> str:
    match os.environ.get("FAKE_WARM"):
        case "fail":
            return "ImportError: no such luck"
        case "hang":
            while True:
                signal.pause()
        case "exit":
            sys.exit(3)
    return ""


def main() -> int:
    run_dir = Path(os.environ[env.RUN_DIR])
    start = int(os.environ[env.TRAINER_START])
    plans = json.loads(os.environ.get("FAKE_TRAINER", "[{}]"))
    plan = plans[min(start, len(plans)) - 1]
    record = {name: value for name, value in os.environ.items() if name.startswith("ESPER_")}
    (run_dir / f"start-{start}.json").write_text(json.dumps({**record, "pid": os.getpid()}))
    dump = (run_dir / paths.STACK_DUMP).open("w")
    faulthandler.register(signal.SIGUSR1, file=dump, all_threads=True)
    stopping: list[float] = []

    def stop(_: int, __: FrameType | None) -> None:
        stopping.append(time.monotonic())

    signal.signal(signal.SIGTERM, stop)
    page = Page.create(run_dir / paths.TRAINER_PAGE, MAX_SLOTS)
    first = int(plan.get("from", 0))
    last = first + int(plan.get("steps", 5))
    step = first
    drain_s = plan.get("drain_s", 0.0)
    while True:
        if stopping and drain_s is not None and time.monotonic() - stopping[0] >= drain_s:
            return 143
        step = min(step + 1, last)
        phase = plan.get("phase", pb.RUNTIME_PHASE_RUNNING)
        beat = Heartbeat(step, 1, phase, time.monotonic_ns(), 0.5, 1000, os.getpid(), 0)
        page.write(0, beat.words())
        if step == last and not plan.get("stay"):
            break
        time.sleep(BEAT_S)
    if "last_word" in plan:
        (run_dir / paths.LAST_WORD).write_text(json.dumps(plan["last_word"]))
    if plan.get("freeze"):
        while True:
            signal.pause()
    if "signal" in plan:
        os.kill(os.getpid(), plan["signal"])
    return int(plan.get("exit", 0))


if __name__ == "__main__":
    sys.exit(main())
