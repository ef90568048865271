"""Measures how causal language models stand up to progressive pruning of attention heads."""

__version__ = "0.1.0"
