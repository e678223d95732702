"""What papers on adaptation compare with, each a small `Predictor` of its own: `<slug>.py` holds one class, named alike.

They are found by file, like methods: `ecliptic.core.method.get("linear_probe")`, `ecliptic adapt --method linear_probe`.
"""
