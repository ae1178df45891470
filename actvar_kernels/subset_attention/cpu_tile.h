// Define attention of one head for one instruction set. ../cpu_backend/isa.h includes this file after vectors.h.

namespace NAMESPACE {

template <class T> inline const T *row(const Rows &rows, int sequence, int head, int token) {
    return (const T *)rows.data + sequence * rows.sequence + head * rows.head + token * rows.token;
}

inline float largest_lane(vec x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

// Copy a token's `dim` numbers as factors, scaled to length `factor` where `norm` is set, with zeros up to `depth`.
template <class T> void normalize(const T *from, bool norm, float factor, int dim, int depth, Factor<T> *to) {
    if (norm) {
        vec squares = {};
        for (int c = 0; c < dim; c += LANES) {
            const vec x = first_columns(from + c, dim - c);
            squares += x * x;
        }
        const float length = __builtin_sqrtf(sum_of(squares));
        factor /= length > 1e-12f ? length : 1e-12f;
        for (int c = 0; c < dim; c += LANES)
            put_columns(to + c, Product<T>::factor(first_columns(from + c, dim - c) * factor), dim - c);
    } else {
        copy(from, dim, to);
    }
    for (int c = dim; c < depth; c++) to[c] = {};
}

// Copy key number `token` into its panel, whose columns are keys.
template <class F> void pack_key(const F *key, int token, int depth, F *panels) {
    constexpr int STEP = Product<F>::STEP;
    F *to = panels + (size_t)(token / PANEL) * PANEL * depth + (token % PANEL) * STEP;
    for (int c = 0; c < depth; c += STEP) memcpy(to + (size_t)c * PANEL, key + c, STEP * sizeof(F));
}

// Store LANES numbers of each of STEP rows side by side, as factors.
template <class T> inline void interleave(const T *const *rows, int c, float *to) { store(to, wide(rows[0] + c)); }
inline void interleave(const bfloat16 *const *rows, int c, bfloat16 *to) {
    const uvec first = __builtin_convertvector(load<hvec>(rows[0] + c), uvec);
    const uvec second = __builtin_convertvector(load<hvec>(rows[1] + c), uvec);
    store(to, first | second << 16);
}

// Copy STEP values from `token` on into the panels, whose rows are all `tokens`. Whole vectors are read from each
// value, also at its end.
template <class T> void pack_values(const T *const *step, int token, int tokens, int dim, Factor<T> *panels) {
    constexpr int STEP = Product<T>::STEP;
    const int columns = padded(dim, LANES);
    for (int column = 0; column < columns; column += PANEL) {
        const int width = smaller(columns - column, PANEL);
        Factor<T> *to = panels + (size_t)column * tokens + (size_t)token * width;
        for (int c = 0; c < width; c += LANES) interleave(step, column + c, to + c * STEP);
    }
}

// Multiply scores by `scale`, write exp(score - largest) to `weights`, with zeros up to `depth`, and return the sum.
// `largest` becomes the largest score if that is larger.
template <class T> float softmax(float *scores, float scale, int tokens, int depth, T *weights, float &largest) {
    const int whole = tokens / LANES * LANES, stride = padded(tokens, LANES);
    for (int t = 0; t < stride; t += LANES) store(scores + t, load<vec>(scores + t) * scale);
    for (int t = tokens; t < stride; t++) scores[t] = -__builtin_inff();
    vec highest = load<vec>(scores);
    for (int t = LANES; t < stride; t += LANES) {
        const vec x = load<vec>(scores + t);
        highest = x > highest ? x : highest;
    }
    const float highest_score = largest_lane(highest);
    largest = largest > highest_score ? largest : highest_score;
    const float base = largest > -__builtin_inff() ? largest : 0;  // so far no query sees a key
    vec total = {};
    for (int t = 0; t < stride; t += LANES) {
        vec x = exponential(load<vec>(scores + t) - base);
        if (t >= whole)
            for (int i = 0; i < LANES; i++)
                if (t + i >= tokens) x[i] = 0;
        total += x;
        put_columns(weights + t, x, depth - t);
    }
    return sum_of(total);
}

// Sizes of the keys that a thread holds at once: all where they are few, otherwise parts that stay in the cache.
struct Sizes {
    int tokens, depth, columns, key_stride, weight_stride;
};

template <class T> Sizes sizes_of(const Job &job) {
    const int all = job.cached + job.own, tokens = all <= MOST_KEYS ? all : KEYS;
    return {tokens, padded(job.dim, Product<T>::STEP), padded(job.dim, LANES), padded(tokens, PANEL),
            padded(tokens, LANES)};
}

template <class T> size_t scratch_bytes(const Job &job) {
    const Sizes n = sizes_of<T>(job);
    const size_t packed = (size_t)n.key_stride * n.depth + (size_t)n.weight_stride * n.columns;
    const size_t query_bytes = sizeof(Factor<T>) * (n.depth + n.weight_stride) + sizeof(float) * (n.key_stride + n.columns);
    return sizeof(Factor<T>) * (packed + n.depth + 3 * n.columns) + QUERIES * query_bytes +
           sizeof(float) * job.kept * (size_t)(n.columns + 2) + 11 * 64;
}

// Multiply `count` rows of `from` by the columns of a matrix [depth, columns] in panels, and store the products in `to`.
// Strides count numbers.
template <class T>
void multiply_rows(bool brgemm, int count, int columns, int depth, const T *from, int stride, const T *panels, float *to,
                   int to_stride) {
    for (int column = 0; column < columns; column += PANEL) {
        const T *panel = panels + (size_t)column * depth;
        const int width = smaller(columns - column, PANEL);
        if (brgemm) BRGEMM.bfloat16(count, width, depth, stride, width, to_stride, false, from, panel, to + column, true);
        for (int i = 0; i < count && !brgemm; i += ROWS) {
            const int group = smaller(count - i, ROWS);
            const T *rows[ROWS];
            float *out[ROWS];
            for (int r = 0; r < group; r++) {
                rows[r] = from + (size_t)(i + r) * stride;
                out[r] = to + (size_t)(i + r) * to_stride + column;
            }
            add_product<T>(width / LANES, group, rows, panel, depth, {nullptr, 0}, true, out);
        }
    }
}

// Hold keys and values of a part of the tokens in panels.
template <class T> struct Panels {
    Factor<T> *keys, *values, *key;
    T *value;
};

// Pack the tokens from `first` to `first + count`, and append those of the own scale to the cache.
template <class T>
void pack(const Job &job, const Sizes &n, int sequence, int head, int first, int count, const T *zeros,
          const Panels<T> &to) {
    constexpr int STEP = Product<T>::STEP;
    const bool norm = job.head_scale != nullptr;
    for (int i = 0; i < padded(count, PANEL); i++) {
        const int t = first + i;
        const bool is_own = t >= job.cached;
        if (i >= count)
            memset(to.key, 0, n.depth * sizeof *to.key);
        else
            normalize(is_own ? row<T>(job.k, sequence, head, t - job.cached) : row<T>(job.keys, sequence, head, t),
                      is_own && norm, 1, job.dim, n.depth, to.key);
        pack_key(to.key, i, n.depth, to.keys);
        if (is_own && job.append && i < count) copy(to.key, job.dim, (T *)row<T>(job.keys, sequence, head, t));
    }
    const int rows_of_values = padded(count, STEP);
    for (int i = 0; i < rows_of_values; i += STEP) {
        const T *step[STEP];
        for (int s = 0; s < STEP; s++) {
            const int t = first + i + s, own = t - job.cached;
            if (i + s >= count) {
                step[s] = zeros;
                continue;
            }
            step[s] = own < 0 ? row<T>(job.values, sequence, head, t) : row<T>(job.v, sequence, head, own);
            if (own >= 0 && job.append)
                memcpy((T *)row<T>(job.values, sequence, head, t), step[s], job.dim * sizeof(T));
            if (job.dim % LANES) {  // No vector may be read past the last value's end.
                T *copy = to.value + (size_t)s * n.columns;
                memcpy(copy, step[s], job.dim * sizeof(T));
                step[s] = copy;
            }
        }
        pack_values(step, i, rows_of_values, job.dim, to.values);
    }
}

// Attend with one head of one sequence, over all tokens or one part of them after the other. For each query there are
// the largest score so far, the sum of exp(score - largest), and the sum of the values with these weights.
template <class T> void run(const Job &job, int sequence, int head, char *scratch) {
    typedef Factor<T> F;
    constexpr int STEP = Product<T>::STEP;
    const Sizes n = sizes_of<T>(job);
    const bool norm = job.head_scale != nullptr;
    Panels<T> panels;
    panels.keys = take<F>(scratch, (size_t)n.key_stride * n.depth);
    panels.values = take<F>(scratch, (size_t)padded(n.tokens, STEP) * n.columns);
    F *queries = take<F>(scratch, QUERIES * n.depth), *weights = take<F>(scratch, QUERIES * n.weight_stride);
    panels.key = take<F>(scratch, n.depth), panels.value = take<T>(scratch, STEP * n.columns);
    T *zeros = take<T>(scratch, n.columns);
    float *scores = take<float>(scratch, QUERIES * n.key_stride), *product = take<float>(scratch, QUERIES * n.columns);
    float *sums = take<float>(scratch, (size_t)job.kept * n.columns);
    float *largest = take<float>(scratch, job.kept), *total = take<float>(scratch, job.kept);

    memset(panels.value, 0, STEP * n.columns * sizeof(T));
    memset(zeros, 0, n.columns * sizeof(T));
    for (int q = 0; q < job.kept; q++) largest[q] = -__builtin_inff();
    for (int key = 0; key < job.cached + job.own; key += n.tokens) {
        const int tokens = smaller(job.cached + job.own - key, n.tokens), depth = padded(tokens, STEP);
        pack(job, n, sequence, head, key, tokens, zeros, panels);
        for (int first = 0; first < job.kept; first += QUERIES) {
            const int count = smaller(job.kept - first, QUERIES), keys = padded(tokens, PANEL);
            for (int i = 0; i < count; i++)
                normalize(row<T>(job.q, sequence, head, first + i), norm, norm ? job.head_scale[head] : 1, job.dim,
                          n.depth, queries + (size_t)i * n.depth);
            multiply_rows(job.brgemm, count, keys, n.depth, queries, n.depth, panels.keys, scores, n.key_stride);
            for (int i = 0; i < count; i++) {
                const int q = first + i;
                const float before = largest[q];
                const float sum = softmax(scores + (size_t)i * n.key_stride, job.scale, tokens, depth,
                                          weights + (size_t)i * n.weight_stride, largest[q]);
                const float factor = key ? exponential(vec{} + (before - largest[q]))[0] : 0;
                total[q] = key ? total[q] * factor + sum : sum;
                for (int c = 0; c < n.columns && key && factor != 1; c++) sums[(size_t)q * n.columns + c] *= factor;
            }
            float *of_queries = sums + (size_t)first * n.columns, *to = key ? product : of_queries;
            multiply_rows(job.brgemm, count, n.columns, depth, weights, n.weight_stride, panels.values, to, n.columns);
            for (int c = 0; c < count * n.columns && key; c += LANES)
                store(of_queries + c, load<vec>(of_queries + c) + load<vec>(product + c));
        }
    }
    for (int q = 0; q < job.kept; q++) {
        T *out = (T *)job.out + (((int64_t)sequence * job.kept + q) * job.heads + head) * job.dim;
        for (int c = 0; c < job.dim; c += LANES)
            put_columns(out + c, load<vec>(sums + (size_t)q * n.columns + c) / total[q], job.dim - c);
    }
}

}  // namespace NAMESPACE
