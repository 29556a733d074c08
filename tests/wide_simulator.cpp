// Runs `wide24.cu` on the CPU: FILE N K B CLUSTERS LATE SEED.
//
// FILE has x, values, places and bias, all but places bf16; y is added. Compiled with the constants
// of `wide24.cu`, and SHARED_BYTES.

#include "hopper_simulator.h"
#include "wide24.cu"

int main(int, char** words) {
    const long N = atol(words[2]), K = atol(words[3]), B = atol(words[4]);
    late = atoi(words[6]), srand(atoi(words[7]));
    FILE* file = fopen(words[1], "r+b");
    auto take = [&](long bytes) {
        Bytes found(bytes);
        check(fread(found.data(), 1, bytes, file) == bytes, "the file is too short");
        return found;
    };
    Bytes x = take(B * K * 2), w = take(N * K), places = take(N * K / 8), bias = take(N * 2);
    Bytes y(B * N * 2, 0x7f);

    const int rows = (N + CLUSTER * ROWS - 1) / (CLUSTER * ROWS);
    const int columns = (B + COLUMNS - 1) / COLUMNS;
    clusters.resize(min(atoi(words[5]), rows * columns));
    threads = THREADS;
    std::vector<Thread> all;
    for (int i = 0; i < clusters.size() * CLUSTER; i++) {
        grid.push_back({{i, 0}, Bytes(1000 + SHARED_BYTES, 0x7f), {}, threads});
        grid[i].barriers.resize(grid[i].memory.size() / 8);
        for (int j = 0; j < threads; j++) all.push_back({&grid[i], j});
    }
    body = [&] {
        product({x.data(), 2, 128, {1, B, K}, {1, COLUMNS / CLUSTER, 64}},
                {w.data(), 2, 64, {1, N, K / 2}, {1, GROUPS * 64, 32}},
                {places.data(), 4, 0, {N / 64, K / 64, 128}, {GROUPS, 1, 128}},
                {y.data(), 2, 128, {1, B, N}, {1, 32, 64}},
                (u16*)bias.data(), B, N / 64, K / 64, rows, columns);
    };
    go(std::move(all));
    fwrite(y.data(), 1, y.size(), file);
    fclose(file);
}
