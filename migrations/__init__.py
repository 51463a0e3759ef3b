"""Alembic migrations. Each takes its locks within a time limit, so that a waiting one never blocks the service."""
