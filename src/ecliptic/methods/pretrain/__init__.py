"""Train two towers from scratch on pairs."""
