"""DFlash (arXiv 2602.06036): a whole block of tokens is drafted in one pass."""
