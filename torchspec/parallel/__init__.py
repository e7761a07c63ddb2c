"""Meshes and parallel setup of the training ranks."""
