"""What a reader sees of each family of methods."""
