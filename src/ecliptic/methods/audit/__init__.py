"""Measure what a model does wrong, and to whom."""
