"""What is measured on a model. ``metrics.py`` names every figure, its unit and its direction."""
