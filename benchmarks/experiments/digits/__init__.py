"""A tiny real LVLM that learns in context from real handwritten digits."""
