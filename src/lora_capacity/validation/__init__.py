"""Predictions against measured runs: reading runs, predicting them, and scoring the predictions."""

from lora_capacity.validation.agreement import Agreement
from lora_capacity.validation.outcomes import Outcome, offered_tokens_per_s, predict_outcomes
from lora_capacity.validation.predict import (
    RUN_LENGTHS,
    Predictions,
    comparable_runs,
    pack_runs,
    predict_runs,
    run_lengths,
)
from lora_capacity.validation.scores import score_runs

__all__ = [
    "RUN_LENGTHS",
    "Agreement",
    "Outcome",
    "Predictions",
    "comparable_runs",
    "offered_tokens_per_s",
    "pack_runs",
    "predict_outcomes",
    "predict_runs",
    "run_lengths",
    "score_runs",
]
