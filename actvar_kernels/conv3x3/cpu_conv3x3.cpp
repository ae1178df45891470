// Compute a 3x3 convolution with padding on the CPU by Winograd's algorithm (Lavin and Gray, 2016), which takes fewer
// products than the nine of a pixel. Images lie pixel by pixel, each with its channels. cpu_kernel.py transforms and
// packs the weights. docs/kernels/conv3x3.md derives the three algorithms.

#include <cstddef>
#include <cstdint>

namespace {

struct Job {
    const void *x;         // [images, height, width, channels]
    const void *weight;    // [products of a tile, channels, columns] in panels
    const float *bias;     // [columns], padded to a vector
    const void *residual;  // to add, in the shape of out, or null
    void *out;             // [images, height, width, columns]; enlarged [images, 2 * height, 2 * width, columns]
    int images, height, width, channels, columns;
    int down, across;  // tiles of an image
    int group;         // This many tiles share each read of a panel of weights.
};

struct Tile {
    int image, row, column;  // Rows and columns are counted in tiles.
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

struct Algorithm {
    int pixels, numbers;  // A tile lies over pixels x pixels pixels and has this many transformed inputs a channel.
    Kind kinds[3];
};

// Large tiles are not in bfloat16, which would round their transformed inputs too much.
#define KIND(isa, T, W) {isa::scratch_bytes<T, isa::W>, isa::run<T, isa::W>}
#define ALGORITHM(isa, W, ...) \
    {isa::W::PIXELS, isa::NUMBERS<isa::W>, {KIND(isa, float, W), __VA_ARGS__, KIND(isa, float16, W)}}
#define ALGORITHMS_OF(isa)                              \
    {ALGORITHM(isa, Small, KIND(isa, bfloat16, Small)), \
     ALGORITHM(isa, Large, {}),                         \
     ALGORITHM(isa, Enlarging, KIND(isa, bfloat16, Enlarging))},
const Algorithm ISAS[][3] = {FOR_EVERY_ISA(ALGORITHMS_OF)};

}  // namespace

// Convolve x and return 0, or 1 when memory ran out. Channels are a multiple of 16; `algorithm` counts ALGORITHMS_OF.
extern "C" int conv3x3(int isa, int kind, int algorithm, const void *x, const void *weight, const void *bias,
                       const void *residual, void *out, int images, int height, int width, int channels, int columns,
                       int threads) {
    const Algorithm &chosen = ISAS[isa][algorithm];
    const Kind &ops = chosen.kinds[kind];
    const int down = (height + chosen.pixels - 1) / chosen.pixels, across = (width + chosen.pixels - 1) / chosen.pixels;
    const int64_t tiles = (int64_t)images * down * across;
    const int64_t share = (tiles + threads - 1) / threads;
    // The transformed inputs of a group have to fit the second-level cache.
    const int fitting_tiles = (1 << 20) / (chosen.numbers * channels * 4) / 6 * 6;
    const int max_group =
        chosen.pixels == 2 || fitting_tiles > MAX_GROUP ? MAX_GROUP : fitting_tiles < 6 ? 6 : fitting_tiles;
    const Job job = {x,        weight,  (const float *)bias, residual, out,    images, height, width,
                     channels, columns, down,                across,   share < max_group ? (int)share : max_group};
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const Scratch scratch(ops.bytes(job), failed);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < tiles; first += job.group)
            if (scratch.bytes != nullptr)
                ops.run(job, first, first + job.group < tiles ? job.group : tiles - first, scratch.bytes);
    }
    return failed;
}
