"""What drafts of any kind are made of: attention, rotary embedding, layers, losses."""
