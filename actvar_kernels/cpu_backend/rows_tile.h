// Define steps over rows of channels for one instruction set. isa.h includes this file after vectors.h.

namespace NAMESPACE {

constexpr int TILE = ROWS;

// Call f(c, columns, j) for each vector of a row, from channel c on; the last vector may have fewer columns. j < 4 is
// the partial sum to add to, since additions to the same sum wait for each other.
template <class F> inline void for_vectors(int channels, F f) {
    int c = 0;
    for (; c + 4 * LANES <= channels; c += 4 * LANES) {
        f(c, LANES, 0);
        f(c + LANES, LANES, 1);
        f(c + 2 * LANES, LANES, 2);
        f(c + 3 * LANES, LANES, 3);
    }
    for (; c + LANES <= channels; c += LANES) f(c, LANES, 0);
    if (c < channels) f(c, channels - c, 0);
}

// Return x with zeros after the first columns.
inline vec only_first(vec x, int columns) {
    if (columns >= LANES) return x;
    for (int j = columns; j < LANES; j++) x[j] = 0;
    return x;
}

inline float sum_of(const vec (&parts)[4]) { return sum_of((parts[0] + parts[1]) + (parts[2] + parts[3])); }

// Store the first columns, rounded to the nearest, and return the stored numbers.
inline vec put_first(float *to, vec x, int columns) {
    memcpy(to, &x, columns * sizeof(float));
    return x;
}
template <class T> inline vec put_first(T *to, vec x, int columns) {
    const hvec h = rounded<T>(x);
    memcpy(to, &h, columns * sizeof(T));
    return widened<T>(h);
}

inline float variance(const float *row, float mean, int channels) {
    vec squares[4] = {};
    for_vectors(channels, [&](int c, int columns, int j) {
        const vec deviation = only_first(first_columns(row + c, columns) - mean, columns);
        squares[j] += deviation * deviation;
    });
    return sum_of(squares) / channels;
}

// Compute row i of the result, and store the FFN's input in `row` [channels]: the result, or x where there is no scale.
template <class T> inline void normalize_row(const Rows &job, int64_t i, float *row) {
    const int C = job.channels;
    const int64_t sequence = i / job.kept, vector = sequence * C;
    const T *x = (const T *)job.x + sequence * job.sequence_stride +
                 (job.index ? job.index[i] : i % job.kept) * job.row_stride;
    if (!job.scale) {
        for_vectors(C, [&](int c, int columns, int) { put_first(row + c, first_columns(x + c, columns), columns); });
        return;
    }
    vec sums[4] = {};
    if (job.update) {
        const T *update = (const T *)job.update + i * C;
        T *stored = (T *)job.sum + i * C;
        for_vectors(C, [&](int c, int columns, int j) {
            const vec change = first_columns(job.gamma + vector + c, columns) * first_columns(update + c, columns);
            sums[j] += put_first(row + c, put_first(stored + c, first_columns(x + c, columns) + change, columns), columns);
        });
    } else {
        for_vectors(C, [&](int c, int columns, int j) {
            sums[j] += put_first(row + c, first_columns(x + c, columns), columns);
        });
    }
    const float mean = sum_of(sums) / C, factor = 1 / std::sqrt(variance(row, mean, C) + job.eps);
    T *out = (T *)job.out + i * C;
    for_vectors(C, [&](int c, int columns, int) {
        const vec scale = first_columns(job.scale + vector + c, columns);
        const vec shift = first_columns(job.shift + vector + c, columns);
        const vec y = (first_columns(row + c, columns) - mean) * factor * (1 + scale) + shift;
        put_first(row + c, put_first(out + c, y, columns), columns);
    });
}

// Mark the highest logits in `mask`; ties go to the lower index.
inline void choose(const float *logits, const Router &router, uint8_t *mask) {
    for (int e = 0; e < router.experts; e++) {
        const int32_t key = rank_key(logits[e]);
        int rank = 0;
        for (int other = 0; other < router.experts; other++) {
            const int32_t other_key = rank_key(logits[other]);
            rank += (other_key > key) | ((other_key == key) & (other < e));
        }
        mask[e] = rank < router.active;
    }
}

inline size_t scratch_bytes(const Rows &job) { return sizeof(float) * ROWS * (job.channels + PANEL); }

// Compute and route rows [first, first + count) of the result, at most ROWS.
template <class T> void normalize(const Rows &job, int64_t first, int count, float *scratch) {
    const Router &router = job.router;
    float *totals = scratch + (size_t)ROWS * job.channels;  // [count, PANEL]
    const float *rows[ROWS];
    float *to[ROWS];
    for (int r = 0; r < count; r++) {
        rows[r] = scratch + (size_t)r * job.channels;
        to[r] = totals + r * PANEL;
        normalize_row<T>(job, first + r, scratch + (size_t)r * job.channels);
    }
    for (int expert = 0; expert < router.experts; expert += PANEL) {
        const int experts = smaller(router.experts - expert, PANEL);
        const float *panel = router.weight + (size_t)expert * job.channels;
        add_product<float>(padded(experts, LANES) / LANES, count, rows, panel, job.channels, {nullptr, 0}, true, to);
        for (int r = 0; r < count; r++)
            for (int e = 0; e < experts; e++)
                router.logits[(first + r) * router.experts + expert + e] = to[r][e] + router.bias[expert + e];
    }
    if (router.experts)
        for (int64_t i = first; i < first + count; i++)
            choose(router.logits + i * router.experts, router, router.mask + i * router.experts);
}

// Return LN(x) @ weight + bias for one row of x; `row` is scratch for all channels.
template <class T> float score(const void *data, const float *weight, float bias, float *row, int channels, float eps) {
    const T *x = (const T *)data;
    vec sums[4] = {}, products[4] = {};
    for_vectors(channels, [&](int c, int columns, int j) {
        sums[j] += put_first(row + c, first_columns(x + c, columns), columns);
    });
    const float mean = sum_of(sums) / channels;
    for_vectors(channels, [&](int c, int columns, int j) {
        products[j] += (first_columns(row + c, columns) - mean) * first_columns(weight + c, columns);
    });
    return sum_of(products) / std::sqrt(variance(row, mean, channels) + eps) + bias;
}

// Store x + gamma * update in `to`.
template <class T> void add(void *to, const void *x, const void *update, const float *gamma, int channels) {
    for_vectors(channels, [&](int c, int columns, int) {
        const vec change = first_columns(gamma + c, columns) * first_columns((const T *)update + c, columns);
        put_first((T *)to + c, first_columns((const T *)x + c, columns) + change, columns);
    });
}

}  // namespace NAMESPACE
