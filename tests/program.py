"""The `talktime` command as people run it: an installed program, its output, its signals and its processes."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import httpx
import pytest
from sqlalchemy.engine import URL

TALKTIME = str(Path(sys.executable).with_name("talktime"))
PATIENCE_S = 60
NOWHERE = "postgresql://nobody@127.0.0.1:1/none"


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without talktime's variables but these."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TALKTIME_")}
    # So that what is not to touch the user's own data cannot: a run without --home would make a home here.
    inherited["XDG_DATA_HOME"] = "/nonexistent/data"
    return {**inherited, **variables}


def written(url: URL) -> str:
    """Write a URL as it stands in the environment."""
    return url.render_as_string(hide_password=False)


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [TALKTIME, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@dataclass(frozen=True, slots=True)
class Running:
    """A service that was started, with what it said, and a client with its key."""

    process: subprocess.Popen[bytes]
    output: Path
    key: str
    client: httpx.Client

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def running(log: Path, *arguments: str | Path, **variables: str) -> Iterator[Running]:
    """Run a service until the block ends, and wait until it has said where it listens, and its key if it made one.

    A key that it did not make is to be found in the environment, or passed as ``Authorization`` by the test.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            [TALKTIME, *arguments], env=environment(**variables), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        origin = said(r"^listening on (http://127\.0\.0\.1:[1-9]\d*)$", log, process)
        said(r"(service key.*\n)", log, process)  # the last of what it has to say
        made = re.search(r"^service key: (tt_\S+)$", log.read_text(), re.MULTILINE)
        key = made[1] if made else variables.get("TALKTIME_SERVICE_KEY", "")
        with httpx.Client(
            base_url=origin, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S, trust_env=False
        ) as client:
            yield Running(process, log, key, client)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def said(pattern: str, log: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait until a service has said something."""
    patient_until = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < patient_until:
        if found := re.search(pattern, log.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.02)
    pytest.fail(f"it did not say {pattern!r} but:\n{log.read_text()}")


# --- processes --------------------------------------------------------------------------------------------------------


def stat_of(pid: int) -> list[str]:
    """Return the fields of a process after its name: state, parent, ...; of one that is gone, those of a dead one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X", "0"]


def is_running(pid: int) -> bool:
    return stat_of(pid)[0] not in ("Z", "X")


def family_of(*pids: int) -> set[int]:
    """Return processes with all their descendants."""
    parents = {int(path.name): int(stat_of(int(path.name))[1]) for path in Path("/proc").glob("[0-9]*")}
    family = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def postmaster(home: Path) -> int:
    return int((home / "postgres" / "postmaster.pid").read_text().split()[0])


def still_running(pids: set[int]) -> set[int]:
    """Return which of the processes do not end by themselves."""
    patient_until = time.monotonic() + 10
    while (left := {pid for pid in pids if is_running(pid)}) and time.monotonic() < patient_until:
        time.sleep(0.02)
    return left


@contextmanager
def fresh_home(tmp_path: Path) -> Iterator[Path]:
    """Yield a home that does not exist yet; what a failed test left running in it is killed."""
    home = tmp_path / "home"
    yield home
    # Nothing to do where there is none, or where the test put a file in its way.
    with suppress(FileNotFoundError, NotADirectoryError, ProcessLookupError):
        pid = postmaster(home)
        if is_running(pid) and Path(f"/proc/{pid}/comm").read_text() == "postgres\n":
            os.kill(pid, signal.SIGQUIT)
            still_running({pid})


@dataclass
class Terminal:
    """A terminal on which a program runs, with what it showed and when."""

    process: subprocess.Popen[bytes]
    descriptor: int
    shown: list[tuple[float, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(text for _, text in self.shown)

    def wait_for(self, pattern: str, seconds: float = 20) -> float:
        """Read on until something is shown, and return when it was."""
        patient_until = time.monotonic() + seconds
        while time.monotonic() < patient_until:
            self.read()
            if found := re.search(pattern, self.text):
                ends = accumulate(len(text) for _, text in self.shown)
                return next(when for (when, _), end in zip(self.shown, ends, strict=True) if end >= found.end())
        pytest.fail(f"it did not show {pattern!r} but:\n{self.text}")

    def read(self) -> None:
        """Take all that is there, after waiting for it a little."""
        while select.select([self.descriptor], [], [], 0.05)[0]:
            try:
                raw = os.read(self.descriptor, 1 << 16).decode(errors="replace")
            except OSError:  # the program has ended, and closed the terminal
                return
            self.shown.append((time.monotonic(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)))

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, or type Ctrl-C, and return the exit code."""
        if number is None:
            os.write(self.descriptor, b"\x03")
        else:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def on_terminal(*arguments: str, **variables: str) -> Iterator[Terminal]:
    """Run a command on a terminal of its own, so that Ctrl-C reaches it as it does a person's."""
    master, slave = pty.openpty()
    screen = {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen(
        # setsid takes the terminal for its own, as a shell's is.
        ["setsid", "--ctty", TALKTIME, *arguments],
        env=environment(**screen, **variables),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
