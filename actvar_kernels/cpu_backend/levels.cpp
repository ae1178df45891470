// Which instruction sets the library is compiled for, which of them the processor has, and how weights are packed for them.

#define KERNEL "layout.h"
#include "levels.h"

namespace {

#define LAYOUT_OF(level) level::LAYOUT,
const int *const LAYOUTS[] = {FOR_EVERY_LEVEL(LAYOUT_OF)};
const char *const NAMES[] = {"portable", "AVX2", "AVX-512", "AVX-512 with bfloat16"};

}  // namespace

extern "C" {

// The highest level that this processor runs.
int best_level() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!wide) return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
    return 0;
#endif
}

const char *level_name(int level) { return NAMES[level]; }

// Floats of a vector, vectors of a panel, rows that lie side by side (of bfloat16).
void level_layout(int level, int *layout) { memcpy(layout, LAYOUTS[level], 3 * sizeof(int)); }
}
