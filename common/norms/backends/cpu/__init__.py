"""Loops in C++ for a CPU, which a compiler makes when they are first needed."""
