"""`--profile`: a torch.profiler trace of a case, and a table of its kernels."""

import hashlib
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from blockshock.distributed import collectives
from blockshock.phases.case import Case

STEPS = 3
NAME_BYTES = 200  # file systems take 255, and an ending follows


def profile(step, case: Case, folder: str) -> str:
    """Runs a few eager steps under the profiler; rank 0 writes its files and returns their stem.

    <folder>/<phase>-<name>.trace.json opens in Perfetto or chrome://tracing; `.kernels.txt` has a
    line a kernel (NCCL's operations among them), by device time, or by host time on the CPU. Long
    names are shortened (`file_name`).
    """
    stem = Path(folder) / file_name(f"{case.phase}-{case.name}")
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


def file_name(name: str) -> str:
    """`name` for a file: without slashes and not too long; a digest tells changed ones apart."""
    plain = name.replace("/", "_")
    if plain == name and len(plain.encode()) <= NAME_BYTES:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return plain.encode()[: NAME_BYTES - 13].decode(errors="ignore") + "-" + digest
