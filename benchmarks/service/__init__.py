"""Load, kills and slow clients: the service under what it must stand."""
