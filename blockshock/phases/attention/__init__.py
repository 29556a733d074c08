"""The laboratory of attention: case, problem, steps."""
