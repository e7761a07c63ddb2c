"""A run without engines, store and ranks: what it would have measured and written, in no time."""
