"""Convoy's trainer: images in, a trained and honestly evaluated classifier out."""
