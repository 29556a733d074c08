// Y = X Wᵀ + b for a 2:4-sparse W [N, K] and few rows of X, bound by reading W.
//
// D = A·B with A = W, 64 columns at a time, and B = Xᵀ, on the sparse tensor cores: `wgmma.sp`
// on Hopper (WGMMA = 1), `mma.sp` elsewhere (PTX ISA, both with A and its indices in registers).
// W is read once, in the plain row-major order of its kept values.
//
// Compiled with: HALF (0 bf16, 1 fp16), NT (tiles of 8 rows of X), MT (tiles of 16 rows of W that a
// warp holds), WARPS (a multiple of 4), STAGES and KB (the pipeline: stages of KB blocks of 64
// columns), INDICES (1: read them, 0: `fixed`), BIAS (1: add it), WGMMA.
//
// Of a block of 64 columns (16 groups of four), thread q of a quad reads the groups 4q..4q+3 of its
// rows, 16 bytes, and feeds group 4q + 2s + u to step s (0, 1) as its register pair u (0, 1). So
// place 16u + 4q + e of step s is column 16q + 8s + 4u + e of the block, and X is dealt out to
// match: by place, in core matrices of 8 rows × 8 places (128 bytes).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define THREADS (WARPS * 32)
#define ROWS (WARPS * MT * 16)
#define VALUES_STAGE (KB * MT * 2 * THREADS * 16)  // bytes; each thread reads only what it copied
#define INDICES_STAGE (INDICES * KB * MT * THREADS * 4)
#define CHUNK (NT * 128)  // eight places of all rows of X
#define X_STAGE (KB * 8 * CHUNK)
#define STAGE (VALUES_STAGE + INDICES_STAGE + X_STAGE)
#define PITCH (ROWS + 8)  // of the output tile in shared memory, in elements

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

__device__ __forceinline__ void copy16(u32 target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source));
}

__device__ __forceinline__ void copy4(u32 target, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source));
}

#if !WGMMA
template <int SELECTOR>
__device__ __forceinline__ void multiply(
    float* d, u32 a0, u32 a1, u32 a2, u32 a3, const u32 (&b)[4], u32 indices) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(indices), "n"(SELECTOR));
}

__device__ __forceinline__ void load_matrices(u32 (&b)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address));
}
#endif

__device__ __forceinline__ u16 rounded(float value) {
    u16 bits;
    asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float widened(u16 bits) {
#if HALF
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

// x [batch, K] with `pitch` elements a row -> dealt [K/64][8 chunks][NT * 8] of eight places; zeros
// beyond the batch. The grid is K/64. Clears the counters of the product that follows.
extern "C" __global__ void deal_out(
    const u16* x, uint4* dealt, u32* counters, int tiles, int batch, int pitch) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < tiles; i += gridDim.x * blockDim.x)
        counters[i] = 0;
    for (int i = threadIdx.x; i < 64 * NT; i += blockDim.x) {
        const int chunk = i % 8, row = i / 8;
        const int column = chunk % 2 * 32 + chunk / 4 * 8 + chunk / 2 % 2 * 4;
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (row < batch) {
            const u16* from = x + (long long)row * pitch + blockIdx.x * 64 + column;
            const uint2 first = *(const uint2*)from, second = *(const uint2*)(from + 16);
            eight = make_uint4(first.x, first.y, second.x, second.y);
        }
        dealt[(blockIdx.x * 8 + chunk) * NT * 8 + row] = eight;
    }
}

// values [N, K/2], indices [N/16][K/64][32], dealt X, bias [N] -> y [batch, N]. The grid is
// (row tiles, split): each CTA sums a part of K; the last one to arrive at a tile adds the parts,
// always in the same order. `counters`, one a tile, are zero before.
extern "C" __global__ void __launch_bounds__(THREADS) product(
    const u16* values, const u32* indices, const uint4* dealt, const u16* bias, u16* y,
    float4* parts, u32* counters, int N, int K, int batch, int fixed) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int blocks = K / 64, stages = (blocks + KB - 1) / KB;
    const int split = gridDim.y, each = (stages + split - 1) / split;
    const int begin = blockIdx.y * each, end = min(begin + each, stages);
    const u32 base = (u32)__cvta_generic_to_shared(shared);

    const unsigned char* row_values[MT];
    const u32* tile_indices[MT];
    int tiles[MT];  // of 16 rows; four warps hold 64 rows together
#pragma unroll
    for (int m = 0; m < MT; m++) {
        tiles[m] = (blockIdx.x * (WARPS / 4) * MT + warp / 4 * MT + m) * 4 + warp % 4;
        long long tile = min(tiles[m], N / 16 - 1);
        row_values[m] = (const unsigned char*)values + (tile * 16 + lane / 4) * K + lane % 4 * 16;
        tile_indices[m] = indices + tile * blocks * 32 + lane;
    }

    auto load = [&](int stage) {
        if (stage < end) {
            const u32 at = base + (stage - begin) % STAGES * STAGE;
#pragma unroll
            for (int k = 0; k < KB; k++) {
                const int block = stage * KB + k;
                if (block >= blocks) break;
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const unsigned char* source = row_values[m] + (long long)block * 64;
                    const u32 slot = 2 * (k * MT + m) * THREADS + thread;
                    copy16(at + slot * 16, source);
                    copy16(at + (slot + THREADS) * 16, source + (long long)8 * K);
                    if (INDICES)
                        copy4(at + VALUES_STAGE + ((k * MT + m) * THREADS + thread) * 4,
                              tile_indices[m] + (long long)block * 32);
                }
            }
            const u32 target = at + VALUES_STAGE + INDICES_STAGE;
            const uint4* source = dealt + (long long)stage * (X_STAGE / 16);
            const int count = min(KB, blocks - stage * KB) * (CHUNK / 2);
            for (int i = thread; i < count; i += THREADS) copy16(target + i * 16, source + i);
        }
        asm volatile("cp.async.commit_group;");
    };

    float sums[MT][NT * 4] = {};
    for (int stage = begin; stage < begin + STAGES - 1; stage++) load(stage);
    for (int stage = begin; stage < end; stage++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
#if WGMMA
        asm volatile("fence.proxy.async.shared::cta;");
#endif
        __syncthreads();
        const u32 offset = (stage - begin) % STAGES * STAGE;
        const uint4* held = (const uint4*)(shared + offset) + thread;
        const u32* places = (const u32*)(shared + offset + VALUES_STAGE) + thread;
        const u32 x_at = base + offset + VALUES_STAGE + INDICES_STAGE;
        const int count = min(KB, blocks - stage * KB);
        uint4 low[KB][MT], high[KB][MT];
        u32 place[KB][MT];
#pragma unroll
        for (int k = 0; k < KB; k++)
#pragma unroll
            for (int m = 0; m < MT; m++) {
                low[k][m] = held[2 * (k * MT + m) * THREADS];
                high[k][m] = held[(2 * (k * MT + m) + 1) * THREADS];
                place[k][m] = INDICES ? places[(k * MT + m) * THREADS]
                                      : (fixed >> lane / 4 % 4 * 4 & 15) * 0x11111111u;
            }
#if WGMMA
        asm volatile("wgmma.fence.sync.aligned;");
#endif
#pragma unroll
        for (int k = 0; k < KB; k++) {
            if (k >= count) break;
            const u32 x_block = x_at + k * 8 * CHUNK;
#if WGMMA
            // Start, leading (along K) and stride (along rows of X) offsets in units of 16 bytes.
            const u64 strides = (u64)(CHUNK / 16) << 16 | (u64)8 << 32;
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply<0>(sums[m], low[k][m].x, high[k][m].x, low[k][m].y, high[k][m].y,
                            strides | x_block >> 4, place[k][m]);
                multiply<1>(sums[m], low[k][m].z, high[k][m].z, low[k][m].w, high[k][m].w,
                            strides | (x_block + 4 * CHUNK) >> 4, place[k][m]);
            }
#else
#pragma unroll
            for (int n = 0; n < NT; n++) {
                u32 first[4], second[4];
                const u32 row = x_block + lane / 8 * CHUNK + n * 128 + lane % 8 * 16;
                load_matrices(first, row);
                load_matrices(second, row + 4 * CHUNK);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    multiply<0>(sums[m] + n * 4, low[k][m].x, high[k][m].x, low[k][m].y,
                                high[k][m].y, first, place[k][m]);
                    multiply<1>(sums[m] + n * 4, low[k][m].z, high[k][m].z, low[k][m].w,
                                high[k][m].w, second, place[k][m]);
                }
            }
#endif
        }
#if WGMMA
        asm volatile("wgmma.commit_group.sync.aligned;");
#endif
        load(stage + STAGES - 1);  // while the tensor cores work
#if WGMMA
        asm volatile("wgmma.wait_group.sync.aligned 0;");
#endif
    }
    asm volatile("cp.async.wait_all;");
    __syncthreads();

    if (split > 1) {
        __shared__ bool last;
        float4* tile_parts = parts + (long long)blockIdx.x * split * MT * NT * THREADS + thread;
        float4* own = tile_parts + blockIdx.y * MT * NT * THREADS;
#pragma unroll
        for (int i = 0; i < MT * NT; i++) {
            float* four = sums[i / NT] + i % NT * 4;
            __stcg(own + i * THREADS, make_float4(four[0], four[1], four[2], four[3]));
        }
        __threadfence();
        __syncthreads();
        if (thread == 0) last = atomicInc(counters + blockIdx.x, split - 1) == split - 1;
        __syncthreads();
        if (!last) return;
        __threadfence();
#pragma unroll
        for (int i = 0; i < MT * NT; i++) {
            float4 total = make_float4(0, 0, 0, 0);
            for (int s = 0; s < split; s++) {
                float4 part = __ldcg(tile_parts + (s * MT * NT + i) * THREADS);
                total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
            }
            float* four = sums[i / NT] + i % NT * 4;
            four[0] = total.x, four[1] = total.y, four[2] = total.z, four[3] = total.w;
        }
    }

    u16* tile = (u16*)shared;  // [NT * 8][PITCH], so that rows of y are written whole
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        const int m = i / 2, row = tiles[m] * 16 + i % 2 * 8 + lane / 4;
        const int local = row - blockIdx.x * ROWS;
        const float shift = BIAS && row < N ? widened(bias[row]) : 0.0f;
#pragma unroll
        for (int j = 0; j < NT * 2; j++)
            tile[(j / 2 * 8 + lane % 4 * 2 + j % 2) * PITCH + local] =
                rounded(sums[m][j / 2 * 4 + i % 2 * 2 + j % 2] + shift);
    }
    __syncthreads();
    for (int i = thread; i < NT * 8 * (ROWS / 8); i += THREADS) {
        const int b = i / (ROWS / 8), local = i % (ROWS / 8) * 8, row = blockIdx.x * ROWS + local;
        if (b < batch && row < N)
            *(uint4*)(y + (long long)b * N + row) = *(uint4*)(tile + b * PITCH + local);
    }
}
