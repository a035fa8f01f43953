"""Image classification with cluster-based normalization."""
