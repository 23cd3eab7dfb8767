"""The experiments of the paper and the talk, each a function of a network and a loader."""

from .early_decoding import EarlyDecoding, decode_early
from .evaluate import Evaluation, evaluate
from .figures import save_figures
from .one_class import OneClass, OneClassClassifier, one_class, one_class_scores
from .paths import Paths, measure_paths
from .removal import BlockRemoval, Removal, RemovalCurve, remove_branches
from .running import Loader
from .tracing import BlockTrace, Trace, trace

__all__ = [
    "BlockRemoval",
    "BlockTrace",
    "EarlyDecoding",
    "Evaluation",
    "Loader",
    "OneClass",
    "OneClassClassifier",
    "Paths",
    "Removal",
    "RemovalCurve",
    "Trace",
    "decode_early",
    "evaluate",
    "measure_paths",
    "one_class",
    "one_class_scores",
    "remove_branches",
    "save_figures",
    "trace",
]
