"""Try an image from outside: ``image_smoke.py IMAGE POSTGRES_IMAGE``, with the standard library and `docker` alone.

API and reconciler are two containers of the image, the commands each one more; the database is a third's. All of them
run as the README says: with a root that cannot be written, without capabilities, as the image's own user.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from smoke import call, run

PATIENCE_S = 60
BEATS = 3
STOP_S = 10  # of the 30 s that are given before it is killed
NAME = f"talktime-smoke-{secrets.token_hex(4)}"
LOCKED_DOWN = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]  # noqa: S108 - the container's
OWNER_PASSWORD, SERVICE_PASSWORD = secrets.token_hex(16), secrets.token_hex(16)
LOGIN = f"""
CREATE ROLE talktime_service LOGIN PASSWORD '{SERVICE_PASSWORD}' IN ROLE talktime_app;
REVOKE CONNECT ON DATABASE talktime FROM PUBLIC;
GRANT CONNECT ON DATABASE talktime TO talktime_service;
"""
# As the README has it, but on the same server, where the roles are.
RESTORE = """
export PGHOST=127.0.0.1 PGUSER=owner
pg_dump --format=custom --file=/tmp/talktime.dump talktime
createdb restored
pg_restore --dbname=restored --exit-on-error --jobs=2 /tmp/talktime.dump
"""

SECRET = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
# Says what it was told, a line each, once the signature is verified by the library of whoever receives webhooks.
RECEIVER = """
import http.server, os, sys
from standardwebhooks import Webhook

class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        Webhook(os.environ["SECRET"]).verify(body, dict(self.headers))
        sys.stdout.write(body.decode() + chr(10))
        sys.stdout.flush()
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", 9000), Receiver).serve_forever()
"""
TOLD = [
    *("account.credited", "chat.started", "balance.low", "chat.exhausted"),
    *("account.credited", "chat.started", "chat.ended"),
]


def main(image: str, postgres_image: str) -> None:
    """Start all of it, meter two chats, hear of them, end it, and remove what was started, however it went."""
    try:
        docker("network", "create", NAME)
        smoke(image, postgres_image)
    except BaseException:
        for name in started():
            print(f"--- {name}\n{logs_of(name)}")
        raise
    finally:
        for name in started():
            docker("rm", "--force", "--volumes", name)
        docker("network", "rm", NAME)


def smoke(image: str, postgres_image: str) -> None:
    """Set up as an operator would, with one login that migrates and another that serves."""
    # The official image has data in a volume of its own; removing the container with --volumes takes it away.
    start("postgres", postgres_image, POSTGRES_USER="owner", POSTGRES_PASSWORD=OWNER_PASSWORD, POSTGRES_DB="talktime")
    with_password = ("docker", "exec", "--env", f"PGPASSWORD={OWNER_PASSWORD}", f"{NAME}-postgres")
    # Over TCP: while the official image sets itself up, it listens on the socket alone.
    psql = (*with_password, "psql", "--host", "127.0.0.1", "--username", "owner", "talktime")
    wait_for("PostgreSQL", lambda: succeeds(*psql, "--command", "SELECT 1"))
    owner = {"TALKTIME_DATABASE_URL": f"postgresql://owner:{OWNER_PASSWORD}@{NAME}-postgres/talktime"}
    service = {"TALKTIME_DATABASE_URL": f"postgresql://talktime_service:{SERVICE_PASSWORD}@{NAME}-postgres/talktime"}
    print(command(image, "migrate", **owner))
    run(*psql, "--quiet", "--set", "ON_ERROR_STOP=1", "--command", LOGIN)
    key = command(image, "key", "new", "smoke", **service).strip()

    # The receiver listens on loopback alone, for http, and the reconciler shares that with it.
    telling = {
        **service,
        "TALKTIME_WEBHOOK_URL": "http://127.0.0.1:9000/",
        "TALKTIME_WEBHOOK_SECRET": SECRET,
        "TALKTIME_BALANCE_LOW_SECONDS": "2",
    }
    beside = ("--no-healthcheck", *LOCKED_DOWN)
    start("receiver", image, *beside, "--entrypoint", "python3", after=("-c", RECEIVER), SECRET=SECRET)
    start("api", image, *LOCKED_DOWN, "--publish", "127.0.0.1::8000", **telling)
    every = ("reconcile", "--every", "1")
    start("reconciler", image, *beside, after=every, network=f"container:{NAME}-receiver", **telling)
    origin = f"http://{docker('port', f'{NAME}-api', '8000/tcp').strip()}"
    wait_for("a healthy API", lambda: inspected("api", ".State.Health.Status") == "healthy")
    call("GET", f"{origin}/readyz")
    for part in ("api", "reconciler"):
        if (user := docker("top", f"{NAME}-{part}", "-o", "pid,uid").split()[3]) != "10001":
            sys.exit(f"{part} runs as {user}")

    def ask(method: str, path: str, body: object = None, **headers: str) -> Any:  # noqa: ANN401 - JSON
        return json.loads(call(method, f"{origin}/v1{path}", key, body, **headers))

    meter(ask)
    wait_for("the last webhook", lambda: len(told()) >= len(TOLD))
    print(f"webhooks, verified: {told()}")
    if told() != TOLD:
        sys.exit(f"the webhooks are not {TOLD}")

    for part in ("api", "reconciler"):
        began = time.monotonic()
        docker("stop", "--time", "30", f"{NAME}-{part}")
        took, code = time.monotonic() - began, inspected(part, ".State.ExitCode")
        print(f"{part}: exit code {code} {took:.1f} s after SIGTERM")
        if code != "0" or took > STOP_S:
            sys.exit(f"{part} did not end in order")
    audit(image, **service)
    run(*with_password, "sh", "-ec", RESTORE)
    audit(image, TALKTIME_DATABASE_URL=service["TALKTIME_DATABASE_URL"].removesuffix("talktime") + "restored")


def audit(image: str, **variables: str) -> None:
    """See that every figure follows from the others."""
    audited = json.loads(command(image, "reconcile", "--audit", "--json", **variables).splitlines()[-1])
    print(f"audit: {audited}")
    if audited["accounts"] != 1 or audited["differences"]:
        sys.exit("the audit is not clean")


def meter(ask: Callable[..., Any]) -> None:
    """Meter one chat until its credits are gone, and one until it is stopped, at a credit a second."""
    ask("PUT", "/advisors/ada", {"credits_per_minute": "60", "free_seconds": 0})
    buy(ask, "3")
    ask("POST", "/users/uma/chats/c1/start", {"advisor_id": "ada"})
    # Nobody says anything more: the reading ends the clock, and a pass writes the charge.
    wait_for("the reconciler's charge", lambda: ledger(ask)[0]["kind"] == "charge")
    reading = ask("GET", "/users/uma/chats/c1")
    told = [reading[name] for name in ("state", "elapsed_us", "credits_used", "balance")]
    charge = [ledger(ask)[0][name] for name in ("chat_id", "amount", "balance_after")]
    print(f"c1: {told}, charged by the reconciler: {charge}")
    if told != ["exhausted", 3_000_000, "3.000000", "0.000000"] or charge != ["c1", "-3.000000", "0.000000"]:
        sys.exit("the chat did not use 3 credits in 3 s")

    buy(ask, "60")
    began = time.monotonic()
    ask("POST", "/users/uma/chats/c2/start", {"advisor_id": "ada"})
    for _ in range(BEATS):
        time.sleep(1)
        if not ask("POST", "/users/uma/chats/c2/heartbeat")["accruing"]:
            sys.exit("the clock does not run")
    stopped = ask("POST", "/users/uma/chats/c2/stop")
    within_us = (time.monotonic() - began) * 1_000_000
    print(f"c2: {stopped['elapsed_us']} us of at most {within_us:.0f}, {stopped['credits_used']} credits")
    if not BEATS * 1_000_000 <= stopped["elapsed_us"] <= within_us:
        sys.exit("the chat's time is not the time that it ran")
    used, lines = Decimal(stopped["elapsed_us"]).scaleb(-6), ledger(ask)
    if not Decimal(stopped["credits_used"]) == used == -Decimal(lines[0]["amount"]):
        sys.exit(f"the chat's time, its cost and its charge are not one: {stopped} {lines[0]}")
    balance = Decimal(ask("GET", "/users/uma/account")["balance"])
    if not balance == 60 - used == sum(Decimal(line["amount"]) for line in lines):
        sys.exit(f"the balance, {balance}, is not the sum of the ledger: {lines}")


def told() -> list[str]:
    """Return what the receiver was told, in the order of its lines."""
    return [json.loads(line)["type"] for line in docker("logs", f"{NAME}-receiver").splitlines()]


def buy(ask: Callable[..., Any], amount: str) -> None:
    """Let the user buy credits."""
    body = {"kind": "purchase", "amount": amount, "memo": "smoke"}
    ask("POST", "/users/uma/credits", body, **{"Idempotency-Key": f"order-{amount}"})


def ledger(ask: Callable[..., Any]) -> list[Any]:
    """Return the lines of the user's ledger, newest first."""
    return list(ask("GET", "/users/uma/ledger")["items"])


# --- containers -------------------------------------------------------------------------------------------------------


def start(
    part: str, image: str, *options: str, after: tuple[str, ...] = (), network: str = NAME, **variables: str
) -> None:
    """Start a container of this run in the background; `after` is what follows the image's name."""
    named = ("--name", f"{NAME}-{part}", "--network", network)
    docker("run", "--detach", *named, *options, *env(variables), image, *after)


def command(image: str, *arguments: str, **variables: str) -> str:
    """Run a command of the image to its end, as an operator would, and return what it printed."""
    return docker("run", "--rm", "--network", NAME, *LOCKED_DOWN, *env(variables), image, *arguments)


def env(variables: dict[str, str]) -> list[str]:
    """Write variables as options."""
    return [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]


def docker(*arguments: str) -> str:
    """Run docker and return what it printed; a failure is an exception."""
    return run("docker", *arguments)


def started() -> list[str]:
    """Return the names of the containers of this run."""
    return docker("ps", "--all", "--filter", f"name=^{NAME}-", "--format", "{{.Names}}").split()


def logs_of(name: str) -> str:
    """Return what a container has said."""
    done = subprocess.run(["docker", "logs", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)  # noqa: S607
    return done.stdout.decode(errors="replace")


def inspected(part: str, what: str) -> str:
    """Look something up about a container."""
    return docker("inspect", "--format", f"{{{{{what}}}}}", f"{NAME}-{part}").strip()


def succeeds(*program: str) -> bool:
    """Say whether a program ends well."""
    return subprocess.run(program, capture_output=True, check=False).returncode == 0


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    patient_until = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > patient_until:
            sys.exit(f"waited for {what} in vain")
        time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
