"""What NVIDIA's data sheets promise: the rates that MFU is a share of in papers."""

import torch

# Dense bf16 FLOP/s by the name that torch gives.
BF16 = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


def bf16_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one device, or None where no data sheet is known."""
    return BF16.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
