// compact: the kept rows and columns of a list of tensors, gathered in one pass over all of them.
// compact_: the same within the tensors' own memory. Kept units only move down, so each unit is read before anything is
// written over it as long as a tensor is walked from its front by one thread.
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

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "common/allocate.h"
#include "common/channel_layout.h"
#include "common/gather_arguments.h"
#include "common/parallel.h"

namespace {

using torch::stable::Tensor;
using Index = std::optional<Tensor>;

// Bytes of output that one task copies: small enough to share out among threads, large enough to forget the call.
constexpr std::int64_t kTaskBytes = 256 << 10;

// Behind a tensor that shrank in place, at least so much has to be left over for the pages to be given back.
constexpr std::int64_t kReturnBytes = 16 << 10;

struct Run {
  std::int64_t first, length;
};

// Which units stay: as runs, and one by one where the runs are short. For every other float of a row the loop over
// units takes a third of the time of the loop over runs.
struct Runs {
  std::vector<Run> list;
  std::vector<std::int32_t> units;
};
constexpr std::int64_t kShortRun = 4;

// A source as rows of `groups` stretches of `columns` units of `unit` bytes. A contiguous tensor has one group a row
// and a unit for every (dim 0, dim 1); a channels_last weight has a group for every tap, and elements as units.
struct Job {
  const char* source;
  char* target;
  const Runs* rows;     // null: all
  const Runs* columns;  // null: all
  std::int64_t row_count, column_count;  // of the target
  std::int64_t groups, source_columns, unit;
  const char* source_end;  // in place only

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
  if (!runs.units.empty()) {
    for (const std::int64_t unit : runs.units) {
      std::memcpy(target, source + unit * Unit, Unit);
      target += Unit;
    }
    return;
  }
  for (const Run& run : runs.list) {
    const char* from = source + run.first * Unit;
    if (run.length * Unit > 128) {
      std::memmove(target, from, run.length * Unit);
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
      for (const Run& run : runs.list) {
        std::memmove(target, source + run.first * unit, run.length * unit);
        target += run.length * unit;
      }
  }
}

void copy_row(const Job& job, char* target, const char* source) {
  if (!job.columns) {
    std::memmove(target, source, job.target_row_bytes());
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
      std::memmove(target, job.source + task.begin * from, (task.end - task.begin) * to);
      return;
    }
    for (std::int64_t row = task.begin; row < task.end; ++row, target += to) copy_row(job, target, job.source + row * from);
    return;
  }
  std::int64_t place = 0;
  for (const Run& run : job.rows->list) {
    const std::int64_t begin = std::max(task.begin, place), end = std::min(task.end, place + run.length);
    if (begin < end) {
      const char* source = job.source + (run.first + begin - place) * from;
      if (!job.columns) {
        std::memmove(target, source, (end - begin) * to);
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
  const std::int64_t count = index.numel();
  Runs found;
  std::vector<Run>& runs = found.list;
  for (std::int64_t i = 0; i < count; ++i) {
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
  if (count < kShortRun * static_cast<std::int64_t>(runs.size()) && size <= INT32_MAX) {
    found.units.reserve(count);
    for (const Run& run : runs) {
      for (std::int64_t i = 0; i < run.length; ++i) found.units.push_back(static_cast<std::int32_t>(run.first + i));
    }
  }
  return found;
}

// In place every unit has to come from its own place or from behind it.
void check_ascending(const Runs& runs, const char* name, std::size_t source) {
  std::int64_t end = 0;
  for (const Run& run : runs.list) {
    if (run.first < end) demp::fail("compact_: ", name, "[", source, "] must be ascending");
    end = run.first + run.length;
  }
}

// Hands the whole pages in [begin, end) back to the system. The memory stays allocated; it reads as zeros afterwards.
void return_pages(char* begin, char* end) {
#ifdef __linux__
  if (end - begin < kReturnBytes) return;
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(begin) + page - 1) / page * page;
  const std::uintptr_t last = reinterpret_cast<std::uintptr_t>(end) / page * page;
  // a refusal (locked or huge pages) costs memory only
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#else
  (void)begin, (void)end;
#endif
}

class Gather {
 public:
  // A new tensor that the gather fills.
  Tensor add(const Tensor& given, const Index& rows, const Index& columns, std::size_t number) {
    const auto format = demp::memory_format(given);
    const bool channels_last = format != torch::headeronly::MemoryFormat::Contiguous;
    const Tensor source = channels_last ? given : torch::stable::contiguous(given);
    sources_.push_back(source);
    std::vector<std::int64_t> shape(source.sizes().begin(), source.sizes().end());
    if (rows) shape[0] = rows->numel();
    if (columns) shape[1] = columns->numel();
    // without the dispatcher where that can be: it took half the time of 1,331 small tensors
    const bool empty = std::count(shape.begin(), shape.end(), 0) > 0;
    Tensor target = channels_last || empty
                        ? torch::stable::empty(shape, source.scalar_type(), std::nullopt, source.device(), std::nullopt, format)
                        : demp::new_contiguous(shape, source.scalar_type());
    if (target.numel() == 0) return target;
    Job job = describe(source, rows, columns, number, channels_last);
    job.target = static_cast<char*>(target.mutable_data_ptr());
    jobs_.push_back(job);
    return target;
  }

  // A dense tensor whose units move to the front of its own memory.
  void add_in_place(const Tensor& tensor, const Index& rows, const Index& columns, std::size_t number) {
    if (tensor.numel() == 0) return;
    Job job = describe(tensor, rows, columns, number, !tensor.is_contiguous());
    if (job.rows) check_ascending(*job.rows, "rows", number);
    if (job.columns) check_ascending(*job.columns, tensor.dim() == 1 ? "rows" : "columns", number);
    job.target = static_cast<char*>(tensor.mutable_data_ptr());
    job.source_end = job.source + tensor.numel() * static_cast<std::int64_t>(tensor.element_size());
    jobs_.push_back(job);
  }

  void run_in_place() {
    demp::parallel_for(0, static_cast<std::int64_t>(jobs_.size()), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const Job& job = jobs_[i];
        run_task({&job, 0, job.row_count});
        return_pages(job.target + job.row_count * job.target_row_bytes(), const_cast<char*>(job.source_end));
      }
    });
  }

  void run() {
    std::vector<Task> tasks;
    for (const Job& job : jobs_) {
      const std::int64_t step = std::max<std::int64_t>(1, kTaskBytes / std::max<std::int64_t>(1, job.target_row_bytes()));
      for (std::int64_t begin = 0; begin < job.row_count; begin += step) {
        tasks.push_back({&job, begin, std::min(begin + step, job.row_count)});
      }
    }
    demp::parallel_for(0, static_cast<std::int64_t>(tasks.size()), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) run_task(tasks[i]);
    });
  }

 private:
  Job describe(const Tensor& source, const Index& rows, const Index& columns, std::size_t number, bool channels_last) {
    const auto old = source.sizes();
    std::int64_t inner = 1;
    for (std::size_t d = 2; d < old.size(); ++d) inner *= old[d];
    const std::int64_t element = static_cast<std::int64_t>(source.element_size());
    Job job{};
    job.source = static_cast<const char*>(source.const_data_ptr());
    if (source.dim() == 1) {  // one row of elements
      job.columns = rows ? known(*rows, old[0], "rows", number) : nullptr;
      job.row_count = job.groups = 1;
      job.column_count = rows ? rows->numel() : old[0];
      job.source_columns = old[0];
      job.unit = element;
    } else {
      job.rows = rows ? known(*rows, old[0], "rows", number) : nullptr;
      job.columns = columns ? known(*columns, old[1], "columns", number) : nullptr;
      job.row_count = rows ? rows->numel() : old[0];
      job.column_count = columns ? columns->numel() : old[1];
      job.source_columns = old[1];
      job.groups = channels_last ? inner : 1;
      job.unit = channels_last ? element : inner * element;
    }
    return job;
  }

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
  demp::check_compact("compact", sources, rows, columns);
  Gather gather;
  std::vector<Tensor> targets;
  targets.reserve(sources.size());
  for (std::size_t i = 0; i < sources.size(); ++i) targets.push_back(gather.add(sources[i], rows[i], columns[i], i));
  gather.run();
  return targets;
}

void compact_(std::vector<Tensor> tensors, std::vector<Index> rows, std::vector<Index> columns) {
  demp::check_compact("compact_", tensors, rows, columns);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!demp::is_dense(tensors[i])) demp::fail("compact_: sources[", i, "] must be contiguous or channels_last");
  }
  Gather gather;
  for (std::size_t i = 0; i < tensors.size(); ++i) gather.add_in_place(tensors[i], rows[i], columns[i], i);
  gather.run_in_place();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(demp_kernels, CPU, m) {
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("compact_", TORCH_BOX(&compact_));
}
