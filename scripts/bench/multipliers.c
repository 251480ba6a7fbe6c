/* A loop that multiplies and adds and does nothing else: what the multipliers of a core can do. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { SUMS = 12 }; /* more than a multiply-add takes cycles, and as many as there are registers for */
typedef float lanes __attribute__((vector_size(4 * LANES)));

/* Multiply-adds done in so many rounds; `out` [LANES] keeps the compiler from leaving them out. */
long multiply_add(long rounds, float *out) {
    lanes sums[SUMS], x = {0}, y = {0};
    x += out[0], y += out[1];
    for (int k = 0; k < SUMS; k++)
        sums[k] = x + (float)k; /* equal ones would be computed once */
    for (long i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int k = 0; k < SUMS; k++)
            sums[k] = sums[k] * x + y;
    }
    for (int k = 1; k < SUMS; k++)
        sums[0] += sums[k];
    for (int i = 0; i < LANES; i++)
        out[i] = sums[0][i];
    return rounds * SUMS * LANES;
}
