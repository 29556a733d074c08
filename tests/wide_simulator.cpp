// Runs `wide24.cu` on the CPU: FILE N K B CLUSTERS LATE SEED.
//
// FILE has x, values, places and bias, all but places bf16; y is added. With SUM it has those of two
// GPUs, which make three sums, of x times 2, -1 and 1, and y of all sums of both are added.
// Compiled with the constants of `wide24.cu`, and SHARED_BYTES.

#include "hopper_simulator.h"
#include "wide24.cu"

#if SUM
const int GPUS = 2, CALLS = 3;
#else
const int GPUS = 1, CALLS = 1;
#endif

struct Gpu { Bytes x[CALLS], y[CALLS], w, places, bias, own; u32 flags[1000], state[2]; Meeting meeting; };

int main(int, char** words) {
    const long N = atol(words[2]), K = atol(words[3]), B = atol(words[4]);
    late = atoi(words[6]), srand(atoi(words[7]));
    FILE* file = fopen(words[1], "r+b");
    auto take = [&](long bytes) {
        Bytes found(bytes);
        check(fread(found.data(), 1, bytes, file) == bytes, "the file is too short");
        return found;
    };
    auto multiple = [](Bytes x, float factor) {
        for (u16* at = (u16*)x.data(); at < (u16*)(x.data() + x.size()); at++)
            *at = narrowed(factor * widened(*at));
        return x;
    };
    static Gpu gpus[GPUS];
    for (Gpu& gpu : gpus) {
        gpu.x[CALLS - 1] = take(B * K * 2), gpu.w = take(N * K), gpu.places = take(N * K / 8);
        gpu.bias = take(N * 2), gpu.own = Bytes(B * N * 4, 0x7f);
        gpu.state[0] = 1u << 31 | 1;  // so many sums that a flag that was never set must not pass
        for (Bytes& y : gpu.y) y = Bytes(B * N * 2, 0x7f);
        for (int i = 0; i < CALLS - 1; i++) gpu.x[i] = multiple(gpu.x[CALLS - 1], i ? -1 : 2);
    }

    const int rows = (N + CLUSTER * ROWS - 1) / (CLUSTER * ROWS);
    const int columns = (B + COLUMNS - 1) / COLUMNS;
    const int at_once = min(atoi(words[5]), rows * columns);
    threads = THREADS, blocks_of_gpu = at_once * CLUSTER;
    clusters.resize(at_once * GPUS);
    std::vector<Thread> all;
    for (int i = 0; i < blocks_of_gpu * GPUS; i++) {
        grid.push_back({{i % blocks_of_gpu, 0}, i / blocks_of_gpu});
        for (int j = 0; j < threads; j++) all.push_back({&grid[i], j});
    }
    body = [&] {
        Gpu &gpu = gpus[me->block->gpu], &other = gpus[GPUS - 1 - me->block->gpu];
        for (int call = 0; call < CALLS; call++) {
            const Bytes &x = gpu.x[call], &y = gpu.y[call];
            meet(gpu.meeting, blocks_of_gpu * threads);
            if (me->index == 0) {
                Block fresh = {me->block->place, me->block->gpu, Bytes(1000 + SHARED_BYTES, 0x7f)};
                fresh.barriers.resize(fresh.memory.size() / 8), fresh.running = threads;
                *me->block = fresh;
            }
            meet(gpu.meeting, blocks_of_gpu * threads);
            product({(unsigned char*)x.data(), 2, 128, {1, B, K}, {1, COLUMNS / CLUSTER, 64}},
                    {gpu.w.data(), 2, 64, {1, N, K / 2}, {1, GROUPS * 64, 32}},
                    {gpu.places.data(), 4, 0, {N / 64, K / 64, 128}, {GROUPS, 1, 128}},
                    (u16*)(SUM ? gpu.own : y).data(), (u16*)gpu.bias.data(), B, N / 64, K / 64, rows, columns
#if SUM
                    , (uint4*)other.own.data(), B * N / 64,
                    (uint4*)y.data(), gpu.flags, other.flags, gpu.state
#endif
            );
        }
    };
    go(std::move(all));
    for (Gpu& gpu : gpus)
        for (Bytes& y : gpu.y) fwrite(y.data(), 1, y.size(), file);
    fclose(file);
}
