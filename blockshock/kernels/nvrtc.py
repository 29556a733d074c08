"""CUDA C++ kernels, compiled on first use by the NVRTC that PyTorch brings.

`torch.cuda._compile_kernel` does the same, but wants an installed CUDA toolkit (CUDA_HOME) for its
headers, which a `pip install torch` does not have; the kernels here include none.
"""

import ctypes
from functools import cache, lru_cache, wraps
from pathlib import Path

import torch
from torch import Tensor
from torch.cuda import _utils

FOLDER = Path(__file__).parent


def once_per_device(function):
    """`cache` for what belongs to the current device, as a loaded kernel does."""

    @cache
    def cached(device, *args, **kwargs):
        return function(*args, **kwargs)

    @wraps(function)
    def found(*args, **kwargs):
        return cached(torch.cuda.current_device(), *args, **kwargs)

    found.cache_clear = cached.cache_clear
    return found


@once_per_device
def kernel(file: str, name: str, shared_bytes: int = 0, prelude: str = "", **macros: int):
    """The kernel `name` of a .cu file in this folder, compiled for the current device.

    prelude: source put before the file's. macros: compile-time constants. shared_bytes: dynamic
    shared memory of its launches. Returns a callable (grid, block, args, shared_mem, stream).
    Raises RuntimeError with the compiler's log.
    """
    source = f'{prelude}\n#line 1 "{file}"\n{(FOLDER / file).read_text(encoding="utf-8")}'
    cubin = _compile(source.encode(), file, macros)
    found = _utils._cuda_load_module(cubin, [name])[name]
    found.set_shared_memory_config(shared_bytes)
    return found


def check_device(x: Tensor) -> None:
    """Raises ValueError unless x is on the current device, where a kernel is launched."""
    if not x.is_cuda or x.device.index != torch.cuda.current_device():
        raise ValueError(
            f"x is on {x.device}, and this kernel runs on the current CUDA device; call it inside "
            "`torch.cuda.device(x.device)`, or on the CPU use 'cusparselt', the same in PyTorch"
        )


@lru_cache
def available() -> bool:
    """Whether the compiler can be loaded."""
    try:
        _library()
    except (OSError, AttributeError):
        return False
    return True


def _library():
    # Newer releases of torch have the first name, since ROCm's compiler stands beside it.
    find = getattr(_utils, "_get_gpu_rtc_library", None) or _utils._get_nvrtc_library
    return find()


def _compile(source: bytes, file: str, macros: dict[str, int]) -> bytes:
    library, program = _library(), ctypes.c_void_p()
    major, minor = torch.cuda.get_device_capability()
    # "a": with the instructions of this generation alone, such as wgmma.
    feature = "a" if major >= 9 else ""
    options = [f"--gpu-architecture=sm_{major}{minor}{feature}", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in macros.items()]
    encoded = [option.encode() for option in options]

    def call(function, *args):
        status = getattr(library, f"nvrtc{function}")(*args)
        if status:
            raise RuntimeError(f"nvrtc{function} failed with status {status} for {file}")

    def text(kind: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"Get{kind}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"Get{kind}", program, buffer)
        return buffer.raw

    call("CreateProgram", ctypes.byref(program), source, file.encode(), 0, None, None)
    try:
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        if library.nvrtcCompileProgram(program, len(encoded), array):
            log = text("ProgramLog").decode(errors="replace").rstrip("\0")
            raise RuntimeError(f"{file} does not compile with {' '.join(options)}:\n{log}")
        return text("CUBIN")
    finally:
        call("DestroyProgram", ctypes.byref(program))
