"""Local training: models, which of them are admitted, person-level DP-SGD."""
