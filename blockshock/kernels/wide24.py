import torch
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


def _multiply_source(dtype: torch.dtype, columns: int) -> str:
    """The wrapper of `wgmma.sp`: how many operands it has depends on the rows of X."""
    n, name = columns // 2, DTYPES[dtype]
    sums = ", ".join(f"%{i}" for i in range(n))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    return f"""
template <int SELECTOR>
__device__ __forceinline__ void multiply(
    float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b,
    unsigned codes, int add) {{
    asm volatile(
        "{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{n + 7}, 0;\\n"
        "wgmma.mma_async.sp.sync.aligned.m64n{columns}k32.f32.{name}.{name} {{{sums}}}, "
        "{{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, %{n + 5}, %{n + 6}, add, 1, 1, 0;\\n}}"
        : {outputs}
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(codes), "n"(SELECTOR), "r"(add));
}}"""
