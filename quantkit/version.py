"""The version of quantkit."""

__version__ = "0.1.0"
