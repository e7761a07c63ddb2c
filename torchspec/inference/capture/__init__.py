"""Runs inside SGLang's scheduler: takes hidden states out of it, into the store."""
