"""Find the right item among many."""
