"""Starts and speeds of servers as people report them: predicted without a calibration of theirs, and scored."""

from lora_capacity.facts.speeds import SpeedPrediction, predict_speeds, score_speeds
from lora_capacity.facts.startups import StartupPrediction, kv_error, predict_startup, score_startups

__all__ = [
    "SpeedPrediction",
    "StartupPrediction",
    "kv_error",
    "predict_speeds",
    "predict_startup",
    "score_speeds",
    "score_startups",
]
