"""Shared by all front ends: addresses, authentication, limits and status details."""
