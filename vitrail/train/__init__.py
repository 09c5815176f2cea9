"""Training: the loop, what it steps with, and the checkpoints it stands on."""
