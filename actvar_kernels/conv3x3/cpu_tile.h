// Define Winograd's convolution for one instruction set. ../cpu_backend/isa.h includes this file after vectors.h.

namespace NAMESPACE {

// Describe an algorithm for one dimension, and name its sizes in it: a tile of OUTPUTS outputs lies over PIXELS pixels.
// `input` turns PIXELS + 2 inputs d into as many numbers v. Product k is v[number(k)] times weight k. `output` turns the
// PRODUCTS products m into outputs y. docs/kernels/conv3x3.md derives them.

// Winograd's F(2, 3). The points are 0, 1, -1 and infinity.
struct Small {
    static constexpr int OUTPUTS = 2, PIXELS = 2, PRODUCTS = 4;
    static constexpr int number(int product) { return product; }
    static inline void input(const vec (&d)[4], vec (&v)[4]) {
        v[0] = d[2] - d[0];
        v[1] = d[2] + d[1];
        v[2] = d[2] - d[1];
        v[3] = d[3] - d[1];
    }
    static inline void output(const vec (&m)[4], vec (&y)[2]) {
        y[0] = m[0] + (m[1] + m[2]);
        y[1] = (m[1] - m[2]) + m[3];
    }
};

// Winograd's F(4, 3). The points are 0, A, -A, B, -B and infinity.
struct Large {
    static constexpr int OUTPUTS = 4, PIXELS = 4, PRODUCTS = 6;
    static constexpr float A = 0.6875f, B = 1.5f, A2 = A * A, B2 = B * B;
    static constexpr int number(int product) { return product; }
    static inline void input(const vec (&d)[6], vec (&v)[6]) {
        const vec even_a = d[4] - B2 * d[2], odd_a = A * (d[3] - B2 * d[1]);
        const vec even_b = d[4] - A2 * d[2], odd_b = B * (d[3] - A2 * d[1]);
        v[0] = A2 * B2 * d[0] - (A2 + B2) * d[2] + d[4];
        v[1] = even_a + odd_a;
        v[2] = even_a - odd_a;
        v[3] = even_b + odd_b;
        v[4] = even_b - odd_b;
        v[5] = A2 * B2 * d[1] - (A2 + B2) * d[3] + d[5];
    }
    static inline void output(const vec (&m)[6], vec (&y)[4]) {
        const vec sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
        y[0] = m[0] + sum_a + sum_b;
        y[1] = A * difference_a + B * difference_b;
        y[2] = A2 * sum_a + B2 * sum_b;
        y[3] = A2 * A * difference_a + B2 * B * difference_b + m[5];
    }
};

// Convolve two pixels that stand twice each, with their neighbours. Outputs 0 and 2 have a product of their own at the
// point -1, outputs 1 and 3 have another, and all share the one at the point 1.
struct Enlarging {
    static constexpr int OUTPUTS = 4, PIXELS = 2, PRODUCTS = 5;
    static constexpr int number(int product) { return product < 3 ? product : product - 1; }
    static inline void input(const vec (&d)[4], vec (&v)[4]) { Small::input(d, v); }
    static inline void output(const vec (&m)[5], vec (&y)[4]) {
        y[0] = m[0] + (m[1] + m[2]);
        y[1] = m[1] + m[3];
        y[2] = m[1] - m[2];
        y[3] = (m[1] - m[3]) + m[4];
    }
};

// Count the numbers and the products of a tile.
template <class W> constexpr int NUMBERS = (W::PIXELS + 2) * (W::PIXELS + 2);
template <class W> constexpr int POSITIONS = W::PRODUCTS * W::PRODUCTS;

// Return the bytes that `run` needs for a group of tiles.
template <class T, class W> size_t scratch_bytes(const Job &job) {
    return (size_t)job.group * (NUMBERS<W> * job.channels * sizeof(Factor<T>) + POSITIONS<W> * PANEL * sizeof(float)) +
           (size_t)job.channels * sizeof(T);
}

// Transform the channels of `count` tiles into `inputs` [NUMBERS, count, C].
template <class T, class W>
void transform(const Job &job, const Tile *tiles, int count, const T *zeros, Factor<T> *inputs) {
    constexpr int N = W::PIXELS + 2;
    const int C = job.channels;
    for (int t = 0; t < count; t++) {
        const T *pixels[N][N], *image = (const T *)job.x + (int64_t)tiles[t].image * job.height * job.width * C;
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++) {
                const int y = tiles[t].row * W::PIXELS + i - 1, x = tiles[t].column * W::PIXELS + j - 1;
                const bool inside = y >= 0 && y < job.height && x >= 0 && x < job.width;
                pixels[i][j] = inside ? image + ((int64_t)y * job.width + x) * C : zeros;
            }
        for (int c = 0; c < C; c += LANES) {
            vec columns[N][N];  // [column, number]
#pragma GCC unroll 6
            for (int j = 0; j < N; j++) {
                vec d[N];
#pragma GCC unroll 6
                for (int i = 0; i < N; i++) d[i] = wide(pixels[i][j] + c);
                W::input(d, columns[j]);
            }
#pragma GCC unroll 6
            for (int i = 0; i < N; i++) {
                vec d[N], v[N];
#pragma GCC unroll 6
                for (int j = 0; j < N; j++) d[j] = columns[j][i];
                W::input(d, v);
#pragma GCC unroll 6
                for (int j = 0; j < N; j++)
                    put(inputs + ((size_t)(i * N + j) * count + t) * C + c, v[j]);
            }
        }
    }
}

// Store the outputs of a panel, `vectors` vectors from `column` on, made from `products` [POSITIONS, group, PANEL].
template <class T, class W>
void put_outputs(const Job &job, const Tile *tiles, int count, int column, int vectors, const float *products) {
    constexpr int N = W::PRODUCTS, M = W::OUTPUTS, SCALE = W::OUTPUTS / W::PIXELS;
    const int D = job.columns, height = job.height * SCALE, width = job.width * SCALE;
    for (int t = 0; t < count; t++) {
        const int top = tiles[t].row * M, left = tiles[t].column * M;
        const int down = smaller(height - top, M), across = smaller(width - left, M);
        for (int c = 0; c < vectors * LANES; c += LANES) {
            vec columns[N][M];  // [product, output]
#pragma GCC unroll 6
            for (int j = 0; j < N; j++) {
                vec m[N];
#pragma GCC unroll 6
                for (int i = 0; i < N; i++)
                    m[i] = load<vec>(products + ((size_t)(i * N + j) * job.group + t) * PANEL + c);
                W::output(m, columns[j]);
            }
            const vec bias = load<vec>(job.bias + column + c);
#pragma GCC unroll 4
            for (int i = 0; i < M; i++) {
                if (i >= down) break;
                vec m[N], y[M];
#pragma GCC unroll 6
                for (int j = 0; j < N; j++) m[j] = columns[j][i];
                W::output(m, y);
#pragma GCC unroll 4
                for (int j = 0; j < M; j++) {
                    if (j >= across) break;
                    const int64_t pixel = ((int64_t)tiles[t].image * height + top + i) * width + left + j;
                    const int64_t to = pixel * D + column + c;
                    vec sum = y[j] + bias;
                    if (job.residual) sum += first_columns((const T *)job.residual + to, D - column - c);
                    put_columns((T *)job.out + to, sum, D - column - c);
                }
            }
        }
    }
}

// Compute the outputs of `count` tiles from tile number `first` on.
template <class T, class W> void run(const Job &job, int64_t first, int count, char *scratch) {
    constexpr int N = W::PRODUCTS;
    const int C = job.channels, stride = padded(job.columns, LANES);
    float *products = (float *)scratch;                                    // [POSITIONS, group, PANEL]
    Factor<T> *inputs = (Factor<T> *)(products + (size_t)POSITIONS<W> * job.group * PANEL);  // [NUMBERS, count, C]
    T *zeros = (T *)(inputs + (size_t)NUMBERS<W> * job.group * C);        // [C], a pixel outside the image
    memset(zeros, 0, C * sizeof(T));
    Tile tiles[MAX_GROUP];
    for (int t = 0; t < count; t++) {
        const int64_t tile = first + t, row = tile / job.across;
        tiles[t] = {(int)(row / job.down), (int)(row % job.down), (int)(tile % job.across)};
    }
    transform<T, W>(job, tiles, count, zeros, inputs);
    for (int column = 0; column < stride; column += PANEL) {
        const int vectors = smaller(stride - column, PANEL) / LANES;
        for (int p = 0; p < POSITIONS<W>; p++) {
            const Factor<T> *panel = (const Factor<T> *)job.weight + (size_t)p * C * stride + (size_t)column * C;
            const Factor<T> *numbers = inputs + (size_t)(W::number(p / N) * (W::PIXELS + 2) + W::number(p % N)) * count * C;
            for (int t = 0; t < count; t += ROWS) {
                const int group = smaller(count - t, ROWS);
                const Factor<T> *rows[ROWS];
                float *to[ROWS];
                for (int r = 0; r < group; r++) {
                    rows[r] = numbers + (size_t)(t + r) * C;
                    to[r] = products + ((size_t)p * job.group + t + r) * PANEL;
                }
                add_product<Factor<T>>(vectors, group, rows, panel, C, {nullptr, 0}, true, to);
            }
        }
        put_outputs<T, W>(job, tiles, count, column, vectors, products);
    }
}

}  // namespace NAMESPACE
