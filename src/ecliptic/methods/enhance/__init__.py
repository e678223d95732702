"""Give a trained encoder what it lacks: longer texts, finer sight, other languages."""
