"""What a reader sees of data parallelism."""
