/* Attention of float32 tensors in one go: tiles of logits that stay in cache from the product that makes them, through
 * the row pass, to the product with the values. Rows of a causal tile end at their own key, so nothing is masked; under
 * a mask, a tile has the keys from the first to the last that any of its rows sees.
 */

#include "rows.c"

/* A tile of a matrix product that fits the vector registers: rows by vectors. */
#ifdef __AVX512F__
#define ROWS 12
#define WIDE 2
#define MIX_ROWS 6
#define MIX_WIDE 4
#else
#define ROWS 6
#define WIDE 1
#define MIX_ROWS 6
#define MIX_WIDE 1
#endif
#define PANEL (WIDE * LANES)
/* Keys whose values stay in the innermost cache while the rows of a tile go over them. */
#define MIX_KEYS 128

/* Strides are in numbers, in the order batch, head, position; the last axis is contiguous. */
typedef struct {
    const float *query, *key, *value;
    const uint8_t *mask; /* 1 where a row sees a key; NULL without */
    float *output;   /* NULL without */
    float *packed;   /* [threads, `packed_stride` apart]: keys in panels, values, queries and outputs of a
                      * tile, sums over its rows */
    float *logits;   /* [threads, `logits_stride` apart][tile][line] */
    long query_stride[3], key_stride[3], value_stride[3], mask_stride[3], output_stride[3];
    long batch, heads, kv_heads, queries, keys, dim, value_dim;
    long packed_stride, logits_stride;
    long tile;       /* rows of a tile, all heads together; a multiple of ROWS */
    long line;       /* distance of its rows */
    long pieces;     /* in how many parts the heads of a key head are shared out */
    long causal;
    float scale;
} attention;

ALWAYS long up(long n, long to) { return (n + to - 1) / to * to; }

/* logits [ROWS][PANEL] = queries [dim][ROWS] times keys [dim][PANEL] */
static void multiply(const float *query, const float *key, float *logits, long line, long dim) {
    vf sum[ROWS][WIDE] = {{{0}}};
    for (long d = 0; d < dim; d++, query += ROWS, key += PANEL) {
        vf k[WIDE];
#pragma GCC unroll 8
        for (int w = 0; w < WIDE; w++) k[w] = load(key + w * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            vf q = all(query[i]);
#pragma GCC unroll 8
            for (int w = 0; w < WIDE; w++) sum[i][w] += q * k[w];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int w = 0; w < WIDE; w++) store(logits + i * line + w * LANES, sum[i][w]);
}

/* output [MIX_ROWS][wide vectors] += weights [MIX_ROWS][keys] times values [keys][wide vectors] */
ALWAYS void mix(const float *weight, long line, const float *value, long width, long keys, float *output, int wide) {
    vf sum[MIX_ROWS][MIX_WIDE];
#pragma GCC unroll 16
    for (int i = 0; i < MIX_ROWS; i++)
#pragma GCC unroll 8
        for (int w = 0; w < wide; w++) sum[i][w] = load(output + i * width + w * LANES);
    for (long k = 0; k < keys; k++, value += width) {
        vf v[MIX_WIDE];
#pragma GCC unroll 8
        for (int w = 0; w < wide; w++) v[w] = load(value + w * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < MIX_ROWS; i++) {
            vf p = all(weight[i * line + k]);
#pragma GCC unroll 8
            for (int w = 0; w < wide; w++) sum[i][w] += p * v[w];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MIX_ROWS; i++)
#pragma GCC unroll 8
        for (int w = 0; w < wide; w++) store(output + i * width + w * LANES, sum[i][w]);
}

static void mix_columns(const float *weight, long line, const float *value, long width, long keys, float *output) {
    long at = 0;
    for (; at + MIX_WIDE * LANES <= width; at += MIX_WIDE * LANES)
        mix(weight, line, value + at, width, keys, output + at, MIX_WIDE);
    for (; at < width; at += LANES) mix(weight, line, value + at, width, keys, output + at, 1);
}

/* Keys `[keys][dim]` as panels `[keys / PANEL][dim][PANEL]`, and values as lines of whole vectors, filled up with 0. */
static void pack_keys(const float *key, long stride, long keys, long dim, float *into) {
    for (long k = 0; k < keys; k += PANEL, into += PANEL * dim) {
        long n = keys - k < PANEL ? keys - k : PANEL;
        if (n < PANEL) memset(into, 0, (size_t)(PANEL * dim) * sizeof(float));
        for (long i = 0; i < n; i++)
            for (long d = 0; d < dim; d++) into[d * PANEL + i] = key[(k + i) * stride + d];
    }
}
static void pack_values(const float *value, long stride, long keys, long dim, long width, float *into) {
    for (long k = 0; k < keys; k++, into += width) {
        memcpy(into, value + k * stride, (size_t)dim * sizeof(float));
        memset(into + dim, 0, (size_t)(width - dim) * sizeof(float));
    }
}

/* What one thread works on: some heads that share a key head, and its memory. */
typedef struct {
    const attention *c;
    const asked *a;
    long batch, head, heads; /* heads of the piece */
    float *keys, *values, *query, *output, *logits, *scratch;
} work;

/* Keys outside of `first` to `stop` are hidden. */
typedef struct { long first, stop; } range;

static const uint8_t *mask_of(const work *w, long head, long q) {
    const attention *c = w->c;
    return c->mask + w->batch * c->mask_stride[0] + (w->head + head) * c->mask_stride[1] + q * c->mask_stride[2];
}

static range seen_by(const work *w, long head, long q) {
    const attention *c = w->c;
    if (c->mask) {
        const uint8_t *m = mask_of(w, head, q);
        long start = 0, stop = c->keys;
        uint64_t eight;
        while (start + 8 <= stop && (memcpy(&eight, m + start, 8), !eight)) start += 8;
        while (start < stop && !m[start]) start++;
        if (start == stop) return (range){0, 0};
        while (stop - start >= 8 && (memcpy(&eight, m + stop - 8, 8), !eight)) stop -= 8;
        while (!m[stop - 1]) stop--;
        return (range){start, stop};
    }
    long stop = c->causal ? q + c->keys - c->queries + 1 : c->keys;
    return (range){0, stop < 0 ? 0 : stop < c->keys ? stop : c->keys};
}

static void pack_queries(const work *w, long first, long each) {
    const attention *c = w->c;
    long n = w->heads * each;
    memset(w->query, 0, (size_t)(up(n, ROWS) * c->dim) * sizeof(float));
    for (long i = 0; i < n; i++) {
        const float *from = c->query + w->batch * c->query_stride[0] + (w->head + i / each) * c->query_stride[1] +
                            (first + i % each) * c->query_stride[2];
        float *into = w->query + i / ROWS * ROWS * c->dim + i % ROWS;
        for (long d = 0; d < c->dim; d++) into[d * ROWS] = from[d] * c->scale;
    }
}

/* A row that sees nothing: what is found is overwritten with 0 later, or is 0. */
static void pass_nothing(const asked *a, long row) {
    if (a->index) a->logit[row] = a->top[row] = (float)(a->index[row] = 0);
    for (long k = 0; a->mass && k < a->columns; k++) a->mass[row * a->columns + k] = 0;
    float *each[] = {a->product, a->mean_back, a->near, a->own, a->rest};
    for (int n = 0; n < 5; n++) if (each[n]) each[n][row] = 0;
}

/* Rows of queries lie far apart, where no processor expects them: ask for those of the next tile in time. */
static void fetch_queries(const work *w, long first, long each) {
    const attention *c = w->c;
    long stop = first + each < c->queries ? first + each : c->queries;
    for (long head = w->head; head < w->head + w->heads; head++)
        for (long q = first; q < stop; q++) {
            const float *at = c->query + w->batch * c->query_stride[0] + head * c->query_stride[1] + q * c->query_stride[2];
            for (long d = 0; d < c->dim; d += LANES) __builtin_prefetch(at + d);
        }
}

/* The row pass over one row `x` of a tile that has the keys `tile`; `a` counts from the first of them. Returns the
 * factor that its weights lack for the output. */
static float pass_row(const work *w, const asked *a, float *x, long i, long first, long each, range tile, range seen) {
    const attention *c = w->c;
    long q = first + i % each, head = w->batch * c->heads + w->head + i / each, row = head * c->queries + q;
    if (seen.stop == 0) {
        memset(x, 0, (size_t)(tile.stop - tile.first) * sizeof(float));
        pass_nothing(a, row);
        return 0;
    }
    long stop = seen.stop - tile.first, most = c->keys - tile.first, filled = up(stop, LANES);
    if (filled > most) filled = most;
    if (c->mask) {
        const uint8_t *m = mask_of(w, i / each, q) + tile.first;
        for (long k = 0; k < stop; k++) x[k] = m[k] ? x[k] : HIDDEN;
    }
    for (long k = stop; k < filled; k++) x[k] = HIDDEN;
    /* `back` belongs to the first row; each row further it holds one more. */
    const float *back = a->back ? a->back - q : 0;
    long place = q + c->keys - c->queries - tile.first;
    float factor = one_row(x, head, row, place, filled, back, 0, w->scratch, a);
    long rest = tile.stop - tile.first - filled;
    if (c->output && rest > 0) memset(x + filled, 0, (size_t)rest * sizeof(float));
    return factor;
}

/* The sums over rows of `a`. */
#define SUMS 6
#define SUMS_OF(a) \
    { &(a).received, &(a).received_log, &(a).received_tail, &(a).received_rows, &(a).band, &(a).band_rest }

/* The questions about the keys from `first` on. */
static asked from_key(const asked *a, long first) {
    asked b = *a;
    b.first = first;
    const float **given[] = {&b.back, &b.other};
    for (int n = 0; n < 2; n++) if (*given[n]) *given[n] += first;
    float **sums[] = SUMS_OF(b);
    for (int n = 0; n < SUMS; n++) if (*sums[n]) *sums[n] += first;
    return b;
}

static void write_row(const work *w, long i, long first, long each, float factor) {
    const attention *c = w->c;
    long width = up(c->value_dim, LANES);
    float *into = c->output + w->batch * c->output_stride[0] + (w->head + i / each) * c->output_stride[1] +
                  (first + i % each) * c->output_stride[2];
    for (long d = 0; d < c->value_dim; d++) into[d] = w->output[i * width + d] * factor;
}

/* Query rows `first` to `first + each` of all heads of the piece. Returns the keys that they see. */
static range one_tile(const work *w, long first, long each) {
    const attention *c = w->c;
    long n = w->heads * each, width = up(c->value_dim, LANES);
    float factor[n];
    range seen[n], tile = {c->keys, 0};
    for (long i = 0; i < n; i++) {
        int same_as_before = i >= each && (!c->mask || c->mask_stride[1] == 0);
        seen[i] = same_as_before ? seen[i - each] : seen_by(w, i / each, first + i % each);
        if (seen[i].stop && seen[i].first < tile.first) tile.first = seen[i].first;
        if (seen[i].stop > tile.stop) tile.stop = seen[i].stop;
    }
    tile.first = tile.stop ? tile.first / PANEL * PANEL : 0;
    asked a = from_key(w->a, tile.first);
    float *logits = w->logits + tile.first;
    pack_queries(w, first, each);
    fetch_queries(w, first + each, each);
    for (long k = tile.first; k < tile.stop; k += PANEL)
        for (long i = 0; i < n; i += ROWS)
            multiply(w->query + i * c->dim, w->keys + k * c->dim, w->logits + i * c->line + k, c->line, c->dim);
    for (long i = 0; i < n; i++) factor[i] = pass_row(w, &a, logits + i * c->line, i, first, each, tile, seen[i]);
    if (!c->output) return tile;
    memset(w->output, 0, (size_t)(up(n, MIX_ROWS) * width) * sizeof(float));
    for (long k = tile.first; k < tile.stop; k += MIX_KEYS)
        for (long i = 0; i < n; i += MIX_ROWS)
            mix_columns(w->logits + i * c->line + k, c->line, w->values + k * width, width,
                        tile.stop - k < MIX_KEYS ? tile.stop - k : MIX_KEYS, w->output + i * width);
    for (long i = 0; i < n; i++) write_row(w, i, first, each, factor[i]);
    return tile;
}

/* Rows whose sums are added up by themselves before they join those of the rows before: a weight that is added to a sum
 * of ten thousand loses the digits that weights differ in, and always to the same side where they hardly differ. */
#define APART 128

/* Adds the sums `apart` [SUMS asked][heads of the piece][line] to the results, for some keys, and makes them 0. */
static void join(const work *w, float *apart, float **into, long stride, range keys) {
    const attention *c = w->c;
    if (keys.first >= keys.stop) return;
    for (int n = 0; n < SUMS; n++) {
        if (!into[n]) continue;
        float *first = into[n] + (w->batch * c->heads + w->head) * stride + keys.first;
        for (long head = 0; head < w->heads; head++, apart += c->line) {
            add_row(first + head * stride, apart + keys.first, keys.stop - keys.first, 1.0f);
            memset(apart + keys.first, 0, (size_t)(keys.stop - keys.first) * sizeof(float));
        }
    }
}

/* All rows of the piece; `apart` has room for their sums. */
static void all_tiles(work *w, long each, float *apart) {
    const attention *c = w->c;
    long stride = w->a->stride, since = 0, free = 0;
    asked own = *w->a;
    float **sums[] = SUMS_OF(own), *into[SUMS];
    for (int n = 0; n < SUMS; n++) {
        into[n] = *sums[n];
        if (into[n]) *sums[n] = apart + (free++ * w->heads - w->batch * c->heads - w->head) * c->line;
    }
    memset(apart, 0, (size_t)(free * w->heads * c->line) * sizeof(float));
    own.stride = c->line;
    w->a = &own;
    const range none = {c->keys, 0};
    range touched = none;
    for (long q = 0; q < c->queries; q += each) {
        range seen = one_tile(w, q, c->queries - q < each ? c->queries - q : each);
        long stop = up(seen.stop, LANES);
        if (seen.stop && seen.first < touched.first) touched.first = seen.first;
        if (stop > touched.stop) touched.stop = stop < c->keys ? stop : c->keys;
        if ((since += each) < APART) continue;
        join(w, apart, into, stride, touched);
        touched = none;
        since = 0;
    }
    join(w, apart, into, stride, touched);
}

static void one_piece(const attention *c, const asked *a, long unit) {
    long piece = unit % c->pieces, kv = unit / c->pieces % c->kv_heads, batch = unit / c->pieces / c->kv_heads;
    long group = c->heads / c->kv_heads, start = group * piece / c->pieces, stop = group * (piece + 1) / c->pieces;
    long width = up(c->value_dim, LANES), panels = up(c->keys, PANEL), each = c->tile / (stop - start);
    float *memory = c->packed + THREAD * c->packed_stride;
    work w = {c, a, batch, kv * group + start, stop - start, memory, memory + panels * c->dim, 0, 0,
              c->logits + THREAD * c->logits_stride, a->scratch + THREAD * 2 * a->scratch_stride};
    w.query = w.values + (c->output ? c->keys * width : 0);
    w.output = w.query + c->tile * c->dim;
    pack_keys(c->key + batch * c->key_stride[0] + kv * c->key_stride[1], c->key_stride[2], c->keys, c->dim, w.keys);
    if (c->output)
        pack_values(c->value + batch * c->value_stride[0] + kv * c->value_stride[1], c->value_stride[2], c->keys,
                    c->value_dim, width, w.values);
    all_tiles(&w, each, w.output + (c->output ? c->tile * width : 0));
}

/* Numbers per thread that `attention.packed` needs. */
long sinklens_packed(const attention *c, const asked *a) {
    asked own = *a;
    float **each[] = SUMS_OF(own);
    long sums = 0, heads = (c->heads / c->kv_heads + c->pieces - 1) / c->pieces;
    for (int n = 0; n < SUMS; n++) sums += *each[n] != 0;
    long width = up(c->value_dim, LANES), values = c->output ? (c->keys + c->tile) * width : 0;
    return up(up(c->keys, PANEL) * c->dim + c->tile * c->dim + values + sums * heads * c->line, LANES);
}

/* Output and statistics; `asked.keep` is RAW with an output and DROPPED without. */
void sinklens_attend(const attention *c, int threads, const asked *a) {
    long units = c->batch * c->kv_heads * c->pieces;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic)
#endif
    for (long unit = 0; unit < units; unit++) one_piece(c, a, unit);
    (void)threads;
}
