"""The report of a run: its saved results as one self-contained HTML page."""

from .page import gather, render

__all__ = ["gather", "render"]
