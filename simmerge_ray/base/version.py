"""The version of the package, for all floors."""

__version__ = "0.2.0"
