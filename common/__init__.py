"""What every application shares: layers, data, metrics, runs."""

__version__ = "0.1.0"
