// Define vectors and register tiles for one instruction set. isa.h includes this file once per NAMESPACE. LANES is
// floats of a vector, VECTORS vectors of a full panel, ROWS rows of a register tile; DOT is 1 for products of bfloat16
// pairs. Use no templates of the standard library here: the linker could take this set's version for all callers.

namespace NAMESPACE {

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

template <class V> inline V load(const void *from) {
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}
template <class V> inline void store(void *to, V value) { memcpy(to, &value, sizeof value); }

// Widen numbers of 16 bits, or round to the nearest of them, ties to even. NaN stays NaN, and a number that is too large
// becomes infinity. GCC's builtin would convert each half of a vector alone and join the halves.
template <class T> vec widened(hvec h);
template <class T> hvec rounded(vec x);
template <> inline hvec rounded<bfloat16>(vec x) {
    uvec bits = (uvec)x;
    uvec nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec nan = (bits >> 16) | 0x40;
    return __builtin_convertvector((uvec)(x == x ? (ivec)nearest : (ivec)nan), hvec);
}
#if LANES == 16
template <> inline vec widened<bfloat16>(hvec h) { return (vec)((uvec)_mm512_cvtepu16_epi32((__m256i)h) << 16); }
template <> inline vec widened<float16>(hvec h) { return (vec)_mm512_cvtph_ps((__m256i)h); }
template <> inline hvec rounded<float16>(vec x) { return (hvec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif LANES == 8
template <> inline vec widened<bfloat16>(hvec h) { return (vec)((uvec)_mm256_cvtepu16_epi32((__m128i)h) << 16); }
template <> inline vec widened<float16>(hvec h) { return (vec)_mm256_cvtph_ps((__m128i)h); }
template <> inline hvec rounded<float16>(vec x) { return (hvec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
template <> inline vec widened<bfloat16>(hvec h) { return (vec)(__builtin_convertvector(h, uvec) << 16); }
#if defined(__aarch64__)
typedef __fp16 fp16vec __attribute__((vector_size(2 * LANES)));
template <> inline vec widened<float16>(hvec h) { return __builtin_convertvector((fp16vec)h, vec); }
template <> inline hvec rounded<float16>(vec x) { return (hvec)__builtin_convertvector(x, fp16vec); }
#else
template <> inline vec widened<float16>(hvec h) {
    const uvec bits = __builtin_convertvector(h, uvec), magnitude = (bits & 0x7fff) << 13;
    const uvec infinite = (uvec)(magnitude >= 0x0f800000) & 0x7f800000;  // or NaN
    return (vec)((uvec)((vec)magnitude * 0x1p112f) | infinite | (bits & 0x8000) << 16);
}
template <> inline hvec rounded<float16>(vec x) {
    const uvec bits = (uvec)x, magnitude = bits & 0x7fffffff;
    const uvec normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uvec subnormal = (uvec)((vec)magnitude + 0.5f) - 0x3f000000;  // The sum rounds to a multiple of 2^-24.
    const uvec infinite = 0x7c00 | ((uvec)(magnitude > 0x7f800000) & 0x200);  // or NaN
    const ivec number = magnitude < 0x38800000 ? (ivec)subnormal : (ivec)normal;
    return __builtin_convertvector((uvec)(magnitude < 0x47800000 ? number : (ivec)infinite) | (bits >> 16 & 0x8000), hvec);
}
#endif
#endif

// Load LANES numbers as float32.
inline vec wide(const float *from) { return load<vec>(from); }
template <class T> inline vec wide(const T *from) { return widened<T>(load<hvec>(from)); }

// Store LANES numbers, rounded.
inline void put(float *to, vec x) { store(to, x); }
inline void put(float16 *to, vec x) { store(to, rounded<float16>(x)); }
#if DOT
inline void put(bfloat16 *to, vec x) { store(to, _mm512_cvtneps_pbh((__m512)x)); }
#else
inline void put(bfloat16 *to, vec x) { store(to, rounded<bfloat16>(x)); }
#endif

inline float sum_of(vec x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

// Round to numbers of type T.
template <class T> inline vec as_stored(vec x) { return widened<T>(rounded<T>(x)); }
template <> inline vec as_stored<float>(vec x) { return x; }

// Return exp(x) with a relative error below 1e-7; x is clamped to [-87, 88].
inline vec exponential(vec x) {
    x = x < -87.0f ? vec{} - 87.0f : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // The sums round to an integer.
    vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

// Return GELU in its tanh form, x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
inline vec gelu(vec x) {
    return x / (1.0f + exponential(-1.5957691216057308f * x * (1.0f + 0.044715f * x * x)));
}

// Define how rows times weights of type T are multiplied: STEP factors of a row at a time with STEP numbers of LANES
// columns. Factors lie in float32 where no instruction multiplies numbers of type T, and `factor` rounds to these numbers.
template <class T> struct Product {
    static constexpr int STEP = 1;
    typedef float Factor;
    typedef vec Weights;
    static inline Weights weights(const T *w) { return wide(w); }
    static inline vec add(vec sum, const Factor *a, Weights w) { return sum + *a * w; }
    static inline vec factor(vec x) { return as_stored<T>(x); }
};
#if DOT
template <> struct Product<bfloat16> {
    static constexpr int STEP = 2;
    typedef bfloat16 Factor;
    typedef __m512bh Weights;
    static inline Weights weights(const bfloat16 *w) { return load<__m512bh>(w); }
    static inline vec add(vec sum, const Factor *a, Weights w) {
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(load<int32_t>(a)), w);
    }
    static inline vec factor(vec x) { return x; }  // `put` rounds.
};
#endif
template <class T> using Factor = typename Product<T>::Factor;
template <class T> constexpr int FACTOR_BYTES = sizeof(Factor<T>);

// Describe memory to fetch into the second-level cache during other work, so that rows do not wait for the next panel.
struct Prefetch {
    const char *from;
    size_t bytes;
    Prefetch part(int begin, int end, int of) const {
        const size_t first = bytes * begin / of;
        return {from + first, bytes * end / of - first};
    }
};

// Add rows[r] times the panel's j-th LANES columns to sums[r][j], over `depth` numbers.
template <class T, int R, int V>
inline void multiply(const Factor<T> *const *rows, const T *panel, int depth, vec (&sums)[R][V], Prefetch next = {nullptr, 0}) {
    typedef Product<T> P;
    constexpr int LINE = 64, STRETCH = 16 * P::STEP;
    const int distance = STRETCH * V * LANES;
    const size_t next_bytes = next.bytes / ((depth + STRETCH - 1) / STRETCH);
    for (int begin = 0; begin < depth; begin += STRETCH, next.from += next_bytes) {
        for (size_t line = 0; line < next_bytes; line += LINE) __builtin_prefetch(next.from + line, 0, 2);
        const int end = smaller(begin + STRETCH, depth);
        for (int k = begin; k < end; k += P::STEP) {
            const T *step = panel + (size_t)k * V * LANES;
            typename P::Weights w[V];
            for (int j = 0; j < V; j++) w[j] = P::weights(step + j * LANES * P::STEP);
            for (size_t line = 0; line < V * LANES * P::STEP * sizeof(T); line += LINE)
                __builtin_prefetch((const char *)(step + distance) + line);
            for (int r = 0; r < R; r++)
                for (int j = 0; j < V; j++) sums[r][j] = P::add(sums[r][j], rows[r] + k, w[j]);
        }
    }
}

// Add rows[r] times a panel of V vectors to totals[r] for `count` rows, or overwrite the totals where `first` is set.
template <class T, int V, int R = ROWS>
inline void add_tile(int count, const Factor<T> *const *rows, const T *panel, int depth, Prefetch next, bool first,
                     float *const *totals) {
    if constexpr (R > 1)
        if (count < R) return add_tile<T, V, R - 1>(count, rows, panel, depth, next, first, totals);
    vec sums[R][V] = {};
    multiply<T, R, V>(rows, panel, depth, sums, next);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++) {
            float *to = totals[r] + j * LANES;
            store(to, first ? sums[r][j] : load<vec>(to) + sums[r][j]);
        }
}
template <class T, int V = VECTORS>
void add_product(int vectors, int count, const Factor<T> *const *rows, const T *panel, int depth, Prefetch next,
                 bool first, float *const *totals) {
    if constexpr (V > 1)
        if (vectors < V) return add_product<T, V - 1>(vectors, count, rows, panel, depth, next, first, totals);
    add_tile<T, V>(count, rows, panel, depth, next, first, totals);
}

// Split a depth into `count` blocks of `size` numbers, of which the last may be shorter. A block of a panel stays in
// the first-level cache for all rows, and sums of blocks are rounded less than one long sum.
struct Blocks {
    int count, size, depth;
    int length(int block) const { return smaller(depth - block * size, size); }
};
template <class T> inline Blocks blocks_of(int depth) {
    const int count = (depth + 255) / 256;
    return {count, padded((depth + count - 1) / count, Product<T>::STEP), depth};
}

// Store the first `columns` numbers of a vector; `columns` may exceed LANES.
template <class T> inline void put_columns(T *to, vec x, int columns) {
    if (columns >= LANES) return put(to, x);
    if (columns <= 0) return;
    T all[LANES];
    put(all, x);
    memcpy(to, all, columns * sizeof(T));
}

// Load the first `columns` numbers of a vector, with zeros after them.
template <class T> inline vec first_columns(const T *from, int columns) {
    if (columns >= LANES) return wide(from);
    T all[LANES] = {};
    if (columns > 0) memcpy(all, from, columns * sizeof(T));
    return wide(all);
}

// Copy numbers, also to another type.
template <class T> inline void copy(const T *from, int count, T *to) { memcpy(to, from, count * sizeof(T)); }
template <class From, class To> inline void copy(const From *from, int count, To *to) {
    for (int c = 0; c < count; c += LANES) put_columns(to + c, first_columns(from + c, count - c), count - c);
}

// Pack rows [begin, end) of `from` [rows, depth] as factors [blocks, rows, size]. Rows of a tile then lie close
// together, so that none pushes another out of the cache.
template <class T> void pack_rows(const T *from, int begin, int end, int depth, Factor<T> *to) {
    const Blocks blocks = blocks_of<T>(depth);
    for (int block = 0; block < blocks.count; block++)
        for (int i = begin; i < end; i++, to += blocks.size)
            copy(from + (size_t)i * depth + block * blocks.size, blocks.length(block), to);
}

// Take room for `count` numbers from `scratch`.
template <class T> T *take(char *&scratch, size_t count) {
    T *part = (T *)scratch;
    scratch += (count * sizeof(T) + 63) / 64 * 64;
    return part;
}

constexpr int PANEL = VECTORS * LANES;  // A full panel has this many columns.

}  // namespace NAMESPACE
