"""Judging default rules on models they have never seen: real modules of ordinary size, each trained from scratch."""

from meta_train.judging.suite import SUITES, Suite
from meta_train.judging.task import Case, JudgingTask, Outcome, train_case

__all__ = ["SUITES", "Case", "JudgingTask", "Outcome", "Suite", "train_case"]
