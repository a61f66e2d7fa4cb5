"""raycascade: train, tune, batch-score and serve recommendation cascades as one system on Ray."""

__version__ = "0.1.0"
