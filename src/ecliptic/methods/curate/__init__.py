"""Which pairs to train on, and with which words."""
