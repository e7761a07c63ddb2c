"""The controller of a run: ledger, credits, rank queues. Metadata only, never a tensor."""
