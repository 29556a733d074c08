"""`--profile`: a torch.profiler trace of a case, and a table of its kernels."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from blockshock.distributed import collectives
from blockshock.phases.case import Case

STEPS = 3


def profile(step, case: Case, folder: str) -> str:
    """Runs a few eager steps under the profiler; rank 0 writes its files and returns their stem.

    <folder>/<phase>-<name>.trace.json opens in Perfetto or chrome://tracing; `.kernels.txt` has a
    line a kernel (NCCL's operations among them), by device time, or by host time on the CPU.
    """
    stem = Path(folder) / f"{case.phase}-{case.name}"
    activities = [ProfilerActivity.CPU]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    if collectives.group_rank() == 0:
        stem.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(f"{stem}.trace.json")
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=40)
        Path(f"{stem}.kernels.txt").write_text(table)
    return str(stem)
