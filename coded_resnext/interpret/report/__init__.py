"""The report of a run: its saved results as one self-contained HTML page."""

from .content import gather
from .page import render

__all__ = ["gather", "render"]
