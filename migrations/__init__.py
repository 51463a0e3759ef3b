"""Alembic migrations. Each takes its locks within a time limit, so that a waiting migration never blocks the service."""
