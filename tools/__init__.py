"""What reads a benchmark JSON file: plot, compare, verdict, report, summary. Needs no torch."""
