// A 3x3 convolution with padding on the CPU by Winograd's F(2x2, 3x3): 16 products a tile of 4 outputs in place of 36 (Lavin
// and Gray, 2016). Images lie pixel by pixel, each with its channels. cpu_kernel.py transforms and packs the weights.

#include <cstddef>
#include <cstdint>

namespace {

struct Job {
    const void *x;       // [images, height, width, channels]
    const void *weight;  // [16, channels, columns] in panels
    const float *bias;   // [columns], padded to a vector
    void *out;           // [images, height, width, columns]
    int images, height, width, channels, columns;
};

constexpr int TILES = 48;  // of 2 x 2 outputs, which go over a panel of weights together

}  // namespace

#define KERNEL "conv3x3/cpu_tile.h"
#include "../cpu_levels.h"

namespace {

struct Level {
    size_t (*bytes[2])(const Job &);  // float32, bfloat16
    void (*runs[2])(const Job &, int64_t, int, char *);
};

#define LEVEL_OF(level) \
    {{level::scratch_bytes<float>, level::scratch_bytes<bfloat16>}, {level::run<float>, level::run<bfloat16>}},
const Level LEVELS[] = {FOR_EVERY_LEVEL(LEVEL_OF)};

}  // namespace

// Channels are a multiple of 16. Returns 0, or 1 when memory ran out.
extern "C" int conv3x3(int level, int is_bfloat16, const void *x, const void *weight, const void *bias, void *out,
                       int images, int height, int width, int channels, int columns, int threads) {
    const Job job = {x, weight, (const float *)bias, out, images, height, width, channels, columns};
    const int64_t tiles = (int64_t)images * ((height + 1) / 2) * ((width + 1) / 2);
    const int64_t share = (tiles + threads - 1) / threads;
    const int group = share < TILES ? share : TILES;
    const size_t bytes = (LEVELS[level].bytes[is_bfloat16](job) + 63) / 64 * 64;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        char *scratch = (char *)aligned_alloc(64, bytes);
        if (scratch == nullptr) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < tiles; first += group)
            if (scratch != nullptr)
                LEVELS[level].runs[is_bfloat16](job, first, first + group < tiles ? group : tiles - first, scratch);
        free(scratch);
    }
    return failed;
}
