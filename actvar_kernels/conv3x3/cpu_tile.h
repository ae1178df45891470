// Winograd's convolution for one instruction set, included by ../cpu_levels.h behind ../cpu_vectors.h.

namespace NAMESPACE {

// The 4 x 4 inputs of LANES channels of a tile, d, as B^T d B.
inline void transform_input(const vec (&d)[4][4], vec (&v)[4][4]) {
    vec rows[4][4];
    for (int j = 0; j < 4; j++) {
        rows[0][j] = d[0][j] - d[2][j];
        rows[1][j] = d[1][j] + d[2][j];
        rows[2][j] = d[2][j] - d[1][j];
        rows[3][j] = d[1][j] - d[3][j];
    }
    for (int i = 0; i < 4; i++) {
        v[i][0] = rows[i][0] - rows[i][2];
        v[i][1] = rows[i][1] + rows[i][2];
        v[i][2] = rows[i][2] - rows[i][1];
        v[i][3] = rows[i][1] - rows[i][3];
    }
}

// Products m of LANES columns as A^T m A, the 2 x 2 outputs of a tile.
inline void transform_output(const vec (&m)[4][4], vec (&y)[2][2]) {
    vec rows[2][4];
    for (int j = 0; j < 4; j++) {
        rows[0][j] = m[0][j] + m[1][j] + m[2][j];
        rows[1][j] = m[1][j] - m[2][j] - m[3][j];
    }
    for (int i = 0; i < 2; i++) {
        y[i][0] = rows[i][0] + rows[i][1] + rows[i][2];
        y[i][1] = rows[i][1] - rows[i][2] - rows[i][3];
    }
}

template <class T> size_t scratch_bytes(const Job &job) {
    return (size_t)16 * TILES * (job.channels * sizeof(T) + PANEL * sizeof(float));
}

// The outputs of `count` tiles from number `first` on.
template <class T> void run(const Job &job, int64_t first, int count, char *scratch) {
    const int C = job.channels, D = job.columns, across = (job.width + 1) / 2, down = (job.height + 1) / 2;
    const int stride = padded(D, LANES);
    float *products = (float *)scratch;                 // [16, count, PANEL]
    T *inputs = (T *)(products + 16 * TILES * PANEL);   // [16, count, C]
    int64_t image[TILES];
    int top[TILES], left[TILES];
    for (int t = 0; t < count; t++) {
        const int64_t tile = first + t;
        image[t] = tile / (across * down);
        top[t] = tile / across % down * 2, left[t] = tile % across * 2;
    }

    for (int t = 0; t < count; t++) {
        const T *pixels[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                const int y = top[t] + i - 1, x = left[t] + j - 1;
                const bool inside = y >= 0 && y < job.height && x >= 0 && x < job.width;
                pixels[i][j] = inside ? (const T *)job.x + ((image[t] * job.height + y) * job.width + x) * C : nullptr;
            }
        for (int c = 0; c < C; c += LANES) {
            vec d[4][4], v[4][4];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) d[i][j] = pixels[i][j] ? wide(pixels[i][j] + c) : vec{};
            transform_input(d, v);
            for (int p = 0; p < 16; p++)
                Product<T>::put(inputs + ((size_t)p * count + t) * C + c, v[p / 4][p % 4]);
        }
    }

    for (int column = 0; column < stride; column += PANEL) {
        const int vectors = smaller(stride - column, PANEL) / LANES;
        for (int p = 0; p < 16; p++) {
            const T *panel = (const T *)job.weight + (size_t)p * C * stride + (size_t)column * C;
            for (int t = 0; t < count; t += ROWS) {
                const int group = smaller(count - t, ROWS);
                const T *rows[ROWS];
                float *to[ROWS];
                for (int r = 0; r < group; r++) {
                    rows[r] = inputs + ((size_t)p * count + t + r) * C;
                    to[r] = products + ((size_t)p * TILES + t + r) * PANEL;
                }
                add_product<T>(vectors, group, rows, panel, C, {nullptr, 0}, true, to);
            }
        }
        for (int t = 0; t < count; t++)
            for (int c = 0; c < vectors * LANES; c += LANES) {
                vec m[4][4], y[2][2];
                for (int p = 0; p < 16; p++) m[p / 4][p % 4] = load<vec>(products + ((size_t)p * TILES + t) * PANEL + c);
                transform_output(m, y);
                const vec bias = load<vec>(job.bias + column + c);
                for (int i = 0; i < smaller(job.height - top[t], 2); i++)
                    for (int j = 0; j < smaller(job.width - left[t], 2); j++) {
                        const int64_t pixel = (image[t] * job.height + top[t] + i) * job.width + left[t] + j;
                        put_columns((T *)job.out + pixel * D + column + c, y[i][j] + bias, D - column - c);
                    }
            }
    }
}

}  // namespace NAMESPACE
