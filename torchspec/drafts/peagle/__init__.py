"""P-EAGLE: all tokens guessed in one pass."""
