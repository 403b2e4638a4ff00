"""Shared by `trainer` and `serving`: image preparation, CPU quotas, process exits, credentials, the command line.

Imports neither of them, and neither torch nor gRPC; the verbs of `convoy.cli` import their package when they run.
"""
