"""Networks that applications share: those of timm, and what they are shown of pixels."""
