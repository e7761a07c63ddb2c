"""The controller of a run: ledger, credits, the steps of the ranks. Metadata only, never a tensor."""
