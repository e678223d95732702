"""Say or compute the same with less."""
