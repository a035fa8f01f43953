"""Checks and measurements of the layers: doctor, benchmark, ahead-of-time compilation."""
