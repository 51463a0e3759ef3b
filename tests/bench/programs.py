"""The processes of a benchmark: started, talked with in lines of JSON, looked at, and ended by their own ids."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

END_S = 20
_LINE_BYTES_MAX = 1 << 16
_TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")
_LAST_WORDS_CHARS = 800


class BenchmarkFailed(Exception):
    """Something was not measured, and why."""


@dataclass(slots=True)
class Program:
    """A program that runs in a process of its own; what it says on its standard error is in `log`."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    _said: bytes = field(default=b"", init=False)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def line(self, patience_s: float) -> str:
        """Return the next line that it writes.

        Raises:
            BenchmarkFailed: it ended, or took too long.
        """
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        until = time.monotonic() + patience_s
        while b"\n" not in self._said:
            ready, _, _ = select.select([descriptor], [], [], max(until - time.monotonic(), 0))
            if not ready:
                self.fail(f"said nothing for {patience_s:.0f} s")
            written = os.read(descriptor, _LINE_BYTES_MAX)
            if not written:
                self.fail("ended")
            self._said += written
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def wait_for(self, pattern: str, patience_s: float) -> str:
        """Return the group of the first line that the pattern matches."""
        while (found := re.search(pattern, self.line(patience_s))) is None:
            pass
        return found[1]

    def tell(self, **message: object) -> None:
        """Write it a line of JSON."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail("ended")

    def ask(self, patience_s: float, **message: object) -> dict[str, Any]:
        """Write it a line of JSON, and return what it answers."""
        self.tell(**message)
        return self.answer(patience_s)

    def answer(self, patience_s: float) -> dict[str, Any]:
        """Return the line of JSON that it writes next."""
        answer: dict[str, Any] = json.loads(self.line(patience_s))
        return answer

    def fail(self, what: str) -> NoReturn:
        """Raise an error with the program's last words."""
        said = self.log.read_text(errors="replace")[-_LAST_WORDS_CHARS:].strip()
        message = f"{self.name} {what}{': ' if said else ''}{said}"
        raise BenchmarkFailed(message) from None


def module(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module with this Python."""
    return sys.executable, "-m", name, *arguments


@contextlib.contextmanager
def started(name: str, *command: str, folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Program]:
    """Run a command until the block ends. A worker ends with its standard input."""
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            env=None if environment is None else dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    try:
        yield Program(name, process, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):
        assert process.stdin is not None
        process.stdin.close()
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


@contextlib.contextmanager
def halted(program: Program) -> Iterator[None]:
    """Halt a program until the block ends."""
    program.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        program.process.send_signal(signal.SIGCONT)


# --- what the kernel says ---------------------------------------------------------------------------------------------


def memory_bytes(pid: int, name: str = "VmHWM") -> int:
    """Return how much memory a process has had at most, or, of the name ``VmRSS``, has now; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


def cpu_us(pid: int) -> int:
    """Return for how long a process has been computing; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_US
    return 0


def files_open(pid: int) -> int:
    """Return how many files a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


@dataclass(frozen=True, slots=True)
class Cores:
    """What all cores together have done since the machine started."""

    busy_us: int
    waiting_us: int
    idle_us: int

    @classmethod
    def now(cls) -> Cores:
        """Look."""
        user, nice, system, idle, waiting, irq, softirq, steal, *_ = (
            int(ticks) * _TICK_US for ticks in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        )
        return cls(user + nice + system + irq + softirq + steal, waiting, idle)

    def since(self, before: Cores) -> dict[str, int]:
        """Return what they did since then: computed, waited for disks, and had nothing to do."""
        return {
            "cores_busy_us": self.busy_us - before.busy_us,
            "cores_waiting_for_disks_us": self.waiting_us - before.waiting_us,
            "cores_idle_us": self.idle_us - before.idle_us,
        }
