"""One file a question: `bench_<phase>.py`; `sweeps/*.yaml` say which cases it is asked for."""
