"""The laboratory of linear layers: case, problem, steps, training, figures."""
