"""Device code behind plain functions, each beside its plain-PyTorch reference.

pack      values <-> dense rows <-> transposed values of a 2:4 matrix
sparse24  the 2:4 product of cuSPARSELt (`cusparselt`: its calls; `algorithms`: the search)

Triton launches on the current device and its stream, whatever device the operands are on. So every
launch stands in `torch.cuda.device_of` an operand, which does nothing where that device is current.
"""
