// The sum over ranks of a small message, in one kernel: every rank writes its partial into the other
// ranks' buffers, waits for theirs, and adds all of them in the order of the ranks.
//
// Compiled with: KIND (0 bf16, 1 fp16, 2 float), RANKS, RANK, BLOCKS and SPAN (of a buffer).
//
// A block of threads works alone: it sends, awaits and adds its own `span` of each message through
// its own place in the buffers, which is SPAN vectors of 16 bytes whatever the message. `epochs`
// counts the messages of each block; a place is used in turn with a second one, so that a rank that
// runs ahead by one message (it cannot by two: it has waited for this rank's last one) does not
// overwrite what is still read. More blocks than fit on the GPU are no deadlock as long as all ranks
// start them in the order of their numbers, as CUDA devices do.

typedef unsigned int u32;

#define THREADS 512

#if KIND == 2
#define LANES 4
struct Vector { float lane[4]; };
__device__ float widened(const Vector& v, int i) { return v.lane[i]; }
__device__ void set(Vector& v, int i, float value) { v.lane[i] = value; }
#else
#define LANES 8
struct Vector { unsigned short lane[8]; };
#if KIND
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
__device__ float widened(const Vector& v, int i) {
#if KIND
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(v.lane[i]));
    return value;
#else
    return __uint_as_float((u32)v.lane[i] << 16);
#endif
}
__device__ void set(Vector& v, int i, float value) {
    asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(v.lane[i]) : "f"(value));
}
#endif

union Word { uint4 bits; Vector vector; };

// partial, out: `count` vectors. buffers, flags: the ranks' addresses; a buffer is
// [2][RANKS][BLOCKS][SPAN] vectors, flags are [RANKS][BLOCKS].
extern "C" __global__ void __launch_bounds__(THREADS) push_sum(
    const uint4* partial, uint4* out, uint4* const* buffers, u32* const* flags, u32* epochs,
    int count, int span) {
    const int thread = threadIdx.x, block = blockIdx.x;
    const int begin = block * span, end = min(begin + span, count);
    const u32 epoch = epochs[block] + 1;
    const long long place = (long long)(epoch & 1) * RANKS * BLOCKS * SPAN + block * SPAN - begin;
    const long long step = (long long)BLOCKS * SPAN;  // from one rank's place to the next one's

    for (int i = begin + thread; i < end; i += THREADS) {
        const uint4 own = partial[i];
#pragma unroll
        for (int away = 1; away < RANKS; away++) {
            const int peer = (RANK + away) % RANKS;
            buffers[peer][place + RANK * step + i] = own;
        }
    }
    __threadfence_system();
    __syncthreads();
    if (thread < RANKS && thread != RANK) {
        u32* theirs = flags[thread] + RANK * BLOCKS + block;
        asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(theirs), "r"(epoch) : "memory");
        u32* mine = flags[RANK] + thread * BLOCKS + block;
        u32 seen;
        do {
            asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(mine) : "memory");
        } while ((int)(seen - epoch) < 0);  // the other rank may be one message ahead
    }
    __syncthreads();
    for (int i = begin + thread; i < end; i += THREADS) {
        float sums[LANES] = {};
#pragma unroll
        for (int rank = 0; rank < RANKS; rank++) {
            Word word;
            word.bits = rank == RANK ? partial[i] : __ldcv(buffers[RANK] + place + rank * step + i);
#pragma unroll
            for (int lane = 0; lane < LANES; lane++) sums[lane] += widened(word.vector, lane);
        }
        Word total;
#pragma unroll
        for (int lane = 0; lane < LANES; lane++) set(total.vector, lane, sums[lane]);
        out[i] = total.bits;
    }
    if (thread == 0) epochs[block] = epoch;
}
