"""The event log, its heads and its snapshots."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "log_head",
        sa.Column("namespace", sa.String(200), primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("namespace", sa.String(200), primary_key=True),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("subject", sa.String(200)),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("idempotency_key", sa.String(200)),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("namespace", "subject", "kind", "attempt", name="uq_events_subject"),
        sa.UniqueConstraint("namespace", "idempotency_key", name="uq_events_idempotency_key"),
    )
    changes = sa.text("kind IN ('reward_voided', 'encoder_epoch')")
    op.create_index("ix_events_changes", "events", ["namespace", "seq"], sqlite_where=changes, postgresql_where=changes)
    op.create_table(
        "snapshots",
        sa.Column("namespace", sa.String(200), primary_key=True),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("epoch_seq", sa.BigInteger, nullable=False),
        sa.Column("checksum", sa.String(64), nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
