"""The target model, as far as training a draft needs it: its folder, and its frozen embedding and head."""
