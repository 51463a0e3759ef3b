"""Have a real cron run the printed crontab: ``cron_smoke.py TALKTIME FOLDER``, as root.

The daemon has processes and folders of its own: it sees no crontab of this machine, and ends with all that it started.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from smoke import call, run, wait_for

PATIENCE_S = 60 + 15 + 15  # until the next minute, and until the second pass of it
PERIOD_S, LATE_S, STOP_S = 15, 5, 30
CRON = """
set -e
mount -t tmpfs none "$1" && mkdir "$1/etc" "$1/work"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/etc,workdir=$1/work" /etc
rm -rf /etc/crontab /etc/cron.d /etc/cron.hourly /etc/cron.daily /etc/cron.weekly /etc/cron.monthly
mkdir -p /etc/talktime
printf '%s\\n' "TALKTIME_DATABASE_URL='$2'" >/etc/talktime/talktime.env
mount -t tmpfs none /usr/local/bin && ln -s "$3" /usr/local/bin/talktime
mount -t tmpfs none /run
mount -t tmpfs none /var/spool/cron && mkdir /var/spool/cron/crontabs
talktime ops cron | crontab -
exec cron -f
"""


def main(talktime: str, folder: Path) -> None:
    """Serve a chat of which nobody speaks, and wait until passes have written it twice."""
    home, log = folder / "home", folder / "serve.log"
    (folder / "mount").mkdir(parents=True)
    # The lease outlasts the test, so that nothing but a pass moves what is written.
    patient = {"TALKTIME_LEASE_SECONDS": "900", "TALKTIME_ABANDON_AFTER_SECONDS": "901"}
    run(talktime, "migrate", "--home", str(home))
    with log.open("w") as output:
        command = ["env", *(f"{name}={value}" for name, value in patient.items()), talktime]
        service = subprocess.Popen(
            [*command, "serve", "--port", "0", "--home", str(home)], stdout=output, stderr=subprocess.STDOUT
        )
    cron = None
    try:
        origin = wait_for(r"listening on (http://\S+)", log, service)
        key = run(talktime, "key", "new", "cron", "--home", str(home)).strip()
        chat = f"{origin}/v1/users/uma/chats/c1"
        call("POST", f"{chat}/start", key, {"advisor_id": "ada"})
        url = f"postgresql://talktime@/talktime?host={home / 'postgres'}&port=5432"
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        cron = subprocess.Popen([*alone, "sh", "-c", CRON, "cron", str(folder / "mount"), url, talktime])
        written = [through(chat, key)]
        patient_until = time.monotonic() + PATIENCE_S
        while len(written) <= 2:  # noqa: PLR2004 - the start, and two passes
            if cron.poll() is not None or time.monotonic() > patient_until:
                sys.exit(f"cron had no two passes made: {written}")
            time.sleep(0.2)
            if (now := through(chat, key)) != written[-1]:
                written.append(now)
                print(f"a pass of cron's wrote through {now}")
        if abs((written[2] - written[1]).total_seconds() - PERIOD_S) > LATE_S:
            sys.exit("the passes are not 15 s apart")
    except BaseException:
        print(log.read_text())
        raise
    finally:
        if cron is not None:
            cron.kill()  # unshare takes no gentler signal; what it has started ends with it
            cron.wait(STOP_S)
        service.terminate()
        service.wait(STOP_S)


def through(chat: str, key: str) -> datetime:
    """Return the instant through which the chat is written."""
    return datetime.fromisoformat(json.loads(call("GET", chat, key))["materialized_through"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
