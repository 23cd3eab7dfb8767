"""Making and judging codebooks; `coded_resnext.codebook.Codebook` is the way in."""

from coded_resnext.codebooks.assignment import (
    Assignment,
    similarity_from_confusions,
    similarity_from_embeddings,
    similarity_from_paths,
)
from coded_resnext.codebooks.bounds import Bounds, distance_bound, johnson_bound, pair_bound
from coded_resnext.codebooks.quality import Quality
from coded_resnext.codebooks.search import Progress
from coded_resnext.codebooks.shipped import Size, shipped_sizes
from coded_resnext.codebooks.verification import Rule, verify

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
