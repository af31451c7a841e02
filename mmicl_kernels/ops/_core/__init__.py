"""What ops share. An op imports this and the public modules of other ops, never one with an underscore."""
