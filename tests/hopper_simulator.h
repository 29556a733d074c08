// The functions of `hopper.cu` on the CPU, and `go`, which runs a grid that calls them.
//
// Every thread of the grid is a coroutine; which one goes on is random, and at times a whole block
// stands still. What the hardware may do later is done late: a copy lands after a random while, what
// is stored in Y at the next barrier at the latest, what comes to one of two GPUs takes its time, and
// with `late` a product reads its operands a random while after its commit. So what is overwritten
// too early, or read before it is there, gives a wrong result. A wait that never ends, a barrier with
// too many arrivals, an address outside of memory and one of a block that has ended end the program.
// Fences and times are not modelled.

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;
using std::min;
using Action = std::function<void()>;
using Bytes = std::vector<unsigned char>;
struct Place2 { int x, y; };
struct uint4 { u32 x, y, z, w; };
// Outermost dimension first; of a matrix it is 1. size: bytes of an element.
struct TensorMap { unsigned char* data; int size, swizzle; long shape[3], box[3]; };

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __cluster_dims__(...)
#define __launch_bounds__(...)
#define __cvta_generic_to_shared(x) 1000  // the kernel aligns it
#define threadIdx (Place2{me->index, 0})
#define blockIdx (me->block->place)
#define gridDim (Place2{blocks_of_gpu, 0})

unsigned char shared[1];

// --- threads

struct Barrier { int expected = 0, pending = 0; long bytes = 0; u32 phase = 0; };
struct Meeting { int arrived = 0; u32 turn = 0, address[32]; };
struct Product { float* sums[128]; u32 *a[128][4], codes[128]; u64 x; int selector, add, issued; };
struct Group {  // of four warps
    std::deque<Product> products;
    struct Batch { size_t issued; long due; };
    std::vector<Batch> batches;  // of each commit: how many products by then, and when they run
    size_t issued[128] = {}, commits[128] = {}, ended = 0;
    Meeting meeting;
};
struct Block {
    Place2 place;
    int gpu;
    Bytes memory;
    std::vector<Barrier> barriers;
    int running;  // threads
    Group groups[5];
    Meeting warps[20];
};
struct Thread {
    Block* block;
    int index;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<bool()> ready;
    std::vector<std::pair<void*, u64>> stores;  // that no other thread need see yet
    bool ended = false;
};
struct Copy { int rounds; Action land; };

Thread* me;
ucontext_t scheduler;
std::vector<Copy> flying;
std::deque<Block> grid;
std::vector<Meeting> clusters;
int threads, blocks_of_gpu;  // of a block; of a grid
long now, last_due;  // rounds of the scheduler
bool late;

void check(bool right, const char* problem) {
    if (!right) printf("%s\n", problem), exit(1);
}

void until(std::function<bool()> ready) {
    for (me->ready = ready; !ready();) swapcontext(&me->context, &scheduler);
    me->ready = nullptr;
}

void meet(Meeting& at, int all) {
    const u32 turn = at.turn;
    if (++at.arrived == all) at.arrived = 0, at.turn++;
    until([&at, turn] { return at.turn != turn; });
}

unsigned char* at(Block& block, u32 address, size_t bytes) {
    check(address + bytes <= block.memory.size(), "an address outside of shared memory");
    check(block.running, "an address of a block that has ended");
    return &block.memory[address];
}

template <class T> T read(const void* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

int lane() { return me->index % 32; }
int in_group() { return me->index % 128; }
Meeting& warp() { return me->block->warps[me->index / 32]; }
Group& group() { return me->block->groups[me->index / 128]; }
int cluster() { return (me->block->gpu * blocks_of_gpu + me->block->place.x) / CLUSTER; }
Block& of_cluster(u32 rank) { return grid[cluster() * CLUSTER + rank]; }
void __syncwarp() { meet(warp(), 32); }
bool elected() { return lane() == 0; }
void land() {
    for (auto& [to, value] : me->stores) memcpy(to, &value, 8);
    me->stores.clear();
}

void group_wait(int) { land(), meet(group().meeting, 128); }
void cluster_wait() { land(), meet(clusters[cluster()], CLUSTER * threads); }

// --- barriers

Barrier& barrier_of(Block& block, u32 address) {
    Barrier& found = block.barriers.at(address / 8);
    check(found.expected, "a barrier that was not made");
    check(block.running, "a barrier of a block that has ended");
    return found;
}

void count(Barrier& barrier, int arrivals, long bytes) {
    check(barrier.pending >= arrivals, "too many arrivals");
    barrier.pending -= arrivals, barrier.bytes += bytes;
    if (!barrier.pending && !barrier.bytes) barrier.phase++, barrier.pending = barrier.expected;
}

void init(u32 barrier, int many) { me->block->barriers.at(barrier / 8) = {many, many}; }
void expect(u32 barrier, u32 bytes) { count(barrier_of(*me->block, barrier), 1, bytes); }
void arrive(u32 barrier, u32 rank) { count(barrier_of(of_cluster(rank), barrier), 1, 0); }

void wait(u32 barrier, u32 parity) {
    Barrier& found = barrier_of(*me->block, barrier);
    until([&found, parity] { return (found.phase & 1) != parity; });
}

// --- copies

// f(address in shared memory, element, or nullptr outside of the tensor) for all of a box.
template <class F>
void each(const TensorMap& map, u32 address, int tile, int row, int column, F f) {
    const u32 rows = map.swizzle == 128 ? 7 : map.swizzle == 64 ? 3 : 0;
    for (long t = tile; t < tile + map.box[0]; t++)
        for (long r = row; r < row + map.box[1]; r++)
            for (long c = column; c < column + map.box[2]; c++, address += map.size) {
                const bool inside = t < map.shape[0] && r < map.shape[1] && c < map.shape[2];
                const long place = (t * map.shape[1] + r) * map.shape[2] + c;
                f(address ^ (address >> 7 & rows) << 4,
                  inside ? map.data + place * map.size : nullptr);
            }
}

void copy(Block& block, u32 target, TensorMap map, int tile, int row, int column, u32 barrier) {
    flying.push_back({rand() % 40, [=, &block] {
        each(map, target, tile, row, column, [&](u32 address, unsigned char* from) {
            unsigned char* to = at(block, address, map.size);
            from ? memcpy(to, from, map.size) : memset(to, 0, map.size);
        });
        count(barrier_of(block, barrier), 0, -map.box[0] * map.box[1] * map.box[2] * map.size);
    }});
}

void copy_in(u32 target, const TensorMap& source, int column, int row, u32 barrier) {
    copy(*me->block, target, source, 0, row, column, barrier);
}

void copy_in(u32 target, const TensorMap& source, int word, int block, int tile, u32 barrier) {
    copy(*me->block, target, source, tile, block, word, barrier);
}

void copy_to_all(u32 target, const TensorMap& from, int column, int row, u32 barrier, int many) {
    for (int i = 0; i < many; i++) copy(of_cluster(i), target, from, 0, row, column, barrier);
}

void fence_init() {}

// --- between warps, blocks and two GPUs

void tell(u32 address, u32 count) { memcpy(at(*me->block, address, 4), &count, 4); }

void wait_told(u32 address, u32 count) {
    until([=] { return read<u32>(at(*me->block, address, 4)) >= count; });
}

u32 claim(u32 address) {
    const u32 count = read<u32>(at(*me->block, address, 4));
    tell(address, count + 1);
    return count;
}

u32 of_first(u32 value) {
    Meeting& all = warp();
    all.address[lane()] = value;
    __syncwarp();
    const u32 found = all.address[0];
    __syncwarp();
    return found;
}

void announce(u32* flag, u32 epoch) { *flag = epoch; }
void wait_announced(const u32* flag, u32 epoch) { until([=] { return *flag - epoch <= 1; }); }
u32 load_fresh(const u32* from) { return *from; }

uint4 load_fresh(const uint4* from) {
    static const int slow = rand() % 2;  // one of them
    if (me->block->gpu == slow && rand() % 8 == 0) {
        const long due = now + rand() % 1000;
        last_due = std::max(last_due, due);
        until([due] { return now >= due; });
    }
    return *from;
}

void count_grid(u32* epoch, u32* ended) {
    if (++*ended == blocks_of_gpu) *ended = 0, ++*epoch;
}

// --- operands and results: bf16

float widened(u16 bits) { const u32 word = (u32)bits << 16; return read<float>(&word); }

u32 narrowed(float value) {
    const u32 word = read<u32>(&value);
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

u32 rounded(float low, float high) { return narrowed(low) | narrowed(high) << 16; }

u32 added(u32 a, u32 b) {
    return rounded(widened(a) + widened(b), widened(a >> 16) + widened(b >> 16));
}

uint4 added(const uint4& a, const uint4& b) {
    return {added(a.x, b.x), added(a.y, b.y), added(a.z, b.z), added(a.w, b.w)};
}

u32 load_shared(u32 address) { return read<u32>(at(*me->block, address, 4)); }

// Lanes 8i to 8i + 7 give the addresses of the rows of matrix i.
void load_matrices(u32* a, u32 address) {
    Meeting& all = warp();
    all.address[lane()] = address;
    __syncwarp();
    for (int i = 0; i < 4; i++)
        a[i] = load_shared(all.address[8 * i + lane() / 4] + lane() % 4 * 4);
    __syncwarp();
}

u32 turned(u32 pair) {
    Meeting& all = warp();
    all.address[lane()] = pair;
    __syncwarp();
    u32 found = 0;
    for (int i = 0; i < 2; i++) {
        const u32 word = all.address[(lane() % 4 * 2 + i) * 4 + lane() / 8];
        found |= (word >> lane() / 4 % 2 * 16 & 0xffff) << 16 * i;
    }
    __syncwarp();
    return found;
}

void store_if(bool inside, u16* to, u32 low, u32 high) {
    if (inside) me->stores.push_back({to, low | (u64)high << 32});
    if (rand() % 2) land();
}

// --- products: PTX ISA, "wgmma.mma_async.sp", m64nNk32, fragments of A and D, sparsity selector

void run(Block& block, const Product& p) {
    static float a[64][32], x[COLUMNS][32];
    memset(a, 0, sizeof a);
    for (int i = 0; i < 512; i++) {
        const int thread = i / 4, half = i % 2, four = thread % 4 + i % 4 / 2 * 4;
        const int row = thread % 32 / 4, first = thread / 32 * 32, pair = *p.a[thread][i % 4];
        const u32 word = p.codes[first + 4 * row + 2 * p.selector + four / 4];
        const u32 code = word >> (16 * half + 4 * (four % 4)) & 15;
        float* kept = a[first / 2 + row + 8 * half] + 4 * four;
        kept[code & 3] = widened(pair), kept[code >> 2] = widened(pair >> 16);
    }
    for (int i = 0; i < COLUMNS * 32; i++) {
        const u32 address = (u32)(p.x & 0x3fff) * 16 + i / 32 * 128 + i % 32 * 2;
        x[i / 32][i % 32] = widened(read<u16>(at(block, address ^ (address >> 7 & 7) << 4, 2)));
    }
    for (int thread = 0; thread < 128; thread++)
        for (int i = 0; i < COLUMNS / 2; i++) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
            const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
            float sum = p.add ? p.sums[thread][i] : 0;
            for (int k = 0; k < 32; k++) sum += a[row][k] * x[column][k];
            p.sums[thread][i] = sum;
        }
}

void run_first(size_t products) {
    for (Group& all = group(); all.ended < products;) {
        Product& next = all.products[all.ended];
        const size_t ended = all.ended;
        until([&, ended] { return all.ended > ended || next.issued == 128; });
        if (all.ended == ended) run(*me->block, next), all.ended++;
    }
}

template <int SELECTOR>
void multiply(float* d, u32& a0, u32& a1, u32& a2, u32& a3, u64 x, u32 codes, int add) {
    Group& all = group();
    const size_t number = all.issued[in_group()]++;
    if (all.products.size() == number) all.products.emplace_back();
    Product& p = all.products[number];
    u32* a[] = {&a0, &a1, &a2, &a3};
    std::copy(a, a + 4, p.a[in_group()]);
    p.sums[in_group()] = d, p.codes[in_group()] = codes;
    p.x = x, p.selector = SELECTOR, p.add = add, p.issued++;
    if (!late) run_first(number + 1);
}

void commit_products() {
    Group& all = group();
    if (all.commits[in_group()]++ < all.batches.size()) return;
    const long due = late ? now + rand() % 100 : 0;
    all.batches.push_back({all.issued[in_group()], due}), last_due = std::max(last_due, due);
}

template <int LEFT> void wait_products() {
    const size_t commits = group().commits[in_group()];
    if (commits <= LEFT) return;
    const Group::Batch last = group().batches[commits - LEFT - 1];
    until([due = last.due] { return now >= due; });
    run_first(last.issued);
}

void fence_products() {}
template <int REGISTERS> void give_registers() {}
template <int REGISTERS> void take_registers() {}

// --- the grid

Action body;

void enter() {
    body();
    me->ended = true, me->block->running--;
    swapcontext(&me->context, &scheduler);
}

void go(std::vector<Thread> all) {
    const Block* still;  // it stands still
    for (Thread& thread : all) {
        thread.stack.reset(new char[65536]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = 65536;
        makecontext(&thread.context, enter, 0);
    }
    for (size_t left = all.size(); left; now++) {
        if (now % 512 == 0) still = rand() % 2 ? &grid[rand() % grid.size()] : nullptr;
        bool moved = !flying.empty() || now < last_due || still;
        const size_t first = rand(), step = rand() % 2 ? 1 : all.size() - 1;  // either direction
        for (size_t n = 0; n < all.size(); n++) {
            me = &all[(first + n * step) % all.size()];
            if (me->ended || me->block == still) continue;
            if (me->ready && !me->ready()) continue;
            moved = true;
            if (rand() % 4) swapcontext(&scheduler, &me->context), left -= me->ended;
        }
        for (Copy& copy : flying)
            if (copy.rounds-- == 0) copy.land();
        std::erase_if(flying, [](const Copy& copy) { return copy.rounds < 0; });
        check(moved, "every thread waits");
    }
}
