"""The attention statistics as two Triton kernels; `triton_pass.py` calls them and says what they serve.

`by_row` goes over the keys of a block of rows with a running maximum, as fused attention does, and carries beside the
output what is asked per row. `by_key` goes over the rows of a block of keys with the log-sum-exp that the first has
found, and adds up what each key receives. Every sum has one place and one order, so results do not depend on the
schedule: there are no atomics. WIDE multiplies in float32 what has been rounded to bfloat16: the interpreter takes the
bits of such numbers for integers. Importing this needs Triton.
"""

# The compiler reads names, not annotations: they would only be in its way.
# pyright: reportMissingImports=false, reportMissingParameterType=false, reportOptionalMemberAccess=false

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """To float32 rounding: where it is near x, 1 - exp(-2|x|) would cancel."""
    t = tl.exp2(-2.8853900817779268 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    s = x * x
    near = 1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(
    q, k, mask, mask_q, mask_k, rows, cols, queries, keys, scale, cap, lowest,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logits of some rows and keys to base 2, -inf where hidden. MASK: 0 none, 1 boolean, 2 additive."""
    if WIDE:
        q, k = q.to(tl.float32), k.to(tl.float32)
    z = tl.dot(q, tl.trans(k), input_precision="ieee")
    z = cap * _tanh(z * (scale / cap)) if CAPPED else z * scale
    z = z * 1.4426950408889634
    seen = (rows < queries)[:, None] & (cols < keys)[None, :]
    if CAUSAL:
        seen = seen & (cols[None, :] <= rows[:, None] + (keys - queries))
    if MASK != 0:
        at = mask + rows.to(tl.int64)[:, None] * mask_q + cols.to(tl.int64)[None, :] * mask_k
        found = tl.load(at, mask=seen, other=0)
        if MASK == 1:
            seen = seen & (found != 0)
        else:
            bias = found.to(tl.float32)
            seen = seen & (bias > lowest)
            z = z + tl.where(seen, bias, 0.0) * 1.4426950408889634
    return tl.where(seen, z, float("-inf"))


@triton.jit
def by_row(
    query, key, value, mask, sinks, groups, spans, output, lse, product, distance, near, own, top, place, mass,
    q_b, q_h, q_q, k_b, k_h, k_k, v_b, v_h, v_k, m_b, m_h, m_q, m_k, g_g, g_b, g_h, o_b, o_h, o_q,
    heads, group, queries, keys, n_groups, scale, cap, lowest, window,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, V: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, SINKS: tl.constexpr,
    OUTPUT: tl.constexpr, PRODUCT: tl.constexpr, DISTANCE: tl.constexpr, NEAR: tl.constexpr, OWN: tl.constexpr,
    PEAK: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """Everything per row, of rows `[ROWS * program_id(0), ...)` of one head, in units of the final weights A.

    `lse` is to base 2, the learned sink included; `product` is sum A ln A; `mass` is `[group][head][query]`.
    """
    block, unit = tl.program_id(0), tl.program_id(1)
    batch, head = (unit // heads).to(tl.int64), (unit % heads).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    dims, outs, slots = tl.arange(0, D), tl.arange(0, V), tl.arange(0, G)
    inside = rows < queries
    q = tl.load(
        query + batch * q_b + head * q_h + rows.to(tl.int64)[:, None] * q_q + dims[None, :],
        mask=inside[:, None] & (dims < DIM)[None, :], other=0.0,
    )  # fmt: skip
    key_head = key + batch * k_b + head // group * k_h
    value_head = value + batch * v_b + head // group * v_h
    mask_head = mask + batch * m_b + head * m_h
    group_head = groups + batch * g_b + head * g_h
    here = rows + (keys - queries)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, V], tl.float32)
    s_product = tl.zeros([ROWS], tl.float32)
    s_distance = tl.zeros([ROWS], tl.float32)
    s_near = tl.zeros([ROWS], tl.float32)
    s_own = tl.zeros([ROWS], tl.float32)
    s_mass = tl.zeros([ROWS, G], tl.float32)
    first = tl.zeros([ROWS], tl.int32)
    for start in range(tl.load(spans + 2 * block), tl.load(spans + 2 * block + 1), KEYS):
        cols = start + tl.arange(0, KEYS)
        k = tl.load(
            key_head + cols.to(tl.int64)[:, None] * k_k + dims[None, :],
            mask=(cols < keys)[:, None] & (dims < DIM)[None, :], other=0.0,
        )  # fmt: skip
        z = _logits(
            q,
            k,
            mask_head,
            m_q,
            m_k,
            rows,
            cols,
            queries,
            keys,
            scale,
            cap,
            lowest,
            CAUSAL,
            MASK,
            CAPPED,
            WIDE,
        )
        larger = tl.maximum(best, tl.max(z, 1))
        if PEAK:
            first = tl.where(larger > best, start + tl.argmax(z, 1, tie_break_left=True).to(tl.int32), first)
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        shrink = tl.where(best == float("-inf"), 0.0, best - safe)
        alpha = tl.where(best == float("-inf"), 0.0, tl.exp2(shrink))
        relative = z - safe[:, None]
        e = tl.exp2(relative)
        if PRODUCT:
            each = tl.where(e > 0, e * relative, 0.0)
            s_product = alpha * (s_product + shrink * total) + tl.sum(each, 1)
        total = alpha * total + tl.sum(e, 1)
        back = (here[:, None] - cols[None, :]).to(tl.float32)
        if DISTANCE:
            s_distance = alpha * s_distance + tl.sum(e * back, 1)
        if NEAR:
            s_near = alpha * s_near + tl.sum(e * tl.minimum(back, window), 1)
        if OWN:
            s_own = alpha * s_own + tl.sum(tl.where(here[:, None] == cols[None, :], e, 0.0), 1)
        if MASS:
            s_mass = s_mass * alpha[:, None]
            for g in range(n_groups):
                member = tl.load(group_head + g * g_g + cols, mask=cols < keys, other=0)
                part = tl.sum(tl.where((member != 0)[None, :], e, 0.0), 1)
                s_mass += tl.where(slots[None, :] == g, part[:, None], 0.0)
        if OUTPUT:
            v = tl.load(
                value_head + cols.to(tl.int64)[:, None] * v_k + outs[None, :],
                mask=(cols < keys)[:, None] & (outs < VALUE_DIM)[None, :], other=0.0,
            )  # fmt: skip
            p = e.to(v.dtype)
            if WIDE:
                p, v = p.to(tl.float32), v.to(tl.float32)
            mixed = mixed * alpha[:, None] + tl.dot(p, v, input_precision="ieee")
        best = larger

    sees = total > 0
    filled = tl.where(sees, total, 1.0)
    norm = tl.where(sees, tl.where(best == float("-inf"), 0.0, best) + tl.log2(filled), float("-inf"))
    factor = tl.where(sees, 1.0, 0.0)
    log_factor = tl.zeros([ROWS], tl.float32)
    full = norm
    if SINKS:
        sink = tl.load(sinks + head) * 1.4426950408889634
        peak = tl.maximum(norm, sink)
        full = peak + tl.log2(tl.exp2(norm - peak) + tl.exp2(sink - peak))
        log_factor = tl.where(sees, norm - full, 0.0)
        factor = tl.where(sees, tl.exp2(log_factor), 0.0)
    weight = factor / filled
    at = unit.to(tl.int64) * queries + rows
    tl.store(lse + at, full, mask=inside)
    if PRODUCT:
        log_p = s_product / filled - tl.log2(filled)
        tl.store(product + at, factor * (log_p + log_factor) * 0.6931471805599453, mask=inside)
    if DISTANCE:
        tl.store(distance + at, s_distance * weight, mask=inside)
    if NEAR:
        tl.store(near + at, s_near * weight, mask=inside)
    if OWN:
        tl.store(own + at, s_own * weight, mask=inside)
    if PEAK:
        tl.store(top + at, weight, mask=inside)
        tl.store(place + at, first, mask=inside)
    if MASS:
        units = tl.num_programs(1).to(tl.int64)
        into = mass + (slots.to(tl.int64)[None, :] * units + unit) * queries + rows[:, None]
        tl.store(into, s_mass * weight[:, None], mask=inside[:, None] & (slots < n_groups)[None, :])
    if OUTPUT:
        tl.store(
            output + batch * o_b + head * o_h + rows.to(tl.int64)[:, None] * o_q + outs[None, :],
            (mixed * weight[:, None]).to(output.dtype.element_ty),
            mask=inside[:, None] & (outs < VALUE_DIM)[None, :],
        )  # fmt: skip


@triton.jit
def by_key(
    query, key, mask, lse, live, tail, probe, rest, spans,
    received, received_log, received_squared, received_max, received_tail, received_rows, band, band_rest,
    q_b, q_h, q_q, k_b, k_h, k_k, m_b, m_h, m_q, m_k,
    heads, group, queries, keys, scale, cap, lowest, band_first, band_last,
    DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    RECEIVED: tl.constexpr, LOG: tl.constexpr, SQUARED: tl.constexpr, MAX: tl.constexpr, TAIL: tl.constexpr,
    PROBE: tl.constexpr, BAND: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Everything per key, of keys `[KEYS * program_id(0), ...)` of one head; sums over rows that are `live`.

    `lse` and `rest` are `[batch * head][query]`, `live` too; `tail` and `probe` are `[batch][query]`.
    """
    block, unit = tl.program_id(0), tl.program_id(1)
    batch, head = (unit // heads).to(tl.int64), (unit % heads).to(tl.int64)
    cols = block * KEYS + tl.arange(0, KEYS)
    dims = tl.arange(0, D)
    inside = cols < keys
    k = tl.load(
        key + batch * k_b + head // group * k_h + cols.to(tl.int64)[:, None] * k_k + dims[None, :],
        mask=inside[:, None] & (dims < DIM)[None, :], other=0.0,
    )  # fmt: skip
    query_head, mask_head = query + batch * q_b + head * q_h, mask + batch * m_b + head * m_h
    per_row = unit.to(tl.int64) * queries
    s_received = tl.zeros([KEYS], tl.float32)
    s_log = tl.zeros([KEYS], tl.float32)
    s_squared = tl.zeros([KEYS], tl.float32)
    s_max = tl.zeros([KEYS], tl.float32)
    s_tail = tl.zeros([KEYS], tl.float32)
    s_rows = tl.zeros([KEYS], tl.float32)
    s_band = tl.zeros([KEYS], tl.float32)
    s_rest = tl.zeros([KEYS], tl.float32)
    for start in range(tl.load(spans + 2 * block), tl.load(spans + 2 * block + 1), ROWS):
        rows = start + tl.arange(0, ROWS)
        known = rows < queries
        q = tl.load(
            query_head + rows.to(tl.int64)[:, None] * q_q + dims[None, :],
            mask=known[:, None] & (dims < DIM)[None, :], other=0.0,
        )  # fmt: skip
        z = _logits(
            q,
            k,
            mask_head,
            m_q,
            m_k,
            rows,
            cols,
            queries,
            keys,
            scale,
            cap,
            lowest,
            CAUSAL,
            MASK,
            CAPPED,
            WIDE,
        )
        counts = tl.load(live + per_row + rows, mask=known, other=0) != 0
        log_a = z - tl.where(counts, tl.load(lse + per_row + rows, mask=known, other=0.0), 0.0)[:, None]
        a = tl.where(counts[:, None] & (z > float("-inf")), tl.exp2(log_a), 0.0)
        if RECEIVED:
            s_received += tl.sum(a, 0)
        if LOG:
            s_log += tl.sum(tl.where(a > 0, a * log_a, 0.0), 0)
        if SQUARED:
            s_squared += tl.sum(a * a, 0)
        if MAX:
            s_max = tl.maximum(s_max, tl.max(a, 0))
        if TAIL:
            some = tl.load(tail + batch * queries + rows, mask=known, other=0) != 0
            s_tail += tl.sum(tl.where(some[:, None], a, 0.0), 0)
        if PROBE:
            some = tl.load(probe + batch * queries + rows, mask=known, other=0) != 0
            s_rows += tl.sum(tl.where(some[:, None], a, 0.0), 0)
        if BAND or REST:
            back = rows[:, None] + (keys - queries) - cols[None, :]
            a = tl.where((back >= band_first) & (back <= band_last), a, 0.0)
        if BAND:
            s_band += tl.sum(a, 0)
        if REST:
            s_rest += tl.sum(a * tl.load(rest + per_row + rows, mask=known, other=0.0)[:, None], 0)
    at = unit.to(tl.int64) * keys + cols
    if RECEIVED:
        tl.store(received + at, s_received, mask=inside)
    if LOG:
        tl.store(received_log + at, s_log * 0.6931471805599453, mask=inside)
    if SQUARED:
        tl.store(received_squared + at, s_squared, mask=inside)
    if MAX:
        tl.store(received_max + at, s_max, mask=inside)
    if TAIL:
        tl.store(received_tail + at, s_tail, mask=inside)
    if PROBE:
        tl.store(received_rows + at, s_rows, mask=inside)
    if BAND:
        tl.store(band + at, s_band, mask=inside)
    if REST:
        tl.store(band_rest + at, s_rest, mask=inside)
