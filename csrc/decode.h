// One token through a whole decoder, by one team of threads. Included by kernels.cpp, inside the variant's namespace.

// The sums of a model step, float32 between the layers.
struct DecodeWork {
  Buffer<float> residual, normed, qkv, attention;
  Buffer<float> plain;  // normed in natural order, which routers read; unused where that is the split order
  FfnWork ffn;
};

template <class W>
static void norm(const float* x, const W* weight, int64_t n, float eps, float offset, float* out, float* plain) {
  float squares = 0;
  vf acc{};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) acc += load(x + i) * load(x + i);
  squares = sum(acc);
  for (; i < n; ++i) squares += x[i] * x[i];
  float scale = 1.0f / std::sqrt(squares / float(n) + eps);
  for (i = 0; i < n; ++i) {
    float value = x[i] * scale * (offset + widen(weight[i]));
    put<W>(out, i, n, value);
    if (plain) plain[i] = value;
  }
}

template <class W>
static void norm_phase(Team& team, const lte_decoder& model, const void* weight, int64_t tokens, DecodeWork& work,
                       int64_t stride, float* plain = nullptr) {
  Work queue = team.begin();
  for (int64_t t; queue.take(tokens, t);)
    norm(work.residual.data + t * model.d_model, static_cast<const W*>(weight), model.d_model, model.norm_eps,
         model.norm_offset, work.normed.data + t * stride, plain ? plain + t * stride : nullptr);
  team.end();
}

// A head in place: its norm, where the family has one, and the rotation of its first `rotary_dim` entries.
template <class W>
static void rotate(const lte_decoder& model, const void* weight, const float* cos, const float* sin, float* head) {
  if (weight) {
    float squares = 0;
    for (int64_t i = 0; i < model.head_dim; ++i) squares += head[i] * head[i];
    float scale = 1.0f / std::sqrt(squares / float(model.head_dim) + model.norm_eps);
    for (int64_t i = 0; i < model.head_dim; ++i)
      head[i] *= scale * (model.norm_offset + widen(static_cast<const W*>(weight)[i]));
  }
  for (int64_t i = 0, half = model.rotary_dim / 2; i < half; ++i) {
    float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// The query heads that share one key-value head of one sequence.
template <class W>
static void attend(const lte_decoder& model, const lte_layer& layer, const lte_step& step, const lte_cache& cache,
                   int64_t b, int64_t kv, float* qkv, float* out) {
  const int64_t group = model.n_heads / model.n_kv_heads, dim = model.head_dim, length = step.position + 1;
  const int64_t stride = (dim + STEP - 1) / STEP * STEP, width = model.n_heads * dim;
  const float *cos = step.cos + b * model.rotary_dim, *sin = step.sin + b * model.rotary_dim;
  W* keys = static_cast<W*>(cache.keys) + b * cache.batch_stride + kv * cache.head_stride;
  W* values = static_cast<W*>(cache.values) + b * cache.batch_stride + kv * cache.head_stride;
  float* key = qkv + width + kv * dim;
  const float* value = qkv + width + model.n_kv_heads * dim + kv * dim;
  rotate<W>(model, layer.k_norm, cos, sin, key);
  for (int64_t i = 0; i < dim; ++i) {
    narrow(key[i], keys + step.position * cache.token_stride + i);
    narrow(value[i], values + step.position * cache.token_stride + i);
  }
  ThreadScratch& mine = thread_scratch();
  float* queries = mine.attention.get(group * (2 * stride + length) + 4 * group);
  float *sums = queries + group * stride, *scores = sums + group * stride, *tile = scores + group * length;
  for (int64_t g = 0; g < group; ++g) {
    float* query = qkv + (kv * group + g) * dim;
    rotate<W>(model, layer.q_norm, cos, sin, query);
    for (int64_t i = 0; i < dim; ++i) put<W>(queries + g * stride, i, dim, query[i]);
  }
  constexpr int64_t R = 4;
  for (int64_t s = 0; s < length;) {
    const W* rows[R];
    int64_t block = length - s >= R ? R : 1;
    for (int64_t i = 0; i < block; ++i) rows[i] = keys + (s + i) * cache.token_stride;
    if (block == R)
      dot_rows<R>(rows, queries, stride, group, dim, tile, group);
    else
      dot_rows<1>(rows, queries, stride, group, dim, tile, group);
    for (int64_t i = 0; i < block; ++i)
      for (int64_t g = 0; g < group; ++g) scores[g * length + s + i] = tile[i * group + g] * model.scaling;
    s += block;
  }
  const int64_t* mask = step.mask ? step.mask + b * step.mask_stride : nullptr;
  float** y = mine.rows.get(group);
  for (int64_t g = 0; g < group; ++g) {
    float *row = scores + g * length, largest = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t s = 0; s < length; ++s)
      if (!mask || mask[s]) largest = std::max(largest, row[s]);
    int64_t s = 0;
    for (; s + VL <= length; s += VL) store(row + s, vexp(load(row + s) - largest));
    for (; s < length; ++s) row[s] = std::exp(row[s] - largest);
    for (s = 0; s < length; ++s) total += row[s] = !mask || mask[s] ? row[s] : 0.0f;
    // Where everything is padding, as in a row that is only carried along, all positions count the same.
    for (s = 0; s < length; ++s) row[s] = total > 0 ? row[s] / total : 1.0f / float(length);
    y[g] = sums + g * stride;
    std::fill(y[g], y[g] + stride, 0.0f);
  }
  for (int64_t s = 0; s < length;) {
    const W* rows[R];
    int64_t block = length - s >= R ? R : 1;
    for (int64_t i = 0; i < block; ++i) rows[i] = values + (s + i) * cache.token_stride;
    if (block == R)
      scale_tile<R>(rows, scores + s, length, group, 0, dim, y);
    else
      scale_tile<1>(rows, scores + s, length, group, 0, dim, y);
    s += block;
  }
  for (int64_t g = 0; g < group; ++g)
    for (int64_t i = 0; i < dim; ++i)
      put<W>(out, (kv * group + g) * dim + i, width, y[g][split_index(i, dim, (const W*)nullptr)]);
}

// A layer up to the inputs of its FFN.
template <class W>
static void decode_attention(Team& team, const lte_decoder& model, const lte_layer& layer, const lte_step& step,
                             int64_t index, DecodeWork& work, int64_t stride) {
  const int64_t D = model.d_model, B = step.batch, width = model.n_heads * model.head_dim;
  const int64_t qkv_width = width + 2 * model.n_kv_heads * model.head_dim;
  const int64_t width_stride = (width + STEP - 1) / STEP * STEP;
  float *residual = work.residual.data, *qkv = work.qkv.data, *attention = work.attention.data;
  Buffer<float>& scratch = thread_scratch().linear;
  norm_phase<W>(team, model, layer.attention_norm, B, work, stride);
  linear_phase<W>(team, layer.qkv, 3, work.normed.data, stride, B, scratch,
                  [&](int64_t t, int64_t row, float value) { qkv[t * qkv_width + row] = value; });
  Work queue = team.begin();
  for (int64_t unit; queue.take(B * model.n_kv_heads, unit);) {
    int64_t b = unit / model.n_kv_heads;
    attend<W>(model, layer, step, step.caches[index], b, unit % model.n_kv_heads, qkv + b * qkv_width,
              attention + b * width_stride);
  }
  team.end();
  linear_phase<W>(team, &layer.output, 1, attention, width_stride, B, scratch,
                  [&](int64_t t, int64_t row, float value) { residual[t * D + row] += value; });
  norm_phase<W>(team, model, layer.ffn_norm, B, work, stride, std::is_same_v<W, float> ? nullptr : work.plain.data);
}

// Its FFN; scale: what the caller decided, with the inputs it wants in `inputs`, or null.
template <class W>
static void decode_ffn(Team& team, const lte_decoder& model, const lte_layer& layer, int64_t B, const float* inputs,
                       const float* scale, DecodeWork& work, int64_t stride) {
  const int64_t D = model.d_model;
  float *residual = work.residual.data, *plain = std::is_same_v<W, float> ? work.normed.data : work.plain.data;
  const W* bias = static_cast<const W*>(layer.ffn.down.bias);
  auto emit = [&](int64_t t, int64_t i, float value) {
    residual[t * D + i] += value + (bias ? widen(bias[i]) : 0.0f);
  };
  if (layer.ffn.nested.down.codes) {
    const float cut = layer.all_experts ? -1.0f : layer.ffn.copy.cut;
    return nested_phases<W>(team, layer.ffn, cut, work.normed.data, stride, B, work.ffn, emit);
  }
  if (scale) {
    team.begin();
    if (team.rank == 0) {
      std::copy_n(scale, B * layer.ffn.n_experts, work.ffn.scale.get(B * layer.ffn.n_experts));
      for (int64_t t = 0; t < B; ++t)
        for (int64_t i = 0; i < D; ++i) {
          put<W>(work.normed.data + t * stride, i, D, inputs[t * D + i]);
          if (plain != work.normed.data) plain[t * stride + i] = inputs[t * D + i];
        }
    }
    team.end();
  } else if (layer.all_experts) {
    run_all(team, layer.ffn, B, work.ffn);
  } else {
    decide_phase<W>(team, layer.ffn, plain, stride, B, work.ffn);
  }
  if (B >= MANY && fits_panels(layer.ffn))
    return prompt_phases<W>(team, layer.ffn, PAIRED<W> ? work.normed.data : plain, stride, B, work.ffn, emit);
  ffn_phases<W>(team, layer.ffn, work.normed.data, stride, B, work.ffn, emit);
}

template <class W>
static void decode(const lte_decoder& model, const lte_step& step, int threads) {
  static thread_local DecodeWork own;
  DecodeWork& work = own;
  const int64_t D = model.d_model, B = step.batch, stride = (D + STEP - 1) / STEP * STEP;
  const int64_t width = model.n_heads * model.head_dim;
  float* residual = work.residual.get(B * D);
  work.normed.get(B * stride);
  if (!std::is_same_v<W, float>) work.plain.get(B * stride);
  work.qkv.get(B * (width + 2 * model.n_kv_heads * model.head_dim));
  work.attention.get(B * ((width + STEP - 1) / STEP * STEP));
  if (step.from == 0)
    for (int64_t i = 0; i < B * D; ++i) residual[i] = widen(static_cast<const W*>(step.hidden)[i]);
  W* logits = static_cast<W*>(step.logits);
  with_team(threads, [&](Team& team) {
    for (int64_t part = step.from; part < step.to; ++part) {
      if (part > 0)
        decode_ffn<W>(team, model, model.layers[part - 1], B, step.inputs, part == step.from ? step.scale : nullptr, work,
                      stride);
      if (part < model.n_layers) decode_attention<W>(team, model, model.layers[part], step, part, work, stride);
    }
    if (step.to <= model.n_layers) return;
    norm_phase<W>(team, model, model.final_norm, B, work, stride);
    linear_phase<W>(team, &model.head, 1, work.normed.data, stride, B, thread_scratch().linear,
                    [&](int64_t t, int64_t row, float value) { narrow(value, logits + t * model.head.rows + row); });
  });
  const float* plain = std::is_same_v<W, float> ? work.normed.data : work.plain.data;
  if (step.to <= model.n_layers)
    for (int64_t t = 0; t < B; ++t) std::copy_n(plain + t * stride, D, step.inputs + t * D);
}
