"""What the paper published, and a page of runs beside it."""
