"""What a reader sees of attention: figures and tables."""
