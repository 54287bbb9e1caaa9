"""Run by Alembic: migrate on the connection that `database.upgrade_database` opened, in its transaction."""

from alembic import context

from simmerge_ray.service.log.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
