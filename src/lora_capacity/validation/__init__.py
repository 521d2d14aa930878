"""Predictions against measured runs: reading runs, predicting them, and scoring the predictions."""

from lora_capacity.validation.agreement import Agreement
from lora_capacity.validation.outcomes import Outcome, offered_tokens_per_s, predict_outcomes
from lora_capacity.validation.predict import (
    RUN_LENGTHS,
    Predictions,
    pack_runs,
    predict_runs,
    run_lengths,
)
from lora_capacity.validation.scores import score_runs
from lora_capacity.validation.speeds import SpeedPrediction, predict_speeds, score_speeds
from lora_capacity.validation.startups import StartupPrediction, kv_error, predict_startup, score_startups

__all__ = [
    "RUN_LENGTHS",
    "Agreement",
    "Outcome",
    "Predictions",
    "SpeedPrediction",
    "StartupPrediction",
    "kv_error",
    "offered_tokens_per_s",
    "pack_runs",
    "predict_outcomes",
    "predict_runs",
    "predict_speeds",
    "predict_startup",
    "run_lengths",
    "score_runs",
    "score_speeds",
    "score_startups",
]
