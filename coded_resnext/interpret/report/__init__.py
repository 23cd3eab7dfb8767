"""The report of a run: its saved results as one self-contained HTML page, JSON or CSV."""

from .content import gather
from .page import render
from .tables import write_tables

__all__ = ["gather", "render", "write_tables"]
