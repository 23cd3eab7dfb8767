"""The experiments of the paper and the talk, each a function of a network and a loader."""

from .budget import Budget, parse_duration
from .early_decoding import BlockDecoding, Classification, EarlyDecoding, decode_early
from .evaluate import Evaluation, evaluate
from .figures import save_figures
from .measures import Curve, Histogram
from .observing import Observations, observe
from .one_class import OneClass, OneClassClassifier, Outside, one_class, one_class_scores
from .paths import Disobedient, Paths, measure_paths
from .removal import BlockRemoval, Removal, RemovalCurve, remove_branches
from .results import EVALUATION_FILE, load_evaluation, save_evaluation
from .running import Loader
from .semantic import BlockSemantics, Semantics, compare_classes
from .tracing import BlockTrace, Trace, trace

__all__ = [
    "EVALUATION_FILE",
    "BlockDecoding",
    "BlockRemoval",
    "BlockSemantics",
    "BlockTrace",
    "Budget",
    "Classification",
    "Curve",
    "Disobedient",
    "EarlyDecoding",
    "Evaluation",
    "Histogram",
    "Loader",
    "Observations",
    "OneClass",
    "OneClassClassifier",
    "Outside",
    "Paths",
    "Removal",
    "RemovalCurve",
    "Semantics",
    "Trace",
    "compare_classes",
    "decode_early",
    "evaluate",
    "load_evaluation",
    "measure_paths",
    "observe",
    "one_class",
    "one_class_scores",
    "parse_duration",
    "remove_branches",
    "save_evaluation",
    "save_figures",
    "trace",
]
