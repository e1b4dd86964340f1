"""Replaying steps under a strategy, ours or one of the literature: docs/predict.md."""

from .features import features
from .policy import Policy, StepTimes
from .predict import POLICIES, predict
from .setting import Setting, make_setting
from .workload import Workload, default_workload, parse_workload

__all__ = [
    "POLICIES",
    "Policy",
    "Setting",
    "StepTimes",
    "Workload",
    "default_workload",
    "features",
    "make_setting",
    "parse_workload",
    "predict",
]
