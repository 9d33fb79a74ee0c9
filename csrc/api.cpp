// Chooses, once, the best copy of the kernels that this processor can run.
#include "lte.h"

#include <cstring>

#include "threads.h"
#include "variant.h"

#define DECLARE(name) \
  namespace name {    \
  extern const lte::Variant variant; \
  }
DECLARE(lte_generic)
#ifdef LTE_HAS_AVX2
DECLARE(lte_avx2)
#endif
#ifdef LTE_HAS_AVX512
DECLARE(lte_avx512)
#endif
#ifdef LTE_HAS_AVX512BF16
DECLARE(lte_avx512bf16)
#endif

namespace {

struct Choice {
  const char* name;
  const lte::Variant* variant;
  bool runs;
};

const Choice* choices(int& count) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#endif
  static const Choice all[] = {
#ifdef LTE_HAS_AVX512BF16
      {"avx512_bf16", &lte_avx512bf16::variant,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16")},
#endif
#ifdef LTE_HAS_AVX512
      {"avx512", &lte_avx512::variant,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq")},
#endif
#ifdef LTE_HAS_AVX2
      {"avx2", &lte_avx2::variant, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"generic", &lte_generic::variant, true},
  };
  count = int(sizeof all / sizeof *all);
  return all;
}

const Choice* chosen() {
  static const Choice* best = [] {
    int count;
    const Choice* choice = choices(count);
    while (!choice->runs) ++choice;
    return choice;
  }();
  return best;
}

const Choice* current = chosen();

}  // namespace

extern "C" {

const char* lte_isa() { return current->name; }

int32_t lte_use_isa(const char* name) {
  int count;
  const Choice* all = choices(count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs && !std::strcmp(all[i].name, name)) {
      current = &all[i];
      return 1;
    }
  return 0;
}

int32_t lte_shares_threads() { return lte::find_pool(); }

void lte_sparse_ffn(const lte_ffn* ffn, const void* x, int64_t tokens, const uint8_t* mask, const float* scale, void* y,
                    int32_t threads) {
  current->variant->sparse_ffn(ffn, x, tokens, mask, scale, y, threads);
}
void lte_copy_scores(const lte_ffn* ffn, const void* x, int64_t tokens, float* scores, int32_t threads) {
  current->variant->copy_scores(ffn, x, tokens, scores, threads);
}
void lte_linear(const lte_matrix* matrix, int32_t dtype, const void* x, int64_t tokens, void* y, int32_t threads) {
  current->variant->linear(matrix, dtype, x, tokens, y, threads);
}
void lte_decode(const lte_decoder* decoder, const lte_step* step, int32_t threads) {
  current->variant->decode(decoder, step, threads);
}
void lte_quantize(const lte_matrix* matrix, int32_t dtype, const lte_lowbit* made, const float* importance, int32_t tries,
                  int32_t threads) {
  current->variant->quantize(matrix, dtype, made, importance, tries, threads);
}
void lte_dequantize(const lte_lowbit* matrix, int32_t dtype, void* out, int32_t threads) {
  current->variant->dequantize(matrix, dtype, out, threads);
}
float lte_read(const void* data, int64_t bytes, int32_t threads) { return current->variant->read(data, bytes, threads); }
}
