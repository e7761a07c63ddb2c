"""Capture in SGLang servers that users start themselves."""
