"""Linear layers that keep whole tiles of their weight."""
