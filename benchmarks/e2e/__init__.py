"""A real-size model end to end: time to first token, time per token, memory."""
