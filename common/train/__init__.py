"""How a run trains: its task, the loop, its state and guard, its folder, checkpoints and log."""
