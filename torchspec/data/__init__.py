"""Conversations to token ids, loss masks and draft vocabularies."""
