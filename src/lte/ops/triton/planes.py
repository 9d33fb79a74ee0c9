"""The kernels of FFNs in two planes of bits, whose upper plane says which neurons run, and which on all their bits.

Upper planes of gate and up lie in tiles, as :mod:`lte.ops.triton.lowbit` reads them; all other codes are
:class:`lte.ops.nested.RowCodes`: pieces of 64 columns, a plane of w bits having 2 w words of a piece, byte c of word i
the columns 4 i + c, 8 w further, and so on. Codes of three bits are two planes. No list of neurons is made: what a
neuron that does not run would be read from is masked, and costs no traffic.
"""

# mypy: disallow-untyped-defs = False

from __future__ import annotations

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from lte.ops.triton.kernels import hidden_of, is_last, multiply_add, share_of, store_output
from lte.ops.triton.lowbit import add_products, fractions, row_products


@triton.jit
def add_lower(
    acc, x_ptr, codes_ptr, scales_ptr, rows, wanted, tokens, n_tokens,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
    WORDS: tl.constexpr, STAGES: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """``acc +=`` the products of wanted rows of a plane of ``WIDE`` of the ``BITS`` lower bits, ``LOW`` below them.

    Scales are those of the upper plane's tiles; acc: as for :func:`add_products`. A tile's step has as many columns,
    whatever the width.
    """
    STEP: tl.constexpr = WORDS if ONE else WORDS * WIDE // 4
    PIECES: tl.constexpr = (D + 63) // 64
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    for start in tl.range(0, PIECES * 2 * WIDE, STEP, num_stages=STAGES):
        word = start + tl.arange(0, STEP)
        piece, word = word // (2 * WIDE), word % (2 * WIDE)
        mask = (piece < PIECES)[:, None] & wanted[None, :]
        at = rows.to(tl.int64)[None, :] * (PIECES * 2 * BITS) + (piece * (2 * BITS) + 2 * LOW + word)[:, None]
        words = tl.load(codes_ptr + at, mask=mask, other=0, eviction_policy="evict_first")
        at = ((rows // 16).to(tl.int64)[None, :] * GROUPS + (piece * 64 // GROUP)[:, None]) * 16 + (rows % 16)[None, :]
        scales = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32) * 2.0 ** (WIDE + LOW - BITS)
        first = piece * 64 + word * 4
        acc = add_products(acc, words, scales, x_ptr, tokens, n_tokens, first, D, WIDE, 8 * WIDE, ONE)
    return acc


@triton.jit
def lower_products(
    x_ptr, codes_ptr, scales_ptr, rows, wanted, tokens, n_tokens,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[T, ROWS], the products with the lower bits of wanted rows."""
    ONE: tl.constexpr = BLOCK_T == 1
    FIRST: tl.constexpr = 2 if BITS == 3 else BITS
    acc = tl.zeros([WORDS, ROWS] if ONE else [BLOCK_T, ROWS], tl.float32)
    acc = add_lower(
        acc, x_ptr, codes_ptr, scales_ptr, rows, wanted, tokens, n_tokens,
        D, GROUP, BITS, 0, FIRST, WORDS, STAGES, ONE,
    )  # fmt: skip
    if BITS == 3:
        acc = add_lower(
            acc, x_ptr, codes_ptr, scales_ptr, rows, wanted, tokens, n_tokens,
            D, GROUP, BITS, 2, 1, WORDS, STAGES, ONE,
        )  # fmt: skip
    if ONE:
        acc = tl.sum(acc, 0)[None, :]
    return acc


@triton.jit(do_not_specialize=["n_tokens"])
def nested_rows_kernel(
    x_ptr, up_ptr, up_scales_ptr, up_lower_ptr, gate_ptr, gate_scales_ptr, gate_lower_ptr, up_bias_ptr, gate_bias_ptr,
    norms_ptr, hidden_ptr, state_ptr, done_ptr, cut, fine_cut, n_tokens,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, UPPER: tl.constexpr, LOWER: tl.constexpr,
    ACT: tl.constexpr, N_DONE: tl.constexpr, DONE_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``hidden[T, F]``, and ``state``: 0 where a neuron is out, 1 coarse, 2 fine; grid [F / ROWS, blocks]."""
    ONE: tl.constexpr = BLOCK_T == 1
    block = tl.program_id(1)
    if tl.program_id(0) == 0:
        counters = tl.arange(0, DONE_PAD)
        tl.store(done_ptr + block * N_DONE + counters, tl.zeros([DONE_PAD], tl.int32), mask=counters < N_DONE)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < F
    LAST: tl.constexpr = (D + GROUP - 1) // GROUP * (GROUP // 32) * (8 // (8 // UPPER))
    up = tl.zeros([WORDS, ROWS] if ONE else [BLOCK_T, ROWS], tl.float32)
    gate = tl.zeros([WORDS, ROWS] if ONE else [BLOCK_T, ROWS], tl.float32)
    for start in tl.range(0, LAST, WORDS, num_stages=STAGES):
        up = row_products(
            up, x_ptr, up_ptr, up_scales_ptr, rows, start, tokens, n_tokens, D, F, GROUP, UPPER, WORDS, ONE
        )
        if gate_ptr is not None:
            gate = row_products(
                gate, x_ptr, gate_ptr, gate_scales_ptr, rows, start, tokens, n_tokens, D, F, GROUP, UPPER, WORDS, ONE
            )
    if ONE:
        up, gate = tl.sum(up, 0)[None, :], tl.sum(gate, 0)[None, :]
    up, gate = up * (1 << UPPER), gate * (1 << UPPER)
    hidden = hidden_of(up, gate, gate_ptr, up_bias_ptr, gate_bias_ptr, rows, inside, ACT)
    score = tl.abs(hidden) * tl.load(norms_ptr + rows, mask=inside, other=0.0)[None, :]
    on = ((score > cut) | (cut < 0)) & (tokens < n_tokens)[:, None] & inside[None, :]
    state = on.to(tl.uint8)
    if LOWER > 0:
        fine = on & ((score > fine_cut) | (fine_cut < 0))
        wanted = tl.max(fine.to(tl.int32), 0) != 0
        if tl.max(wanted.to(tl.int32), 0) > 0:
            up += lower_products(
                x_ptr, up_lower_ptr, up_scales_ptr, rows, wanted, tokens, n_tokens,
                D, GROUP, LOWER, BLOCK_T, ROWS, WORDS, STAGES,
            )  # fmt: skip
            if gate_ptr is not None:
                gate += lower_products(
                    x_ptr, gate_lower_ptr, gate_scales_ptr, rows, wanted, tokens, n_tokens,
                    D, GROUP, LOWER, BLOCK_T, ROWS, WORDS, STAGES,
                )  # fmt: skip
            exact = hidden_of(up, gate, gate_ptr, up_bias_ptr, gate_bias_ptr, rows, inside, ACT)
            hidden = tl.where(fine, exact, hidden)
        state += fine.to(tl.uint8)
    at = tokens.to(tl.int64)[:, None] * F + rows[None, :]
    mask = (tokens < n_tokens)[:, None] & inside[None, :]
    tl.store(hidden_ptr + at, tl.where(on, hidden, 0.0).to(hidden_ptr.dtype.element_ty), mask=mask)
    tl.store(state_ptr + at, state, mask=mask)


@triton.jit
def add_rows(
    acc, hidden, codes_ptr, scales_ptr, rows, wanted, piece,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
    FACTOR: tl.constexpr, PIECES: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """``acc += hidden[T, NEURONS] @`` a plane of wanted rows, columns of ``PIECES`` pieces from ``piece`` on.

    acc: [CODES, NEURONS, WORDS] for one token, [T, CODES * WORDS] for a tile; FACTOR: of the scales, apart from the
    plane's place among its ``BITS``.
    """
    CODES: tl.constexpr = 8 // WIDE * 4
    WORDS: tl.constexpr = 2 * WIDE * PIECES
    TOP: tl.constexpr = 23 - WIDE
    MASK: tl.constexpr = ((1 << WIDE) - 1) << TOP
    MIDDLE: tl.constexpr = 1.5 - 0.5 / (1 << WIDE)
    ALL: tl.constexpr = (D + 63) // 64
    word = tl.arange(0, WORDS)
    piece = piece + word // (2 * WIDE)
    mask = wanted[:, None] & (piece < ALL)[None, :]
    at = rows.to(tl.int64)[:, None] * (ALL * 2 * BITS) + (piece * (2 * BITS) + 2 * LOW + word % (2 * WIDE))[None, :]
    words = tl.load(codes_ptr + at, mask=mask, other=0, eviction_policy="evict_first")
    at = rows.to(tl.int64)[:, None] * ((D + GROUP - 1) // GROUP) + (piece * 64 // GROUP)[None, :]
    scales = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32) * (FACTOR * 2.0 ** (WIDE + LOW))
    code = tl.arange(0, CODES)
    turn = (TOP - code % 4 * 8 - code // 4 * WIDE) & 31
    if ONE:
        numbers = fractions(words[None, :, :], turn[:, None, None], MASK)
        acc += (numbers - MIDDLE) * (scales * tl.reshape(hidden, [rows.shape[0]])[:, None])[None, :, :]
    else:
        numbers = fractions(words[:, None, :], turn[None, :, None], MASK)
        levels = ((numbers - MIDDLE) * scales[:, None, :]).to(hidden.dtype)
        acc = multiply_add(hidden, tl.reshape(levels, [rows.shape[0], CODES * WORDS]), acc)
    return acc


@triton.jit
def zeros_for(WIDE: tl.constexpr, NEURONS: tl.constexpr, PIECES: tl.constexpr, BLOCK_T: tl.constexpr):
    """What :func:`add_rows` adds to."""
    if BLOCK_T == 1:
        acc = tl.zeros([8 // WIDE * 4, NEURONS, 2 * WIDE * PIECES], tl.float32)
    else:
        acc = tl.zeros([BLOCK_T, 64 * PIECES], tl.float32)
    return acc


@triton.jit
def in_order(acc, WIDE: tl.constexpr, PIECES: tl.constexpr, BLOCK_T: tl.constexpr):
    """[T, 64 PIECES], the columns one after the other."""
    if BLOCK_T == 1:
        acc = tl.sum(acc, 1)
    # Of tokens, codes in a byte, bytes of a word, pieces, words in a piece.
    acc = tl.reshape(acc, [BLOCK_T, 8 // WIDE, 4, PIECES, 2 * WIDE])
    return tl.reshape(tl.permute(acc, 0, 3, 1, 4, 2), [BLOCK_T, 64 * PIECES])


@triton.jit(do_not_specialize=["n_tokens", "n_exact"])
def nested_down_kernel(
    hidden_ptr, state_ptr, upper_ptr, lower_ptr, scales_ptr, exact_ptr, exact_rows_ptr, bias_ptr,
    done_ptr, partial_ptr, out_ptr, n_exact, n_tokens,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, UPPER: tl.constexpr, LOWER: tl.constexpr,
    BLOCK_T: tl.constexpr, NEURONS: tl.constexpr, PIECES: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    N_DONE: tl.constexpr,
):  # fmt: skip
    """``out[T, D] = hidden @ down + bias``, lower bits of fine neurons only; grid [D / (64 PIECES), SPLITS, blocks]."""
    ONE: tl.constexpr = BLOCK_T == 1
    UP: tl.constexpr = 2 if UPPER == 3 else UPPER
    LO: tl.constexpr = 2 if LOWER == 3 else LOWER
    FINER: tl.constexpr = 2.0 ** (-LOWER)
    split, block = tl.program_id(1), tl.program_id(2)
    piece = tl.program_id(0) * PIECES
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = piece * 64 + tl.arange(0, 64 * PIECES)
    out_mask = (tokens < n_tokens)[:, None] & (cols < D)[None, :]
    out_at = tokens.to(tl.int64)[:, None] * D + cols[None, :]
    begin, end, used = share_of(F, split, SPLITS, NEURONS)
    if split < used:
        upper = zeros_for(UP, NEURONS, PIECES, BLOCK_T)
        if UPPER == 3:
            upper_third = zeros_for(1, NEURONS, PIECES, BLOCK_T)
        if LOWER > 0:
            lower = zeros_for(LO, NEURONS, PIECES, BLOCK_T)
        if LOWER == 3:
            lower_third = zeros_for(1, NEURONS, PIECES, BLOCK_T)
        for start in tl.range(begin, end, NEURONS, num_stages=STAGES):
            rows = start + tl.arange(0, NEURONS)
            at = tokens.to(tl.int64)[:, None] * F + rows[None, :]
            ok = (tokens < n_tokens)[:, None] & (rows < end)[None, :]
            state = tl.load(state_ptr + at, mask=ok, other=0)
            hidden = tl.load(hidden_ptr + at, mask=ok, other=0.0)
            on = tl.max((state > 0).to(tl.int32), 0) != 0
            upper = add_rows(
                upper, hidden, upper_ptr, scales_ptr, rows, on, piece, D, GROUP, UPPER, 0, UP, 1.0, PIECES, ONE
            )
            if UPPER == 3:
                upper_third = add_rows(
                    upper_third, hidden, upper_ptr, scales_ptr, rows, on, piece, D, GROUP, UPPER, 2, 1, 1.0, PIECES, ONE
                )
            if LOWER > 0:
                fine = tl.max((state > 1).to(tl.int32), 0) != 0
                hidden = tl.where(state > 1, hidden, 0.0).to(hidden.dtype)
                lower = add_rows(
                    lower, hidden, lower_ptr, scales_ptr, rows, fine, piece, D, GROUP, LOWER, 0, LO, FINER, PIECES, ONE
                )
                if LOWER == 3:
                    lower_third = add_rows(
                        lower_third, hidden, lower_ptr, scales_ptr, rows, fine, piece,
                        D, GROUP, LOWER, 2, 1, FINER, PIECES, ONE,
                    )  # fmt: skip
        acc = in_order(upper, UP, PIECES, BLOCK_T)
        if UPPER == 3:
            acc += in_order(upper_third, 1, PIECES, BLOCK_T)
        if LOWER > 0:
            acc += in_order(lower, LO, PIECES, BLOCK_T)
        if LOWER == 3:
            acc += in_order(lower_third, 1, PIECES, BLOCK_T)
        if split == 0:
            for number in range(0, n_exact):
                neuron = tl.load(exact_ptr + number)
                hidden = tl.load(hidden_ptr + tokens.to(tl.int64) * F + neuron, mask=tokens < n_tokens, other=0.0)
                row = tl.load(exact_rows_ptr + number * D + cols, mask=cols < D, other=0.0)
                acc += hidden.to(tl.float32)[:, None] * row.to(tl.float32)[None, :]
        last = True
        if SPLITS > 1:
            tl.store(partial_ptr + split * n_tokens * D + out_at, acc, mask=out_mask)
            last = is_last(done_ptr + block * N_DONE + tl.program_id(0), used)
        if last:
            store_output(acc, out_ptr, bias_ptr, partial_ptr, out_at, out_mask, cols, used, n_tokens, D, SPLITS)
