// Compute a 3x3 convolution with padding on the CPU by Winograd's F(M x M, 3 x 3), M = 2 or 4 (Lavin and Gray, 2016). A
// tile of M x M outputs takes (M + 2)^2 products instead of 9 M^2. Images lie pixel by pixel, each with its channels.
// cpu_kernel.py transforms and packs the weights.

#include <cstddef>
#include <cstdint>

namespace {

struct Job {
    const void *x;         // [images, height, width, channels]; enlarged: [images, height / 2, width / 2, channels]
    const void *weight;    // [(M + 2)^2, channels, columns] in panels
    const float *bias;     // [columns], padded to a vector
    const void *residual;  // [images, height, width, columns] to add, or null
    void *out;             // [images, height, width, columns]
    int images, height, width, channels, columns;
    int enlarge;  // 1 repeats every pixel of x in both directions.
    int group;    // This many tiles share each read of a panel of weights.
};

struct Tile {  // M x M outputs
    int image, top, left;
};

constexpr int MAX_GROUP = 48;  // A group has at most this many tiles.

}  // namespace

#define KERNEL "../conv3x3/cpu_tile.h"
#include "../cpu_backend/isa.h"

namespace {

struct Kind {
    size_t (*bytes)(const Job &);
    void (*run)(const Job &, int64_t, int, char *);
};

// Large tiles are in float32 alone: bfloat16 would round their transformed inputs too much.
#define KINDS_OF(isa)                                          \
    {{isa::scratch_bytes<float, 2>, isa::run<float, 2>},       \
     {isa::scratch_bytes<bfloat16, 2>, isa::run<bfloat16, 2>}, \
     {isa::scratch_bytes<float, 4>, isa::run<float, 4>}},
const Kind ISAS[][3] = {FOR_EVERY_ISA(KINDS_OF)};

}  // namespace

// Convolve x and return 0, or 1 when memory ran out. Channels are a multiple of 16; outputs is M.
extern "C" int conv3x3(int isa, int is_bfloat16, int outputs, const void *x, const void *weight, const void *bias,
                       const void *residual, void *out, int images, int height, int width, int channels, int columns,
                       int enlarge, int threads) {
    const int64_t tiles = (int64_t)images * ((height + outputs - 1) / outputs) * ((width + outputs - 1) / outputs);
    const int64_t share = (tiles + threads - 1) / threads;
    // The transformed inputs of a group have to fit the second-level cache.
    const int fitting_tiles = (1 << 20) / ((outputs + 2) * (outputs + 2) * channels * 4) / 6 * 6;
    const int max_group = outputs == 2 || fitting_tiles > MAX_GROUP ? MAX_GROUP : fitting_tiles < 6 ? 6 : fitting_tiles;
    const Job job = {x,      weight, (const float *)bias, residual, out,
                     images, height, width,               channels, columns,
                     enlarge, share < max_group ? (int)share : max_group};
    const Kind &kind = ISAS[isa][outputs == 4 ? 2 : is_bfloat16];
    const size_t bytes = (kind.bytes(job) + 63) / 64 * 64;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        char *scratch = (char *)aligned_alloc(64, bytes);
        if (scratch == nullptr) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < tiles; first += job.group)
            if (scratch != nullptr)
                kind.run(job, first, first + job.group < tiles ? job.group : tiles - first, scratch);
        free(scratch);
    }
    return failed;
}
