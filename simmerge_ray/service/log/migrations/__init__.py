"""Alembic's migrations of the event log; `database.upgrade_database` runs them."""
