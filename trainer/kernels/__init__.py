"""Fused operations of training steps on GPUs, in Triton. Importing the package imports no Triton.

Start reading at `operations`, which the networks call; `choice` decides between kernels and torch's operations.
"""
