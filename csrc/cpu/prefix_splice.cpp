// Where every row comes from, in one walk over the ids; then rows are moved run by run.

#include "prefix_splice.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace mmicl {
namespace {

struct Span {
  int64_t first, size;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// The messages are those of mmicl_kernels/ops/_core/checks.py and api.py, which leave these checks out.
void check_range(const char* name, const Integers& x, int64_t low, int64_t high) {
  if (x.size == 0) return;
  int64_t smallest = x[0], largest = x[0];
  for (int64_t i = 1; i < x.size; ++i) {
    smallest = std::min(smallest, x[i]), largest = std::max(largest, x[i]);
  }
  if (smallest >= low && largest <= high) return;
  fail(name, " has values from ", smallest, " to ", largest, ", expected ", low, " to ", high);
}

void check_bounds(const char* name, const Integers& x, int64_t most) {
  check_range(name, x, 0, most);
  for (int64_t i = 1; i < x.size; ++i) {
    if (x[i] < x[i - 1]) fail(name, " decreases, expected bounds from 0 to ", most, " in order");
  }
}

void check_demonstrations(const Integers& offsets, const Integers& demo_ids, int64_t N) {
  check_range("demo_ids", demo_ids, 0, offsets.size - 2);
  check_bounds("offsets", offsets, N);
}

void check_demonstrations(const Demonstrations& x) {
  check_demonstrations(x.offsets, x.demo_ids, x.N);
  check_bounds("cu_demos", x.cu_demos, x.demo_ids.size);
  if (x.cu_demos[0] != 0) fail("cu_demos begins with ", x.cu_demos[0], ", expected 0");
}

Span demonstration(const Demonstrations& x, int64_t k) {
  const int64_t d = x.demo_ids[k];
  return {x.offsets[d], x.offsets[d + 1] - x.offsets[d]};
}

Span prompt(const Prompts& x, int64_t r) {
  if (x.cu_prompt.data) return {x.cu_prompt[r], x.cu_prompt[r + 1] - x.cu_prompt[r]};
  const int64_t low = x.start.data ? x.start[r] : 0, high = x.end.data ? x.end[r] : x.T;
  return {r * x.T + low, high - low};
}

void check_prompts(const Prompts& x, int64_t R, int64_t max_length) {
  check_bounds("cu_prompt", x.cu_prompt, x.T);
  check_range("prompt_start", x.start, 0, x.T);
  check_range("prompt_end", x.end, 0, x.T);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t tokens = prompt(x, r).size;
    if (tokens >= 0 && tokens <= max_length) continue;
    fail("prompt has ", tokens, " tokens in request ", r, ", expected 0 to max_length = ", max_length);
  }
}

// Adds runs in ascending order, and what is between them as runs of one kind.
class RunList {
 public:
  explicit RunList(RowKind between) : between_(between) {}

  void add(RowKind kind, int64_t begin, int64_t size, int64_t source, int64_t position) {
    if (size <= 0) return;
    fill_to(begin);
    runs_.push_back({kind, begin, source, position});
    end_ = begin + size;
  }

  Runs finish(int64_t rows) {
    fill_to(rows);
    runs_.push_back({between_, rows, 0, 0});
    return std::move(runs_);
  }

 private:
  void fill_to(int64_t row) {
    if (end_ < row) runs_.push_back({between_, end_, 0, 0});
  }

  RowKind between_;
  Runs runs_;
  int64_t end_ = 0;
};

struct Request {
  int64_t begin, end;  // the ids that are kept
  int64_t fused;       // tokens
  Span own;
};

// The longest run of last demonstrations that fits beside the prompt.
Request newest_that_fit(const Demonstrations& demos, const Prompts& prompts, int64_t r, int64_t max_length) {
  Request x = {demos.cu_demos[r + 1], demos.cu_demos[r + 1], 0, prompt(prompts, r)};
  while (x.begin > demos.cu_demos[r]) {
    const int64_t size = demonstration(demos, x.begin - 1).size;
    if (size > max_length - x.own.size - x.fused) break;
    x.fused += size;
    --x.begin;
  }
  return x;
}

void drop_all(int64_t* places, int64_t K) {
  std::fill(places, places + K, 0);
  std::fill(places + K, places + 2 * K, kDropped);
}

// body(run, low, high): the part of the run that lies in [begin, end).
template <class Body>
void for_runs(const Runs& runs, int64_t begin, int64_t end, Body body) {
  const auto after = [](int64_t row, const Run& run) { return row < run.begin; };
  auto run = std::upper_bound(runs.begin(), runs.end(), begin, after) - 1;
  for (; begin < end; ++run) {
    const int64_t high = std::min(end, run[1].begin);
    body(*run, begin, high);
    begin = high;
  }
}

void copy_run(const RowCopies& x, const RowSource& from, int64_t low, int64_t source, int64_t rows) {
  char* out = x.out.row(low);
  const char* in = from.rows.row(source);
  if (!from.convert && x.out.stride_t == x.row_bytes && from.rows.stride_t == x.row_bytes) {
    std::memcpy(out, in, rows * x.row_bytes);
    return;
  }
  const char* scale = from.scale ? from.scale + source * from.stride_scale : nullptr;
  for (int64_t i = 0; i < rows; ++i, out += x.out.stride_t, in += from.rows.stride_t) {
    if (!from.convert) {
      std::memcpy(out, in, x.row_bytes);
    } else {
      from.convert(out, in, scale, x.C);
      if (scale) scale += from.stride_scale;
    }
  }
}

}  // namespace

Runs plan_splice(const Demonstrations& demos, const Prompts& prompts, const SpliceShape& shape,
                 const SplicePlaces& places) {
  const int64_t R = demos.requests(), K = demos.demo_ids.size, L = shape.L;
  const bool packed = shape.layout == SpliceLayout::packed;
  const int64_t most = packed ? shape.max_length : std::min(L, shape.max_length);
  check_demonstrations(demos);
  check_prompts(prompts, R, most);
  std::vector<Request> requests;
  int64_t total = 0;
  places.cu_seqlens[0] = 0;
  for (int64_t r = 0; r < R; ++r) {
    requests.push_back(newest_that_fit(demos, prompts, r, most));
    total += requests[r].fused + requests[r].own.size;
    places.cu_seqlens[r + 1] = static_cast<int32_t>(total);
  }
  if (packed && total > L) {
    fail("length is ", L, ", expected at least the ", total, " tokens of the packed batch");
  }
  RunList runs(RowKind::padding);
  drop_all(places.demos, K);
  int64_t end = 0;  // of the request before, where packed
  for (int64_t r = 0; r < R; ++r) {
    const Request& x = requests[r];
    const int64_t row = packed ? 0 : r * L, tokens = x.fused + x.own.size;
    const int64_t first = packed ? end : shape.layout == SpliceLayout::left ? L - tokens : 0;
    int64_t at = first;
    for (int64_t k = x.begin; k < x.end; ++k) {
      const Span rows = demonstration(demos, k);
      places.demos[k] = row, places.demos[K + k] = at;
      runs.add(RowKind::fused, row + at, rows.size, rows.first, at - first);
      at += rows.size;
    }
    places.prompts[r] = row, places.prompts[R + r] = at;
    runs.add(RowKind::own, row + at, x.own.size, x.own.first, at - first);
    end = first + tokens;
  }
  return runs.finish((packed ? 1 : R) * L);
}

Runs plan_in_place(const Demonstrations& demos, const Integers& starts, int64_t B, int64_t L,
                   const SplicePlaces& places) {
  const int64_t R = demos.requests(), K = demos.demo_ids.size, copies = R > 0 ? B / R : 0;
  check_demonstrations(demos);
  check_range("starts", starts, kDropped, -kDropped);
  RunList runs(RowKind::kept);
  drop_all(places.demos, K);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t r = b / copies, row = r * copies * L;
    int64_t at = starts[r];
    for (int64_t k = demos.cu_demos[r]; k < demos.cu_demos[r + 1]; ++k) {
      const Span rows = demonstration(demos, k);
      const int64_t low = std::max<int64_t>(at, 0), high = std::min(at + rows.size, L);
      runs.add(RowKind::fused, b * L + low, high - low, rows.first + low - at, 0);
      places.demos[k] = row, places.demos[K + k] = at;
      at += rows.size;
    }
    places.prompts[r] = row, places.prompts[R + r] = at;
  }
  if (B == 0) drop_all(places.prompts, R);
  return runs.finish(B * L);
}

Runs plan_prompt_grad(const Prompts& prompts, const int64_t* prompt_places, int64_t R, int64_t rows,
                      int64_t B, int64_t L) {
  check_prompts(prompts, R, L);
  RunList runs(RowKind::padding);
  for (int64_t r = 0; r < R; ++r) {
    const Span own = prompt(prompts, r);
    const int64_t row = prompt_places[r], at = prompt_places[R + r];
    if (own.size == 0) continue;
    if (row < 0 || row > (B - 1) * L || at < 0 || at > L - own.size) {
      fail("prompt_places[:, ", r, "] is ", row, ", ", at, ", expected a place of dout");
    }
    runs.add(RowKind::own, own.first, own.size, row + at, 0);
  }
  return runs.finish(rows);
}

void copy_rows(const RowCopies& x, const Runs& runs, int64_t begin, int64_t end) {
  for_runs(runs, begin, end, [&](const Run& run, int64_t low, int64_t high) {
    const int64_t source = run.source + low - run.begin;
    switch (run.kind) {
      case RowKind::padding: std::memset(x.out.row(low), 0, (high - low) * x.row_bytes); break;
      case RowKind::fused: copy_run(x, x.fused, low, source, high - low); break;
      case RowKind::own: copy_run(x, x.own, low, source, high - low); break;
      case RowKind::kept: break;
    }
  });
}

void write_fields(const TokenFields& x, const Runs& runs, int64_t begin, int64_t end) {
  for_runs(runs, begin, end, [&](const Run& run, int64_t low, int64_t high) {
    const bool token = run.kind != RowKind::padding;
    for (int64_t j = low; j < high; ++j) {
      x.attention_mask[j] = token;
      x.position_ids[j] = token ? run.position + j - run.begin : 0;
    }
    if (!x.labels) return;
    for (int64_t j = low; j < high; ++j) {
      x.labels[j] = run.kind == RowKind::own ? x.own_labels[run.source + j - run.begin] : kIgnoredLabel;
    }
  });
}

Uses find_uses(const BankGrad& x) {
  const int64_t M = x.offsets.size - 1, K = x.demo_ids.size;
  Uses found{std::vector<int64_t>(M + 1), std::vector<int64_t>(M + 1), {}};
  check_demonstrations(x.offsets, x.demo_ids, x.N);
  for (int64_t d = 0; d <= M; ++d) found.offsets[d] = x.offsets[d];
  const auto used = [&](int64_t k) { return x.places[K + k] > kDropped; };
  for (int64_t k = 0; k < K; ++k) {
    if (!used(k)) continue;
    if (x.places[k] < 0 || x.places[k] > (x.B - x.copies) * x.L) {
      fail("demo_places[0, ", k, "] is ", x.places[k], ", expected a row of dout");
    }
    ++found.first[x.demo_ids[k] + 1];
  }
  for (int64_t d = 0; d < M; ++d) found.first[d + 1] += found.first[d];
  found.uses.resize(found.first[M]);
  std::vector<int64_t> next = found.first;
  for (int64_t k = 0; k < K; ++k) {
    if (used(k)) found.uses[next[x.demo_ids[k]]++] = k;
  }
  return found;
}

void sum_uses(const BankGrad& x, const Uses& found, int64_t begin, int64_t end) {
  const std::vector<int64_t>& offsets = found.offsets;
  const int64_t M = x.offsets.size - 1, K = x.demo_ids.size;
  int64_t d = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
  std::vector<const void*> rows;
  for (int64_t n = begin; n < end; ++n) {
    while (d < M && offsets[d + 1] <= n) ++d;
    rows.clear();
    const bool inside = 0 <= d && d < M;
    for (int64_t i = inside ? found.first[d] : 0; inside && i < found.first[d + 1]; ++i) {
      const int64_t k = found.uses[i], position = x.places[K + k] + n - offsets[d];
      if (position < 0 || position >= x.L) continue;
      for (int64_t copy = 0; copy < x.copies; ++copy) {
        rows.push_back(x.dout.row(x.places[k] + copy * x.L + position));
      }
    }
    char* out = x.dbank + n * x.row_bytes;
    if (rows.empty()) {
      std::memset(out, 0, x.row_bytes);
    } else if (rows.size() == 1 && x.same_type) {
      std::memcpy(out, rows[0], x.row_bytes);
    } else {
      x.sum(out, rows.data(), static_cast<int64_t>(rows.size()), x.C);
    }
  }
}

}  // namespace mmicl
