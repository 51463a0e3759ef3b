"""The rules that keep every statement fit for a distributed database, checked on the SQL that is really sent.

Plain PostgreSQL does not complain when one is broken, so tests/conftest.py listens on every engine and lets each
distinct statement be parsed, by PostgreSQL's own parser, and judged here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from pglast import ast, parse_sql
from pglast.enums import A_Expr_Kind, BoolExprType
from pglast.visitors import Visitor
from sqlalchemy.dialects.postgresql import psycopg

from talktime.store.operators import OVER_ALL_BUCKETS
from talktime.store.tables import metadata

Node: TypeAlias = Any
"""A node of the parser's tree: every statement has attributes of its own, so types say little here."""

USER_TABLES = {name for name, table in metadata.tables.items() if "bucket" in table.c}
GLOBAL_TABLES = set(metadata.tables) - USER_TABLES

VOLATILE = {
    "clock_timestamp",
    "gen_random_uuid",
    "now",
    "random",
    "statement_timestamp",
    "timeofday",
    "transaction_timestamp",
    "uuidv4",
    "uuidv7",
}

# Read-only look-ups that may go over all buckets: they group by the bucket and nothing else of a user.
_OVER_ALL_BUCKETS = re.compile(
    r"SELECT account\.bucket, count\(.*GROUP BY account\.bucket( ORDER BY account\.bucket)?", re.DOTALL
)

# What operators look at, over all buckets as well: these statements to the letter, and no others like them.
_DIALECT = psycopg.dialect()  # type: ignore[no-untyped-call] # SQLAlchemy's dialects come without types
OPERATORS_STATEMENTS = [str(query.compile(dialect=_DIALECT)) for query in OVER_ALL_BUCKETS]


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
        over_all_buckets = statement in OPERATORS_STATEMENTS or _OVER_ALL_BUCKETS.fullmatch(text.strip()) is not None
        broken = list(_broken(_statement(raw), over_all_buckets=over_all_buckets))
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
    if isinstance(stmt, ast.MergeStmt):
        yield "MERGE"
    writes = isinstance(stmt, ast.InsertStmt | ast.UpdateStmt | ast.DeleteStmt)
    if writes:
        yield from _broken_write(stmt)
    for with_clause in _nodes(stmt, ast.WithClause):
        if _nodes(with_clause, (ast.InsertStmt, ast.UpdateStmt, ast.DeleteStmt)):
            yield "a modifying CTE"
    if not (isinstance(stmt, ast.SelectStmt) and over_all_buckets):
        for query in [stmt, *_nodes(stmt, ast.SelectStmt)]:
            yield from _without_bucket(query)
    for select in _nodes(stmt, ast.SelectStmt):
        if select.lockingClause and len(_nodes(select, ast.RangeVar)) != 1:
            yield "a locking statement names more than one table"


def _broken_write(stmt: Node) -> Iterator[str]:
    for call in _nodes(stmt, ast.FuncCall):
        if call.funcname[-1].sval in VOLATILE:
            yield f"{call.funcname[-1].sval}() in a write"
    if _nodes(stmt, ast.SQLValueFunction):
        yield "the clock in a write"
    for expression in _nodes(stmt, ast.A_Expr):
        if expression.name[-1].sval in "+-" and isinstance(expression.lexpr, ast.ColumnRef):
            yield "arithmetic on a column in a write"
    if isinstance(stmt, ast.InsertStmt):
        if stmt.relation.relname in USER_TABLES and "bucket" not in {column.name for column in stmt.cols or ()}:
            yield "an INSERT without the bucket"
        if stmt.selectStmt is None or not stmt.selectStmt.valuesLists:
            yield "an INSERT that is not by VALUES"
    if isinstance(stmt, ast.UpdateStmt) and any(target.name == "bucket" for target in stmt.targetList):
        yield "an UPDATE of the bucket"


def _without_bucket(query: Node) -> Iterator[str]:
    """Name the user tables of one query level for which it does not say ``bucket = $n``."""
    if isinstance(query, ast.SelectStmt):
        places = [*(query.fromClause or ())]
    elif isinstance(query, ast.UpdateStmt):
        places = [query.relation, *(query.fromClause or ())]
    elif isinstance(query, ast.DeleteStmt):
        places = [query.relation, *(query.usingClause or ())]
    else:
        return
    tables, conditions = [], [query.whereClause]
    while places:
        place = places.pop()
        if isinstance(place, ast.JoinExpr):
            places += [place.larg, place.rarg]
            conditions.append(place.quals)
        elif isinstance(place, ast.RangeVar) and place.relname in USER_TABLES:
            tables.append(place)
    said = {name for condition in conditions for name in _pinned(condition)}
    for table in tables:
        name = table.alias.aliasname if table.alias else table.relname
        if name not in said and not (len(tables) == 1 and "" in said):
            yield f"no bucket = $n for {name}"


def _pinned(condition: Node) -> Iterator[str]:
    """Name the tables whose bucket a condition pins to a value; only what AND joins counts."""
    if isinstance(condition, ast.BoolExpr) and condition.boolop == BoolExprType.AND_EXPR:
        for part in condition.args:
            yield from _pinned(part)
    elif (
        isinstance(condition, ast.A_Expr)
        and condition.kind == A_Expr_Kind.AEXPR_OP
        and condition.name[-1].sval == "="
        and isinstance(condition.lexpr, ast.ColumnRef)
        and condition.lexpr.fields[-1].sval == "bucket"
        and _is_value(condition.rexpr)
    ):
        fields = condition.lexpr.fields
        yield fields[-2].sval if len(fields) > 1 else ""


def _is_value(node: Node) -> bool:
    return isinstance(node, ast.ParamRef | ast.A_Const) or (isinstance(node, ast.TypeCast) and _is_value(node.arg))
