"""What is kept of a run's figures: trackers while it trains, curves when it has ended."""
