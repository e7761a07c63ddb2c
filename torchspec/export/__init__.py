"""Folders that real servers load."""
