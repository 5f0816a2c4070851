"""Comparisons of many runs: a grid of settings and seeds, trained one by one, and the statistics of the results."""
