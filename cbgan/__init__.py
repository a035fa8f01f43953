"""Generative adversarial networks with cluster-based normalization."""
