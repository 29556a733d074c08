// Y = X Wᵀ + b for a 2:4-sparse W [N, K] and many rows of X, on Hopper.
//
// D = A·B with A = W and B = Xᵀ by `wgmma.sp`. Its dense operand takes all that shared memory can
// read, so the values of W are fed from registers. A block of threads has GROUPS groups of four
// warps that multiply, with 64 rows of W each, over the same COLUMNS rows of X. One thread copies:
// of a group of its own, or where the sums leave no registers for one, of the first group. Blocks
// in a cluster have other rows of W and the same rows of X: each copies its share of X to all.
// A block stays and takes tile after tile; copies for the next one go on while a tile is written.
// The instructions are functions of `hopper.cu`, which stands before this file. The tests run it
// without a GPU as well, with `hopper_simulator.h` in that place.
//
// Compiled with: HALF (0 bf16, 1 fp16), BIAS (1: add it), GROUPS (2 to 4), COLUMNS (rows of X: 128,
// 192, 256), STAGES (of 64 columns of W and X), CLUSTER (blocks: 1, 2, 4), BAND (tiles of W that
// follow each other before the next rows of X), COPIERS (1: a group that only copies), COPIER and
// MULTIPLIER (registers of a thread, where COPIERS = 1), and
//   VALUES  0 loaded once, whatever K says: wrong sums, the rate without reading W
//           1 through shared memory, from the plain row-major values
//           2 from L2 to registers, in the order that `arrange_values` makes
//   STILL   1: only the first round of stages is copied: wrong sums, the rate without copies of X
//   SETS    of registers of A, each for 64 columns. A product reads its set until it has ended.
//           VALUES = 1: with 1 a group waits for its own product, and the other groups keep the
//           tensor cores busy. VALUES = 2: one half of the sets is loaded while the other is
//           multiplied; with 1 set the halves are 32 columns each.
//
// A block of 64 columns feeds two instructions. Thread 32w + 4g + q of a group gives instruction s
// rows 16w + g and 16w + g + 8 of A: registers 0 and 1 the kept pairs of the group of four 8s + q,
// registers 2 and 3 those of 8s + 4 + q. Its places are one word for both instructions: thread
// 4g + 2s + u has the codes of groups 8s + 4u + 0..3 of row g, and above them those of row g + 8
// (PTX ISA, "wgmma.mma_async.sp": fragments of A, metadata, sparsity selector).
//
// What a step compiles to (ARRIVE is `wgmma.fence`, DEPBAR 1 leaves the last product in flight):
//   pairs          LDS LDSM LDSM, ARRIVE, HGMMA HGMMA, DEPBAR 1, SYNCS.ARRIVE
//   direct         LDS, ARRIVE, HGMMA HGMMA, DEPBAR 1, SYNCS.ARRIVE, in each second step LDG × 4
//   three, direct  LDS, ARRIVE, HGMMA, DEPBAR 1, LDG, ARRIVE, HGMMA, DEPBAR 1, SYNCS.ARRIVE, LDG
// Loads of values share one scoreboard: a wait for one is a wait for all. So they are issued at
// once, right after the wait that frees their registers, and no younger one delays a product.
//
// Rates in TFLOP/s counted as dense: N = 8192, B = 4096, bf16, bursts, one H200 at 700 W, where
// cuSPARSELt has 1171 and the dense half 757 of its own. For 128 × 256 × 64 the tensor cores take
// 512 clocks, and shared memory takes `clocks`, at 128 bytes each: X read by two groups (512),
// copies into it, W, places. L2 is read for `KB`. cuSPARSELt's scheme, both operands from shared
// memory, has 896 clocks and 25 KB.
//                        clocks   KB  expected  with a fence
//   alone                  912    41      1000      604        L2
//   pairs                  912    25      1150      642
//   three                  827    20      1130      574        the last round of tiles: 0.89
//   direct                 784    25      1340      577
//   fours, direct          784    17      1220                 120 of 132 processors: 0.91
//   three, direct          699    20      1300                 0.89
//   narrow three, direct   704    23      1300                 0.89
//   narrow four, direct    672    26      1450
//   held                   784    17      1340      705        no W is read
//   held, still            520     0      1700     1330        nor is X copied
// "With a fence" was measured (PyTorch 2.11, CUDA 13.0) when `arrive` was a release to the cluster:
// a step took what MEMBAR.ALL.GPU takes, 750 clocks without copies, 1450 to 1900 beside them. The
// rest is not measured. Expected: 1171 × 896 / clocks × the share that works, and at most 1456, as
// the probe has 1334 for A in registers where it has 1073 for A in shared memory.

#define THREADS ((GROUPS + COPIERS) * 128)
#define ROWS (GROUPS * 64)
#define X_STAGE (COLUMNS * 128)  // bytes
#define W_STAGE (VALUES == 1 ? GROUPS * 4096 : 0)
#define PLACES_STAGE (GROUPS * 512)
#define PIECE 4096  // 32 rows of Y × 64 columns, of which a group has two
#define W_AT (STAGES * X_STAGE)
#define PIECES_AT (W_AT + STAGES * W_STAGE)
#define PLACES_AT (PIECES_AT + GROUPS * 2 * PIECE)
#define BARRIERS_AT (PLACES_AT + STAGES * PLACES_STAGE)
#define AHEAD (SETS / 2)  // blocks of values that are loaded at once
#define SPLIT (VALUES == 2 && SETS == 1)
#define IN_FLIGHT (SETS > 1 || SPLIT)  // products at the end of a step
static_assert(VALUES != 2 || SETS == 1 || SETS % 2 == 0, "values from L2: SETS has two halves");

// A core matrix row is 128 bytes, swizzled; eight rows of X are 1024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)(address >> 4 & 0x3FFF) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

struct Place { int row, column; };  // of a tile: first row of W of the cluster, first row of X

// BAND tiles of W, then the next rows of X: blocks that run together share both in L2.
__device__ __forceinline__ Place place_of(int tile, int rows, int columns) {
    const int first = tile / (BAND * columns) * BAND, high = min(BAND, rows - first);
    const int within = tile - first * columns;
    return {(first + within % high) * CLUSTER * ROWS, within / high * COLUMNS};
}

// --- kernels

// values [N, K/2] -> [N/64][K/32][128 threads] of the four registers that an instruction takes.
// The grid is (K/64, N/64), of 256 threads.
extern "C" __global__ void arrange_values(const u32* values, uint4* arranged, int K) {
    const int thread = threadIdx.x % 128, step = blockIdx.x * 2 + threadIdx.x / 128;
    const int row = blockIdx.y * 64 + thread / 32 * 16 + thread % 32 / 4;
    const u32* low = values + (long long)row * (K / 4) + step * 8 + thread % 4;
    const u32* high = low + (long long)8 * (K / 4);
    arranged[((long long)blockIdx.y * (K / 32) + step) * 128 + thread] =
        make_uint4(low[0], high[0], low[4], high[4]);
}

// x [batch, K], w (values [N, K/2]), places [N/64][K/64][128], arranged (VALUES 0 and 2), bias [N]
// -> y [batch, N]. The grid is a multiple of CLUSTER; all of it must run at once.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) product(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
    const __grid_constant__ TensorMap places, const __grid_constant__ TensorMap y,
    const uint4* arranged, const u16* bias, int lines, int blocks,
    int rows, int columns) {
    extern __shared__ unsigned char shared[];
    const u32 base = ((u32)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8;
    const int group = threadIdx.x / 128 - COPIERS, thread = threadIdx.x % 128;
    const int lane = thread % 32, warp = thread / 32;
    const int rank = blockIdx.x % CLUSTER;
    const int tiles = rows * columns;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init(full + i * 8, 1);
            init(empty + i * 8, CLUSTER * GROUPS * 4);  // one arrival of each warp that reads
        }
        fence_init();
    }
    cluster_wait();

    // One thread copies: the next block of 64 columns into the next stage, tile after tile.
    int next_tile = blockIdx.x / CLUSTER, next_block = 0, left = STAGES;
    Place next = place_of(next_tile, rows, columns);
    auto fetch = [&](int stage, u32 turn) {
        const u32 ready = full + stage * 8;
        wait(empty + stage * 8, turn ^ 1);
        const bool copied = !STILL || left-- > 0;
        expect(ready, copied ? X_STAGE + W_STAGE + PLACES_STAGE : 0);
        const int share = COLUMNS / CLUSTER, row = next.row + rank * ROWS;
        const u32 target = base + stage * X_STAGE + rank * (share * 128);
        if (copied) {
            if (CLUSTER > 1)
                copy_to_all(
                    target, x, next_block * 64, next.column + rank * share, ready, CLUSTER);
            else
                copy_in(target, x, next_block * 64, next.column, ready);
            if (VALUES == 1)
                copy_in(base + W_AT + stage * W_STAGE, w, next_block * 32, row, ready);
            copy_in(base + PLACES_AT + stage * PLACES_STAGE, places, 0, next_block, row / 64,
                    ready);
        }
        if (++next_block == blocks) {
            next_block = 0, next_tile += gridDim.x / CLUSTER;
            if (next_tile < tiles) next = place_of(next_tile, rows, columns);
        }
    };

    if (group < 0) {
#if COPIERS
        give_registers<COPIER>();
#endif
        if (threadIdx.x == 0)
            for (int i = 0; next_tile < tiles; i++) fetch(i % STAGES, i / STAGES & 1);
    } else {
#if COPIERS
        take_registers<MULTIPLIER>();
#else
        if (threadIdx.x == 0)
            for (int i = 0; i < STAGES - 2 && next_tile < tiles; i++) fetch(i, 0);
#endif
        int stage = 0;
        u32 turn = 0;  // parity of the round through the stages
        // The lane's row of the four 8 × 8 matrices, which are rows 0-7 and 8-15, then again the
        // next 16 bytes; a row is 64 bytes, swizzled.
        const int matrix_row = warp * 16 + lane % 16, half = lane / 16;
        const u32 values_at = base + W_AT + group * 4096 + matrix_row * 64 +
                              ((half ^ (matrix_row >> 1 & 3)) << 4);
        const u32 places_at = base + PLACES_AT + group * 512 + thread * 4;
        const u32 pieces_at = base + PIECES_AT + group * (2 * PIECE);
        // The lane's row of the four 8 × 8 matrices of Y; a row is 128 bytes, swizzled.
        const u32 sums_at = pieces_at + (lane / 16 * 8 + lane % 8) * 128 +
                            ((warp * 2 + lane / 8 % 2 ^ lane % 8) << 4);
        float sums[COLUMNS / 2];
        u32 a[SETS][8];

        int line = 0;  // of blocks of W, in which the tile's values are
        auto load_half = [&](u32* set, int block, int half) {
            const long long at = (long long)line * blocks + min(block, blocks - 1);
            load_words(set + half * 4, arranged + at * 256 + half * 128 + thread);
        };
        auto load = [&](u32* set, int block) {
            load_half(set, block, 0);
            load_half(set, block, 1);
        };
        auto load_first = [&](int tile) {  // what a tile begins with
            line = min(place_of(tile, rows, columns).row / 64 + rank * GROUPS + group, lines - 1);
            if (SPLIT) load_half(a[0], 0, 0);
#pragma unroll
            for (int i = 0; i < (VALUES == 2 ? AHEAD : SETS); i++) load(a[i], i);
        };
        const int first = blockIdx.x / CLUSTER, apart = gridDim.x / CLUSTER;
        if (VALUES != 1) load_first(first);

        auto fetch_ahead = [&]() {  // into the stage that was used two blocks ago
            if (!COPIERS && threadIdx.x == 0 && next_tile < tiles)
                fetch((stage + STAGES - 2) % STAGES, turn ^ (stage >= 2));
        };
        auto release = [&](int stage) {
            if (lane < CLUSTER) arrive(empty + stage * 8, lane);
        };
        auto before = [&]() { return stage == 0 ? STAGES - 1 : stage - 1; };

        for (int tile = first; tile < tiles; tile += apart) {
            auto step = [&](int i, int block) {
                u32* set = a[i];
                wait(full + stage * 8, turn);
                if (VALUES == 1) {
                    load_matrices(set, values_at + stage * W_STAGE);
                    load_matrices(set + 4, (values_at ^ 32) + stage * W_STAGE);
                }
                const u32 codes = load_shared(places_at + stage * PLACES_STAGE);
                const u64 x_block = descriptor(base + stage * X_STAGE);
                fence_products();
                multiply<0>(sums, set[0], set[1], set[2], set[3], x_block, codes, block > 0);
                if (SPLIT) {  // the last block's product has ended: its half of the set is free
                    commit_products();
                    wait_products<1>();
                    load_half(set, block, 1);
                    fetch_ahead();
                    fence_products();
                }
                multiply<1>(sums, set[4], set[5], set[6], set[7], x_block + 4, codes, 1);
                commit_products();
                if (!SPLIT) fetch_ahead();
                wait_products<IN_FLIGHT>();
                if (!IN_FLIGHT)
                    release(stage);  // which the products have read
                else if (block > 0)
                    release(before());
                if (SPLIT)
                    load_half(set, block + 1, 0);
                else if (VALUES == 2 && i % AHEAD == 0)
#pragma unroll
                    for (int j = AHEAD; j < 2 * AHEAD; j++) load(a[(i + j) % SETS], block + j);
                if (++stage == STAGES) stage = 0, turn ^= 1;
            };
            int block = 0;
#pragma unroll 1
            for (; block + SETS <= blocks; block += SETS) {
#pragma unroll
                for (int i = 0; i < SETS; i++) step(i, block + i);
            }
#pragma unroll
            for (int i = 0; i < SETS - 1; i++)
                if (block + i < blocks) step(i, block + i);
            const Place at = place_of(tile, rows, columns);
            const int row = at.row + rank * ROWS + group * 64;
            const int own = row + warp * 16 + lane / 4;
            const float low = BIAS && own < lines * 64 ? widened(bias[own]) : 0.0f;
            const float high = BIAS && own + 8 < lines * 64 ? widened(bias[own + 8]) : 0.0f;
            wait_products<0>();
            if (IN_FLIGHT) release(before());

#pragma unroll
            for (int piece = 0; piece < COLUMNS / 32; piece++) {
                const u32 target = pieces_at + piece % 2 * PIECE;
                // The copy from this half, two pieces ago, has been read.
                if (thread == 0) wait_read<1>();
                group_wait(group);
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    const float* d = sums + (piece * 4 + pair * 2) * 4;
                    store_matrices(sums_at + piece % 2 * PIECE + pair * 16 * 128,
                                   rounded(d[0] + low, d[1] + low),
                                   rounded(d[2] + high, d[3] + high),
                                   rounded(d[4] + low, d[5] + low),
                                   rounded(d[6] + high, d[7] + high));
                }
                fence_copies();
                group_wait(group);
                if (thread == 0) copy_out(y, row, at.column + piece * 32, target);
                // Some sums have left their registers.
                if (VALUES == 2 && piece == 0 && tile + apart < tiles) load_first(tile + apart);
            }
        }
        if (thread == 0) wait_written();
    }
    // A block that ends takes its shared memory from copies and arrivals of the others.
    __syncwarp();
    cluster_wait();
}
