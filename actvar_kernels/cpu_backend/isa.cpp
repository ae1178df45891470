// Tell which instruction sets the library and the processor have, and how weights are packed for each set.

#define KERNEL "layout.h"
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#define LAYOUT_OF(isa) isa::LAYOUT,
const int *const LAYOUTS[] = {FOR_EVERY_ISA(LAYOUT_OF)};
const char *const NAMES[] = {"portable", "AVX2", "AVX-512", "AVX-512 with bfloat16"};

}  // namespace

extern "C" {

// Return the highest isa that this processor runs.
int best_isa() {
#if defined(__x86_64__)
    unsigned a, b, features, d;  // GCC 10 does not know "f16c" by name.
    const bool f16c = __get_cpuid(1, &a, &b, &features, &d) && (features & bit_F16C);
    if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!wide) return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
    return 0;
#endif
}

const char *isa_name(int isa) { return NAMES[isa]; }

// Write floats of a vector, vectors of a panel and bfloat16 rows that lie side by side to `layout`.
void isa_layout(int isa, int *layout) { memcpy(layout, LAYOUTS[isa], 3 * sizeof(int)); }
}
