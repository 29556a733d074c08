"""The figures of a data-parallel step: memory of a rank, floor, tokens a second, MFU.

    MFU = FLOPs per token · tokens a second / ranks / matrix rate

FLOPs per token are those of `transformer.counts`, attention in full (PaLM, arXiv:2204.02311,
appendix B). The matrix rate is the measured one (`mfu`) or that of the data sheet, which papers use
(`mfu_datasheet`). What is computed twice, by checkpointing, is not counted.

floor = the larger of arithmetic and of the optimizer's traffic, and of one all-reduce of gradients
"""

import torch

from blockshock.measure.datasheet import bf16_flops
from blockshock.measure.floor import OPTIMIZER_PASSES, all_reduce_wire
from blockshock.phases.data_parallel.case import USUAL_MIB, DataParallelCase, taken
from blockshock.phases.data_parallel.problem import Problem
from blockshock.phases.data_parallel.steps import Run
from blockshock.transformer import counts


def figures(case: DataParallelCase, run: Run, problem: Problem, experiment, ceilings) -> dict:
    """For the result: memory, floor, and the model's counts with the matrix rates."""
    count = counts(case.config)
    held = sum(_local(p).nbytes for p in run.wrapper.module.parameters())
    state = run.optimizer.state.values() if run.optimizer else ()
    tensors = [x for one in state for x in one.values() if isinstance(x, torch.Tensor)]
    return {
        "memory": {
            "weight_bytes": held,
            "optimizer_bytes": sum(_local(x).nbytes for x in tensors) if run.optimizer else None,
        },
        "floor": None if ceilings is None else _floor(case, run, experiment, ceilings),
        "paths": {"attention": case.config.attention_on(problem.device.type)},
        "model": {
            "parameters": count.parameters,
            "parameters_without_embeddings": count.parameters_without_embeddings,
            "flops_per_token": count.flops_per_token,
            "flops_per_token_causal": count.flops_per_token_causal,
            "matrix_flops": ceilings and ceilings["matrix_flops"][case.dtype],
            "datasheet_flops": bf16_flops(problem.device) if case.dtype == "bf16" else None,
        },
    }


def rates(case: DataParallelCase, seconds: float, outcome: dict) -> dict:
    """Tokens of all ranks; MFU of one rank's share of them; the last loss of `lm`."""
    model, tokens = outcome["model"], case.batch * case.T / seconds
    found = {
        "tokens_per_s": case.ranks * tokens,
        "mfu": tokens * model["flops_per_token"] / model["matrix_flops"],
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }
    if model["datasheet_flops"]:
        found["mfu_datasheet"] = tokens * model["flops_per_token"] / model["datasheet_flops"]
    if "curves" in outcome:
        found["loss"] = outcome["curves"]["loss"][-1]
    return found


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, whose own size is that of the whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _floor(case: DataParallelCase, run: Run, experiment, ceilings: dict) -> dict[str, float]:
    flops = counts(case.config).flops_per_token_causal * case.batch * case.T
    gradient = 4 * counts(case.config).parameters
    passes = OPTIMIZER_PASSES["adam"] * experiment.trained_bytes
    wire = 0 if run.wrapper.alone else all_reduce_wire(gradient, case.ranks)
    terms = {
        "compute": flops / ceilings["matrix_flops"][case.dtype],
        "memory": (gradient + passes) / ceilings["copy_bytes_per_s"],
        "wire": wire / ceilings["link_bytes_per_s"] if wire else 0.0,
    }
    return {"seconds": max(terms.values()), **terms}


def usuals(case: DataParallelCase) -> dict:
    """For the result: what the method uses where nothing is asked."""
    return {"usual": {"bucket_mib": USUAL_MIB if "bucket_mib" in taken(case.method) else None}}
