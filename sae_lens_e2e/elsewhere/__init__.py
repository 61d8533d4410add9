"""Programs whose pins exclude ours, each in a Python environment of its own: a model and tokens are handed over as files."""
