"""How figures are laid out and written, whatever family they show."""
