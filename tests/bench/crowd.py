"""Memory of the API with many requests in flight at once.

All clients connect. Then the API is halted, each client sends its request, and the API goes on: so all of them are
in flight in it, however fast it answers.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.bench.programs import BenchmarkFailed, files_open, halted, memory_bytes, module, started
from tests.bench.rounds import Run, per_second
from tests.bench.service import Api, Share, plan

CONNECT_S = 60
ANSWER_S = 180
LOOK_AGAIN_S = 0.05
ALIKE = 10


def crowd(api: Api, requests: Path, in_flight: int, folder: Path) -> Run:
    """Send so many requests at once, and return the answers by status and the memory that the API has had so far."""
    pid = api.program.pid
    before = memory_bytes(pid, "VmRSS")
    files_before = _settled(pid)
    with started("load generator", *module("tests.bench.http_load"), folder=folder) as generator:
        generator.tell(**plan(api.address, requests, Share(0, 1, in_flight)))
        _take(generator.answer(CONNECT_S))
        until = time.monotonic() + CONNECT_S
        while (accepted := files_open(pid) - files_before) < in_flight:
            if time.monotonic() > until:
                message = f"the API took only {accepted} of {in_flight} connections in {CONNECT_S} s"
                raise BenchmarkFailed(message)
            time.sleep(LOOK_AGAIN_S)
        connected = memory_bytes(pid, "VmRSS")
        with halted(api.program):
            sent = _take(generator.ask(CONNECT_S))["sent"]
        answer = generator.answer(ANSWER_S)
    return {
        "rate": per_second(sum(answer["statuses"].values()), answer["elapsed_us"]),
        "sent": sent,
        "statuses": answer["statuses"],
        "failure": answer["failure"],
        "elapsed_us": answer["elapsed_us"],
        "memory_before_bytes": before,
        "memory_connected_bytes": connected,
        "memory_peak_bytes": memory_bytes(pid),
    }


def _settled(pid: int) -> int:
    """Return how many files the API has open, once the connections of the last crowd are gone."""
    looks: list[int] = []
    while len(looks) < ALIKE or len(set(looks[-ALIKE:])) > 1:
        looks.append(files_open(pid))
        time.sleep(LOOK_AGAIN_S)
    return looks[-1]


def _take(answer: Run) -> Run:
    if "failure" in answer:
        raise BenchmarkFailed(answer["failure"])
    return answer
