"""The experiments of the paper and the talk, each a function of what a network does."""

from .decoding import (
    BlockDecoding,
    BlockTrace,
    Classification,
    EarlyDecoding,
    ExitCurve,
    ExitPoint,
    SampleBlock,
    Samples,
    Trace,
    trace,
)
from .evaluate import Plan, evaluate, plan
from .evaluation import Evaluation, Images, Provenance
from .figures import save_figures
from .observe import Loader, Observations, observe
from .one_class import (
    ClassScores,
    Curve,
    Histogram,
    OneClass,
    OneClassClassifier,
    Outside,
    one_class,
    score_classes,
)
from .paths import BlockSemantics, Disobedient, Paths, Semantics
from .removal import BlockRemoval, Removal, RemovalCurve, remove_branches
from .results import load_evaluation, load_pictures, save_evaluation, save_pictures

__all__ = [
    "BlockDecoding",
    "BlockRemoval",
    "BlockSemantics",
    "BlockTrace",
    "ClassScores",
    "Classification",
    "Curve",
    "Disobedient",
    "EarlyDecoding",
    "Evaluation",
    "ExitCurve",
    "ExitPoint",
    "Histogram",
    "Images",
    "Loader",
    "Observations",
    "OneClass",
    "OneClassClassifier",
    "Outside",
    "Paths",
    "Plan",
    "Provenance",
    "Removal",
    "RemovalCurve",
    "SampleBlock",
    "Samples",
    "Semantics",
    "Trace",
    "evaluate",
    "load_evaluation",
    "load_pictures",
    "observe",
    "one_class",
    "plan",
    "remove_branches",
    "save_evaluation",
    "save_figures",
    "save_pictures",
    "score_classes",
    "trace",
]
