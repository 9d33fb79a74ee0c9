"""The Triton kernels: router or copy -> hidden -> down, each once for a single token and once for a tile of tokens.

Names: T tokens, D model width, F neurons, E experts of ``EXPERT`` neurons; weights are [F, D], a neuron per row.
A *block* is a tile of ``BLOCK_T`` tokens; the single-token kernels know only one. Every sum is taken in a fixed order.

The hidden kernels map a program to fixed neurons and let it leave at once where no token wants them: the hardware's
scheduler then balances the load, and no program waits for a prefix sum. Their program 0 meanwhile writes the list of
active experts, from which the down kernels, whose programs each own an equal share of the *active* neurons, read.
"""

# mypy: disallow-untyped-defs = False
# Kernel arguments are typed by Triton, at the call.

from __future__ import annotations

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from lte.ops.triton import checks

INTERPRETED = tl.constexpr(checks.INTERPRETED)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """The activation function, on a float32 tile."""
    if ACT == "relu":
        # Unlike maximum(), this keeps a NaN, as PyTorch does.
        y = tl.where(z < 0.0, 0.0, z)
    elif ACT == "gelu":
        y = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        y = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == "identity":
        y = z
    else:
        y = z * tl.sigmoid(z)
    return y


@triton.jit
def hidden_of(up, gate, gate_ptr, up_bias_ptr, gate_bias_ptr, rows, active, ACT: tl.constexpr):
    """What enters the down projection, [T, ROWS], from the products."""
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + rows, mask=active, other=0.0).to(tl.float32)[None, :]
    if gate_ptr is not None:
        if gate_bias_ptr is not None:
            gate += tl.load(gate_bias_ptr + rows, mask=active, other=0.0).to(tl.float32)[None, :]
        hidden = activate(gate, ACT) * up
    else:
        hidden = activate(up, ACT)
    return hidden


@triton.jit
def store_output(
    acc, out_ptr, bias_ptr, partial_ptr, offsets, mask, cols, used, n_tokens, D: tl.constexpr, SPLITS: tl.constexpr
):
    """The sums of all splits, [T, columns], in the order of the splits, and the bias."""
    if SPLITS > 1:
        acc = tl.zeros(acc.shape, tl.float32)
        for part in range(0, used):
            at = part * n_tokens * D + offsets
            acc += tl.load(partial_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def multiply_add(a, b, acc):
    """``a @ b + acc`` in float32."""
    if INTERPRETED:
        # Triton's interpreter keeps bfloat16 as integers and would multiply those.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["n_tokens"])
def router_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, weight_stride, threshold, n_tokens,
    D: tl.constexpr, E: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``mask[T, E] = sigmoid(x W.T + b) > threshold``; grid [E / BLOCK_E, T / BLOCK_T].

    Plain float32 multiply-adds: the router is a hundredth of the FFN, and TF32 would flip scores near the threshold.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_T, BLOCK_E, BLOCK_D], tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        cols = (start + tl.arange(0, BLOCK_D))[None, None, :]
        x = tl.load(
            x_ptr + tokens.to(tl.int64)[:, None, None] * D + cols,
            mask=(tokens < n_tokens)[:, None, None] & (cols < D),
            other=0.0,
        )
        w = tl.load(
            weight_ptr + experts.to(tl.int64)[None, :, None] * weight_stride + cols,
            mask=(experts < E)[None, :, None] & (cols < D),
            other=0.0,
        )
        acc += x.to(tl.float32) * w.to(tl.float32)
    logits = tl.sum(acc, 2)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)[None, :]
    tl.store(
        mask_ptr + tokens.to(tl.int64)[:, None] * E + experts[None, :],
        (tl.sigmoid(logits) > threshold).to(tl.uint8),
        mask=(tokens < n_tokens)[:, None] & (experts < E)[None, :],
    )


@triton.jit
def lowbit_products(
    x, x_scale, planes_ptr, scales_ptr, group, acc,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """``acc[T, 16 BLOCKS] +=`` one group's products of a low-bit matrix, laid out as :class:`lte.ops.LowBitMatrix` is.

    x: [T, GROUP] int8, x_scale: [T]. LAST: blocks of rows in the matrix.
    """
    rows, cols = tl.arange(0, 16 * BLOCKS), tl.arange(0, GROUP)
    block = tl.program_id(0) * BLOCKS + rows // 16
    # Of a tile of 16 rows and 32 columns, 64 bytes to a bit.
    tile = (block.to(tl.int64) * GROUPS + group)[None, :] * (GROUP // 32) + (cols // 32)[:, None]
    at = planes_ptr + tile * (BITS * 64) + (rows % 16 * 4)[None, :] + (cols % 4)[:, None]
    step = (cols % 32 // 4)[:, None]
    inside = (block < LAST)[None, :]
    codes = tl.zeros([GROUP, 16 * BLOCKS], tl.uint8)
    FIELDS: tl.constexpr = 8 // BITS
    whole = step < FIELDS * BITS
    for bit in tl.static_range(BITS):
        plane = tl.load(at + tl.where(whole, step // FIELDS, bit) * 64, mask=inside, other=0)
        place = tl.where(whole, step % FIELDS * BITS + bit, step).to(tl.uint8)
        codes += ((plane >> place) & 1) << bit
    # Twice the level, so that it is whole.
    levels = 2 * codes.to(tl.int8) - ((1 << BITS) - 1)
    scale = tl.load(scales_ptr + (block.to(tl.int64) * GROUPS + group) * 16 + rows % 16, mask=block < LAST, other=0.0)
    dots = tl.dot(x, levels.to(tl.int8), out_dtype=tl.int32)
    return acc + dots.to(tl.float32) * (0.5 * x_scale)[:, None] * scale.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["n_tokens"])
def copy_scores_kernel(
    x_ptr, up_planes_ptr, up_scales_ptr, gate_planes_ptr, gate_scales_ptr, norms_ptr, up_bias_ptr, gate_bias_ptr,
    scores_ptr, n_tokens,
    D: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    ACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``scores[T, F] = |act(gate x) * up x| * norm`` by the FFN's coarse copy; grid [F / (16 BLOCKS), T / BLOCK_T].

    Every program rounds the inputs for itself: they are few beside the weights, and in the cache.
    """
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.program_id(0) * (16 * BLOCKS) + tl.arange(0, 16 * BLOCKS)
    up = tl.zeros([BLOCK_T, 16 * BLOCKS], tl.float32)
    gate = tl.zeros([BLOCK_T, 16 * BLOCKS], tl.float32)
    LAST: tl.constexpr = (F + 15) // 16
    for group in range(0, GROUPS):
        cols = group * GROUP + tl.arange(0, GROUP)
        offsets = tokens.to(tl.int64)[:, None] * D + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=(tokens < n_tokens)[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)
        x_scale = tl.maximum(tl.max(tl.abs(x), 1) / 127.0, 1e-30)
        # Adding and taking away 1.5 * 2^23 rounds to the nearest, ties to even.
        whole = ((x / x_scale[:, None] + 12582912.0) - 12582912.0).to(tl.int8)
        up = lowbit_products(whole, x_scale, up_planes_ptr, up_scales_ptr, group, up, GROUPS, GROUP, BITS, BLOCKS, LAST)
        if gate_planes_ptr is not None:
            gate = lowbit_products(
                whole, x_scale, gate_planes_ptr, gate_scales_ptr, group, gate, GROUPS, GROUP, BITS, BLOCKS, LAST
            )
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + rows, mask=rows < F, other=0.0).to(tl.float32)[None, :]
    if gate_planes_ptr is not None:
        if gate_bias_ptr is not None:
            gate += tl.load(gate_bias_ptr + rows, mask=rows < F, other=0.0).to(tl.float32)[None, :]
        hidden = activate(gate, ACT) * up
    else:
        hidden = activate(up, ACT)
    scores = tl.abs(hidden) * tl.load(norms_ptr + rows, mask=rows < F, other=0.0)[None, :]
    tl.store(
        scores_ptr + tokens.to(tl.int64)[:, None] * F + rows[None, :],
        scores,
        mask=(tokens < n_tokens)[:, None] & (rows < F)[None, :],
    )


@triton.jit
def list_active(
    expert_weights_ptr, list_ptr, count_ptr, done_ptr, block, n_tokens,
    E: tl.constexpr, BLOCK_T: tl.constexpr, LIST_T: tl.constexpr, LIST_E: tl.constexpr,
    N_DONE: tl.constexpr, DONE_PAD: tl.constexpr,
):  # fmt: skip
    """Write the experts that any token of the block wants, in order, and their number; reset the block's counters."""
    counters = tl.arange(0, DONE_PAD)
    tl.store(done_ptr + block * N_DONE + counters, tl.zeros([DONE_PAD], tl.int32), mask=counters < N_DONE)
    if expert_weights_ptr is not None:
        count = 0
        for first in range(0, E, LIST_E):
            experts = first + tl.arange(0, LIST_E)
            wanted = tl.zeros([LIST_E], tl.int32)
            for start in range(0, BLOCK_T, LIST_T):
                tokens = block * BLOCK_T + start + tl.arange(0, LIST_T)
                w = tl.load(
                    expert_weights_ptr + tokens.to(tl.int64)[:, None] * E + experts[None, :],
                    mask=(tokens < n_tokens)[:, None] & (experts < E)[None, :],
                    other=0,
                )
                wanted = tl.maximum(wanted, tl.max((w != 0).to(tl.int32), 0))
            rank = count + tl.cumsum(wanted, 0) - 1
            tl.store(list_ptr + block * E + rank, experts, mask=wanted != 0)
            count += tl.sum(wanted, 0)
        tl.store(count_ptr + block, count)


@triton.jit
def hidden_one_kernel(
    x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, expert_weights_ptr,
    hidden_ptr, list_ptr, count_ptr, done_ptr, up_stride, gate_stride,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, EXPERT: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
    LIST_T: tl.constexpr, LIST_E: tl.constexpr, N_DONE: tl.constexpr, DONE_PAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``hidden[F] = w * act(gate x) * up x`` for one token, active neurons only; grid [1 + F / ROWS]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if tl.program_id(0) == 0:
        list_active(
            expert_weights_ptr, list_ptr, count_ptr, done_ptr, 0, 1,
            E, 1, LIST_T, LIST_E, N_DONE, DONE_PAD,
        )  # fmt: skip
    else:
        rows = (tl.program_id(0) - 1) * ROWS + tl.arange(0, ROWS)
        active = rows < F
        if expert_weights_ptr is not None:
            scale = tl.load(expert_weights_ptr + rows // EXPERT, mask=active, other=0)
            active = active & (scale != 0)
        if tl.max(active.to(tl.int32), 0) > 0:
            up_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
            gate_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                cols = start + tl.arange(0, BLOCK_D)
                # A row that is not active is masked: it costs no traffic, and a NaN in it cannot spread.
                mask = active[:, None] & (cols < D)[None, :]
                x = tl.load(x_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
                offsets = rows.to(tl.int64)[:, None] * up_stride + cols[None, :]
                up = tl.load(up_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
                if gate_ptr is not None:
                    offsets = rows.to(tl.int64)[:, None] * gate_stride + cols[None, :]
                    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
                    gate_acc += gate.to(tl.float32) * x
                up_acc += up.to(tl.float32) * x
            up_sum = tl.sum(up_acc, 1)
            if up_bias_ptr is not None:
                up_sum += tl.load(up_bias_ptr + rows, mask=active, other=0.0).to(tl.float32)
            if gate_ptr is not None:
                gate_sum = tl.sum(gate_acc, 1)
                if gate_bias_ptr is not None:
                    gate_sum += tl.load(gate_bias_ptr + rows, mask=active, other=0.0).to(tl.float32)
                hidden = activate(gate_sum, ACT) * up_sum
            else:
                hidden = activate(up_sum, ACT)
            if expert_weights_ptr is not None:  # noqa: SIM102 - without experts there is no scale to ask
                if scale.dtype.is_floating():
                    hidden = hidden * scale.to(tl.float32)
            tl.store(hidden_ptr + rows, hidden, mask=active)


@triton.jit(do_not_specialize=["n_tokens"])
def hidden_tile_kernel(
    x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, expert_weights_ptr,
    hidden_ptr, list_ptr, count_ptr, done_ptr, up_stride, gate_stride, n_tokens,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, EXPERT: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
    LIST_T: tl.constexpr, LIST_E: tl.constexpr, N_DONE: tl.constexpr, DONE_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``hidden[T, F] = w * act(gate x) * up x``, in the dtype of the weights; grid [1 + F / ROWS, blocks].

    Neurons that some token of the block wants are read once for all of them; the others' hidden values become zeros.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(1)
    if tl.program_id(0) == 0:
        list_active(
            expert_weights_ptr, list_ptr, count_ptr, done_ptr, block, n_tokens,
            E, BLOCK_T, LIST_T, LIST_E, N_DONE, DONE_PAD,
        )  # fmt: skip
    else:
        tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = (tl.program_id(0) - 1) * ROWS + tl.arange(0, ROWS)
        wanted = (tokens < n_tokens)[:, None] & (rows < F)[None, :]
        if expert_weights_ptr is not None:
            experts = tokens.to(tl.int64)[:, None] * E + (rows // EXPERT)[None, :]
            scale = tl.load(expert_weights_ptr + experts, mask=wanted, other=0)
            wanted = wanted & (scale != 0)
        active = tl.max(wanted.to(tl.int32), 0) != 0
        if tl.max(active.to(tl.int32), 0) > 0:
            up_acc = tl.zeros([BLOCK_T, ROWS], tl.float32)
            gate_acc = tl.zeros([BLOCK_T, ROWS], tl.float32)
            for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                cols = start + tl.arange(0, BLOCK_D)
                x = tl.load(
                    x_ptr + tokens.to(tl.int64)[:, None] * D + cols[None, :],
                    mask=(tokens < n_tokens)[:, None] & (cols < D)[None, :],
                    other=0.0,
                )
                mask = active[:, None] & (cols < D)[None, :]
                up = tl.load(up_ptr + rows.to(tl.int64)[:, None] * up_stride + cols[None, :], mask=mask, other=0.0)
                up_acc = multiply_add(x, up.trans(), up_acc)
                if gate_ptr is not None:
                    offsets = rows.to(tl.int64)[:, None] * gate_stride + cols[None, :]
                    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0)
                    gate_acc = multiply_add(x, gate.trans(), gate_acc)
            hidden = hidden_of(up_acc, gate_acc, gate_ptr, up_bias_ptr, gate_bias_ptr, rows, active, ACT)
            if expert_weights_ptr is not None:  # noqa: SIM102 - without experts there is no scale to ask
                if scale.dtype.is_floating():
                    hidden = hidden * scale.to(tl.float32)
            # Selected, not multiplied: a token's own overflow in an expert it does not want must not become a NaN.
            hidden = tl.where(wanted, hidden, 0.0)
            tl.store(
                hidden_ptr + tokens.to(tl.int64)[:, None] * F + rows[None, :],
                hidden.to(hidden_ptr.dtype.element_ty),
                mask=(tokens < n_tokens)[:, None] & active[None, :],
            )


@triton.jit
def share_of(n_rows, split, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """First and last active row of a split, and how many splits have any (at least one, which adds the bias)."""
    per_split = tl.maximum(tl.cdiv(tl.cdiv(n_rows, SPLITS), ROWS), 1) * ROWS
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, n_rows), tl.maximum(tl.cdiv(n_rows, per_split), 1)


@triton.jit
def active_rows(start, end, list_ptr, EXPERT: tl.constexpr, ROWS: tl.constexpr):
    """Neurons at positions ``start`` to ``start + ROWS - 1`` among the active ones; only those before ``end`` count."""
    rows = start + tl.arange(0, ROWS)
    if list_ptr is not None:
        if EXPERT % ROWS == 0:
            # All in one expert. The compiler pipelines loads whose address hangs on one scalar, not on a vector.
            rows = tl.load(list_ptr + start // EXPERT) * EXPERT + start % EXPERT + tl.arange(0, ROWS)
        else:
            rows = tl.load(list_ptr + rows // EXPERT, mask=rows < end, other=0) * EXPERT + rows % EXPERT
    return rows


@triton.jit
def is_last(done_ptr, expected):
    """Whether all other splits of this output tile have stored their sums."""
    # The counter must not be raised before every thread of this program has stored its part.
    tl.debug_barrier()
    finished = tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return finished == expected - 1


@triton.jit
def down_one_kernel(
    hidden_ptr, down_ptr, bias_ptr, list_ptr, count_ptr, done_ptr, partial_ptr, out_ptr, down_stride,
    D: tl.constexpr, F: tl.constexpr, EXPERT: tl.constexpr,
    PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    SUM_ROWS: tl.constexpr,
):  # fmt: skip
    """``out[D] = sum_j hidden[j] down[j] + bias`` over active neurons j; grid [D / BLOCK_D, SPLITS].

    The program that finishes last for its columns adds the splits' sums, in the order of the splits.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    split = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n_rows = F if list_ptr is None else tl.load(count_ptr) * EXPERT
    begin, end, used = share_of(n_rows, split, SPLITS, ROWS)
    if split < used:
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in tl.range(begin, end, ROWS, num_stages=STAGES):
            ok = start + tl.arange(0, ROWS) < end
            rows = active_rows(start, end, list_ptr, EXPERT, ROWS)
            hidden = tl.load(hidden_ptr + rows, mask=ok, other=0.0)
            offsets = rows.to(tl.int64)[:, None] * down_stride + cols[None, :]
            mask = ok[:, None] & (cols < D)[None, :]
            down = tl.load(down_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            acc += hidden[:, None] * down.to(tl.float32)
        total = tl.sum(acc, 0)
        last = True
        if SPLITS > 1:
            tl.store(partial_ptr + split * D + cols, total, mask=cols < D)
            last = is_last(done_ptr + tl.program_id(0), used)
        if last:
            if SPLITS > 1:
                sums = tl.zeros([SUM_ROWS, BLOCK_D], tl.float32)
                for first in range(0, used, SUM_ROWS):
                    parts = first + tl.arange(0, SUM_ROWS)
                    mask = (parts < used)[:, None] & (cols < D)[None, :]
                    offsets = parts[:, None] * D + cols[None, :]
                    sums += tl.load(partial_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
                total = tl.sum(sums, 0)
            if bias_ptr is not None:
                total += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            tl.store(out_ptr + cols, total.to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["n_tokens"])
def down_tile_kernel(
    hidden_ptr, down_ptr, bias_ptr, list_ptr, count_ptr, done_ptr, partial_ptr, out_ptr, down_stride, n_tokens,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, EXPERT: tl.constexpr,
    PDL: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, N_DONE: tl.constexpr,
):  # fmt: skip
    """``out[T, D] = hidden @ down + bias`` over neurons active in the block; grid [D / BLOCK_D, SPLITS, blocks]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    split = tl.program_id(1)
    block = tl.program_id(2)
    tokens = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    out_mask = (tokens < n_tokens)[:, None] & (cols < D)[None, :]
    out_offsets = tokens[:, None] * D + cols[None, :]
    n_rows = F if list_ptr is None else tl.load(count_ptr + block) * EXPERT
    experts_ptr = None if list_ptr is None else list_ptr + block * E
    begin, end, used = share_of(n_rows, split, SPLITS, ROWS)
    if split < used:
        acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in tl.range(begin, end, ROWS, num_stages=STAGES):
            ok = start + tl.arange(0, ROWS) < end
            rows = active_rows(start, end, experts_ptr, EXPERT, ROWS)
            hidden = tl.load(
                hidden_ptr + tokens[:, None] * F + rows[None, :],
                mask=(tokens < n_tokens)[:, None] & ok[None, :],
                other=0.0,
            )
            offsets = rows.to(tl.int64)[:, None] * down_stride + cols[None, :]
            down = tl.load(down_ptr + offsets, mask=ok[:, None] & (cols < D)[None, :], other=0.0)
            acc = multiply_add(hidden, down, acc)
        last = True
        if SPLITS > 1:
            tl.store(partial_ptr + split * n_tokens * D + out_offsets, acc, mask=out_mask)
            last = is_last(done_ptr + block * N_DONE + tl.program_id(0), used)
        if last:
            store_output(acc, out_ptr, bias_ptr, partial_ptr, out_offsets, out_mask, cols, used, n_tokens, D, SPLITS)
