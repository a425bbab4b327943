"""What was given up, a thousand times: no thread, task or descriptor is left behind it, and nobody waits in a queue."""

import asyncio
import os
import socket
import threading
import time

import aiohttp
import grpc
import psutil
import pytest
from esper_leyline import paths
from esper_leyline.oona import REPORTS, Oona, OonaConfig, OonaUnavailable, Status
from esper_leyline.v1.bus_pb2 import BusEnvelope
from esper_leyline.v1.command_pb2 import SignedCommand
from esper_leyline.v1.command_pb2_grpc import KasminaAuthorityServiceStub
from esper_leyline.v1.common_pb2 import MESSAGE_PRIORITY_CRITICAL

from tests.support.forgeries import lying
from tests.support.sidecars import Sidecars
from tests.support.waiting import PATIENT_S, until, until_sync
from tests.support.weatherlight import PodFiles

pytestmark = [pytest.mark.timeout(180), pytest.mark.row("T36")]
TIMES = 1000
SHUT_S = 0.1


def held() -> tuple[int, int]:
    """Threads and descriptors of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


async def test_calls_that_redis_never_answers():
    signal = BusEnvelope(payload=b"x", priority=MESSAGE_PRIORITY_CRITICAL)
    async with lying() as liar:
        oona = Oona(OonaConfig(url=liar.url, timeout_s=0.003, block_s=0.003, breaker_failures=10**9))

        async def give_up(times):
            for number in range(times):
                if number % 4:
                    assert (await oona.publish_report(signal)).status is Status.UNAVAILABLE
                else:
                    with pytest.raises(OonaUnavailable):
                        await oona.last(REPORTS)

        await give_up(20)
        threads, descriptors = held()
        tasks = len(asyncio.all_tasks())
        await give_up(TIMES)
        assert threading.active_count() == threads
        # The server of this test has half of them, and notices a little later.
        await until(lambda: held()[1] <= descriptors)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        began = time.monotonic()
        await oona.aclose()
        assert time.monotonic() - began < SHUT_S


async def test_the_time_in_a_queue_counts():
    """Fifty callers of one connection wait once, and not one after the other."""
    signal = BusEnvelope(payload=b"x", priority=MESSAGE_PRIORITY_CRITICAL)
    async with lying() as liar, Oona(OonaConfig(url=liar.url, timeout_s=0.5)) as oona:
        began = time.monotonic()
        outcomes = await asyncio.gather(*(oona.publish_report(signal) for _ in range(50)))
        took_s = time.monotonic() - began
    assert {outcome.status for outcome in outcomes} == {Status.UNAVAILABLE}
    assert took_s < 50 * 0.5 / 10


def test_calls_of_a_trainer_to_a_sidecar(tmp_path_factory):
    directory = tmp_path_factory.mktemp("s")
    sidecars = Sidecars(directory)
    try:
        kasmina = sidecars.start("kasmina")
        worker = kasmina.worker()

        def hang_up(times):
            """On a channel of its own every tenth time, as after a failure."""
            given_up = 0
            for number in range(times):
                if number % 10 == 0:
                    channel = grpc.insecure_channel(f"unix:{kasmina.socket}")
                    stub = KasminaAuthorityServiceStub(channel)
                    stub.SubmitCommand(SignedCommand(), timeout=PATIENT_S, wait_for_ready=True)
                call = stub.SubmitCommand.future(SignedCommand(), timeout=PATIENT_S)
                given_up += call.cancel()
                if number % 10 == 9:
                    channel.close()
            return given_up

        hang_up(20)
        threads, descriptors = worker.num_threads(), worker.num_fds()
        assert hang_up(TIMES) > TIMES / 2
        until_sync(lambda: worker.num_fds() <= descriptors, what="no descriptor more")
        assert worker.num_threads() <= threads
    finally:
        sidecars.stop()


async def test_polls_and_greetings_that_weatherlight_never_gets_to_the_end_of(tmp_path):
    pod = PodFiles(tmp_path)
    pod.start()
    try:
        await until(pod.ready)
        worker = psutil.Process(pod.worker_pid())

        async def hang_up(times):
            async with aiohttp.ClientSession() as session:
                for number in range(times):
                    if number % 10 == 0:
                        with pytest.raises(TimeoutError):
                            async with asyncio.timeout(0.005):
                                await session.get(f"{pod.url}/v1/reports?wait=30")
                    greet(pod)

        await hang_up(20)
        threads, descriptors = worker.num_threads(), worker.num_fds()
        await hang_up(TIMES)
        await until(lambda: worker.num_fds() <= descriptors)
        assert worker.num_threads() <= threads
        assert worker.pid == pod.worker_pid()
        assert (await pod.pull()).last_seq == 0  # there is a place for who comes now
    finally:
        pod.close()


def greet(pod):
    """Connects as a supervisor does, says nothing or half a word, and goes."""
    with socket.socket(socket.AF_UNIX) as connection:
        here = os.open(pod.run_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:  # a socket's path has 107 bytes at most
            connection.connect(f"/proc/self/fd/{here}/{paths.WEATHERLIGHT_SOCKET}")
        finally:
            os.close(here)
        connection.sendall(b"tolar")
