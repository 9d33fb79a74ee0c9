// C interface of the CPU backend. Plain C types only: the library knows nothing of Python or torch, so one build
// serves every torch version. Pointers are to contiguous rows; sizes are in elements. Nothing here checks its
// arguments: src/lte/ops/cpu does.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

enum lte_dtype : int32_t { LTE_FP32 = 0, LTE_BF16 = 1 };
enum lte_activation : int32_t { LTE_RELU = 0, LTE_GELU = 1, LTE_GELU_TANH = 2, LTE_SILU = 3, LTE_IDENTITY = 4 };

// [rows, cols] numbers scale * (code - (2^bits - 1) / 2), as src/lte/ops/lowbit.py has them, in blocks of rows.
// planes: [blocks, groups, chunks of a group, bits, rows of a block, 4]; the last byte, over the planes, has the codes
// of columns 4 s + its index of the chunk, s from 0 to 7. scales: [blocks, groups, rows of a block], bf16. With
// `by_columns` they are [groups, chunks of a group, blocks, ...] and [groups, blocks, ...]: some columns lie together.
enum : int64_t { LTE_LOWBIT_ROWS = 16, LTE_LOWBIT_CHUNK = 32 };
struct lte_lowbit {
  const uint8_t* planes;
  const uint16_t* scales;
  int64_t rows, cols, groups, group;
  int32_t bits, by_columns;
};

// out = W x + b. weight: [rows, cols] with row stride `stride`, or null where `low` holds it; bias: [rows] or null.
// Weight and bias are of the dtype of what is multiplied with them.
struct lte_matrix {
  const void* weight;
  const void* bias;
  int64_t rows, cols, stride;
  lte_lowbit low;
};

// An FFN's own coarse copy. An expert runs where the root of the sum, over its neurons, of the squares of
// act(gate x) * (up x) * norm is above `cut`; where that is below 0, every expert runs, and the copy is not looked at.
// gate.planes is null for a plain FFN, up.planes where there is no copy.
struct lte_copy {
  lte_lowbit gate, up;
  const float* norms;  // [d_ff]
  float cut;
};

// [rows, cols] codes of 1 to 4 bits, row by row, as src/lte/ops/nested.py has them; codes is null where there are none.
struct lte_rows {
  const uint8_t* codes;
  int32_t bits;
};

// An FFN in two planes. Its copy has the upper bits of gate and up; where nested.down.codes is not null, the matrices
// have biases alone. Lower bits count 2^-bits of the upper ones' scales. A neuron runs where its score is above the
// copy's `cut`, on all bits where it is above `fine_cut`.
struct lte_nested {
  lte_rows gate, up;              // lower bits
  lte_rows down, down_lower;      // one row per neuron, upper and lower bits
  const uint16_t* down_scales;    // [d_ff, down_groups], bf16, of the upper bits
  int64_t down_groups, down_group;
  const int32_t* exact;           // [n_exact], ascending: neurons whose down row is exact, and has scales 0
  const uint16_t* exact_rows;     // [n_exact, d_model], bf16
  int64_t n_exact;
  float fine_cut;
};

// One feed-forward network; one row per neuron in every matrix. gate.weight is null for a plain FFN.
// router: [n_experts, d_model], its weight and bias float32 whatever `dtype`; null where the caller gives a mask or the
// copy decides.
struct lte_ffn {
  lte_matrix gate, up, down;  // down: transposed, its bias is [d_model]
  lte_matrix router;
  lte_copy copy;
  lte_nested nested;
  int64_t d_model, d_ff, n_experts;
  float threshold;
  int32_t dtype, activation;
};

// One pre-norm decoder layer with rotary attention (the Llama shape). q_norm and k_norm may be null.
struct lte_layer {
  const void *attention_norm, *ffn_norm;  // [d_model]
  const void *q_norm, *k_norm;            // [head_dim]
  lte_matrix qkv[3];                      // unused entries have rows = 0; their outputs are q, k, v in this order
  lte_matrix output;
  lte_ffn ffn;
  int32_t all_experts;  // 1: run dense, without the router
};

struct lte_decoder {
  const lte_layer* layers;
  const void* final_norm;
  lte_matrix head;  // LM head
  int64_t n_layers, d_model, n_heads, n_kv_heads, head_dim, rotary_dim;
  float norm_eps, norm_offset, scaling;  // a norm multiplies by (norm_offset + weight)
  int32_t dtype;
};

// Keys or values of one layer: [batch, n_kv_heads, capacity, head_dim], contiguous in the last dimension.
struct lte_cache {
  void *keys, *values;
  int64_t batch_stride, head_stride, token_stride;
};

// One token for each of `batch` sequences, in parts: part 0 ends before the first FFN, part i before FFN i, the last,
// n_layers, with the logits. A call does parts [from, to); between two calls, by the same thread, the caller may decide
// for the FFN that comes next.
struct lte_step {
  int64_t batch, position;      // position: tokens in the cache before this one
  const void* hidden;           // [batch, d_model], embeddings
  const float *cos, *sin;       // [batch, rotary_dim]
  const int64_t* mask;          // [batch, mask_stride], 0 where a cached token is padding; or null
  int64_t mask_stride;
  const lte_cache* caches;      // [n_layers]
  void* logits;                 // [batch, vocabulary]
  int64_t from, to;
  float* inputs;                // [batch, d_model]: of the FFN that comes next; may have been changed when it is run
  const float* scale;           // [batch, n_experts], of the FFN that comes first, as in lte_sparse_ffn; or null
};

const char* lte_isa();                  // the instruction set in use
int32_t lte_use_isa(const char* name);  // 0 when this machine cannot run it
int32_t lte_shares_threads();           // 1 when torch's OpenMP pool was found

// y[t] = sum over e of w[t, e] E_e(x[t]) + bias. mask: [tokens, n_experts] bytes, or scale: [tokens, n_experts], or
// neither: the router or the copy decides where there is one, else every expert runs. x, y: [tokens, d_model].
void lte_sparse_ffn(const lte_ffn* ffn, const void* x, int64_t tokens, const uint8_t* mask, const float* scale, void* y,
                    int32_t threads);
// scores: [tokens, n_experts], what the copy says of every expert: the root its `cut` is compared with.
void lte_copy_scores(const lte_ffn* ffn, const void* x, int64_t tokens, float* scores, int32_t threads);
void lte_linear(const lte_matrix* matrix, int32_t dtype, const void* x, int64_t tokens, void* y, int32_t threads);
void lte_decode(const lte_decoder* decoder, const lte_step* step, int32_t threads);
// Rounds a matrix to few bits: fills the planes and scales of `made`. importance: [cols], weights of the errors, or null.
void lte_quantize(const lte_matrix* matrix, int32_t dtype, const lte_lowbit* made, const float* importance, int32_t tries,
                  int32_t threads);
// out: [rows, cols] of `dtype`, the numbers that a matrix of few bits means.
void lte_dequantize(const lte_lowbit* matrix, int32_t dtype, void* out, int32_t threads);
float lte_read(const void* data, int64_t bytes, int32_t threads);  // reads every byte once: the bandwidth limit
}
#pragma GCC visibility pop
