"""The paper's classifiers, each from an image and its cluster to logits."""
