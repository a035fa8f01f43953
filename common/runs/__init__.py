"""A run's folder: what it holds, who has it open, its checkpoints and its logs."""
