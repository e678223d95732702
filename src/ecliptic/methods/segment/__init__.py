"""Name every pixel by text."""
