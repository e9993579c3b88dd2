"""A grid of runs over keys of a run file, kept point by point, and set side by side."""
