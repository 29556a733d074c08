"""A language model from text to sample: prepare, train, evaluate, sample.

`python -m blockshock.lm --config small` runs all four; docs/language_model.md says the rest.
"""
