"""AdaMatch: its switches, its algorithm and the losses of a training step."""
