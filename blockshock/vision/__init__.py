"""A vision transformer that learns which tiles of its weights to keep: train, evaluate, benchmark.

`python -m blockshock.block_sparse --config digits` runs all three; docs/vision.md says the rest.
"""
