"""The training side of a run: ranks that pull samples, train the draft, and keep checkpoints of it."""
