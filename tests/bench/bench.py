"""What all parts of the benchmark share: the options, the server, a population, and a folder for what is in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.database import Server
from tests.bench.pgbench import PgBench
from tests.bench.population import Population, populate
from tests.bench.programs import Program
from tests.bench.rounds import S_US, Progress
from tests.bench.service import Api, Load, serving, write_requests

USERS_POLLING_MAX = 4_000
USERS_ENOUGH = 2_000
"""From so many users on, no user polls as often as one may; with fewer, they may poll more often."""
PER_USER_UNBOUNDED = 1_000_000
WARM_UP_US = S_US


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The sizes."""

    rounds: int
    seconds: int
    clients: int
    generators: int
    chats: int
    segments: int
    in_flight: int


@dataclass(slots=True, kw_only=True)
class Bench:
    """A benchmark that runs."""

    options: Options
    server: Server
    folder: Path
    progress: Progress
    _databases: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)
    _population: Population | None = field(default=None, init=False)

    def close(self) -> None:
        """Drop the databases."""
        self._databases.close()

    @property
    def population(self) -> Population:
        """Users with a running chat each; made when the first part asks for it."""
        if self._population is None:
            url = self._databases.enter_context(self.server.database())
            self.progress.say(f"making {self.options.chats:,} users with a running chat each")
            self._population = populate(url, self.options.chats)
        return self._population

    @contextlib.contextmanager
    def api(self, population: Population | None = None) -> Iterator[Api]:
        """Run the API over a population, else the one that all share."""
        found = population or self.population
        per_user = {} if found.users >= USERS_ENOUGH else {"per_user": PER_USER_UNBOUNDED}
        with serving(found, self.folder, **per_user) as api:
            yield api

    def load(
        self, name: str, server: Program, address: str, requests: list[bytes] | Path, *, clients: int | None = None
    ) -> Load:
        """Return a load on a server."""
        path = self.folder / f"requests of {name}.json"
        return Load(
            name=name,
            server=server,
            address=address,
            requests=requests if isinstance(requests, Path) else write_requests(path, requests),
            clients=clients or self.options.clients,
            generators=min(self.options.generators, clients or self.options.clients),
            warm_up_us=min(WARM_UP_US, self.options.seconds * S_US),
            us=self.options.seconds * S_US,
            folder=self.folder,
        )

    def polling(self, api: Api, name: str = "reading") -> Load:
        """Return the load of users who poll, each with a token of their own."""
        users = api.population.some_users(USERS_POLLING_MAX)
        requests = [api.reading(user_id, token) for user_id, token in zip(users, api.tokens(users), strict=True)]
        return self.load(name, api.program, api.address, requests)

    def pgbench(self, rows: int) -> PgBench:
        """Return pgbench with so many rows: as many as there are chats in the requests that it is compared with."""
        found = PgBench(
            url=self.population.url,
            rows=rows,
            clients=self.options.clients,
            seconds=self.options.seconds,
            folder=self.folder,
        )
        found.prepare()
        return found
