// Compile code once per instruction set: #define KERNEL as the header with the code and include this file. Every set
// gets a namespace with vectors.h and KERNEL. FOR_EVERY_ISA lists the namespaces, the highest set last, and FOR_EVERY_KIND
// a template for the kinds of numbers, in the order of DTYPES in cpu.py.

#include "numbers.h"

#include <cstdlib>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int padded(int count, int to) { return (count + to - 1) / to * to; }
inline int smaller(int a, int b) { return a < b ? a : b; }

// Hold memory of one thread; `failed` becomes 1 where there is none.
struct Scratch {
    char *const bytes;

    Scratch(size_t size, int &failed) : bytes((char *)aligned_alloc(64, (size + 63) / 64 * 64)) {
        if (bytes == nullptr) {
#pragma omp atomic write
            failed = 1;
        }
    }
    ~Scratch() { free(bytes); }
};

#define NAMESPACE portable
#define LANES 4
#define VECTORS 2
#define ROWS 4
#define DOT 0
#include "vectors.h"
#include KERNEL
#undef NAMESPACE
#undef LANES
#undef VECTORS
#undef ROWS

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define NAMESPACE avx2
#define LANES 8
#define VECTORS 2
#define ROWS 6
#include "vectors.h"
#include KERNEL
#undef NAMESPACE
#undef LANES
#undef VECTORS
#undef ROWS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define NAMESPACE avx512
#define LANES 16
#define VECTORS 4
#define ROWS 6
#include "vectors.h"
#include KERNEL
#undef NAMESPACE
#undef DOT
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#define NAMESPACE avx512_bf16
#define DOT 1
#include "vectors.h"
#include KERNEL
#undef NAMESPACE
#pragma GCC pop_options

#define FOR_EVERY_ISA(X) X(portable) X(avx2) X(avx512) X(avx512_bf16)
#else
#define FOR_EVERY_ISA(X) X(portable)
#endif

#define FOR_EVERY_KIND(X) {X<float>, X<bfloat16>, X<float16>}

}  // namespace
