"""The experiments of the paper and the talk, each a function of a network and a loader."""

from .budget import Budget, parse_duration
from .early_decoding import BlockDecoding, Classification, EarlyDecoding, decode_early
from .evaluate import evaluate
from .evaluation import Evaluation
from .exit_curve import ExitCurve, ExitPoint, exit_curve
from .figures import save_figures
from .measures import Curve, Histogram
from .observing import Observations, observe
from .one_class import OneClass, OneClassClassifier, Outside, one_class, one_class_scores
from .paths import Disobedient, Paths, measure_paths
from .pictures import load_pictures, save_pictures
from .removal import BlockRemoval, Removal, RemovalCurve, remove_branches
from .results import load_evaluation, save_evaluation
from .running import Loader
from .samples import SampleBlock, Samples, trace_samples
from .semantic import BlockSemantics, Semantics, compare_classes
from .tracing import BlockTrace, Trace, trace

__all__ = [
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
    "ExitCurve",
    "ExitPoint",
    "Histogram",
    "Loader",
    "Observations",
    "OneClass",
    "OneClassClassifier",
    "Outside",
    "Paths",
    "Removal",
    "RemovalCurve",
    "SampleBlock",
    "Samples",
    "Semantics",
    "Trace",
    "compare_classes",
    "decode_early",
    "evaluate",
    "exit_curve",
    "load_evaluation",
    "load_pictures",
    "measure_paths",
    "observe",
    "one_class",
    "one_class_scores",
    "parse_duration",
    "remove_branches",
    "save_evaluation",
    "save_figures",
    "save_pictures",
    "trace",
    "trace_samples",
]
