/* One pass over rows of attention logits, while each row is in cache: weights and all that is asked per row.
 *
 * The torch path makes about eight passes over a block that does not fit the cache; this makes one. The definitions
 * are those of `reduce.py`. Written with vector extensions of GCC and Clang, so it runs on any processor they know.
 */

#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

#define HIDDEN (-1e30f)
#define LOG2E 1.4426950408889634f

static inline vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf all(float x) { return (vf){0} + x; }
static inline vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

/* The last, partial vector of a row; lanes beyond it hold `fill`. */
static inline vf load_part(const float *p, long n, float fill) {
    float buffer[LANES];
    for (long i = 0; i < LANES; i++) buffer[i] = i < n ? p[i] : fill;
    return load(buffer);
}
static inline void store_part(float *p, vf v, long n) { memcpy(p, &v, (size_t)n * sizeof(float)); }

static inline float sum(vf v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }
static inline float largest(vf v) { float m = v[0]; for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m; return m; }

/* To bfloat16, to nearest, ties to even; for numbers that are not NaN. */
static inline vh to_half(vf v) {
    vu bits = (vu)v;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
}

/* 2^x to about one unit in the last place; exactly 0 below the smallest normal number. x must be <= 127. */
static inline vf exp2v(vf x) {
    vi normal = x >= -126.0f;
    x = pick(normal, x, all(0.0f));
    vf n = (x + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to the nearest integer */
    vf f = x - n;
    /* Taylor series of 2^f on [-1/2, 1/2]: the first term left out is below 6e-9. */
    vf p = all(1.5252733804059841e-05f);
    p = p * f + 1.5403530393381606e-04f;
    p = p * f + 1.3333558146428443e-03f;
    p = p * f + 9.6181291076284772e-03f;
    p = p * f + 5.5504108664821580e-02f;
    p = p * f + 2.4022650695910071e-01f;
    p = p * f + 6.9314718055994531e-01f;
    p = p * f + 1.0f;
    vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
    return pick(normal, p * (vf)exponent, all(0.0f));
}

/* What is asked of each row; NULL for nothing. Arrays run over `heads * rows`. */
typedef struct {
    const float *back;   /* [keys]: its weighted sum is `mean_back` */
    const float *count;  /* weight of each row in the sums over rows; NULL for 1 */
    const float *sink;   /* learned sink logit of each head (nats), for `count`; NULL without */
    float *logit;        /* largest logit */
    float *top;          /* weight there */
    int64_t *index;      /* key there, the first on ties; asked with the two above or not at all */
    float *product;      /* sum of weight * logit */
    float *mean_back;
    float *received;     /* [heads], `received_stride` apart: sums over rows of count * weight are added */
    long received_stride;
    uint16_t *half;      /* [heads * rows][keys]: the weights once more, as bfloat16; only if not `known` */
} asked;

typedef struct { float value; long at; } peak;

/* Largest entry and its first place. Each lane keeps its own first; the lowest of the equal ones wins. */
static peak row_peak(const float *x, long keys) {
    vf best = all(HIDDEN * 4);
    vi at = {0}, lane, k;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    long start = 0;
    for (k = lane; start < keys; start += LANES, k += LANES) {
        vf v = start + LANES <= keys ? load(x + start) : load_part(x + start, keys - start, HIDDEN * 4);
        vi larger = v > best;
        best = pick(larger, v, best);
        at = (k & larger) | (at & ~larger);
    }
    peak found = {best[0], at[0]};
    for (int i = 1; i < LANES; i++)
        if (best[i] > found.value || (best[i] == found.value && at[i] < found.at)) found = (peak){best[i], at[i]};
    return found;
}

typedef struct { vf mass, product, back; } sums;

/* Partial sums in several places: more exact than one long sum, and no addition waits for the one before. */
#define UNROLLED 4

/* Weights before normalisation, and their sums. */
static inline void step(vf x, vf back, float shift, float to_log2, sums *s, vf *weight) {
    vf e = exp2v((x - shift) * to_log2);
    s->mass += e;
    s->product += e * x;
    s->back += e * back;
    *weight = e;
}

static sums weigh(float *x, long keys, float shift, float to_log2, const float *back) {
    sums s[UNROLLED] = {{{0}, {0}, {0}}};
    vf e;
    long k = 0;
    for (; k + UNROLLED * LANES <= keys; k += UNROLLED * LANES)
        for (int u = 0; u < UNROLLED; u++) {
            float *at = x + k + u * LANES;
            step(load(at), back ? load(back + k + u * LANES) : all(0.0f), shift, to_log2, s + u, &e);
            store(at, e);
        }
    for (; k < keys; k += LANES) {
        long n = keys - k < LANES ? keys - k : LANES;
        vf rest = back ? load_part(back + k, n, 0.0f) : all(0.0f);
        step(load_part(x + k, n, HIDDEN), rest, shift, to_log2, s, &e);
        store_part(x + k, e, n);
    }
    for (int u = 1; u < UNROLLED; u++) {
        s[0].mass += s[u].mass;
        s[0].product += s[u].product;
        s[0].back += s[u].back;
    }
    return s[0];
}

static void finish_row(float *x, long keys, float scale, float count, float *received, uint16_t *half) {
    long k = 0;
    for (; k + LANES <= keys; k += LANES) {
        vf w = load(x + k) * scale;
        store(x + k, w);
        if (received) store(received + k, load(received + k) + w * count);
        if (half) { vh h = to_half(w); memcpy(half + k, &h, sizeof h); }
    }
    if (k == keys) return;
    vf w = load_part(x + k, keys - k, 0.0f) * scale;
    vh h = to_half(w);
    store_part(x + k, w, keys - k);
    if (received) store_part(received + k, load_part(received + k, keys - k, 0.0f) + w * count, keys - k);
    if (half) memcpy(half + k, &h, (size_t)(keys - k) * sizeof(uint16_t));
}

float expf(float);
float logf(float);

static void one_row(float *x, long head, long row, long keys, int known, const asked *a) {
    float scale = 1;
    peak p = {0, 0};
    if (!known || a->index) p = row_peak(x, keys);
    sums s = weigh(x, keys, known ? 0.0f : p.value, known ? 1.0f : LOG2E, a->back);
    if (!known) scale = 1.0f / sum(s.mass);
    if (a->index) {
        a->logit[row] = p.value;
        a->index[row] = p.at;
        a->top[row] = x[p.at] * scale;
    }
    if (a->product) a->product[row] = sum(s.product) * scale;
    if (a->mean_back) a->mean_back[row] = sum(s.back) * scale;
    float count = a->count ? a->count[row] : 1.0f;
    /* The row's share that the learned sink leaves: exp(norm) / (exp(norm) + exp(sink)), norm = largest - ln(scale). */
    if (a->sink && !known) count /= 1.0f + expf(a->sink[head] - p.value + logf(scale));
    /* A row that does not count may hold anything, NaN included, so it is not added with weight 0 but left out. */
    float *received = a->received && count != 0.0f ? a->received + head * a->received_stride : 0;
    if (!known || received) finish_row(x, keys, scale, count, received, a->half ? a->half + row * keys : 0);
}

/* Logits `[heads][rows][keys]` become weights in place. `known`: the logits are logarithms to base 2 of the weights
 * themselves; otherwise they are in nats and the weights are their softmax. */
void sinklens_rows(float *logits, long heads, long rows, long keys, int known, int threads, const asked *a) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
    for (long head = 0; head < heads; head++)
        for (long row = 0; row < rows; row++)
            one_row(logits + (head * rows + row) * keys, head, head * rows + row, keys, known, a);
    (void)threads;
}
