"""The experiments of the paper and the talk, each a function of a network and a loader."""

from .budget import Budget, parse_duration
from .decoding import (
    BlockDecoding,
    Classification,
    EarlyDecoding,
    ExitCurve,
    ExitPoint,
    decode_early,
    exit_curve,
)
from .evaluate import Evaluation, evaluate
from .figures import save_figures
from .observe import Loader, Observations, observe
from .one_class import (
    Curve,
    Histogram,
    OneClass,
    OneClassClassifier,
    Outside,
    one_class,
    one_class_scores,
)
from .paths import Disobedient, Paths, measure_paths
from .removal import BlockRemoval, Removal, RemovalCurve, remove_branches
from .results import load_evaluation, load_pictures, save_evaluation, save_pictures
from .samples import BlockTrace, SampleBlock, Samples, Trace, trace, trace_samples
from .semantic import BlockSemantics, Semantics, compare_classes

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
