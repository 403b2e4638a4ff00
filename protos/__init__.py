"""The wire protocol: `.proto` sources and what `python -m protos.generate` makes of them.

Knows nothing of serving. The messages live in a descriptor pool of their own (`protos.pool`).
"""
