"""What every application shares: layers, data, metrics, runs."""
