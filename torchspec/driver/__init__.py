"""The driver of a run: checks, plans, starts the cluster and the actors, watches them, and cleans up after them."""
