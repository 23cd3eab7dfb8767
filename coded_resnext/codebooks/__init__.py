"""Making and judging codebooks; `coded_resnext.codebooks.codebook.Codebook` is the way in."""

from .assignment import (
    Assignment,
    similarity_from_confusions,
    similarity_from_embeddings,
    similarity_from_paths,
)
from .bounds import Bounds, distance_bound, johnson_bound, pair_bound
from .files import Size, shipped_sizes
from .quality import Quality, Rule, verify
from .search import Progress

__all__ = [
    "Assignment",
    "Bounds",
    "Progress",
    "Quality",
    "Rule",
    "Size",
    "distance_bound",
    "johnson_bound",
    "pair_bound",
    "shipped_sizes",
    "similarity_from_confusions",
    "similarity_from_embeddings",
    "similarity_from_paths",
    "verify",
]
