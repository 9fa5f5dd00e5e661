// oneDNN's batch normalization behind a few C functions: prepare, run in a timed loop, read back.
//
// Compiled by peers/onednn.py on the machine that runs the benchmark.

#include <sys/mman.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "dnnl.hpp"

using namespace dnnl;
using tag = memory::format_tag;
using Forward = batch_normalization_forward;
using Backward = batch_normalization_backward;

namespace {

tag tag_of(int ndim, const std::string &layout) {
  static const std::unordered_map<std::string, std::array<tag, 4>> tags{
      {"channels_first", {tag::nc, tag::ncw, tag::nchw, tag::ncdhw}},
      {"channels_last", {tag::nc, tag::nwc, tag::nhwc, tag::ndhwc}},
      {"blocks of 16", {tag::undef, tag::nCw16c, tag::nChw16c, tag::nCdhw16c}},
      {"blocks of 8", {tag::undef, tag::nCw8c, tag::nChw8c, tag::nCdhw8c}}};
  return tags.at(layout)[ndim - 2];
}

// Memory as NumPy allocates it: large arrays in huge pages.
std::shared_ptr<void> allocate(size_t bytes) {
  constexpr size_t huge = size_t(1) << 21, line = 64;
  const size_t alignment = bytes >= 2 * huge ? huge : line;
  void *p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == huge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return {p, std::free};
}

struct Task {
  engine cpu{engine::kind::cpu, 0};
  stream queue{cpu};
  std::vector<std::shared_ptr<void>> owned;
  std::unordered_map<int, memory> arguments;
  primitive operation;
  memory::dims shape;
  memory::desc plain, format;
  int output = DNNL_ARG_DST;
  bool fresh = false;

  memory make(const memory::desc &desc) {
    owned.push_back(allocate(desc.get_size()));
    return {desc, cpu, owned.back().get()};
  }

  void reorder_to(memory from, memory to) {
    reorder(from, to).execute(queue, from, to);
    queue.wait();
  }

  memory tensor(const void *values) {
    memory result = make(format);
    reorder_to({plain, cpu, const_cast<void *>(values)}, result);
    return result;
  }

  memory parameter(const void *values) {
    const memory::desc desc{{shape[1]}, memory::data_type::f32, tag::a};
    memory result = make(desc);
    if (values) reorder_to({desc, cpu, const_cast<void *>(values)}, result);
    return result;
  }

  void execute() {
    if (fresh) arguments[output] = memory(format, cpu);
    operation.execute(queue, arguments);
    queue.wait();
  }
};

std::string message;

} // namespace

extern "C" {

const char *onednn_version() {
  static const std::string text = std::to_string(version()->major) + "." +
                                  std::to_string(version()->minor) + "." +
                                  std::to_string(version()->patch);
  return text.c_str();
}

// Channels in a block of the blocked layout: as many as oneDNN's own vectors hold. Of any other it
// has only a reference implementation.
int onednn_block() {
  return get_effective_cpu_isa() >= cpu_isa::avx512_core ? 16 : 8;
}

// Why onednn_prepare gave NULL.
const char *onednn_error() { return message.c_str(); }

void *onednn_prepare(int ndim, const long *shape, const char *layout, const char *direction,
                     bool fresh, float eps, const void *x, const void *dy, const void *gamma,
                     const void *beta, const void *mean, const void *var) try {
  auto task = std::make_unique<Task>();
  task->shape.assign(shape, shape + ndim);
  task->fresh = fresh;
  const auto f32 = memory::data_type::f32;
  task->plain = {task->shape, f32, tag_of(ndim, "channels_first")};
  task->format = {task->shape, f32, tag_of(ndim, layout)};
  const memory::desc &format = task->format;
  const bool inference = std::string(direction) == "inference";
  auto flags = normalization_flags::use_scale | normalization_flags::use_shift;
  if (inference) flags |= normalization_flags::use_global_stats;

  const Forward::primitive_desc forward(
      task->cpu, inference ? prop_kind::forward_inference : prop_kind::forward_training, format,
      format, eps, flags);
  task->operation = Forward(forward);
  auto &arguments = task->arguments;
  arguments = {{DNNL_ARG_SRC, task->tensor(x)},
               {DNNL_ARG_DST, task->make(format)},
               {DNNL_ARG_SCALE, task->parameter(gamma)},
               {DNNL_ARG_SHIFT, task->parameter(beta)},
               {DNNL_ARG_MEAN, task->parameter(inference ? mean : nullptr)},
               {DNNL_ARG_VARIANCE, task->parameter(inference ? var : nullptr)}};

  if (std::string(direction) == "backward") {
    task->execute();
    const Backward::primitive_desc backward(task->cpu, prop_kind::backward, format, format, format,
                                            eps, flags, forward);
    task->operation = Backward(backward);
    task->output = DNNL_ARG_DIFF_SRC;
    arguments.erase(DNNL_ARG_DST);
    arguments.erase(DNNL_ARG_SHIFT);
    arguments.insert({{DNNL_ARG_DIFF_DST, task->tensor(dy)},
                      {DNNL_ARG_DIFF_SRC, task->make(format)},
                      {DNNL_ARG_DIFF_SCALE, task->parameter(nullptr)},
                      {DNNL_ARG_DIFF_SHIFT, task->parameter(nullptr)}});
  }
  return task.release();
} catch (const std::exception &error) {
  message = error.what();
  return nullptr;
}

double onednn_run(void *task, long calls) {
  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  for (long i = 0; i < calls; ++i) static_cast<Task *>(task)->execute();
  return std::chrono::duration<double>(clock::now() - start).count();
}

void onednn_result(void *handle, void *values) {
  auto task = static_cast<Task *>(handle);
  task->reorder_to(task->arguments.at(task->output), {task->plain, task->cpu, values});
}

void onednn_release(void *task) { delete static_cast<Task *>(task); }
}
