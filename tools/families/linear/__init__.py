"""What a reader sees of linear layers: figures, tables, hypotheses."""
