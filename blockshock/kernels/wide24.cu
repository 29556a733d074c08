// Y = X Wᵀ + b for a 2:4-sparse W [N, K] and many rows of X, on Hopper.
//
// D = A·B with A = W and B = Xᵀ by `wgmma.sp`. Its dense operand takes all that shared memory can
// read, so the values of W are fed from registers. A block of threads has two groups of four warps
// that multiply, with 64 rows of W each, over the same COLUMNS rows of X, and a group of which one
// thread copies. The two blocks of a cluster have other rows of W and the same rows of X: each
// copies its half of X to both. A block stays and takes tile after tile; copies for the next one go
// on while a tile is written.
// The instructions are functions of `hopper.cu`, which stands before this file. The tests run it
// without a GPU as well, with `hopper_simulator.h` in that place.
//
// Compiled with: HALF (0 bf16, 1 fp16), BIAS (1: add it), SUM (1: with another GPU's), GROUPS,
// COLUMNS (rows of X of a tile), STAGES (of 64 columns of W and X), CLUSTER (blocks), BAND (tiles of
// W that follow each other before the next rows of X), COPIER and MULTIPLIER (registers of a thread
// that copies, multiplies).
//
// SUM: Y = X Wᵀ + X W'ᵀ of two GPUs that run this kernel at the same time, with other W of the same
// size. What a tile gives is written to `own`, which the other GPU can read, and the other one is
// told. Beside the warp that copies and the one that tells, two warps take piece by piece of the
// tiles of their block, load the other GPU's over the link, and write the sum, while the next tile is
// multiplied; at the end all warps but the one that copies do. Products wait for nothing, so the two
// need not run in step. Their grids have one size: then more blocks than run at once are no deadlock,
// as both GPUs start them in the order of their numbers. `own` is two buffers in turn: who has ended
// a sum has read what the other told in it, and the other had then ended the sum before; so a GPU can
// be ahead by one sum, and not by two.
//
// A block of 64 columns feeds two instructions. Thread 32w + 4g + q of a group gives instruction s
// rows 16w + g and 16w + g + 8 of A: registers 0 and 1 the kept pairs of the group of four 8s + q,
// registers 2 and 3 those of 8s + 4 + q. Its places are one word for both instructions: thread
// 4g + 2s + u has the codes of groups 8s + 4u + 0..3 of row g, and above them those of row g + 8
// (PTX ISA, "wgmma.mma_async.sp": fragments of A, metadata, sparsity selector).
//
// An instruction reads its registers, the places too, until it has ended. So a step and the next
// have sets of their own, and one product is in flight while the next set is loaded. It compiles to
//   LDS LDSM LDSM, ARRIVE (`wgmma.fence`), HGMMA HGMMA, DEPBAR 1, SYNCS.ARRIVE
//
// Rates in TFLOP/s counted as dense, of this kernel and of others that were tried: one H200 at 700 W,
// PyTorch 2.11, CUDA 13.0, bf16, N = K = 8192 and B = 4096, medians of bursts of two calls; `zeros`:
// of operands that are zero; `sustained`: after 1.6 s, where * is of N = K = 16384. `full`: what
// the share of processors that work in the last round of tiles leaves. For 128 × 256 × 64 the tensor
// cores take 512 clocks, and shared memory, at 128 bytes a clock, takes `clocks`: X read by the
// groups (512), copies into it, W, places. `KB` come from L2, copies to two blocks counted once.
//
//                                              clocks  KB  full  random  zeros  sustained
//   cuSPARSELt's best of 21 algorithms            896  25  0.97    1173   1314   982, 1004*
//   two groups of 64 × 256                        912  25  0.97    1165   1342   985,  995*
//   W from L2 to registers, 2 steps ahead         784  25  0.97    1155   1294   983
//   the same, 4 steps ahead                       784  25  0.97    1146   1342   971
//   the same, 2 steps, and first a prefetch       784  25  0.97    1065   1203
//   the same, 2 steps, clusters of four           784  17  0.86    1078   1151
//   three groups of 64 × 256                      827  20  0.86    1063   1131   986*
//   three groups of 64 × 224                      847  21  0.84    1067   1168   951*
//   four groups of 64 × 128                       928  26  0.97    1082   1166
//   two groups, W read once: wrong sums           784  17  0.97    1336   1525  1130
//
// This kernel is the second one, with Y stored from registers in place of bulk copies from shared
// memory: 0.99 of the library's rate at this size in each of four runs, as the other had 0.99 and
// 1.00. To end a tile takes 2 us either way, of 59 at this K. With one group 1, 2 or 3 steps ahead of
// the other it has 0.99 as well.
// So with many rows this kernel is about as fast as the library (docs/linear.md has sizes), and no
// scheme passed it. With random data what ran for 1.6 s was bound by power, not by shared memory:
// 690 W at 1350 to 1485 MHz give 951 to 1004 TFLOP/s, whatever is read from where, and fewer stalls
// end in a lower clock. Zeros draw less power: the same kernels have 1.06 to 1.17 of the rate. W read
// once for all steps shows what moving 8 KB of W a step costs: 0.13 of the rate. A probe with A in
// registers has 1334, but one A in all of its instructions.
// A release to the cluster in `arrive` is a fence of the whole GPU: 642 in place of 1165.

#define THREADS ((GROUPS + 1) * 128)
#define ROWS (GROUPS * 64)
#define X_STAGE (COLUMNS * 128)  // bytes
#define W_STAGE (GROUPS * 4096)
#define PLACES_STAGE (GROUPS * 512)
#define W_AT (STAGES * X_STAGE)
#define PLACES_AT (W_AT + STAGES * W_STAGE)
#define BARRIERS_AT (PLACES_AT + STAGES * PLACES_STAGE)
#define TOLD_AT (BARRIERS_AT + STAGES * 16)  // how many tiles each group has written
#define CLAIMED_AT (TOLD_AT + GROUPS * 4)    // how many pieces are being added

// A core matrix row is 128 bytes, swizzled; eight rows of X are 1024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)(address >> 4 & 0x3FFF) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

// Of 16: which row of W is row i of A. So after a turn a lane has four rows that follow each other,
// and eight rows that are loaded together lie in all banks.
__device__ __forceinline__ int row_of_w(int i) {
    const int pair = i % 8 / 2;
    return pair * 4 + (pair / 2 ^ i / 8) * 2 + i % 2;
}

struct Place { int row, column; };  // of a tile: first row of W of the cluster, first row of X

// BAND tiles of W, then the next rows of X: blocks that run together share both in L2.
__device__ __forceinline__ Place place_of(int tile, int rows, int columns) {
    const int first = tile / (BAND * columns) * BAND, high = min(BAND, rows - first);
    const int within = tile - first * columns;
    return {(first + within % high) * CLUSTER * ROWS, within / high * COLUMNS};
}

#if SUM
#define PIECE 32  // rows of Y, of 64 columns: eight loads of each lane of a warp
#define PIECES (GROUPS * COLUMNS / PIECE)  // of a tile of a block

struct Exchange {  // what a block needs to add its tiles to the other GPU's
    const uint4 *own, *other;  // partials [batch, N] of this sum
    uint4* out;
    u32 *flags, *their_flags, epoch;  // a flag for each tile of each block
    int batch, lines, rows, columns, first, apart, rank, tiles;

    __device__ __forceinline__ u32 slot(int tile) const { return tile * CLUSTER + rank; }
};

// A piece after the other, until none of the block's is left; by whole warps.
__device__ __forceinline__ void add_pieces(const Exchange& sum, u32 base) {
    const int lane = threadIdx.x % 32, pitch = sum.lines * 8;  // vectors of eight values
    for (int ready = -1;;) {
        const u32 claimed = of_first(lane == 0 ? claim(base + CLAIMED_AT) : 0);
        const int nth = claimed / PIECES, piece = claimed % PIECES;
        const int tile = sum.first + nth * sum.apart;
        if (tile >= sum.tiles) return;
        if (nth > ready) {
            for (int i = 0; i < GROUPS; i++) wait_told(base + TOLD_AT + i * 4, nth + 1);
            wait_announced(sum.flags + sum.slot(tile), sum.epoch);
            ready = nth;
        }
        const Place at = place_of(tile, sum.rows, sum.columns);
        const int line = (at.row + sum.rank * ROWS) / 64 + piece % GROUPS;
        const int row = at.column + piece / GROUPS * PIECE + lane / 8;
        const int left = line < sum.lines ? sum.batch - row : 0;
        const long long start = (long long)row * pitch + line * 8 + lane % 8;
        uint4 theirs[PIECE / 4], mine[PIECE / 4];
#pragma unroll
        for (int i = 0; i < PIECE / 4; i++) {
            if (i * 4 < left) theirs[i] = load_fresh(sum.other + start + i * 4 * pitch);
            if (i * 4 < left) mine[i] = load_fresh(sum.own + start + i * 4 * pitch);
        }
#pragma unroll
        for (int i = 0; i < PIECE / 4; i++)
            if (i * 4 < left) sum.out[start + i * 4 * pitch] = added(mine[i], theirs[i]);
    }
}
#endif

// x [batch, K], w (values [N, K/2]), places [N/64][K/64][128], bias [N] -> y [batch, N]. lines: N/64,
// blocks: K/64; rows, columns: of tiles. The grid is a multiple of CLUSTER, of any size; it is
// fastest as large as runs at once.
// With SUM, y are this GPU's two buffers, `between` times 128 bytes apart, other are the other GPU's,
// and out is the sum; both grids have one size. flags, their_flags: of tiles of blocks, in this and
// the other GPU. state: how many sums there were, and 0.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) product(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
    const __grid_constant__ TensorMap places, u16* y, const u16* bias, int batch, int lines, int blocks,
    int rows, int columns
#if SUM
    , const uint4* other, int between, uint4* out, u32* flags, u32* their_flags, u32* state
#endif
    ) {
    extern __shared__ unsigned char shared[];
    const u32 base = ((u32)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8;
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const int lane = thread % 32, warp = thread / 32;
    const int rank = blockIdx.x % CLUSTER;
    const int tiles = rows * columns, first = blockIdx.x / CLUSTER, apart = gridDim.x / CLUSTER;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init(full + i * 8, 1);
            init(empty + i * 8, CLUSTER * GROUPS * 4);  // one arrival of each warp that reads
        }
        fence_init();
#if SUM
        for (int i = 0; i < GROUPS; i++) tell(base + TOLD_AT + i * 4, 0);
        tell(base + CLAIMED_AT, 0);
#endif
    }
    cluster_wait();
#if SUM
    const u32 epoch = load_fresh(state) + 1;
    const long long buffer = epoch % 2 * (long long)between;
    y += buffer * 64, other += buffer * 8;
    const Exchange sum = {(uint4*)y, other, out, flags, their_flags, epoch, batch, lines, rows, columns,
                          first, apart, rank, tiles};
#endif

    if (group == GROUPS) {
        give_registers<COPIER>();
        const int share = COLUMNS / CLUSTER;
        int stage = 0;
        u32 turn = 0;  // parity of the round through the stages
        if (warp == 0 && elected()) {  // so the compiler makes no loop over threads around a copy
            for (int tile = first; tile < tiles; tile += apart) {
                const Place at = place_of(tile, rows, columns);
                const int row = at.row + rank * ROWS, column = at.column + rank * share;
                // Copies that lie wholly beyond X are slow, and nobody reads what they would bring.
                const int shares = min(CLUSTER, (batch - at.column + share - 1) / share);
                const u32 bytes = shares * (share * 128) + W_STAGE + PLACES_STAGE;
                for (int block = 0; block < blocks; block++) {
                    const u32 ready = full + stage * 8;
                    const u32 target = base + stage * X_STAGE + rank * (share * 128);
                    wait(empty + stage * 8, turn ^ 1);
                    expect(ready, bytes);
                    if (rank < shares) copy_to_all(target, x, block * 64, column, ready, CLUSTER);
                    copy_in(base + W_AT + stage * W_STAGE, w, block * 32, row, ready);
                    copy_in(base + PLACES_AT + stage * PLACES_STAGE, places, 0, block, row / 64,
                            ready);
                    if (++stage == STAGES) stage = 0, turn ^= 1;
                }
            }
        }
#if SUM
        if (warp == 1 && elected()) {
            for (int tile = first, nth = 1; tile < tiles; tile += apart, nth++) {
                for (int i = 0; i < GROUPS; i++) wait_told(base + TOLD_AT + i * 4, nth);
                announce(their_flags + sum.slot(tile), epoch);
            }
        }
        if (warp > 0) {
            __syncwarp();
            add_pieces(sum, base);
        }
#endif
    } else {
        take_registers<MULTIPLIER>();
        int stage = 0;
        u32 turn = 0;
        // The lane's row of the four 8 × 8 matrices, which are rows 0-7 and 8-15 of A, then again the
        // next 16 bytes; a row is 64 bytes, swizzled.
        const int matrix_row = warp * 16 + row_of_w(lane % 16), half = lane / 16;
        const u32 values_at = base + W_AT + group * 4096 + matrix_row * 64 +
                              ((half ^ (matrix_row >> 1 & 3)) << 4);
        const u32 places_at = base + PLACES_AT + group * 512 + thread * 4;
        const int own = warp * 16 + row_of_w(lane / 4);  // row of W of the sums 0, 1 of every four
        float sums[COLUMNS / 2];
        u32 a[2][8];  // of this step and of the last one

        auto release_last = [&]() {  // the stage before this one, which the products have read
            const int last = stage == 0 ? STAGES - 1 : stage - 1;
            if (lane < CLUSTER) arrive(empty + last * 8, lane);
        };
        auto step = [&](u32* set, int block) {
            wait(full + stage * 8, turn);
            load_matrices(set, values_at + stage * W_STAGE);
            load_matrices(set + 4, (values_at ^ 32) + stage * W_STAGE);
            const u32 codes = load_shared(places_at + stage * PLACES_STAGE);
            const u64 x_block = descriptor(base + stage * X_STAGE);
            fence_products();
            multiply<0>(sums, set[0], set[1], set[2], set[3], x_block, codes, block > 0);
            multiply<1>(sums, set[4], set[5], set[6], set[7], x_block + 4, codes, 1);
            commit_products();
            wait_products<1>();
            if (block > 0) release_last();
            if (++stage == STAGES) stage = 0, turn ^= 1;
        };

#if SUM
        u32 written = 0;
#endif
        for (int tile = first; tile < tiles; tile += apart) {
#pragma unroll 1
            for (int block = 0; block + 1 < blocks; block += 2) {
                step(a[0], block);
                step(a[1], block + 1);
            }
            if (blocks % 2) step(a[0], blocks - 1);
            const Place at = place_of(tile, rows, columns);
            const int row = at.row + rank * ROWS + group * 64;
            const bool biased = BIAS && row < lines * 64;
            const float low = biased ? widened(bias[row + own]) : 0.0f;
            const float high = biased ? widened(bias[row + (own ^ 2)]) : 0.0f;
            wait_products<0>();
            release_last();

            // The warp's sums of eight rows of X, turned: lane 4b + q gets of row b what rows 4q to
            // 4q + 3 of W give, a sector of Y with the three lanes beside it.
            const long long pitch = lines * 64, eight = pitch * 8;
            u16* to = y + (at.column + lane / 4) * pitch + row + warp * 16 + lane % 4 * 4;
            const int left = row < lines * 64 ? batch - at.column - lane / 4 : 0;
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; i++, to += eight) {
                const float* d = sums + i * 4;
                const u32 low_pair = turned(rounded(d[0] + low, d[1] + low));
                const u32 high_pair = turned(rounded(d[2] + high, d[3] + high));
                const bool swap = lane % 4 / 2;
                store_if(i * 8 < left, to, swap ? high_pair : low_pair,
                         swap ? low_pair : high_pair);
            }
#if SUM
            group_wait(group);
            if (thread == 0) tell(base + TOLD_AT + group * 4, ++written);
#endif
        }
#if SUM
        add_pieces(sum, base);
#endif
    }
    // A block that ends takes its shared memory from copies and arrivals of the others.
    __syncwarp();
    cluster_wait();
#if SUM
    if (threadIdx.x == 0) count_grid(state, state + 1);
#endif
}
