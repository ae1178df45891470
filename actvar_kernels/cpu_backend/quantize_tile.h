// Quantize rows to bytes for one instruction set: q = x / scale to the nearest, half to even, scale = max |x| / 127. The
// bytes are q + 128. Include this file after vectors.h.

namespace NAMESPACE {

// Keep the compiler from joining a product with the sum that follows, so that both are rounded as in PyTorch.
inline vec rounded_product(vec a, vec b) {
    vec product = a * b;
#if defined(__x86_64__)
    asm("" : "+v"(product));
#endif
    return product;
}

// Return the highest |x| of a row, as the bits of a float: infinity and NaN are higher than all numbers.
template <class T> inline uint32_t highest(const T *x, int depth) {
    uvec most = {};
    for (int c = 0; c < depth; c += LANES) {
        const uvec bits = (uvec)first_columns(x + c, depth - c) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    uint32_t all = 0;
    for (int j = 0; j < LANES; j++) all = most[j] > all ? most[j] : all;
    return all;
}

inline float scale_of(uint32_t bits) { return load<float>(&bits) / 127; }

// Quantize a row of `depth` numbers, and fill it up with zeros to a multiple of 4. A row without a scale that numbers
// can be divided by becomes zeros.
template <class T> inline void quantize(const T *x, int depth, float scale, uint8_t *to) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    const bool divides = scale > 0 && scale < __builtin_inff();
    for (int c = 0; c < depth; c += LANES) {
        vec q = {};
        if (divides) {
            q = first_columns(x + c, depth - c) / scale;
            q = q > 127.0f ? vec{} + 127.0f : q;
            q = q < -127.0f ? vec{} - 127.0f : q;
            q = (q + 12582912.0f) - 12582912.0f;  // The sums round to an integer.
        }
        const bytes all = __builtin_convertvector(__builtin_convertvector(q, ivec) + 128, bytes);
        memcpy(to + c, &all, smaller(LANES, padded(depth - c, 4)));
    }
}

// Quantize row number `row` of x [rows, depth], and store its scale.
template <class T> void quantize_row(const void *x, int depth, int row, uint8_t *to, float *scale) {
    const T *from = (const T *)x + (size_t)row * depth;
    *scale = scale_of(highest(from, depth));
    quantize(from, depth, *scale, to);
}

}  // namespace NAMESPACE
