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

// GCC's builtin would convert each half of a vector alone and join the halves.
#if LANES == 16
inline vec widened(hvec h) { return (vec)((uvec)_mm512_cvtepu16_epi32((__m256i)h) << 16); }
#elif LANES == 8
inline vec widened(hvec h) { return (vec)((uvec)_mm256_cvtepu16_epi32((__m128i)h) << 16); }
#else
inline vec widened(hvec h) { return (vec)(__builtin_convertvector(h, uvec) << 16); }
#endif
// Round to the nearest bfloat16, ties to even; NaN stays NaN.
inline hvec rounded(vec x) {
    uvec bits = (uvec)x;
    uvec nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec nan = (bits >> 16) | 0x40;
    return __builtin_convertvector((uvec)(x == x ? (ivec)nearest : (ivec)nan), hvec);
}

// Load LANES numbers as float32.
inline vec wide(const float *from) { return load<vec>(from); }
inline vec wide(const bfloat16 *from) { return widened(load<hvec>(from)); }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    return load<float>(&bits);
}
template <class T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bfloat16 from_float<bfloat16>(float x) {
    const uint32_t bits = load<uint32_t>(&x);
    return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

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

// Define how numbers of type T are multiplied: STEP numbers of a row at a time with STEP numbers of LANES columns.
template <class T> struct Product;

template <> struct Product<float> {
    static constexpr int STEP = 1;
    typedef vec Weights;
    static inline Weights weights(const float *w) { return load<vec>(w); }
    static inline vec add(vec sum, const float *a, Weights w) { return sum + *a * w; }
    static inline void put(float *to, vec x) { store(to, x); }
};

#if DOT
template <> struct Product<bfloat16> {
    static constexpr int STEP = 2;
    typedef __m512bh Weights;
    static inline Weights weights(const bfloat16 *w) { return load<__m512bh>(w); }
    static inline vec add(vec sum, const bfloat16 *a, Weights w) {
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(load<int32_t>(a)), w);
    }
    static inline void put(bfloat16 *to, vec x) { store(to, _mm512_cvtneps_pbh((__m512)x)); }
};
#else
template <> struct Product<bfloat16> {
    static constexpr int STEP = 1;
    typedef vec Weights;
    static inline Weights weights(const bfloat16 *w) { return widened(load<hvec>(w)); }
    static inline vec add(vec sum, const bfloat16 *a, Weights w) {
        uint32_t bits = (uint32_t)*a << 16;
        return sum + load<float>(&bits) * w;
    }
    static inline void put(bfloat16 *to, vec x) { store(to, rounded(x)); }
};
#endif

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
inline void multiply(const T *const *rows, const T *panel, int depth, vec (&sums)[R][V], Prefetch next = {nullptr, 0}) {
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
inline void add_tile(int count, const T *const *rows, const T *panel, int depth, Prefetch next, bool first,
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
void add_product(int vectors, int count, const T *const *rows, const T *panel, int depth, Prefetch next, bool first,
                 float *const *totals) {
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

// Pack rows [begin, end) of `from` [rows, depth] as [blocks, rows, size]. Rows of a tile then lie close together, so
// that none pushes another out of the cache.
template <class T> void pack_rows(const T *from, int begin, int end, int depth, T *to) {
    const Blocks blocks = blocks_of<T>(depth);
    for (int block = 0; block < blocks.count; block++)
        for (int i = begin; i < end; i++, to += blocks.size)
            memcpy(to, from + (size_t)i * depth + block * blocks.size, blocks.length(block) * sizeof(T));
}

// Store the first `columns` numbers of a vector; `columns` may exceed LANES.
template <class T> inline void put_columns(T *to, vec x, int columns) {
    if (columns >= LANES) return Product<T>::put(to, x);
    if (columns <= 0) return;
    T all[LANES];
    Product<T>::put(all, x);
    memcpy(to, all, columns * sizeof(T));
}

// Load the first `columns` numbers of a vector, with zeros after them.
template <class T> inline vec first_columns(const T *from, int columns) {
    if (columns >= LANES) return wide(from);
    T all[LANES] = {};
    if (columns > 0) memcpy(all, from, columns * sizeof(T));
    return wide(all);
}

constexpr int PANEL = VECTORS * LANES;  // A full panel has this many columns.

}  // namespace NAMESPACE
