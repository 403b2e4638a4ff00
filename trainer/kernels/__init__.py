"""Fused operations of training steps on GPUs, in Triton. Importing the package imports no Triton."""
