"""Figures of summed losses: one formula each, for numbers and for columns of tables alike. Without torch.

Losses are negative log-likelihoods in nats, summed over whatever the figure is of: a window, a document, a whole text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pandas as pd

Amount = TypeVar("Amount", float, "pd.Series[Any]")


def mean_loss(nats: Amount, count: Amount) -> Amount:
    """Mean negative log-likelihood per token or per word, in nats: the logarithm of perplexity, or of word perplexity.

    The word perplexity is that of lm-evaluation-harness, over the words that begin in scored text.
    """
    return nats / count


def bits_per_byte(nats: Amount, text_bytes: Amount) -> Amount:
    """Loss in bits over the UTF-8 bytes it accounts for; comparable across tokenizers; lower is better."""
    return nats / math.log(2) / text_bytes
