"""Service keys and console sessions: global tables, written alone; an instant is read before, never in a write.

Only digests (SHA-256) are stored. The keys are random and long, so nothing slower is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from talktime.store import tables
from talktime.store.statements import CLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

_key, _session = tables.service_key, tables.console_session


async def read_clock(connection: AsyncConnection) -> int:
    """Return the database's instant."""
    now: int = (await connection.execute(CLOCK)).scalar_one()
    return now


# --- service keys -----------------------------------------------------------------------------------------------------


async def insert_key(connection: AsyncConnection, name: str, digest: bytes, now: int) -> bool:
    """Store a key; False if there is one of this name already."""
    statement = insert(_key).values(name=name, digest=digest, created_at=now, revoked_at=None)
    made = await connection.execute(statement.on_conflict_do_nothing().returning(_key.c.name))
    return made.scalar_one_or_none() is not None


async def revoke_key(connection: AsyncConnection, name: str, now: int) -> bool:
    """Revoke a key that is in force; False if there is none of this name."""
    statement = update(_key).where(_key.c.name == name, _key.c.revoked_at.is_(None)).values(revoked_at=now)
    return (await connection.execute(statement)).rowcount == 1


async def has_key(connection: AsyncConnection, name: str) -> bool:
    """Tell whether there is a key of this name, in force or not."""
    found = await connection.execute(select(_key.c.name).where(_key.c.name == name))
    return found.scalar_one_or_none() is not None


async def load_keys(connection: AsyncConnection) -> Sequence[Row[Any, Any, Any]]:
    """Return the name, the creation and the revocation of each key, the oldest first."""
    statement = select(_key.c.name, _key.c.created_at, _key.c.revoked_at).order_by(_key.c.created_at, _key.c.name)
    return (await connection.execute(statement)).all()


async def load_active_keys(connection: AsyncConnection) -> dict[bytes, str]:
    """Return the names of the keys in force by their digests."""
    found = await connection.execute(select(_key.c.digest, _key.c.name).where(_key.c.revoked_at.is_(None)))
    return {row.digest: row.name for row in found}


# --- console sessions -------------------------------------------------------------------------------------------------


async def delete_expired_sessions(connection: AsyncConnection, now: int) -> None:
    """Delete the sessions that have expired."""
    await connection.execute(delete(_session).where(_session.c.expires_at <= now))


async def insert_session(connection: AsyncConnection, digest: bytes, key_digest: bytes, expires_at: int) -> None:
    """Store a session."""
    await connection.execute(
        insert(_session).values(digest=digest, key_digest=key_digest, expires_at=expires_at).on_conflict_do_nothing()
    )


async def load_session(connection: AsyncConnection, digest: bytes) -> bytes | None:
    """Return the digest of the key that opened a session, if the session has not expired."""
    statement = select(_session.c.key_digest).where(
        _session.c.digest == digest, _session.c.expires_at > func.clock_timestamp()
    )
    key_digest: bytes | None = (await connection.execute(statement)).scalar_one_or_none()
    return key_digest


async def delete_session(connection: AsyncConnection, digest: bytes) -> None:
    """Delete a session."""
    await connection.execute(delete(_session).where(_session.c.digest == digest))
