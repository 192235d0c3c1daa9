// The functions of math.h and philox.h on arrays of numbers, so that tests can hold them to the errors they state.
#include "spans.h"
#include "../philox.h"

namespace fastvae {
namespace FASTVAE_ISA {
namespace {

template <class F>
void each(const float* numbers, float* results, int64_t count, F function) {
    constexpr int LANES = lanes_of<Float>::COUNT;
    for (int64_t j = 0; j < count; j += LANES) {
        const int there = static_cast<int>(count - j < LANES ? count - j : LANES);
        store_first(results + j, there, function(load_first(numbers + j, there, Float{})));
    }
}

}  // namespace

bool evaluate(const std::string& name, const float* numbers, float* results, int64_t count) {
    const auto run = [&](auto function) { each(numbers, results, count, function); };
    if (name == "exp") run([](Float x) FASTVAE_LAMBDA { return exp(x); });
    else if (name == "exp_of_bounded") run([](Float x) FASTVAE_LAMBDA { return exp_of_bounded(x); });
    else if (name == "exp_negative") run([](Float x) FASTVAE_LAMBDA { return exp_negative(x); });
    else if (name == "log") run([](Float x) FASTVAE_LAMBDA { return log(x); });
    else if (name == "log_normal") run([](Float x) FASTVAE_LAMBDA { return log_normal(x); });
    else if (name == "reciprocal_above_one") run([](Float x) FASTVAE_LAMBDA { return reciprocal_above_one(x); });
    else if (name == "squared_radius") run([](Float x) FASTVAE_LAMBDA { return squared_radius(x); });
    else if (name == "sin") run([](Float x) FASTVAE_LAMBDA { return sin_half_turn(x); });
    else if (name == "cos") run([](Float x) FASTVAE_LAMBDA { return cos_half_turn(x); });
    else return false;
    return true;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
