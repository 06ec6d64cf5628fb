/* |x| of hidden states in one reading: the largest of each row, and the few entries among which the median is. */

/* Largest magnitude of each row of `x`, rows `stride` apart; NaN if the row holds one. */
void sinklens_row_max(const float *x, long rows, long dim, long stride, float *found) {
    for (long r = 0; r < rows; r++, x += stride) {
        vf best[4] = {{0}, {0}, {0}, {0}};
        vi strange = {0};
        long d = 0;
        for (; d + 4 * LANES <= dim; d += 4 * LANES)
            for (int u = 0; u < 4; u++) {
                vf v = load(x + d + u * LANES);
                strange |= v != v;
                best[u] = larger(magnitude(v), best[u]);
            }
        for (; d < dim; d += LANES) {
            vf v = d + LANES <= dim ? load(x + d) : load_part(x + d, dim - d, 0.0f);
            strange |= v != v;
            best[0] = larger(magnitude(v), best[0]);
        }
        int nan = 0;
        for (int i = 0; i < LANES; i++) nan |= strange[i];
        found[r] = nan ? __builtin_nanf("") : largest(larger(larger(best[0], best[1]), larger(best[2], best[3])));
    }
}

/* Counts the magnitudes below `low` into `counts[0]`, and copies those from `low` to `high` to `kept`, whose number goes
 * to `counts[1]`; -1 if they are more than `room`. `kept` has room for 16 more. */
void sinklens_between(const float *x, long rows, long dim, long stride, float low, float high, float *kept, long room,
                      long *counts) {
    long below = 0, n = 0;
    counts[1] = -1;
    for (long r = 0; r < rows; r++, x += stride) {
        long d = 0;
#ifdef __AVX512F__
        __m512 from = _mm512_set1_ps(low), to = _mm512_set1_ps(high);
        for (; d + LANES <= dim; d += LANES) {
            __m512 v = (__m512)magnitude(load(x + d));
            __mmask16 in = _mm512_cmp_ps_mask(v, from, _CMP_GE_OQ) & _mm512_cmp_ps_mask(v, to, _CMP_LE_OQ);
            below += __builtin_popcount(_mm512_cmp_ps_mask(v, from, _CMP_LT_OQ));
            if (n > room) return;
            _mm512_storeu_ps(kept + n, _mm512_maskz_compress_ps(in, v));
            n += __builtin_popcount(in);
        }
#endif
        for (; d < dim; d++) {
            float v = __builtin_fabsf(x[d]);
            if (n > room) return;
            kept[n] = v;
            n += v >= low && v <= high;
            below += v < low;
        }
    }
    counts[0] = below;
    if (n <= room) counts[1] = n;
}
