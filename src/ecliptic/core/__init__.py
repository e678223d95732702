"""The nouns and contracts every method builds on. Nothing in here knows a particular method."""
