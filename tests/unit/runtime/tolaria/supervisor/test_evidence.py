"""What is seen of a process from outside: pulses, threads, and what is kept of a hang."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper_runtime.tolaria.supervisor import evidence, gauges, pulse
from esper_runtime.tolaria.supervisor.evidence import MAX_FILES, Evidence

from tests.support.waiting import until_sync


@contextmanager
def process(code: str) -> Iterator[int]:
    """As leader of its own group, so that what it starts ends with it."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        try:
            yield child.pid
        finally:
            os.killpg(child.pid, signal.SIGKILL)


SLEEPS = "import time; print('here', flush=True); time.sleep(3600)"
SPINS = "print('here', flush=True)\nwhile True: pass"
READS = """
import time
print('here', flush=True)
while True:
    open('/proc/version').read()
    time.sleep(0.001)
"""
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}]).wait()"


def test_a_sleeping_process_has_a_flat_pulse():
    with process(SLEEPS) as pid:
        until_sync(lambda: (found := pulse.take(pid)) and not found.wants, what="sleep")
        first, second = pulse.take(pid), pulse.take(pid)
        assert first == second is not None


def test_a_spinning_process_wants_the_processor():
    with process(SPINS) as pid:
        before = pulse.take(pid)
        assert before is not None
        until_sync(lambda: (now := pulse.take(pid)) and now.wants and now.cpu_s > before.cpu_s, what="processor time")


def test_reads_are_seen():
    with process(READS) as pid:
        before = pulse.take(pid)
        assert before is not None
        until_sync(lambda: (now := pulse.take(pid)) and now.io_bytes > before.io_bytes + 10_000, what="bytes")


def test_children_count():
    with process(PARENT.format(code=SPINS)) as pid:
        before = pulse.take(pid)
        assert before is not None
        until_sync(lambda: (now := pulse.take(pid)) and now.cpu_s > before.cpu_s, what="the child's processor time")


def test_a_process_that_is_gone_has_no_pulse():
    with process(SLEEPS) as pid:
        pass
    assert pulse.take(pid) is None
    assert evidence.from_outside(pid) == ""


def test_a_stopped_process_is_described():
    with process(SLEEPS) as pid:
        os.kill(pid, signal.SIGSTOP)
        until_sync(lambda: "T (stopped)" in evidence.from_outside(pid), what="stopped")
        found = evidence.from_outside(pid)
        assert found.startswith(f"thread {pid} python")
        assert ", waits in " in found


def test_many_threads_are_bounded(tmp_path: Path):
    for thread in range(1, 101):
        task = tmp_path / "7" / "task" / str(thread)
        task.mkdir(parents=True)
        (task / "comm").write_text("x" * 500)
        (task / "status").write_text("Name: x\nState:\tD (disk sleep)\n")
        (task / "wchan").write_text("wait_on_page")
        (task / "stack").write_text("[<0>] wait_on_page+0x1/0x2\n[<0>] do_read+0x1/0x2\n" * 50)
    lines = evidence.from_outside(7, proc=tmp_path).splitlines()
    assert len(lines) == evidence.MAX_THREADS + 1
    assert lines[-1] == "and 68 threads more"
    assert "D (disk sleep), waits in wait_on_page (wait_on_page < do_read < " in lines[0]
    assert len(lines[0]) < 300


def hang(kept: Evidence, why: str) -> str:
    kept.look(os.getpid(), why)
    return kept.keep()


def test_files_are_numbered_and_the_oldest_go(tmp_path: Path):
    dump = tmp_path / "dump"
    kept = Evidence(dump, tmp_path)
    assert kept.keep() == "", "no hang, no evidence"
    for number in range(1, MAX_FILES + 4):
        dump.write_text(f"stack {number}")
        assert f"stacks-{number}.txt" in hang(kept, "it hangs")
    names = sorted(int(path.stem.partition("-")[2]) for path in tmp_path.glob("stacks-*.txt"))
    assert names == list(range(4, MAX_FILES + 4))
    text = (tmp_path / f"stacks-{MAX_FILES + 3}.txt").read_text()
    assert text.startswith("it hangs\n")
    assert f"stack {MAX_FILES + 3}" in text
    assert "State" not in text
    assert kept.keep() == "", "told once"


def test_a_huge_dump_is_cut(tmp_path: Path):
    dump = tmp_path / "dump"
    dump.write_text("head\n" + "x" * 100_000)
    kept = Evidence(dump, tmp_path)
    assert len(hang(kept, "it hangs")) < 2000
    assert (tmp_path / "stacks-1.txt").stat().st_size < 40_000


def test_a_volume_that_takes_nothing_costs_only_the_file(tmp_path: Path):
    dump = tmp_path / "dump"
    dump.write_text("File main.py, line 3 in main")
    found = hang(Evidence(dump, tmp_path / "absent"), "it hangs")
    assert found == "it hangs\nFile main.py, line 3 in main"


def test_without_an_own_dump_the_view_from_outside_is_told(tmp_path: Path):
    found = hang(Evidence(tmp_path / "absent", tmp_path), "it hangs")
    assert "it wrote no Python stacks; seen from outside:\nthread " in found


def test_the_trainers_metrics_follow_the_supervisors(tmp_path: Path):
    path = tmp_path / "trainer.prom"
    own = [("hangs_total", "counter", "Hangs noticed", 2)]
    alone = gauges.render(own, path)
    assert alone.endswith("# TYPE esper_tolaria_hangs_total counter\nesper_tolaria_hangs_total 2\n")
    path.write_bytes(b"esper_x 1\nesper_y \xff\nesper_torn")
    assert gauges.render(own, path) == alone + "esper_x 1\nesper_y \ufffd\n"
    path.write_bytes(b"esper_x 1\n" * 100_000)
    assert len(gauges.render(own, path)) <= len(alone) + gauges.MAX_TRAINER_BYTES
    path.write_bytes(b"y" * 400_000)
    assert gauges.render(own, path) == alone
