"""The training loop and what it needs: optimizers, schedules, checkpoints, logs. Knows models by their public face."""
