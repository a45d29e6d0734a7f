"""What a training run is made of: the step, its loop, checkpoints and log."""
