"""Folders of images: listed, decoded once, and checked for duplicates."""
