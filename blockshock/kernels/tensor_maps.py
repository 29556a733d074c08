"""Launches of kernels that copy tiles by tensor maps, and in clusters, through the CUDA driver.

PyTorch's launcher of own kernels takes pointers and integers; a tensor map is 128 bytes by value.
"""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor
from torch.cuda import _utils

_TYPES = {2: 1, 4: 2}  # bytes of an element -> CU_TENSOR_MAP_DATA_TYPE_UINT16, _UINT32
_SWIZZLES = {0: 0, 64: 2, 128: 3}  # bytes of a swizzled row -> CU_TENSOR_MAP_SWIZZLE_*
_PROMOTION = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


class TensorMap(ctypes.Structure):
    """A CUtensorMap."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def aligned(x: Tensor) -> bool:
    """Whether a tensor map can describe x [.., n]: its start and its rows are multiples of 16
    bytes, and a row is contiguous."""
    size = x.element_size()
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    rows = all(step * size % 16 == 0 and step >= x.shape[-1] for _, step in outer)
    return x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and rows


def tensor_map(x: Tensor, box: tuple[int, ...], swizzle: int = 0) -> TensorMap:
    """The map of x for tiles of `box` elements, both in the order of x's dimensions.

    swizzle: 0, or the bytes of a row of the box, 64 or 128. What lies outside of x is read as zero
    and not written. The map holds the address of x, not x. Raises ValueError unless `aligned`.
    """
    if not aligned(x):
        raise ValueError(
            f"shape {tuple(x.shape)}, strides {x.stride()}, address {x.data_ptr():#x}: a tensor "
            "map needs rows that start at multiples of 16 bytes; pass a contiguous copy"
        )
    return _encoded(x.data_ptr(), x.element_size(), tuple(x.shape), x.stride(), box, swizzle)


@lru_cache(maxsize=1024)
def _encoded(address, size, shape, strides, box, swizzle) -> TensorMap:
    rank = len(shape)
    memory = ctypes.create_string_buffer(128 + 64)  # the driver wants it aligned to 64 bytes
    place = memory, -ctypes.addressof(memory) % 64
    made = TensorMap.from_buffer(*place)
    _utils._check_cuda(
        _utils._get_cuda_library().cuTensorMapEncodeTiled(
            ctypes.byref(made),
            _TYPES[size],
            rank,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*reversed(shape)),
            (ctypes.c_uint64 * (rank - 1))(*(step * size for step in reversed(strides[:-1]))),
            (ctypes.c_uint32 * rank)(*reversed(box)),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,  # not interleaved
            _SWIZZLES[swizzle],
            _PROMOTION,
            0,  # zeros outside
        )
    )
    return made


def most_clusters(kernel, blocks: int, threads: int, shared_bytes: int) -> int:
    """How many clusters of `blocks` blocks of a kernel run at once on this device."""
    attribute = _Attribute(id=_CLUSTER_DIMENSION)
    attribute.value[:3] = blocks, 1, 1
    config = _Config(
        grid=(blocks, 1, 1),
        block=(threads, 1, 1),
        shared=shared_bytes,
        attributes=ctypes.pointer(attribute),
        count=1,
    )
    found = ctypes.c_int()
    library = _utils._get_cuda_library()
    _utils._check_cuda(
        library.cuOccupancyMaxActiveClusters(ctypes.byref(found), kernel.func, ctypes.byref(config))
    )
    return found.value


def launch(kernel, blocks: int, threads: int, arguments: list, shared_bytes: int) -> None:
    """Starts a kernel of `nvrtc.kernel` on the current stream, on a line of blocks.

    arguments: tensors (their addresses), integers (C int) and tensor maps (by value).
    """
    values = [_argument(value) for value in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    _utils._check_cuda(
        _utils._get_cuda_library().cuLaunchKernel(
            kernel.func, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, pointers, None
        )
    )


def _argument(value):
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return value if isinstance(value, TensorMap) else ctypes.c_int(value)
