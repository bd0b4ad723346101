// compact: the kept rows and columns of a list of tensors, gathered in one pass over all of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/channel_layout.h"
#include "common/gather_arguments.h"

namespace {

using torch::stable::Tensor;
using Index = std::optional<Tensor>;

// Bytes of output that one task copies: small enough to share out among threads, large enough to forget the call.
constexpr std::int64_t kTaskBytes = 256 << 10;

struct Run {
  std::int64_t first, length;
};
using Runs = std::vector<Run>;

// A source as rows of `groups` stretches of `columns` units of `unit` bytes. A contiguous tensor has one group a row
// and a unit for every (dim 0, dim 1); a channels_last weight has a group for every tap, and elements as units.
struct Job {
  const char* source;
  char* target;
  const Runs* rows;     // null: all
  const Runs* columns;  // null: all
  std::int64_t row_count, column_count;  // of the target
  std::int64_t groups, source_columns, unit;

  std::int64_t source_row_bytes() const { return groups * source_columns * unit; }
  std::int64_t target_row_bytes() const { return groups * column_count * unit; }
};

struct Task {
  const Job* job;
  std::int64_t begin, end;  // rows of the target
};

// The usual units are copied by moves of a fixed size; a call of memcpy for four bytes costs more than the bytes.
template <int Unit>
void copy_units(char* target, const char* source, const Runs& runs) {
  for (const Run& run : runs) {
    const char* from = source + run.first * Unit;
    if (run.length * Unit > 128) {
      std::memcpy(target, from, run.length * Unit);
      target += run.length * Unit;
      continue;
    }
    for (std::int64_t i = 0; i < run.length; ++i, target += Unit, from += Unit) std::memcpy(target, from, Unit);
  }
}

void copy_stretch(char* target, const char* source, const Runs& runs, std::int64_t unit) {
  switch (unit) {
    case 1: return copy_units<1>(target, source, runs);
    case 2: return copy_units<2>(target, source, runs);
    case 4: return copy_units<4>(target, source, runs);
    case 8: return copy_units<8>(target, source, runs);
    case 18: return copy_units<18>(target, source, runs);
    case 36: return copy_units<36>(target, source, runs);
    case 72: return copy_units<72>(target, source, runs);
    case 100: return copy_units<100>(target, source, runs);
    default:
      for (const Run& run : runs) {
        std::memcpy(target, source + run.first * unit, run.length * unit);
        target += run.length * unit;
      }
  }
}

void copy_row(const Job& job, char* target, const char* source) {
  if (!job.columns) {
    std::memcpy(target, source, job.target_row_bytes());
    return;
  }
  const std::int64_t target_step = job.column_count * job.unit, source_step = job.source_columns * job.unit;
  for (std::int64_t g = 0; g < job.groups; ++g) {
    copy_stretch(target + g * target_step, source + g * source_step, *job.columns, job.unit);
  }
}

void run_task(const Task& task) {
  const Job& job = *task.job;
  const std::int64_t from = job.source_row_bytes(), to = job.target_row_bytes();
  char* target = job.target + task.begin * to;
  if (!job.rows) {
    if (!job.columns) {
      std::memcpy(target, job.source + task.begin * from, (task.end - task.begin) * to);
      return;
    }
    for (std::int64_t row = task.begin; row < task.end; ++row, target += to) copy_row(job, target, job.source + row * from);
    return;
  }
  std::int64_t place = 0;
  for (const Run& run : *job.rows) {
    const std::int64_t begin = std::max(task.begin, place), end = std::min(task.end, place + run.length);
    if (begin < end) {
      const char* source = job.source + (run.first + begin - place) * from;
      if (!job.columns) {
        std::memcpy(target, source, (end - begin) * to);
        target += (end - begin) * to;
      } else {
        for (std::int64_t row = begin; row < end; ++row, target += to, source += from) copy_row(job, target, source);
      }
    }
    place += run.length;
    if (place >= task.end) return;
  }
}

Runs runs_of(const Tensor& index, std::int64_t size, const char* name, std::size_t source) {
  const std::int64_t* values = index.const_data_ptr<std::int64_t>();
  const std::int64_t step = index.stride(0);
  Runs runs;
  for (std::int64_t i = 0; i < index.numel(); ++i) {
    const std::int64_t value = values[i * step];
    if (value < 0 || value >= size) {
      demp::fail("compact: ", name, "[", source, "] must be in [0, ", size, "), got ", value);
    }
    if (!runs.empty() && runs.back().first + runs.back().length == value) {
      ++runs.back().length;
    } else {
      runs.push_back({value, 1});
    }
  }
  return runs;
}

class Gather {
 public:
  Tensor add(const Tensor& given, const Index& rows, const Index& columns, std::size_t number) {
    const auto format = demp::memory_format(given);
    const bool channels_last = format != torch::headeronly::MemoryFormat::Contiguous;
    const Tensor source = channels_last ? given : torch::stable::contiguous(given);
    sources_.push_back(source);
    std::vector<std::int64_t> shape(source.sizes().begin(), source.sizes().end());
    if (rows) shape[0] = rows->numel();
    if (columns) shape[1] = columns->numel();
    Tensor target = torch::stable::empty(
        shape, source.scalar_type(), std::nullopt, source.device(), std::nullopt, format);
    if (target.numel() == 0) return target;

    const auto old = source.sizes();
    std::int64_t inner = 1;
    for (std::size_t d = 2; d < old.size(); ++d) inner *= old[d];
    const std::int64_t element = static_cast<std::int64_t>(source.element_size());
    Job job{};
    job.source = static_cast<const char*>(source.const_data_ptr());
    job.target = static_cast<char*>(target.mutable_data_ptr());
    if (source.dim() == 1) {  // one row of elements
      job.columns = rows ? known(*rows, old[0], "rows", number) : nullptr;
      job.row_count = job.groups = 1;
      job.column_count = shape[0];
      job.source_columns = old[0];
      job.unit = element;
    } else {
      job.rows = rows ? known(*rows, old[0], "rows", number) : nullptr;
      job.columns = columns ? known(*columns, old[1], "columns", number) : nullptr;
      job.row_count = shape[0];
      job.column_count = shape[1];
      job.source_columns = old[1];
      job.groups = channels_last ? inner : 1;
      job.unit = channels_last ? element : inner * element;
    }
    jobs_.push_back(job);
    return target;
  }

  void run() {
    std::vector<Task> tasks;
    for (const Job& job : jobs_) {
      const std::int64_t step = std::max<std::int64_t>(1, kTaskBytes / std::max<std::int64_t>(1, job.target_row_bytes()));
      for (std::int64_t begin = 0; begin < job.row_count; begin += step) {
        tasks.push_back({&job, begin, std::min(begin + step, job.row_count)});
      }
    }
    torch::stable::parallel_for(0, static_cast<std::int64_t>(tasks.size()), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) run_task(tasks[i]);
    });
  }

 private:
  // A weight, its gradient and its moments share their indices: the runs are found once.
  const Runs* known(const Tensor& index, std::int64_t size, const char* name, std::size_t number) {
    const auto key = std::make_pair(index.get(), size);
    const auto found = runs_.find(key);
    if (found != runs_.end()) return &found->second;
    return &runs_.emplace(key, runs_of(index, size, name, number)).first->second;
  }

  std::vector<Tensor> sources_;  // keeps copies of strided sources alive
  std::vector<Job> jobs_;
  std::map<std::pair<AtenTensorHandle, std::int64_t>, Runs> runs_;
};

std::vector<Tensor> compact(std::vector<Tensor> sources, std::vector<Index> rows, std::vector<Index> columns) {
  demp::check_compact(sources, rows, columns);
  Gather gather;
  std::vector<Tensor> targets;
  targets.reserve(sources.size());
  for (std::size_t i = 0; i < sources.size(); ++i) targets.push_back(gather.add(sources[i], rows[i], columns[i], i));
  gather.run();
  return targets;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CPU, m) {
  m.impl("compact", TORCH_BOX(&compact));
}
