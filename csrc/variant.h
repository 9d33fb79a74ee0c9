// What one compiled copy of the kernels offers.
#pragma once
#include "lte.h"

namespace lte {
struct Variant {
  decltype(lte_sparse_ffn)* sparse_ffn;
  decltype(lte_copy_scores)* copy_scores;
  decltype(lte_linear)* linear;
  decltype(lte_decode)* decode;
  decltype(lte_quantize)* quantize;
  decltype(lte_dequantize)* dequantize;
  decltype(lte_read)* read;
};
}  // namespace lte
