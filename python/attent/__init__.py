"""attent teaches attention learners: it scores each example inside the training step and trains on the best of them."""

from __future__ import annotations

from . import presets, schedules
from .indexed import indexed
from .modules import AttentiveClassifier, ScoringHead
from .one_pass import OnePass
from .ops.dispatch import backends
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.score_and_select import score_and_select
from .ops.scored_attention import Readout, ScoredAttention, scored_attention
from .ops.select_top_k import select_top_k
from .sampler import TeachingSampler
from .scores import example_scores, gradient_scores
from .selection import Selection
from .teacher import Teacher
from .teacher_summary import TeachingSummary

__version__ = "0.1.0"

__all__ = [
    "AttentiveClassifier",
    "OnePass",
    "Readout",
    "ScoredAttention",
    "ScoringHead",
    "Selection",
    "Teacher",
    "TeachingSampler",
    "TeachingSummary",
    "__version__",
    "backends",
    "example_scores",
    "gradient_scores",
    "indexed",
    "linear_cross_entropy",
    "presets",
    "schedules",
    "score_and_select",
    "scored_attention",
    "select_top_k",
]
