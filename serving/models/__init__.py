"""The model repository: which versions of which models are served, and how they are loaded."""
