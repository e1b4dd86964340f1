// A SwiGLU expert, and a layer of them, as a ggml graph over bf16 weights that stay where they are.
#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"


struct ggml_peer {
  ggml_context* context;
  ggml_cgraph* graph;
  ggml_threadpool* pool;
  ggml_cplan plan;
  std::vector<uint8_t> work;
  ggml_tensor *gate, *up, *down, *x, *ids, *topk_weights, *out;
};

extern "C" {

// top_k 0: one expert, no routing.
ggml_peer* ggml_peer_open(int64_t hidden, int64_t intermediate, int64_t experts, int64_t top_k, int64_t tokens, int threads) {
  auto* p = new ggml_peer{};
  const int64_t rows = tokens * (top_k > 0 ? top_k : 1);
  const size_t floats = tokens * hidden * (2 + top_k) + rows * (3 * intermediate + 2 * hidden + 4);
  p->context = ggml_init({floats * 4 + (16u << 20), nullptr, false});
  if (!p->context) {
    delete p;
    return nullptr;
  }
  const auto matrix = [&](int64_t in, int64_t out) {
    ggml_set_no_alloc(p->context, true);
    ggml_tensor* t = top_k > 0 ? ggml_new_tensor_3d(p->context, GGML_TYPE_BF16, in, out, experts)
                               : ggml_new_tensor_2d(p->context, GGML_TYPE_BF16, in, out);
    ggml_set_no_alloc(p->context, false);
    return t;
  };
  p->gate = matrix(hidden, intermediate);
  p->up = matrix(hidden, intermediate);
  p->down = matrix(intermediate, hidden);
  if (top_k == 0) {
    p->x = ggml_new_tensor_2d(p->context, GGML_TYPE_F32, hidden, tokens);
    ggml_tensor* gate = ggml_mul_mat(p->context, p->gate, p->x);
    ggml_tensor* up = ggml_mul_mat(p->context, p->up, p->x);
    p->out = ggml_mul_mat(p->context, p->down, ggml_swiglu_split(p->context, gate, up));
  } else {
    p->x = ggml_new_tensor_3d(p->context, GGML_TYPE_F32, hidden, 1, tokens);
    p->ids = ggml_new_tensor_2d(p->context, GGML_TYPE_I32, top_k, tokens);
    p->topk_weights = ggml_new_tensor_3d(p->context, GGML_TYPE_F32, 1, top_k, tokens);
    ggml_tensor* gate = ggml_mul_mat_id(p->context, p->gate, p->x, p->ids);
    ggml_tensor* up = ggml_mul_mat_id(p->context, p->up, p->x, p->ids);
    ggml_tensor* down = ggml_mul_mat_id(p->context, p->down, ggml_swiglu_split(p->context, gate, up), p->ids);
    ggml_tensor* weighted = ggml_mul_inplace(p->context, down, p->topk_weights);
    for (int64_t k = 0; k < top_k; ++k) {
      ggml_tensor* part =
          ggml_view_2d(p->context, weighted, hidden, tokens, weighted->nb[2], static_cast<size_t>(k) * weighted->nb[1]);
      p->out = k == 0 ? part : ggml_add(p->context, p->out, part);
    }
    if (top_k == 1) p->out = ggml_cont(p->context, p->out);
  }
  p->graph = ggml_new_graph(p->context);
  ggml_build_forward_expand(p->graph, p->out);
  ggml_threadpool_params params = ggml_threadpool_params_default(threads);
  p->pool = ggml_threadpool_new(&params);
  p->plan = ggml_graph_plan(p->graph, threads, p->pool);
  p->work.resize(p->plan.work_size + 64);
  p->plan.work_data = p->work.data();
  return p;
}

void ggml_peer_close(ggml_peer* p) {
  ggml_threadpool_free(p->pool);
  ggml_free(p->context);
  delete p;
}

// x fp32 [tokens][hidden], ids int32 and topk_weights fp32 [tokens][top_k] or null. Returns fp32 [tokens][hidden], valid
// until the next call.
const float* ggml_peer_run(ggml_peer* p, void* gate, void* up, void* down, size_t gate_up_stride, size_t down_stride,
                           const float* x, const int32_t* ids, const float* topk_weights) {
  p->gate->data = gate;
  p->up->data = up;
  p->down->data = down;
  std::memcpy(p->x->data, x, ggml_nbytes(p->x));
  if (ids) {
    p->gate->nb[2] = p->up->nb[2] = gate_up_stride;
    p->down->nb[2] = down_stride;
    std::memcpy(p->ids->data, ids, ggml_nbytes(p->ids));
    std::memcpy(p->topk_weights->data, topk_weights, ggml_nbytes(p->topk_weights));
  }
  return ggml_graph_compute(p->graph, &p->plan) == GGML_STATUS_SUCCESS ? static_cast<const float*>(p->out->data) : nullptr;
}

}  // extern "C"
