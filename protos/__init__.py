"""The wire protocol: `.proto` sources, and the modules that `python -m protos.generate` makes from them.

Imports nothing from the other packages. The messages live in a descriptor pool of their own (`protos.pool`).
"""
