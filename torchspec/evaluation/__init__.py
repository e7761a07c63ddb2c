"""What a draft is worth in a real speculative server."""
