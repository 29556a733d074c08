"""A file a family, `bench_<family>.py`: a function a phase; `sweeps/` says for which cases."""
