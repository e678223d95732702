"""Find objects and defects."""
