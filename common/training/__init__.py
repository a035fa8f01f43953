"""The one training loop: applications hand over networks, data and a step, it does what every run does."""
