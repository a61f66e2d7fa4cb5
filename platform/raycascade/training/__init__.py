"""The training step and its state in plain PyTorch: no Ray in here."""
