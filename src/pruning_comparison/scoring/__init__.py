"""How heads are ranked: scores [L, H] of a model's heads, higher = keep."""

from pruning_comparison.scoring.scores import HeadScores, ScoreSettings, score_heads

__all__ = [
    "HeadScores",
    "ScoreSettings",
    "score_heads",
]
