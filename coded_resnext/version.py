"""The version of the package, for every part of it and for `setup.py`."""

__version__ = "0.1.0"
