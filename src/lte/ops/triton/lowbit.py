"""The same kernels for weights of 1 to 8 bits, unpacked in registers: rows (up, gate, any linear layer) and down.

A 32-bit *word* of a :class:`lte.ops.LowBitMatrix` holds four bytes of one row in one plane, with ``8 // BITS`` codes
each: bit field f of byte c is that of column ``4 f + c`` behind the word's first. 16 words, one of every row of a
block, lie together, and words of neighbouring planes and chunks behind one another. Where that leaves bits of a byte
over, as three bits do, they are the other codes', put together here as further words. For one token the products are
summed in float32 registers; a tile of tokens goes through the matrix units, weights rounded to the inputs' dtype.
"""

# mypy: disallow-untyped-defs = False

from __future__ import annotations

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from lte.ops.triton.kernels import INTERPRETED, hidden_of, is_last, list_active, multiply_add, share_of, store_output


@triton.jit
def fractions(words, turn, mask: tl.constexpr):
    """``1 + code / 2^BITS``: turned to the left, a code lies at the top of the mantissa, which 1.0 is put around."""
    if INTERPRETED:
        words, turn = words.to(tl.uint32, bitcast=True), turn.to(tl.uint32)
        words = (words << turn) | (words >> ((32 - turn) & 31))
        return ((words & mask) | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.inline_asm_elementwise(
        "shf.l.wrap.b32 $0, $1, $1, $2; lop3.b32 $0, $0, $3, $4, 0xEA;",
        "=f,r,r,r,r",
        [words, turn, mask, 0x3F800000],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def tile_words(codes_ptr, word, row, mask, BITS: tl.constexpr):
    """Words of tiles of 16 rows and 32 columns: of a row a tile has four where a byte has two codes, and so on."""
    FIELDS: tl.constexpr = 8 // BITS
    PARTS: tl.constexpr = 8 // FIELDS
    if FIELDS * BITS == 8:
        words = tl.load(codes_ptr + word * 16 + row, mask=mask, other=0, eviction_policy="evict_first")
    else:
        at, part = codes_ptr + word // PARTS * (BITS * 16) + row, (word % PARTS).to(tl.int32)
        words = tl.load(at + part * 16, mask=mask & (part < BITS), other=0)
        for bit in tl.static_range(BITS):
            plane = tl.load(at + bit * 16, mask=mask & (part >= BITS), other=0)
            for field in tl.static_range(FIELDS):
                words |= ((plane >> (part * FIELDS + field)) & 0x01010101) << (field * BITS + bit)
    return words


@triton.jit
def add_products(
    acc, words, scales, x_ptr, tokens, n_tokens, first,
    X_STRIDE: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """``acc += `` the products of words [WORDS, ROWS] with inputs ``x[token, column]``, divided by ``2^BITS``.

    acc: [WORDS, ROWS] for one token, [T, ROWS] for a tile; first: [WORDS], the column of a word's first code, of which
    the next in the same byte is STEP columns away.
    """
    CODES: tl.constexpr = 8 // BITS * 4
    TOP: tl.constexpr = 23 - BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << TOP
    MIDDLE: tl.constexpr = 1.5 - 0.5 / (1 << BITS)
    code = tl.arange(0, CODES)
    column = code if STEP == 4 else code % 4 + code // 4 * STEP  # the compiler sees what lies side by side
    turn = (TOP - code % 4 * 8 - code // 4 * BITS) & 31
    if ONE:
        # The compiler keeps what comes first in the registers of one thread: all codes of a word.
        numbers = fractions(words[None, :, :], turn[:, None, None], MASK)
        cols = first[None, :] + column[:, None]
        x = tl.load(x_ptr + cols, mask=cols < X_STRIDE, other=0.0).to(tl.float32)
        acc += (tl.sum(numbers * x[:, :, None], 0) - MIDDLE * tl.sum(x, 0)[:, None]) * scales
    else:
        cols = tl.reshape(first[:, None] + column[None, :], [words.shape[0] * CODES])
        x = tl.load(
            x_ptr + tokens.to(tl.int64)[:, None] * X_STRIDE + cols[None, :],
            mask=(tokens < n_tokens)[:, None] & (cols < X_STRIDE)[None, :],
            other=0.0,
        )
        numbers = fractions(words[:, None, :], turn[None, :, None], MASK)
        levels = ((numbers - MIDDLE) * scales[:, None, :]).to(x.dtype)
        acc = multiply_add(x, tl.reshape(levels, [words.shape[0] * CODES, words.shape[1]]), acc)
    return acc


@triton.jit
def row_products(
    acc, x_ptr, codes_ptr, scales_ptr, rows, start, tokens, n_tokens,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    WORDS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Of a matrix that lies row by row, the words from ``start`` on."""
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    PARTS: tl.constexpr = 8 // (8 // BITS)
    PER_GROUP: tl.constexpr = GROUP // 32 * PARTS
    word = start + tl.arange(0, WORDS)
    block = (rows // 16)[None, :]
    mask = (block < (F + 15) // 16) & (word < GROUPS * PER_GROUP)[:, None]
    block = block.to(tl.int64)
    row = (rows % 16)[None, :]
    words = tile_words(codes_ptr, block * (GROUPS * PER_GROUP) + word[:, None], row, mask, BITS)
    at = (block * GROUPS + (word // PER_GROUP)[:, None]) * 16 + row
    scales = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return add_products(acc, words, scales, x_ptr, tokens, n_tokens, word * (32 // PARTS), D, BITS, 4, ONE)


@triton.jit(do_not_specialize=["n_tokens"])
def lowbit_rows_kernel(
    x_ptr, up_ptr, up_scales_ptr, gate_ptr, gate_scales_ptr, up_bias_ptr, gate_bias_ptr, expert_weights_ptr,
    out_ptr, list_ptr, count_ptr, done_ptr, n_tokens,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    E: tl.constexpr, EXPERT: tl.constexpr, ACT: tl.constexpr,
    LIST_T: tl.constexpr, LIST_E: tl.constexpr, N_DONE: tl.constexpr, DONE_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out[T, F] = w * act(gate x) * up x`` of active neurons; ``up x + bias`` of all rows without ``done_ptr``.

    Grid [F / ROWS, blocks], and one more program first where there is a list to write.
    """
    ONE: tl.constexpr = BLOCK_T == 1
    block = tl.program_id(1)
    program = tl.program_id(0)
    if done_ptr is not None:
        program -= 1
        if program < 0:
            list_active(
                expert_weights_ptr, list_ptr, count_ptr, done_ptr, block, n_tokens,
                E, BLOCK_T, LIST_T, LIST_E, N_DONE, DONE_PAD,
            )  # fmt: skip
    if program >= 0:
        tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = program * ROWS + tl.arange(0, ROWS)
        wanted = (tokens < n_tokens)[:, None] & (rows < F)[None, :]
        if expert_weights_ptr is not None:
            experts = tokens.to(tl.int64)[:, None] * E + (rows // EXPERT)[None, :]
            scale = tl.load(expert_weights_ptr + experts, mask=wanted, other=0)
            wanted = wanted & (scale != 0)
        active = tl.max(wanted.to(tl.int32), 0) != 0
        if tl.max(active.to(tl.int32), 0) > 0:
            LAST: tl.constexpr = (D + GROUP - 1) // GROUP * (GROUP // 32) * (8 // (8 // BITS))
            up = tl.zeros([WORDS, ROWS] if ONE else [BLOCK_T, ROWS], tl.float32)
            gate = tl.zeros([WORDS, ROWS] if ONE else [BLOCK_T, ROWS], tl.float32)
            for start in tl.range(0, LAST, WORDS, num_stages=STAGES):
                up = row_products(
                    up, x_ptr, up_ptr, up_scales_ptr, rows, start, tokens, n_tokens,
                    D, F, GROUP, BITS, WORDS, ONE,
                )  # fmt: skip
                if gate_ptr is not None:
                    gate = row_products(
                        gate, x_ptr, gate_ptr, gate_scales_ptr, rows, start, tokens, n_tokens,
                        D, F, GROUP, BITS, WORDS, ONE,
                    )  # fmt: skip
            if ONE:
                up, gate = tl.sum(up, 0)[None, :], tl.sum(gate, 0)[None, :]
            up, gate = up * (1 << BITS), gate * (1 << BITS)
            hidden = hidden_of(up, gate, gate_ptr, up_bias_ptr, gate_bias_ptr, rows, active, ACT)
            if expert_weights_ptr is not None:  # noqa: SIM102 - without experts there is no scale to ask
                if scale.dtype.is_floating():
                    hidden = hidden * scale.to(tl.float32)
            tl.store(
                out_ptr + tokens.to(tl.int64)[:, None] * F + rows[None, :],
                tl.where(wanted, hidden, 0.0).to(out_ptr.dtype.element_ty),
                mask=(tokens < n_tokens)[:, None] & active[None, :],
            )


@triton.jit
def active_chunks(position, ok, start, list_ptr, PER_EXPERT: tl.constexpr, CHUNKS: tl.constexpr):
    """Chunks of 32 neurons at some positions, from ``start`` on, among the active ones."""
    chunks = position
    if list_ptr is not None:
        if PER_EXPERT % CHUNKS == 0:
            expert = tl.load(list_ptr + start // PER_EXPERT)
            chunks = expert * PER_EXPERT + start % PER_EXPERT + (position - start)
        else:
            chunks = tl.load(list_ptr + position // PER_EXPERT, mask=ok, other=0) * PER_EXPERT + position % PER_EXPERT
    return chunks


@triton.jit(do_not_specialize=["n_tokens"])
def lowbit_down_kernel(
    hidden_ptr, codes_ptr, scales_ptr, bias_ptr, list_ptr, count_ptr, done_ptr, partial_ptr, out_ptr, n_tokens,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, E: tl.constexpr, EXPERT: tl.constexpr,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    N_DONE: tl.constexpr,
):  # fmt: skip
    """``out[T, D] = hidden @ down + bias`` over active chunks of 32 neurons; grid [D / ROWS, SPLITS, blocks]."""
    ONE: tl.constexpr = BLOCK_T == 1
    PARTS: tl.constexpr = 8 // (8 // BITS)
    WORDS: tl.constexpr = CHUNKS * PARTS
    BLOCKS: tl.constexpr = (D + 15) // 16
    split, block = tl.program_id(1), tl.program_id(2)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < D
    out_mask = (tokens < n_tokens)[:, None] & inside[None, :]
    out_at = tokens.to(tl.int64)[:, None] * D + rows[None, :]
    PER_EXPERT: tl.constexpr = (EXPERT + 31) // 32
    n_chunks = PER_EXPERT if list_ptr is None else tl.load(count_ptr + block) * PER_EXPERT
    experts_ptr = None if list_ptr is None else list_ptr + block * E
    begin, end, used = share_of(n_chunks, split, SPLITS, CHUNKS)
    if split < used:
        acc = tl.zeros([WORDS, ROWS] if ONE else [BLOCK_T, ROWS], tl.float32)
        for start in tl.range(begin, end, CHUNKS, num_stages=STAGES):
            position = start + tl.arange(0, WORDS) // PARTS
            ok = position < end
            chunk = active_chunks(position, ok, start, experts_ptr, PER_EXPERT, CHUNKS)
            mask = ok[:, None] & (rows // 16 < BLOCKS)[None, :]
            part = tl.arange(0, WORDS) % PARTS
            tile = chunk.to(tl.int64)[:, None] * BLOCKS + (rows // 16)[None, :]
            words = tile_words(codes_ptr, tile * PARTS + part[:, None], (rows % 16)[None, :], mask, BITS)
            at = ((chunk // (GROUP // 32))[:, None] * BLOCKS + (rows // 16)[None, :]) * 16 + (rows % 16)[None, :]
            scales = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
            first = tl.where(ok, chunk * 32, F) + part * (32 // PARTS)
            acc = add_products(acc, words, scales, hidden_ptr, tokens, n_tokens, first, F, BITS, 4, ONE)
        if ONE:
            acc = tl.sum(acc, 0)[None, :]
        acc *= 1 << BITS
        last = True
        if SPLITS > 1:
            tl.store(partial_ptr + split * n_tokens * D + out_at, acc, mask=out_mask)
            last = is_last(done_ptr + block * N_DONE + tl.program_id(0), used)
        if last:
            store_output(acc, out_ptr, bias_ptr, partial_ptr, out_at, out_mask, rows, used, n_tokens, D, SPLITS)
