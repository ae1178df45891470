// The expert FFN for one instruction set. Included once per set by cpu_kernel.cpp, which defines NAMESPACE, LANES (floats
// of a vector), VECTORS (vectors of a full panel), ROWS (rows of a register tile) and DOT (1: products of bfloat16 pairs).
// Nothing from the standard library's templates may be used here: they would be compiled for this set for everyone.

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

inline vec widened(hvec h) { return (vec)(__builtin_convertvector(h, uvec) << 16); }
inline hvec rounded(vec x) {  // to the nearest bfloat16, ties to even; NaN stays NaN
    uvec bits = (uvec)x;
    uvec nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec nan = (bits >> 16) | 0x40;
    return __builtin_convertvector((uvec)(x == x ? (ivec)nearest : (ivec)nan), hvec);
}

inline vec exponential(vec x) {  // relative error below 1e-7 between -87 and 88, clamped outside
    x = x < -87.0f ? vec{} - 87.0f : x;
    x = x > 88.0f ? vec{} + 88.0f : x;
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
    vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

inline vec gelu(vec x) {  // tanh form: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
    return x / (1.0f + exponential(-1.5957691216057308f * x * (1.0f + 0.044715f * x * x)));
}

// How numbers of type T are multiplied: STEP of them at a time, a step of a row with a step of LANES columns.
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

// sums[r][j] += rows[r] times the panel's j-th LANES columns, over `depth` numbers.
template <class T, int R, int V>
inline void multiply(const T *const *rows, const T *panel, int depth, vec (&sums)[R][V]) {
    typedef Product<T> P;
    for (int k = 0; k < depth; k += P::STEP) {
        typename P::Weights w[V];
        for (int j = 0; j < V; j++) w[j] = P::weights(panel + (size_t)k * V * LANES + j * LANES * P::STEP);
        __builtin_prefetch(panel + (size_t)(k + 8 * P::STEP) * V * LANES);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < V; j++) sums[r][j] = P::add(sums[r][j], rows[r] + k, w[j]);
    }
}

template <class T, int R, int V>
void up(const T *const *rows, const T *panel, int depth, const float *bias, T *hidden, int hidden_stride) {
    vec sums[R][V] = {};
    multiply<T, R, V>(rows, panel, depth, sums);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++)
            Product<T>::put(hidden + (size_t)r * hidden_stride + j * LANES,
                            gelu(sums[r][j] + load<vec>(bias + j * LANES)));
}

template <class T, int R, int V> void down(const T *const *rows, const T *panel, int depth, float *const *out) {
    vec sums[R][V] = {};
    multiply<T, R, V>(rows, panel, depth, sums);
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++) store(out[r] + j * LANES, load<vec>(out[r] + j * LANES) + sums[r][j]);
}

// Tiles of up to ROWS rows and of a panel of up to VECTORS vectors.
template <class T, int V, int R = ROWS>
void up_tile(int count, const T *const *rows, const T *panel, int depth, const float *bias, T *hidden, int stride) {
    if constexpr (R > 1)
        if (count < R) return up_tile<T, V, R - 1>(count, rows, panel, depth, bias, hidden, stride);
    up<T, R, V>(rows, panel, depth, bias, hidden, stride);
}
template <class T, int V, int R = ROWS>
void down_tile(int count, const T *const *rows, const T *panel, int depth, float *const *out) {
    if constexpr (R > 1)
        if (count < R) return down_tile<T, V, R - 1>(count, rows, panel, depth, out);
    down<T, R, V>(rows, panel, depth, out);
}
template <class T, int V = VECTORS>
void up_panel(int vectors, int count, const T *const *rows, const T *panel, int depth, const float *bias, T *hidden,
              int stride) {
    if constexpr (V > 1)
        if (vectors < V) return up_panel<T, V - 1>(vectors, count, rows, panel, depth, bias, hidden, stride);
    up_tile<T, V>(count, rows, panel, depth, bias, hidden, stride);
}
template <class T, int V = VECTORS>
void down_panel(int vectors, int count, const T *const *rows, const T *panel, int depth, float *const *out) {
    if constexpr (V > 1)
        if (vectors < V) return down_panel<T, V - 1>(vectors, count, rows, panel, depth, out);
    down_tile<T, V>(count, rows, panel, depth, out);
}

inline int smaller(int a, int b) { return a < b ? a : b; }

// All experts for the tokens [begin, end). Rows are read by pointer, one expert after the other adds to the sums.
template <class T> void run(const Job &job, int begin, int end, char *scratch) {
    const int tokens = end - begin, C = job.channels, full = VECTORS * LANES;
    const int hidden_stride = padded(job.width, LANES), out_stride = padded(C, LANES);
    const int depth = padded(C, Product<T>::STEP), hidden_depth = padded(job.width, Product<T>::STEP);
    float *sums = (float *)scratch;
    T *hidden = (T *)(sums + (size_t)tokens * out_stride);
    int *chosen = (int *)(hidden + (size_t)tokens * hidden_stride);
    const T *u = (const T *)job.u;
    for (int t = 0; t < tokens; t++) memcpy(sums + (size_t)t * out_stride, job.bias2, 4 * (size_t)out_stride);

    for (int expert = 0; expert < job.experts; expert++) {
        int count = 0;
        for (int t = 0; t < tokens; t++)
            if (job.mask[(size_t)(begin + t) * job.experts + expert]) chosen[count++] = t;
        const T *weight = (const T *)job.weight1 + (size_t)expert * depth * hidden_stride;
        for (int column = 0; column < hidden_stride; column += full) {
            const int vectors = smaller(hidden_stride - column, full) / LANES;
            for (int i = 0; i < count; i += ROWS) {
                const int group = smaller(count - i, ROWS);
                const T *rows[ROWS];
                for (int r = 0; r < group; r++) rows[r] = u + (size_t)(begin + chosen[i + r]) * C;
                up_panel<T>(vectors, group, rows, weight + (size_t)column * depth, depth,
                            job.bias1 + (size_t)expert * hidden_stride + column,
                            hidden + (size_t)i * hidden_stride + column, hidden_stride);
            }
        }
        weight = (const T *)job.weight2 + (size_t)expert * hidden_depth * out_stride;
        for (int column = 0; column < out_stride; column += full) {
            const int vectors = smaller(out_stride - column, full) / LANES;
            for (int i = 0; i < count; i += ROWS) {
                const int group = smaller(count - i, ROWS);
                const T *rows[ROWS];
                float *out[ROWS];
                for (int r = 0; r < group; r++) {
                    rows[r] = hidden + (size_t)(i + r) * hidden_stride;
                    out[r] = sums + (size_t)chosen[i + r] * out_stride + column;
                }
                down_panel<T>(vectors, group, rows, weight + (size_t)column * hidden_depth, hidden_depth, out);
            }
        }
    }

    for (int t = 0; t < tokens; t++) {
        const float *from = sums + (size_t)t * out_stride;
        T *to = (T *)job.out + (size_t)(begin + t) * C;
        int c = 0;
        for (; c + LANES <= C; c += LANES) Product<T>::put(to + c, load<vec>(from + c));
        T last[LANES];
        if (c < C) Product<T>::put(last, load<vec>(from + c)), memcpy(to + c, last, (C - c) * sizeof(T));
    }
}

}  // namespace NAMESPACE
