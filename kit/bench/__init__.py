"""Measurements: side by side in one run, ratios against a named baseline, medians of repeats."""
