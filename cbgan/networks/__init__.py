"""The two networks, their losses, and what the discriminator sees of images."""
