"""What measures the ops of benchmarks.ops, and what writes the measurements down."""
