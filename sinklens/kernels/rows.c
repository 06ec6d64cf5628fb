/* One pass over rows of attention logits, while each row is in cache: weights and all that is asked per row and per key.
 *
 * The torch path makes several passes over a block that does not fit the cache; this makes one. The definitions are
 * those of `reduce.py`. Written with vector extensions of GCC and Clang, so it runs on any processor they know.
 */

#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

/* Below every logit that is finite in earnest. */
#define HIDDEN (-3e38f)
#define LEAST_LEFT 1e-4f /* as in spec.py */
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define ALWAYS static inline __attribute__((always_inline))

ALWAYS vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
ALWAYS void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
ALWAYS vf all(float x) { return x - (vf){0}; }
ALWAYS vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
ALWAYS vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }

/* The last, partial vector of a row; lanes beyond it hold `fill`. */
static inline vf load_part(const float *p, long n, float fill) {
    float buffer[LANES];
    for (long i = 0; i < LANES; i++) buffer[i] = i < n ? p[i] : fill;
    return load(buffer);
}
ALWAYS void store_part(float *p, vf v, long n) { memcpy(p, &v, (size_t)n * sizeof(float)); }

static inline float sum(vf v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }
static inline float largest(vf v) { float m = v[0]; for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m; return m; }

/* To bfloat16, to nearest, ties to even; for numbers that are not NaN. */
ALWAYS vh to_half(vf v) {
    vu bits = (vu)v;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
}

/* 2^f on [-1/2, 1/2] by a polynomial fitted for the least relative error, 2e-9, with p(0) = 1. */
ALWAYS vf power(vf f) {
    vf p = all(1.5353361882350367e-04f);
    p = p * f + 1.3398874422124261e-03f;
    p = p * f + 9.6184373578407315e-03f;
    p = p * f + 5.5503324711004852e-02f;
    p = p * f + 2.4022647913626435e-01f;
    p = p * f + 6.9314720285508213e-01f;
    return p * f + 1.0f;
}

/* The three that matter most have instructions of their own where the processor has them. `exp2v`: 2^x to about one
 * unit in the last place, exactly 0 below the smallest normal number, for x <= 127, NaN for NaN. `larger`: of each lane, `b` where
 * they cannot be compared. `same`: whether any lane is `value`. */
#ifdef __AVX512F__
ALWAYS vf exp2v(vf x) {
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)power(x - (vf)n), n);
}
ALWAYS vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
ALWAYS int same(vf a, float value) {
    return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(value), _CMP_EQ_OQ) != 0;
}
#else
ALWAYS vf exp2v(vf x) {
    vi normal = ~(x < -126.0f);
    x = pick(normal, x, all(0.0f));
    vf n = (x + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to the nearest integer */
    vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
    return pick(normal, power(x - n) * (vf)exponent, all(0.0f));
}
ALWAYS vf larger(vf a, vf b) { return pick(a > b, a, b); }
ALWAYS int same(vf a, float value) {
    vi hit = a == value;
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= hit[i];
    return any != 0;
}
#endif

/* What is given, and what is asked; NULL for nothing. Per-row arrays run over `heads * rows`; sums over rows are added
 * to arrays of `keys` whose heads are `stride` apart. */
typedef struct {
    const float *back;     /* [keys]: its weighted sum is `mean_back` */
    const float *count;    /* per row, its weight in the sums over rows; NULL for 1 */
    const float *sink;     /* [heads]: learned sink logit (nats), for `count`; only if not `known` */
    const float *other;    /* [heads, `other_stride` apart][keys]: 1 outside of the first key group, 0 inside */
    const uint8_t *tail;   /* per row, whether it is in `received_tail` */
    const uint8_t *probe;  /* per row, whether it is in `received_rows` */
    const int64_t *column; /* [heads][columns]: keys whose weights are wanted; outside of [0, keys) for none */
    float *scratch;        /* [threads][2][`scratch_stride`] */
    float *logit;          /* largest logit */
    float *top;            /* weight there */
    int64_t *index;        /* key there, the first on ties; asked with the two above or not at all */
    float *product;        /* sum of weight * ln(weight) */
    float *mean_back;
    float *near;           /* sum of weight * max(0, window - distance) */
    float *own;            /* weight of the row's own key */
    float *mass;           /* [columns] per row */
    float *rest;           /* sum of weight * other */
    float *received;       /* sum over rows of count * weight */
    float *received_log;   /* the same of A ln A, where A = count * weight */
    float *received_tail;
    float *received_rows;
    float *band;           /* over the rows `band_first` to `band_last` after the key */
    float *band_rest;      /* the same of A * part / (A's mass off the first group); needs `rest` */
    uint16_t *half;        /* [heads * rows][keys]: the weights once more, as bfloat16; only if not `known` */
    long stride, other_stride, scratch_stride, columns;
    long place;            /* index of the first row's own key */
    long window, band_first, band_last;
    long keep;             /* what becomes of the logits */
    long first;            /* index of the first key here among the keys that `column` and `index` count */
} asked;

/* They may hold anything afterwards, or be the weights, or the weights before they are normalised. */
enum { DROPPED, NORMALISED, RAW };

/* Largest entry and its first place; place 0 where nothing is comparable. */
typedef struct { float value; long at; } peak;

static float row_largest(const float *x, long keys) {
    vf best[4] = {all(-__builtin_inff()), all(-__builtin_inff()), all(-__builtin_inff()), all(-__builtin_inff())};
    long k = 0;
    for (; k + 4 * LANES <= keys; k += 4 * LANES)
        for (int u = 0; u < 4; u++) best[u] = larger(load(x + k + u * LANES), best[u]);
    for (; k + LANES <= keys; k += LANES) best[0] = larger(load(x + k), best[0]);
    if (k < keys) best[1] = larger(load_part(x + k, keys - k, -__builtin_inff()), best[1]);
    return largest(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

static long first_of(const float *x, long keys, float value) {
    long k = 0;
    while (k + LANES <= keys && !same(load(x + k), value)) k += LANES;
    for (; k < keys; k++) if (x[k] == value) return k;
    return 0;
}

typedef struct { vf mass, product, back, rest; } sums;

/* Partial sums in several places: more exact than one long sum, and no addition waits for the one before. */
#define UNROLLED 4

ALWAYS vf weigh_keys(vf x, const float *back, const float *other, float shift, float to_log2, sums *s, vf *product) {
    vf z = x - shift, w = exp2v(z * to_log2), p = w * z;
    s->mass += w;
    s->product += p;
    if (back) s->back += w * load(back);
    if (other) s->rest += w * load(other);
    *product = p;
    return w;
}

/* Weights before normalisation `e`, their logarithms times themselves `t`, and sums of them. */
ALWAYS sums weigh(const float *x, float *e, float *t, long keys, float shift, float to_log2, const float *back,
                  const float *other) {
    sums s[UNROLLED] = {{{0}, {0}, {0}, {0}}};
    vf p;
    long k = 0;
    for (; k + UNROLLED * LANES <= keys; k += UNROLLED * LANES)
        for (int u = 0; u < UNROLLED; u++) {
            long at = k + u * LANES;
            store(e + at, weigh_keys(load(x + at), back ? back + at : 0, other ? other + at : 0, shift, to_log2, s + u, &p));
            if (t) store(t + at, p);
        }
    for (; k + LANES <= keys; k += LANES) {
        store(e + k, weigh_keys(load(x + k), back ? back + k : 0, other ? other + k : 0, shift, to_log2, s, &p));
        if (t) store(t + k, p);
    }
    if (k < keys) {
        long n = keys - k;
        vf w = weigh_keys(load_part(x + k, n, HIDDEN), 0, 0, shift, to_log2, s, &p);
        if (back) s->back += w * load_part(back + k, n, 0.0f);
        if (other) s->rest += w * load_part(other + k, n, 0.0f);
        store_part(e + k, w, n);
        if (t) store_part(t + k, p, n);
    }
    for (int u = 1; u < UNROLLED; u++) {
        s[0].mass += s[u].mass;
        s[0].product += s[u].product;
        s[0].back += s[u].back;
        s[0].rest += s[u].rest;
    }
    return s[0];
}

/* The same with the questions fixed at compile time. */
static sums weigh_row(const float *x, float *e, float *t, long keys, float shift, float to_log2, const float *back,
                      const float *other) {
    if (t) {
        if (other) return weigh(x, e, t, keys, shift, to_log2, back, other);
        return weigh(x, e, t, keys, shift, to_log2, back, 0);
    }
    if (other) return weigh(x, e, 0, keys, shift, to_log2, back, other);
    if (back) return weigh(x, e, 0, keys, shift, to_log2, back, 0);
    return weigh(x, e, 0, keys, shift, to_log2, 0, 0);
}

/* into += e * factor */
static void add_row(float *into, const float *e, long keys, float factor) {
    long k = 0;
    for (; k + LANES <= keys; k += LANES) store(into + k, load(into + k) + load(e + k) * factor);
    for (; k < keys; k++) into[k] += e[k] * factor;
}

/* into += t * a + e * b */
static void add_log_row(float *into, const float *t, const float *e, long keys, float a, float b) {
    long k = 0;
    for (; k + LANES <= keys; k += LANES) store(into + k, load(into + k) + load(t + k) * a + load(e + k) * b);
    for (; k < keys; k++) into[k] += t[k] * a + e[k] * b;
}

/* Weights in place; their sums over rows and their halves on the way. */
ALWAYS void scale_keys(float *e, long keys, float scale, float count, float *received, uint16_t *half) {
    long k = 0;
    for (; k + LANES <= keys; k += LANES) {
        vf w = load(e + k) * scale;
        store(e + k, w);
        if (received) store(received + k, load(received + k) + w * count);
        if (half) { vh h = to_half(w); memcpy(half + k, &h, sizeof h); }
    }
    if (k == keys) return;
    vf w = load_part(e + k, keys - k, 0.0f) * scale;
    vh h = to_half(w);
    store_part(e + k, w, keys - k);
    if (received) store_part(received + k, load_part(received + k, keys - k, 0.0f) + w * count, keys - k);
    if (half) memcpy(half + k, &h, (size_t)(keys - k) * sizeof(uint16_t));
}

static void scale_row(float *e, long keys, float scale, float count, float *received, uint16_t *half) {
    if (half) scale_keys(e, keys, scale, count, received, half);
    else if (received) scale_keys(e, keys, scale, count, received, 0);
    else scale_keys(e, keys, scale, count, 0, 0);
}

float expf(float);
float logf(float);

/* Single weights of a row, `e * scale`, and sums over a few of its keys. */
static void look_up(const float *e, long head, long row, long place, long keys, float scale, const asked *a) {
    if (a->own) a->own[row] = place >= 0 && place < keys ? e[place] * scale : 0.0f;
    for (long c = 0; c < a->columns; c++) {
        int64_t key = a->column[head * a->columns + c] - a->first;
        a->mass[row * a->columns + c] = key >= 0 && key < keys ? e[key] * scale : 0.0f;
    }
    if (a->near) {
        long first = place - a->window;
        float found = 0;
        for (long k = first < 0 ? 0 : first + 1; k < keys; k++) found += e[k] * (float)(k - first);
        a->near[row] = found * scale;
    }
}

/* Sums over rows, of weights `e * scale` and of `count` times that. */
static void add_sums(const float *e, const float *t, long head, long row, long place, long keys, float scale,
                     float count, float rest, const asked *a, int known) {
    long at = head * a->stride;
    if (a->received_log) {
        float unit = known ? LN2 : 1.0f;
        float log_factor = logf(scale) + logf(count);
        add_log_row(a->received_log + at, t, e, keys, unit * scale * count, scale * count * log_factor);
    }
    if (a->tail && a->tail[row]) add_row(a->received_tail + at, e, keys, scale * count);
    if (a->probe && a->probe[row]) add_row(a->received_rows + at, e, keys, scale * count);
    long first = place - a->band_last, last = place - a->band_first;
    if (first < 0) first = 0;
    if (last >= keys) last = keys - 1;
    if (first > last) return;
    if (a->band) add_row(a->band + at + first, e + first, last - first + 1, scale * count);
    float part = rest / LEAST_LEFT - 1.0f; /* `part_left` of spec.py; a row that is NaN stays so */
    if (part > 1.0f) part = 1.0f;
    if (a->band_rest && !(part <= 0.0f))
        add_row(a->band_rest + at + first, e + first, last - first + 1, scale * count * part / rest);
}

/* A row of which the first `keys` are seen; `place` is its own key. Returns what its stored weights still lack. */
static float one_row(float *x, long head, long row, long place, long keys, const float *back, int known, float *scratch,
                     const asked *a) {
    float *e = a->keep ? x : scratch, *t = a->received_log ? scratch + a->scratch_stride : 0;
    float scale = 1, log_scale = 0, count = a->count ? a->count[row] : 1.0f, left = 1, share = 0, rest = 0;
    peak p = {0, 0};
    if (!known || a->index) p.value = row_largest(x, keys);
    if (a->index) p.at = first_of(x, keys, p.value);
    /* A row that sees a key has something larger, or it has no softmax: then it is NaN, not a mean of hidden keys. */
    if (p.value <= HIDDEN) p.value = __builtin_nanf("");
    const float *other = a->rest ? a->other + head * a->other_stride : 0;
    sums s = weigh_row(x, e, t, keys, known ? 0.0f : p.value, known ? 1.0f : LOG2E, back, other);
    if (!known) {
        scale = 1.0f / sum(s.mass);
        log_scale = logf(scale);
    }
    if (a->index) {
        a->logit[row] = p.value;
        a->index[row] = p.at + a->first;
        a->top[row] = e[p.at] * scale;
    }
    if (a->product) a->product[row] = sum(s.product) * scale * (known ? LN2 : 1.0f) + log_scale;
    if (a->mean_back) a->mean_back[row] = sum(s.back) * scale;
    /* The row's share that the learned sink leaves: exp(norm) / (exp(norm) + exp(sink)), norm = largest - ln(scale). */
    if (a->sink && !known) {
        float odds = expf(a->sink[head] - p.value + log_scale);
        left = 1.0f / (1.0f + odds);
        share = left == 0.0f ? 1.0f : odds * left; /* not 1 - left, which would cancel */
    }
    if (a->rest) {
        if (known) share = a->rest[row]; /* the learned sink's mass, where there is one */
        rest = a->rest[row] = sum(s.rest) * scale * left + share;
    }
    count *= left;
    look_up(e, head, row, place, keys, scale, a);
    /* A row that does not count may hold anything, NaN included, so it is not added with weight 0 but left out. */
    int counts = count != 0.0f;
    if (counts) add_sums(e, t, head, row, place, keys, scale, count, rest, a, known);
    float *received = a->received && counts ? a->received + head * a->stride : 0;
    uint16_t *half = a->half ? a->half + row * keys : 0;
    if (a->keep == NORMALISED || half) {
        if (!known || received) scale_row(e, keys, scale, count, received, half);
        return left;
    }
    if (received) add_row(received, e, keys, scale * count);
    return scale * left;
}

/* Logits `[heads][rows][keys]` become weights in place, if those are to be kept. `known`: the logits are logarithms to
 * base 2 of the weights themselves; otherwise they are in nats and the weights are their softmax. */
void sinklens_rows(float *logits, long heads, long rows, long keys, int known, int threads, const asked *a) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
    for (long head = 0; head < heads; head++) {
        float *scratch = a->scratch + THREAD * 2 * a->scratch_stride;
        for (long r = 0; r < rows; r++) {
            long row = head * rows + r;
            one_row(logits + row * keys, head, row, a->place + r, keys, a->back, known, scratch, a);
        }
    }
    (void)threads;
}
