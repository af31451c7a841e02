// prefix_splice: schemas, checks, tensors to params. The arguments are those of the functions of the same
// names in mmicl_kernels/ops/prefix_splice/_torch.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/prefix_splice.h"

namespace {

using namespace mmicl;
using torch::stable::new_empty;

// ---- tensors to params ----

Integers integers(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 1, name, " has ", x.dim(), " dims, expected 1, on the CPU");
  const bool wide = x.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || x.scalar_type() == ScalarType::Int, name, " has dtype ",
                  torch::headeronly::toString(x.scalar_type()), ", expected Int or Long");
  return {x.const_data_ptr(), x.size(0), x.stride(0), wide};
}

Integers integers(const std::optional<Tensor>& x, const char* name, int64_t size) {
  if (!x) return {};
  const Integers found = integers(*x, name);
  STD_TORCH_CHECK(found.size == size, name, " has ", found.size, " numbers, expected ", size);
  return found;
}

Integers bounds(const Tensor& x, const char* name) {
  const Integers found = integers(x, name);
  STD_TORCH_CHECK(found.size >= 1, name, " is empty, expected at least [0]");
  return found;
}

Prompts prompts(int64_t R, int64_t batch_rows, int64_t T, const std::optional<Tensor>& start,
                const std::optional<Tensor>& end, const std::optional<Tensor>& cu_prompt) {
  const int64_t expected = cu_prompt ? 1 : R;
  STD_TORCH_CHECK(batch_rows == expected, "prompt has ", batch_rows, " rows, expected ", expected);
  return {integers(start, "prompt_start", R), integers(end, "prompt_end", R),
          integers(cu_prompt, "cu_prompt", R + 1), T};
}

ConstByteRows byte_rows(const Tensor& x) {
  return {static_cast<const char*>(x.const_data_ptr()), x.size(1), x.stride(0) * itemsize(x),
          x.stride(1) * itemsize(x)};
}

MutableByteRows writable_byte_rows(const Tensor& x) {
  return {static_cast<char*>(x.mutable_data_ptr()), x.size(1), x.stride(0) * itemsize(x),
          x.stride(1) * itemsize(x)};
}

RowSource bank_source(const Tensor& bank, const std::optional<Tensor>& scale, const Tensor& out) {
  const int64_t N = bank.size(0), C = out.size(2);
  const PrefixSpliceKernels& kernels = prefix_splice_kernels(element_type(out, "out"));
  RowSource source;
  check_rows(bank, "bank", {N, C}, bank.scalar_type());
  source.rows = {static_cast<const char*>(bank.const_data_ptr()), N, 0, bank.stride(0) * itemsize(bank)};
  if (scale) {
    check_tensor(bank, "bank", {N, C}, ScalarType::Char);
    check_tensor(*scale, "bank_scale", {N}, scale->scalar_type());
    source.convert = kernels.dequantise[static_cast<int>(element_type(*scale, "bank_scale"))];
    source.scale = static_cast<const char*>(scale->const_data_ptr());
    source.stride_scale = scale->stride(0) * itemsize(*scale);
  } else if (bank.scalar_type() != out.scalar_type()) {
    source.convert = kernels.convert[static_cast<int>(element_type(bank, "bank"))];
  }
  return source;
}

template <class Number>
Number* numbers(const Tensor& x) {
  return static_cast<Number*>(x.mutable_data_ptr());
}

// ---- ops ----

SpliceShape splice_shape(const std::string& layout, int64_t length, int64_t max_length) {
  if (layout == "left") return {SpliceLayout::left, length, max_length};
  if (layout == "right") return {SpliceLayout::right, length, max_length};
  STD_TORCH_CHECK(layout == "packed", "layout is '", layout, "', expected left, right or packed");
  return {SpliceLayout::packed, length, max_length};
}

using Splice = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Splice prefix_splice_fwd(const Tensor& bank, const std::optional<Tensor>& bank_scale, const Tensor& offsets,
                         const Tensor& demo_ids, const Tensor& cu_demos, const Tensor& prompt,
                         const std::optional<Tensor>& prompt_start, const std::optional<Tensor>& prompt_end,
                         const std::optional<Tensor>& cu_prompt, const std::optional<Tensor>& labels,
                         std::string layout, int64_t length, int64_t max_length) {
  check_floating_rows(prompt, "prompt", 3);
  STD_TORCH_CHECK(bank.dim() == 2, "bank has ", bank.dim(), " dims, expected [N, C]");
  const Demonstrations demos = {bounds(offsets, "offsets"), integers(demo_ids, "demo_ids"),
                                bounds(cu_demos, "cu_demos"), bank.size(0)};
  const SpliceShape shape = splice_shape(layout, length, max_length);
  const int64_t R = demos.requests(), B = shape.layout == SpliceLayout::packed ? 1 : R, C = prompt.size(2);
  const Prompts own = prompts(R, prompt.size(0), prompt.size(1), prompt_start, prompt_end, cu_prompt);

  const Tensor attention_mask = new_empty(prompt, {B, length}, ScalarType::Long);
  const Tensor position_ids = new_empty(prompt, {B, length}, ScalarType::Long);
  const Tensor cu_seqlens = new_empty(prompt, {R + 1}, ScalarType::Int);
  const Tensor new_labels = new_empty(prompt, labels ? Shape{B, length} : Shape{0}, ScalarType::Long);
  const Tensor demo_places = new_empty(prompt, {2, demos.demo_ids.size}, ScalarType::Long);
  const Tensor prompt_places = new_empty(prompt, {2, R}, ScalarType::Long);
  const Runs runs = plan_splice(
      demos, own, shape,
      {numbers<int64_t>(demo_places), numbers<int64_t>(prompt_places), numbers<int32_t>(cu_seqlens)});

  TokenFields fields = {numbers<int64_t>(attention_mask), numbers<int64_t>(position_ids)};
  std::optional<Tensor> flat_labels;
  if (labels) {
    flat_labels = torch::stable::reshape(*labels, {-1});
    fields.labels = numbers<int64_t>(new_labels);
    fields.own_labels = integers(flat_labels, "labels", prompt.size(0) * prompt.size(1));
  }
  const Tensor embeddings = new_rows(prompt, {B, length, C}, prompt.scalar_type());
  RowCopies copies = {writable_byte_rows(embeddings), C, C * itemsize(prompt)};
  copies.fused = bank_source(bank, bank_scale, prompt), copies.own.rows = byte_rows(prompt);
  parallel_rows(B * length, C, [&](int64_t begin, int64_t end) {
    copy_rows(copies, runs, begin, end);
    write_fields(fields, runs, begin, end);
  });
  return {embeddings, attention_mask, position_ids, cu_seqlens, new_labels, demo_places, prompt_places};
}

std::tuple<Tensor, Tensor> prefix_splice_place_(const Tensor& embeddings, const Tensor& bank,
                                                const std::optional<Tensor>& bank_scale,
                                                const Tensor& offsets, const Tensor& demo_ids,
                                                const Tensor& cu_demos, const Tensor& starts) {
  check_floating_rows(embeddings, "embeddings", 3);
  check_writable(embeddings, "embeddings");
  STD_TORCH_CHECK(bank.dim() == 2, "bank has ", bank.dim(), " dims, expected [N, C]");
  const Demonstrations demos = {bounds(offsets, "offsets"), integers(demo_ids, "demo_ids"),
                                bounds(cu_demos, "cu_demos"), bank.size(0)};
  const int64_t R = demos.requests(), B = embeddings.size(0), L = embeddings.size(1), C = embeddings.size(2);
  STD_TORCH_CHECK(R > 0 ? B % R == 0 : B == 0, "embeddings has ", B, " rows, expected a multiple of ", R);
  const Tensor demo_places = new_empty(embeddings, {2, demos.demo_ids.size}, ScalarType::Long);
  const Tensor end_places = new_empty(embeddings, {2, R}, ScalarType::Long);
  const Runs runs = plan_in_place(demos, integers(starts, "starts", R), B, L,
                                  {numbers<int64_t>(demo_places), numbers<int64_t>(end_places)});
  RowCopies copies = {writable_byte_rows(embeddings), C, C * itemsize(embeddings)};
  copies.fused = bank_source(bank, bank_scale, embeddings);
  parallel_rows(B * L, C, [&](int64_t begin, int64_t end) { copy_rows(copies, runs, begin, end); });
  return {demo_places, end_places};
}

Tensor bank_grad(const Tensor& dout, const Tensor& offsets, const Tensor& demo_ids, const Tensor& demo_places,
                 int64_t R, int64_t N, ScalarType bank_dtype) {
  BankGrad p = {bounds(offsets, "offsets"), integers(demo_ids, "demo_ids")};
  check_contiguous(demo_places, "demo_places", {2, p.demo_ids.size}, ScalarType::Long);
  p.places = static_cast<const int64_t*>(demo_places.const_data_ptr()), p.dout = byte_rows(dout);
  p.B = dout.size(0), p.L = dout.size(1), p.C = dout.size(2), p.N = N;
  if (R > 0 && R < p.B) {
    STD_TORCH_CHECK(p.B % R == 0, "dout has ", p.B, " rows, expected a multiple of ", R);
    p.copies = p.B / R;
  }
  const Tensor dbank = new_rows(dout, {N, p.C}, bank_dtype);
  p.dbank = numbers<char>(dbank), p.row_bytes = p.C * itemsize(dbank);
  const PrefixSpliceKernels& kernels = prefix_splice_kernels(element_type(dbank, "bank"));
  p.sum = kernels.sum[static_cast<int>(element_type(dout, "dout"))];
  p.same_type = bank_dtype == dout.scalar_type();
  const Uses uses = find_uses(p);
  parallel_rows(N, p.C, [&](int64_t begin, int64_t end) { sum_uses(p, uses, begin, end); });
  return dbank;
}

Tensor prompt_grad(const Tensor& dout, const Tensor& prompt_places, const Shape& shape, const Prompts& own) {
  const int64_t R = prompt_places.size(1), rows = shape[0] * shape[1], C = dout.size(2);
  const Runs runs =
      plan_prompt_grad(own, static_cast<const int64_t*>(prompt_places.const_data_ptr()), R, rows,
                       dout.size(0), dout.size(1));
  const Tensor dprompt = new_rows(dout, shape, dout.scalar_type());
  RowCopies copies = {writable_byte_rows(dprompt), C, C * itemsize(dprompt)};
  copies.own.rows = byte_rows(dout);
  parallel_rows(rows, C, [&](int64_t begin, int64_t end) { copy_rows(copies, runs, begin, end); });
  return dprompt;
}

std::tuple<Tensor, Tensor> prefix_splice_bwd(
    const Tensor& dout, const Tensor& offsets, const Tensor& demo_ids, const Tensor& demo_places,
    const Tensor& prompt_places, std::vector<int64_t> prompt_shape,
    const std::optional<Tensor>& prompt_start, const std::optional<Tensor>& prompt_end,
    const std::optional<Tensor>& cu_prompt, int64_t N, ScalarType bank_dtype, bool need_dbank,
    bool need_dprompt) {
  check_floating_rows(dout, "dout", 3);
  STD_TORCH_CHECK(prompt_places.dim() == 2, "prompt_places has ", prompt_places.dim(), " dims, expected 2");
  const int64_t R = prompt_places.size(1);
  check_contiguous(prompt_places, "prompt_places", {2, R}, ScalarType::Long);
  Tensor dbank = new_empty(dout, {0}), dprompt = new_empty(dout, {0});
  if (need_dbank) dbank = bank_grad(dout, offsets, demo_ids, demo_places, R, N, bank_dtype);
  if (need_dprompt) {
    STD_TORCH_CHECK(prompt_shape.size() == 3 && prompt_shape[2] == dout.size(2), "prompt_shape is ",
                    to_string(prompt_shape), ", expected [R, T, ", dout.size(2), "]");
    const Prompts own = prompts(R, prompt_shape[0], prompt_shape[1], prompt_start, prompt_end, cu_prompt);
    dprompt = prompt_grad(dout, prompt_places, prompt_shape, own);
  }
  return {dbank, dprompt};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mmicl_cpu, m) {
  m.def(
      "prefix_splice_fwd(Tensor bank, Tensor? bank_scale, Tensor offsets, Tensor demo_ids, Tensor cu_demos, "
      "Tensor prompt, Tensor? prompt_start, Tensor? prompt_end, Tensor? cu_prompt, Tensor? labels, "
      "str layout, int length, int max_length) -> "
      "(Tensor embeddings, Tensor attention_mask, Tensor position_ids, Tensor cu_seqlens, Tensor labels, "
      "Tensor demo_places, Tensor prompt_places)");
  m.def(
      "prefix_splice_place_(Tensor(a!) embeddings, Tensor bank, Tensor? bank_scale, Tensor offsets, "
      "Tensor demo_ids, Tensor cu_demos, Tensor starts) -> (Tensor demo_places, Tensor end_places)");
  m.def(
      "prefix_splice_bwd(Tensor dout, Tensor offsets, Tensor demo_ids, Tensor demo_places, "
      "Tensor prompt_places, int[] prompt_shape, Tensor? prompt_start, Tensor? prompt_end, "
      "Tensor? cu_prompt, int N, ScalarType bank_dtype, bool need_dbank, bool need_dprompt) -> "
      "(Tensor dbank, Tensor dprompt)");
}

STABLE_TORCH_LIBRARY_IMPL(mmicl_cpu, CPU, m) {
  m.impl("prefix_splice_fwd", TORCH_BOX(&prefix_splice_fwd));
  m.impl("prefix_splice_place_", TORCH_BOX(&prefix_splice_place_));
  m.impl("prefix_splice_bwd", TORCH_BOX(&prefix_splice_bwd));
}
