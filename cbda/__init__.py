"""Unsupervised domain adaptation with cluster-based normalization."""
