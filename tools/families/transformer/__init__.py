"""What a reader sees of tensor parallelism with fewer syncs."""
