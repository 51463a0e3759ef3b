"""Try an installed talktime from outside: ``smoke.py TALKTIME HOME``, with the standard library alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

START_SECONDS_MAX = 60
STOP_SECONDS_MAX = 30


def main(talktime: str, home: Path) -> None:
    """Start the service, use it, end it, and see that nothing is left running."""
    output = home.with_suffix(".log")
    with output.open("w") as log:
        command = [talktime, "up", "--port", "0", "--home", str(home)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        origin = wait_for(r"listening on (http://\S+)", output, process)
        key = wait_for(r"service key: (\S+)", output, process)
        call("GET", f"{origin}/readyz")
        answer = call("PUT", f"{origin}/v1/advisors/smoke", key, {"credits_per_minute": "1.5", "free_seconds": 180})
        print(f"PUT /v1/advisors/smoke: {answer}")
        at_home = ["--home", str(home)]
        made = run(talktime, "key", "new", "shop", *at_home).strip()
        print(run(talktime, "credit", "uma", "5", *at_home))
        call("POST", f"{origin}/v1/users/uma/chats/c1/start", made, {"advisor_id": "smoke"})
        reading = run(talktime, "watch", "uma", "c1", "--once", *at_home)
        print(reading)
        if "state=running" not in reading or "balance=5.000000" not in reading:
            sys.exit("the chat does not run on its free time")
        if "<form" not in call("GET", f"{origin}/console"):
            sys.exit("the console has no page to sign in on")
        if "<html" not in call("GET", f"{origin}/"):
            sys.exit("there is no demo page")
        postgres = int((home / "postgres" / "postmaster.pid").read_text().split()[0])
        process.send_signal(signal.SIGTERM)
        if process.wait(STOP_SECONDS_MAX) != 0:
            sys.exit(f"talktime up ended with {process.returncode} on SIGTERM")
        if is_running(postgres):
            sys.exit(f"PostgreSQL ({postgres}) still runs")
    except BaseException:
        print(output.read_text())
        raise
    finally:
        process.kill()
        process.wait()


def wait_for(pattern: str, output: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait until the service has written what is looked for."""
    patient_until = time.monotonic() + START_SECONDS_MAX
    while process.poll() is None and time.monotonic() < patient_until:
        if found := re.search(pattern + r"\s", output.read_text()):
            return found[1]
        time.sleep(0.1)
    sys.exit(f"talktime up did not print {pattern!r}")


def run(*command: str) -> str:
    """Run a command to its end and return what it printed; a failure is an exception."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=START_SECONDS_MAX, check=True).stdout


def call(method: str, url: str, key: str | None = None, body: object = None, **more: str) -> str:
    """Make a request, with more headers if need be; an answer that is no success is an exception."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {}), **more}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, headers, method=method), timeout=10) as answer:
        return str(answer.read().decode())


def is_running(pid: int) -> bool:
    """Say whether the process lives. A dead one that its parent has not asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
