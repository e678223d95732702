"""Built-in models: one module each, with `load()` and the recipe that trained it."""
