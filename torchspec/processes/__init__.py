"""Processes of ours and what they leave: children, the janitor of a run, files in shared memory."""
