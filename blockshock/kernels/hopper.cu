// Hopper's instructions for copies, barriers and products, as functions; put before `wide24.cu`.
//
// Source: PTX ISA, the instruction that each function names. Addresses of shared memory are u32, as
// instructions take them. HALF: values are fp16 (1) or bf16 (0).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

struct __align__(64) TensorMap { u64 opaque[16]; };

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

// --- barriers

__device__ __forceinline__ void init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void fence_init() {  // before the cluster's other blocks arrive
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Arrives at the same barrier of another block of the cluster, or of this one. It says that reads
// have ended, and they have: `wgmma.wait_group` came before. So it needs no release to the cluster,
// which is a fence of the whole GPU (MEMBAR.ALL.GPU): a round trip to L2 in every step.
__device__ __forceinline__ void arrive(u32 barrier, u32 block) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
        ::"r"(barrier), "r"(block) : "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ bool elected() {  // of a warp's threads
    u32 chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(chosen));
    return chosen;
}

// Of one of the block's groups of four warps.
__device__ __forceinline__ void group_wait(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// --- copies

__device__ __forceinline__ void copy_in(
    u32 target, const TensorMap& source, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];"
        ::"r"(target), "l"(&source), "r"(column), "r"(row), "r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_in(
    u32 target, const TensorMap& source, int word, int block, int tile, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];"
        ::"r"(target), "l"(&source), "r"(word), "r"(block), "r"(tile), "r"(barrier) : "memory");
}

// To the same address of the cluster's first `blocks` blocks, each of which counts the bytes.
__device__ __forceinline__ void copy_to_all(
    u32 target, const TensorMap& source, int column, int row, u32 barrier, int blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(target), "l"(&source), "r"(column), "r"(row), "r"(barrier),
          "h"((u16)((1 << blocks) - 1)) : "memory");
}

// --- between warps, blocks and two GPUs

__device__ __forceinline__ void tell(u32 address, u32 count) {
    asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(address), "r"(count) : "memory");
}

__device__ __forceinline__ void wait_told(u32 address, u32 count) {
    for (u32 told = 0;; __nanosleep(100)) {
        asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];"
                     : "=r"(told) : "r"(address) : "memory");
        if (told >= count) break;
    }
}

__device__ __forceinline__ u32 claim(u32 address) {  // the count so far, and one more
    u32 count;
    asm volatile("atom.relaxed.cta.shared::cta.add.u32 %0, [%1], 1;"
                 : "=r"(count) : "r"(address) : "memory");
    return count;
}

__device__ __forceinline__ u32 of_first(u32 value) { return __shfl_sync(~0u, value, 0); }

__device__ __forceinline__ void announce(u32* flag, u32 epoch) {  // in the memory of another GPU
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory");
}

// A flag may be one ahead. One of a larger sum long ago is not: the difference is taken as u32.
__device__ __forceinline__ void wait_announced(const u32* flag, u32 epoch) {
    for (u32 seen = 0;; __nanosleep(100)) {
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        if (seen - epoch <= 1) break;
    }
}

__device__ __forceinline__ u32 load_fresh(const u32* from) {
    u32 value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

// What another GPU, or another warp, has written.
__device__ __forceinline__ uint4 load_fresh(const uint4* from) {
    uint4 value;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from) : "memory");
    return value;
}

// The last block of a grid to call this counts the grid.
__device__ __forceinline__ void count_grid(u32* epoch, u32* ended) {
    __threadfence();
    if (atomicAdd(ended, 1) + 1 < gridDim.x) return;
    *ended = 0, ++*epoch;
}

// --- products, of a group of four warps together: `multiply` is made in Python

__device__ __forceinline__ void fence_products() {  // after its registers were written
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int LEFT>
__device__ __forceinline__ void wait_products() {  // all but the last LEFT that were committed
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- operands and results

// One instruction's A: 16 rows × 16 kept values of each warp.
__device__ __forceinline__ void load_matrices(u32* a, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
}

// An 8 × 8 matrix of a warp, of which lane 4r + q has entries 2q, 2q + 1 of row r, transposed.
__device__ __forceinline__ u32 turned(u32 pair) {
    u32 found;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(pair));
    return found;
}

__device__ __forceinline__ void store_if(bool inside, u16* to, u32 low, u32 high) {
    asm volatile(
        "{\n.reg .pred inside;\nsetp.ne.b32 inside, %3, 0;\n"
        "@inside st.global.v2.u32 [%0], {%1, %2};\n}"
        ::"l"(to), "r"(low), "r"(high), "r"((int)inside) : "memory");
}

__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}

__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 pair;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
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

__device__ __forceinline__ u32 added(u32 a, u32 b) {  // two values
    return rounded(widened((u16)a) + widened((u16)b), widened(a >> 16) + widened(b >> 16));
}

__device__ __forceinline__ uint4 added(const uint4& a, const uint4& b) {  // eight values
    return {added(a.x, b.x), added(a.y, b.y), added(a.z, b.z), added(a.w, b.w)};
}
