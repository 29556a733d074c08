"""What a reader sees of block-sparse layers."""
