"""From scores to the heads that stay, and cutting the others: masked, or for real."""

from pruning_comparison.pruning.selection import expected_heads_pruned, heads_to_prune, select_heads
from pruning_comparison.pruning.surgery import (
    HeadGates,
    converted_copy,
    mask_heads,
    masked_copy,
    remove_heads,
    sharing_copy,
)

__all__ = [
    "HeadGates",
    "converted_copy",
    "expected_heads_pruned",
    "heads_to_prune",
    "mask_heads",
    "masked_copy",
    "remove_heads",
    "select_heads",
    "sharing_copy",
]
