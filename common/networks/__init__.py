"""Networks that applications share: those of timm, and the range of pixels they take."""
