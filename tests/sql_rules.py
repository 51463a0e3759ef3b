"""The rules that keep every statement fit for a distributed database, checked on the SQL that is really sent.

Plain PostgreSQL does not complain when one is broken, so tests/conftest.py listens on every engine and lets each
distinct statement be parsed, by PostgreSQL's own parser, and judged here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from pglast import ast, parse_sql
from pglast.enums import A_Expr_Kind, BoolExprType, JoinType
from pglast.visitors import Visitor
from sqlalchemy.dialects.postgresql import psycopg

from talktime.store.citus import LOCAL
from talktime.store.operators import OVER_ALL_BUCKETS
from talktime.store.tables import metadata

Node: TypeAlias = Any
"""A node of the parser's tree: every statement has attributes of its own, so types say little here."""

USER_TABLES = {name for name, table in metadata.tables.items() if "bucket" in table.c}
GLOBAL_TABLES = set(metadata.tables) - USER_TABLES

# The functions that a write may call: Citus would call any other once on the coordinator, or once on each node.
IMMUTABLE = {"unnest"}

# All that waits for an advisory lock: a migration, or the distribution of the tables, for another one.
MIGRATIONS_LOCKS = ("SELECT pg_try_advisory_lock(8317214)", "SELECT pg_advisory_xact_lock(8317214)")

WRITES = (ast.InsertStmt, ast.UpdateStmt, ast.DeleteStmt, ast.MergeStmt)

# Read-only look-ups that may go over all buckets: they group by the bucket and nothing else of a user.
_OVER_ALL_BUCKETS = re.compile(
    r"SELECT (account|event)\.bucket, count\(.*GROUP BY \1\.bucket( ORDER BY \1\.bucket)?", re.DOTALL
)

# What operators look at, over all buckets as well: these statements to the letter, and no others like them.
DIALECT = psycopg.dialect()  # type: ignore[no-untyped-call] # SQLAlchemy's dialects come without types
OPERATORS_STATEMENTS = [str(query.compile(dialect=DIALECT)) for query in OVER_ALL_BUCKETS]


class RuleBroken(AssertionError):
    """A statement breaks a rule."""

    def __init__(self, rules: list[str], statement: str) -> None:
        super().__init__(f"{'; '.join(rules)}\n{statement}")


def check(statement: str) -> None:
    """Judge one statement as the driver gets it.

    Raises:
        RuleBroken: and says which rule.
    """
    text = re.sub(r"%\(\w+\)s", "$1", statement).replace("%%", "%")
    for raw in parse_sql(text):
        stmt = _statement(raw)
        over_all_buckets = statement in OPERATORS_STATEMENTS or (
            _OVER_ALL_BUCKETS.fullmatch(text.strip()) is not None and len(_nodes(stmt, ast.RangeVar)) == 1
        )
        broken = list(_broken(stmt, over_all_buckets=over_all_buckets))
        if statement not in MIGRATIONS_LOCKS:
            broken += [f"{name}()" for name in _called(stmt) if "advisory" in name or name == "pg_notify"]
        if broken:
            raise RuleBroken(broken, statement)


def tables_written(statement: str) -> set[str]:
    """Return the tables that a statement writes."""
    text = re.sub(r"%\(\w+\)s", "$1", statement).replace("%%", "%")
    statements: list[Any] = [raw.stmt for raw in parse_sql(text)]
    return {
        stmt.relation.relname
        for stmt in statements
        if isinstance(stmt, ast.InsertStmt | ast.UpdateStmt | ast.DeleteStmt)
    }


def _statement(raw: Node) -> Node:
    return raw.stmt


def _nodes(root: object, kind: type | tuple[type, ...]) -> list[Any]:
    found: list[Any] = []

    class Collect(Visitor):  # type: ignore[misc] # untyped, see pyproject.toml
        def visit(self, _ancestors: object, node: object) -> None:
            if isinstance(node, kind):
                found.append(node)

    Collect()(root)
    return found


def _broken(stmt: Node, *, over_all_buckets: bool) -> Iterator[str]:
    yield from _broken_kind(stmt)
    if isinstance(stmt, ast.InsertStmt | ast.UpdateStmt | ast.DeleteStmt):
        yield from _broken_write(stmt)
    for with_clause in _nodes(stmt, ast.WithClause):
        if _nodes(with_clause, WRITES):
            yield "a modifying CTE"
    # A view is for reports, which may go over all buckets.
    if not isinstance(stmt, ast.ViewStmt) and not (isinstance(stmt, ast.SelectStmt) and over_all_buckets):
        batches = _batches(stmt)
        for query in [stmt, *_nodes(stmt, ast.SelectStmt)]:
            yield from _without_bucket(query, batches)
    for select in _nodes(stmt, ast.SelectStmt):
        locked = select.lockingClause or ()
        if locked and len(_nodes(select, ast.RangeVar)) - sum(len(_nodes(c, ast.RangeVar)) for c in locked) != 1:
            yield "a locking statement names more than one table"


def _broken_kind(stmt: Node) -> Iterator[str]:
    if isinstance(stmt, ast.MergeStmt):
        yield "MERGE"
    if isinstance(stmt, ast.ListenStmt | ast.NotifyStmt):
        yield "LISTEN or NOTIFY"
    named = {table.relname for table in _nodes(stmt, ast.RangeVar)}
    if isinstance(stmt, ast.TruncateStmt | ast.LockStmt | ast.CopyStmt) and named & USER_TABLES:
        yield "no bucket can be said in TRUNCATE, LOCK and COPY"
    if named & USER_TABLES and named & {*LOCAL}:
        yield "a user table beside one that stays on the coordinator"


def _broken_write(stmt: Node) -> Iterator[str]:
    for name in _called(stmt):
        if name not in IMMUTABLE:
            yield f"{name}() in a write"
    if _nodes(stmt, ast.SQLValueFunction):
        yield "the clock in a write"
    if any(_is_arithmetic_on_a_column(expression) for expression in _nodes(stmt, ast.A_Expr)):
        yield "arithmetic on a column in a write"
    for clause in [stmt, *_nodes(stmt, ast.OnConflictClause)]:
        if isinstance(clause, ast.UpdateStmt | ast.OnConflictClause):
            yield from ("an UPDATE of the bucket" for target in clause.targetList or () if target.name == "bucket")
    if isinstance(stmt, ast.InsertStmt):
        if stmt.relation.relname in USER_TABLES and "bucket" not in {column.name for column in stmt.cols or ()}:
            yield "an INSERT without the bucket"
        if stmt.selectStmt is None or not stmt.selectStmt.valuesLists:
            yield "an INSERT that is not by VALUES"


def _is_arithmetic_on_a_column(expression: Node) -> bool:
    # A value less a column is immutable, where a column and an interval may not be.
    sides = {"+": (expression.lexpr, expression.rexpr), "-": (expression.lexpr,)}.get(expression.name[-1].sval, ())
    return any(side is not None and _nodes(side, ast.ColumnRef) for side in sides)


def _called(stmt: Node) -> list[str]:
    return [call.funcname[-1].sval for call in _nodes(stmt, ast.FuncCall)]


def _without_bucket(query: Node, batches: set[str]) -> Iterator[str]:
    """Name the user tables of one query level for which it does not say ``bucket = $n``, nor takes it from a batch."""
    if isinstance(query, ast.SelectStmt):
        places = [*(query.fromClause or ())]
    elif isinstance(query, ast.UpdateStmt):
        places = [query.relation, *(query.fromClause or ())]
    elif isinstance(query, ast.DeleteStmt):
        places = [query.relation, *(query.usingClause or ())]
    else:
        return
    tables, pinned = [], {*_pinned(query.whereClause, batches)}
    while places:
        place = places.pop()
        if isinstance(place, ast.JoinExpr):
            places += [place.larg, place.rarg]
            pinned |= {*_pinned(place.quals, batches)} - _kept(place)
        elif isinstance(place, ast.RangeVar) and place.relname in USER_TABLES:
            tables.append(place)
    for table in tables:
        if _name(table) not in pinned and not (len(tables) == 1 and "" in pinned):
            yield f"no bucket = $n for {_name(table)}"


def _kept(join: Node) -> set[str]:
    """Name what a join keeps whatever its condition says, and so does not pin."""
    if join.jointype == JoinType.JOIN_INNER:
        return set()
    sides = {JoinType.JOIN_LEFT: [join.larg], JoinType.JOIN_RIGHT: [join.rarg]}.get(
        join.jointype, [join.larg, join.rarg]
    )
    return {"", *(_name(table) for side in sides for table in _nodes(side, ast.RangeVar))}


def _name(table: Node) -> str:
    name: str = table.alias.aliasname if table.alias else table.relname
    return name


def _batches(stmt: Node) -> set[str]:
    """Name the unnests of a statement that carry buckets, if it is one that may: it reads, or renews leases."""
    if isinstance(stmt, ast.UpdateStmt):
        may = {target.name for target in stmt.targetList} == {"last_heartbeat_at"}
    else:
        may = isinstance(stmt, ast.SelectStmt)
    unnests = [place for place in _nodes(stmt, ast.RangeFunction) if may and "unnest" in _called(place)]
    return {
        place.alias.aliasname
        for place in unnests
        if place.alias and "bucket" in {column.sval for column in place.alias.colnames or ()}
    }


def _pinned(condition: Node, batches: set[str]) -> Iterator[str]:
    """Name the tables whose bucket a condition pins to a value, or to a batch's; only what AND joins counts."""
    if isinstance(condition, ast.BoolExpr) and condition.boolop == BoolExprType.AND_EXPR:
        for part in condition.args:
            yield from _pinned(part, batches)
    elif (
        isinstance(condition, ast.A_Expr)
        and condition.kind == A_Expr_Kind.AEXPR_OP
        and condition.name[-1].sval == "="
        and _is_bucket(condition.lexpr)
        and (_is_value(condition.rexpr) or (_is_bucket(condition.rexpr) and _table_of(condition.rexpr) in batches))
    ):
        yield _table_of(condition.lexpr)


def _is_bucket(node: Node) -> bool:
    return isinstance(node, ast.ColumnRef) and getattr(node.fields[-1], "sval", "*") == "bucket"


def _table_of(column: Node) -> str:
    table: str = column.fields[-2].sval if len(column.fields) > 1 else ""
    return table


def _is_value(node: Node) -> bool:
    return isinstance(node, ast.ParamRef | ast.A_Const) or (isinstance(node, ast.TypeCast) and _is_value(node.arg))
