// Compares the CPU kernels of the baseline level with plain loops, without Python: for compilers and processors that
// have no torch here. Prints what differs and returns 1, or returns 0.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "mudsc/assignment.hpp"
#include "mudsc/correlation.hpp"
#include "mudsc/permute.hpp"
#include "mudsc/zip.hpp"

namespace {

using Index = std::int64_t;

int failures = 0;

void expect(bool right, const char* what, Index n) {
  if (right) return;
  std::printf("failed: %s at size %lld\n", what, static_cast<long long>(n));
  ++failures;
}

std::vector<float> random_values(std::size_t count, std::mt19937& generator, bool ties) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = ties ? std::round(2 * normal(generator)) : normal(generator);
  return values;
}

// ---- Assignment: feasible duals whose sum is the objective prove the optimum
// ------------------------------------------

void check_assignment(Index rows, Index columns, bool maximize, bool ties, std::mt19937& generator) {
  const std::vector<float> values = random_values(static_cast<std::size_t>(rows * columns), generator, ties);
  std::vector<Index> column_of_row(static_cast<std::size_t>(rows), -1);
  std::vector<double> u(static_cast<std::size_t>(rows)), v(static_cast<std::size_t>(columns));
  double objective = 0, gap = 0;
  mudsc::AssignmentStatus status{};
  mudsc::AssignmentProblem problem{};
  problem.values = values.data();
  problem.type = mudsc::ScalarType::float32;
  problem.batch = 1;
  problem.rows = rows;
  problem.columns = columns;
  problem.maximize = maximize;
  problem.threads = 2;
  problem.column_of_row = column_of_row.data();
  problem.row_duals = u.data();
  problem.column_duals = v.data();
  problem.objective = &objective;
  problem.gap = &gap;
  problem.status = &status;
  mudsc::baseline::linear_assignment(problem);
  expect(status == mudsc::AssignmentStatus::optimal, "assignment status", rows);
  const double sign = maximize ? 1.0 : -1.0;
  std::vector<bool> used(static_cast<std::size_t>(columns));
  double total = 0, bound = 0, worst = 0, scale = 1;
  for (Index i = 0; i < rows; ++i) {
    const Index j = column_of_row[static_cast<std::size_t>(i)];
    expect(j >= 0 && j < columns && !used[static_cast<std::size_t>(j)], "assignment is one to one", rows);
    if (j < 0 || j >= columns) return;
    used[static_cast<std::size_t>(j)] = true;
    total += values[static_cast<std::size_t>(i * columns + j)];
    bound += u[static_cast<std::size_t>(i)];
  }
  for (Index j = 0; j < columns; ++j) bound += v[static_cast<std::size_t>(j)];
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < columns; ++j) {
      const double value = values[static_cast<std::size_t>(i * columns + j)];
      worst = std::max(worst, sign * (value - u[static_cast<std::size_t>(i)] - v[static_cast<std::size_t>(j)]));
      scale = std::max(scale, std::abs(value));
    }
  }
  const double tolerance = 1e-9 * scale * static_cast<double>(rows);
  expect(worst <= tolerance, "assignment duals are feasible", rows);
  expect(std::abs(total - objective) <= tolerance, "assignment objective", rows);
  expect(std::abs(bound - total) <= tolerance, "assignment duals prove the optimum", rows);
  expect(gap <= tolerance, "assignment gap", rows);
}

// ---- Zip: the greedy search, step by step on the whole matrix
// ---------------------------------------------------------

struct Greedy {
  std::vector<Index> cluster_of_unit;
  std::vector<float> values;
};

Greedy greedy(std::vector<float> s, Index units, Index num_models, Index remaining, Index budget, float shrink) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const auto at = [&](Index i, Index j) -> float& { return s[static_cast<std::size_t>(i * units + j)]; };
  std::vector<Index> cluster(static_cast<std::size_t>(units)), budgets(static_cast<std::size_t>(num_models), budget);
  std::iota(cluster.begin(), cluster.end(), Index{0});
  std::vector<bool> alive(static_cast<std::size_t>(units), true);
  const auto model_of = [&](Index unit) { return unit / (units / num_models); };
  const auto sever = [&](Index model) {
    for (Index i = 0; i < units; ++i) {
      for (Index j = 0; j < units; ++j) {
        if (model_of(i) == model && model_of(j) == model) at(i, j) = kNone;
      }
    }
  };
  for (Index i = 0; i < units; ++i) at(i, i) = kNone;
  for (Index model = 0; budget <= 0 && model < num_models; ++model) sever(model);
  Greedy result;
  for (Index left = units; left > remaining; --left) {
    Index best_i = -1, best_j = -1;
    float best = kNone;
    for (Index i = 0; i < units; ++i) {
      for (Index j = 0; alive[static_cast<std::size_t>(i)] && j < units; ++j) {
        if (alive[static_cast<std::size_t>(j)] && at(i, j) > best) best = at(i, j), best_i = i, best_j = j;
      }
    }
    if (best_i < 0) break;
    const Index i = std::min(best_i, best_j), j = std::max(best_i, best_j);
    result.values.push_back(best);
    for (Index unit = 0; unit < units; ++unit) {
      if (cluster[static_cast<std::size_t>(unit)] == j) cluster[static_cast<std::size_t>(unit)] = i;
    }
    for (Index k = 0; k < units; ++k) at(k, i) = std::min(at(k, i), at(k, j)) * shrink;
    alive[static_cast<std::size_t>(j)] = false;
    for (Index k = 0; k < units; ++k) at(i, k) = std::min(at(i, k), at(j, k)) * shrink;
    at(i, i) = kNone;
    if (model_of(i) == model_of(j) && --budgets[static_cast<std::size_t>(model_of(i))] == 0) sever(model_of(i));
  }
  std::vector<Index> number(static_cast<std::size_t>(units), -1);
  Index next = 0;
  for (Index unit = 0; unit < units; ++unit) {
    Index& id = number[static_cast<std::size_t>(cluster[static_cast<std::size_t>(unit)])];
    if (id < 0) id = next++;
    result.cluster_of_unit.push_back(id);
  }
  return result;
}

void check_zip(Index per_model, Index num_models, bool ties, std::mt19937& generator) {
  const Index units = per_model * num_models, remaining = per_model;
  const Index budget = std::max<Index>(1, (units - remaining) / num_models / 2);
  std::vector<float> s = random_values(static_cast<std::size_t>(units * units), generator, ties);
  for (Index i = 0; i < units; ++i) {
    for (Index j = 0; j < i; ++j)
      s[static_cast<std::size_t>(i * units + j)] = s[static_cast<std::size_t>(j * units + i)];
  }
  const Greedy expected = greedy(s, units, num_models, remaining, budget, 0.5f);
  std::vector<Index> cluster_of_unit(static_cast<std::size_t>(units));
  std::vector<double> values(static_cast<std::size_t>(units - remaining));
  mudsc::ZipProblem problem{};
  problem.similarity = s.data();
  problem.type = mudsc::ScalarType::float32;
  problem.row_stride = units;
  problem.units = units;
  problem.num_models = num_models;
  problem.remaining = remaining;
  problem.budget = budget;
  problem.shrink = 0.5;
  problem.cluster_of_unit = cluster_of_unit.data();
  problem.values = values.data();
  const Index merges = mudsc::baseline::zip_units(problem);
  expect(merges == static_cast<Index>(expected.values.size()), "number of merges", units);
  expect(cluster_of_unit == expected.cluster_of_unit, "clusters", units);
  for (std::size_t k = 0; k < expected.values.size() && k < values.size(); ++k) {
    expect(values[k] == static_cast<double>(expected.values[k]), "similarity of a merge", units);
  }
}

// ---- Permute
// ----------------------------------------------------------------------------------------------------------

void check_permute(Index rows, Index columns, Index inner, std::mt19937& generator) {
  const std::size_t size = static_cast<std::size_t>(rows * columns * inner);
  const std::vector<float> first = random_values(size, generator, false),
                           second = random_values(size, generator, false);
  std::vector<Index> row_index, column_index;
  for (int model = 0; model < 2; ++model) {
    std::vector<Index> order(static_cast<std::size_t>(rows));
    std::iota(order.begin(), order.end(), Index{0});
    std::shuffle(order.begin(), order.end(), generator);
    row_index.insert(row_index.end(), order.begin(), order.end());
    order.resize(static_cast<std::size_t>(columns));
    std::iota(order.begin(), order.end(), Index{0});
    std::shuffle(order.begin(), order.end(), generator);
    column_index.insert(column_index.end(), order.begin(), order.end());
  }
  std::vector<float> out(size);
  const void* tensors[] = {first.data(), second.data()};
  const double weights[] = {0.25, 0.75};
  mudsc::PermuteProblem problem{};
  problem.dtype = mudsc::ScalarType::float32;
  problem.num_models = 2;
  problem.tensors = tensors;
  problem.weights = weights;
  problem.outer = problem.middle = 1;
  problem.inner = inner;
  problem.rows = {mudsc::UnitMapKind::gather, row_index.data(), nullptr, rows, rows};
  problem.columns = {mudsc::UnitMapKind::gather, column_index.data(), nullptr, columns, columns};
  problem.out = out.data();
  problem.threads = 2;
  mudsc::baseline::permute_merge(problem);
  double worst = 0;
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < columns; ++j) {
      for (Index k = 0; k < inner; ++k) {
        double expected = 0;
        for (Index model = 0; model < 2; ++model) {
          const Index row = row_index[static_cast<std::size_t>(model * rows + i)];
          const Index column = column_index[static_cast<std::size_t>(model * columns + j)];
          const std::size_t place = static_cast<std::size_t>((row * columns + column) * inner + k);
          expected += weights[model] * (model == 0 ? first : second)[place];
        }
        worst = std::max(worst, std::abs(expected - out[static_cast<std::size_t>((i * columns + j) * inner + k)]));
      }
    }
  }
  expect(worst < 1e-6, "permuted and merged values", rows);
}

// ---- Correlation: centered features and the final quotient
// -------------------------------------------------------------

void check_correlation(Index units, Index samples, bool unit_major, std::mt19937& generator) {
  std::vector<float> features = random_values(static_cast<std::size_t>(units * samples), generator, false);
  for (float& value : features) value += 100.0f;
  features[0] = std::numeric_limits<float>::quiet_NaN();  // counts as 0
  const auto value = [&](Index sample, Index unit) {
    const float x = features[static_cast<std::size_t>(sample * units + unit)];
    return std::isnan(x) ? 0.0 : static_cast<double>(x);
  };
  std::vector<float> centered(features.size());
  std::vector<double> mean(static_cast<std::size_t>(units)), squares(static_cast<std::size_t>(units));
  mudsc::CenterProblem problem{};
  problem.dtype = problem.centered_dtype = mudsc::ScalarType::float32;
  problem.features = features.data();
  problem.outer = samples;
  problem.units = units;
  problem.inner = 1;
  problem.outer_stride = units;
  problem.unit_stride = 1;
  problem.inner_stride = 1;
  problem.unit_major = unit_major;
  problem.centered = centered.data();
  problem.mean = mean.data();
  problem.squares = squares.data();
  problem.threads = 2;
  mudsc::baseline::center_features(problem);
  for (Index unit = 0; unit < units; ++unit) {
    double expected_mean = 0, expected_squares = 0, worst = 0;
    for (Index sample = 0; sample < samples; ++sample)
      expected_mean += value(sample, unit) / static_cast<double>(samples);
    for (Index sample = 0; sample < samples; ++sample) {
      const double difference = value(sample, unit) - expected_mean;
      expected_squares += difference * difference;
      const Index place = unit_major ? unit * samples + sample : sample * units + unit;
      worst = std::max(worst, std::abs(difference - centered[static_cast<std::size_t>(place)]));
    }
    expect(std::abs(mean[static_cast<std::size_t>(unit)] - expected_mean) < 1e-4, "mean", units);
    expect(worst < 1e-4, "centered features", units);
    expect(std::abs(squares[static_cast<std::size_t>(unit)] - expected_squares) < 1e-4 * (1 + expected_squares),
           "sum of squares", units);
  }
  std::vector<double> comoment(static_cast<std::size_t>(units * units)), deviation(static_cast<std::size_t>(units));
  for (std::size_t k = 0; k < comoment.size(); ++k) comoment[k] = static_cast<double>(features[1 + k % 50]);
  for (Index unit = 0; unit < units; ++unit)
    deviation[static_cast<std::size_t>(unit)] = 0.5 + static_cast<double>(unit);
  std::vector<float> out(comoment.size());
  mudsc::CorrelateProblem quotient{};
  quotient.comoment = comoment.data();
  quotient.row_deviation = quotient.column_deviation = deviation.data();
  quotient.units = units;
  quotient.count = 7;
  quotient.eps = 1e-7;
  quotient.dtype = mudsc::ScalarType::float32;
  quotient.out = out.data();
  quotient.row_stride = units;
  quotient.threads = 2;
  mudsc::baseline::correlate(quotient);
  for (Index i = 0; i < units; ++i) {
    for (Index j = 0; j < units; ++j) {
      const std::size_t place = static_cast<std::size_t>(i * units + j);
      const double scale = deviation[static_cast<std::size_t>(i)] * deviation[static_cast<std::size_t>(j)];
      expect(std::abs(out[place] - comoment[place] / 7 / scale) <= 1e-5 * std::abs(out[place]), "correlation", units);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  for (const Index n : {1, 2, 3, 8, 17, 64, 130, 600}) {
    for (const bool ties : {false, true}) {
      for (const bool maximize : {false, true}) check_assignment(n, n, maximize, ties, generator);
      check_assignment(n, n + n / 2 + 1, true, ties, generator);
    }
  }
  for (const Index units : {1, 2, 7, 40}) {
    for (const Index models : {2, 3}) {
      for (const bool ties : {false, true}) check_zip(units, models, ties, generator);
    }
  }
  for (const Index n : {1, 3, 16, 65, 130}) {
    for (const Index inner : {1, 9}) check_permute(n, n + 2, inner, generator);
  }
  for (const Index units : {1, 5, 16, 70}) {
    for (const bool unit_major : {false, true}) check_correlation(units, 51, unit_major, generator);
  }
  if (failures == 0) std::puts("all kernels agree with plain loops");
  return failures == 0 ? 0 : 1;
}
