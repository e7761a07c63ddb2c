"""What a run tells of itself, and every view of that: in a terminal, on a page, for Prometheus, trackers and curves."""
