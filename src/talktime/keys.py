"""Service keys, and the console's sessions that are opened with them: made, listed, ended.

A key or a session's token is told once, when it is made; what is stored is its digest. Each function opens its own
transaction.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from talktime.errors import InvalidKeyName, KeyNameTaken, KeyNotFound
from talktime.store import keys as store

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from talktime.store.database import Database

KEY_PREFIX = "tt_"
ENVIRONMENT = "environment"
"""The name of the key that the environment gives; none of the database's may have it."""

_SECRET_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9_.:@+=~|-]{1,64}")


@dataclass(frozen=True, slots=True)
class ServiceKey:
    """What is known of a key of the database: instants in microseconds; `revoked_at` is None while it is in force."""

    name: str
    created_at: int
    revoked_at: int | None


def digest_of(credential: str | bytes) -> bytes:
    """Return the SHA-256 of a key or a token."""
    raw = credential.encode(errors="surrogatepass") if isinstance(credential, str) else credential
    return hashlib.sha256(raw).digest()


# --- service keys -----------------------------------------------------------------------------------------------------


async def new_key(database: Database, name: str) -> str:
    """Make a service key and return it. It cannot be shown again.

    Raises:
        InvalidKeyName: the name is none for a key.
        KeyNameTaken: there is a key of this name, in force or revoked.
    """
    if not _NAME.fullmatch(name) or name in (".", "..", ENVIRONMENT):
        raise InvalidKeyName(name)
    key = KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)

    async def work(connection: AsyncConnection) -> bool:
        now = await store.read_clock(connection)
        return await store.insert_key(connection, name, digest_of(key), now)

    if not await database.transaction(work):
        raise KeyNameTaken(name)
    return key


async def list_keys(database: Database) -> list[ServiceKey]:
    """Return all keys of the database, revoked ones too, the oldest first."""
    return [ServiceKey(row.name, row.created_at, row.revoked_at) for row in await database.read(store.load_keys)]


async def revoke_key(database: Database, name: str) -> None:
    """Take a key out of force for ever. Doing it again changes nothing.

    Raises:
        KeyNotFound: there is none of this name.
    """

    async def work(connection: AsyncConnection) -> bool:
        now = await store.read_clock(connection)
        return await store.revoke_key(connection, name, now) or await store.has_key(connection, name)

    if not await database.transaction(work):
        raise KeyNotFound(name)


async def active_keys(database: Database) -> dict[bytes, str]:
    """Return the names of the database's keys in force by their digests."""
    return await database.read(store.load_active_keys)


# --- console sessions -------------------------------------------------------------------------------------------------


async def open_session(database: Database, key_digest: bytes, *, seconds: int) -> str:
    """Open a session for the holder of a key and return its token, which is good for so many seconds."""
    token = secrets.token_urlsafe(_SECRET_BYTES)

    async def work(connection: AsyncConnection) -> None:
        now = await store.read_clock(connection)
        await store.delete_expired_sessions(connection, now)
        await store.insert_session(connection, digest_of(token), key_digest, now + seconds * 1_000_000)

    await database.transaction(work)
    return token


async def find_session(database: Database, token: str) -> bytes | None:
    """Return the digest of the key that opened a session; None if there is no such session, or no more."""
    return await database.read(lambda connection: store.load_session(connection, digest_of(token)))


async def close_session(database: Database, token: str) -> None:
    """Close a session, if it is open."""
    await database.transaction(lambda connection: store.delete_session(connection, digest_of(token)))
