// The machine behind emulator.h: fibers, their schedule, and the errors of a launch.
#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" __attribute__((visibility("default"))) int64_t emulator_launches = 0;  // so far
extern "C" __attribute__((visibility("default"))) int32_t emulator_idle = 0;  // launches do nothing: for the host's time

namespace emulator {
namespace {

constexpr size_t STACK = 512 << 10;

std::string setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value == nullptr || *value == '\0' ? otherwise : value;
}
const bool BACKWARD = setting("EMU_ORDER", "random") == "backward";
const uint64_t SEED = std::stoull(setting("EMU_SEED", "0"));
const double PERTURB = std::stod(setting("EMU_PERTURB", "0"));
const int SMS = std::stoi(setting("EMU_SMS", "2"));

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool waits;
    Scope scope;
    const void* place;
    int line;
};

std::mutex one_launch;
std::vector<Fiber> fibers(1024);
ucontext_t scheduler;
const std::function<void()>* body;
unsigned current;
int64_t serial = 0;
std::string error, last_error;
std::mt19937_64 draw(SEED);
const void* bottom;  // of the scheduler's stack
size_t bottom_size;

void to_scheduler(bool for_good) {
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, bottom, bottom_size);
    swapcontext(&fibers[current].context, &scheduler);
    __sanitizer_finish_switch_fiber(fake, &bottom, &bottom_size);
}

void entry() {
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bottom_size);
    (*body)();
    fibers[current].waits = false;
    to_scheduler(true);
}

void resume(unsigned thread) {
    current = threadIdx.x = thread;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fibers[thread].stack.get(), STACK);
    swapcontext(&scheduler, &fibers[thread].context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

// All threads of a scope wait: at one barrier, or it is an error.
void release(unsigned first, unsigned count, std::vector<unsigned>& ready) {
    for (unsigned thread = first; thread < first + count; ++thread) {
        const Fiber &one = fibers[first], &other = fibers[thread];
        if (one.place != other.place || one.line != other.line) error = "threads wait at different barriers";
        ready.push_back(thread);
    }
}

void run_block(unsigned threads) {
    std::vector<unsigned> ready(threads), in_warp(threads / LANES + 1, 0);
    unsigned ended = 0, in_block = 0;
    for (unsigned thread = 0; thread < threads; ++thread) {
        Fiber& fiber = fibers[thread];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, entry, 0);
        ready[thread] = thread;
    }
    while (error.empty() && ended < threads) {
        if (ready.empty()) return void(error = "a barrier that not all threads reach");
        const auto next = BACKWARD ? std::max_element(ready.begin(), ready.end()) : ready.begin() + draw() % ready.size();
        const unsigned thread = *next;
        *next = ready.back();
        ready.pop_back();
        resume(thread);
        const Fiber& fiber = fibers[thread];
        if (!fiber.waits) {
            ++ended;
        } else if (fiber.scope == BLOCK && ++in_block == threads) {
            in_block = 0;
            release(0, threads, ready);
        } else if (fiber.scope == WARP && ++in_warp[thread / LANES] == LANES) {
            in_warp[thread / LANES] = 0;
            release(thread / LANES * LANES, LANES, ready);
        }
    }
}

// The same for the same x and seed, between -1 and 1.
double noise(float x) {
    uint64_t state = (__float_as_uint(x) + SEED) * 0x9E3779B97F4A7C15ull;
    state = (state ^ state >> 29) * 0xBF58476D1CE4E5B9ull;
    return static_cast<double>(static_cast<int64_t>(state ^ state >> 32)) * 0x1p-63;
}

}  // namespace

void fail(const std::string& what) {
    error = what;
    to_scheduler(true);
    std::abort();
}

void wait(Scope scope, const void* place, int line) {
    Fiber& fiber = fibers[current];
    fiber.waits = true, fiber.scope = scope, fiber.place = place, fiber.line = line;
    to_scheduler(false);
}

int64_t block_serial() { return serial; }

float off_by(float x, int ulps) {
    if (PERTURB == 0 || !std::isfinite(x)) return x;
    const long steps = std::lround(noise(x) * ulps * PERTURB);
    for (long k = 0; k < std::labs(steps); ++k) x = std::nextafter(x, steps > 0 ? INFINITY : -INFINITY);
    return x;
}
float absolutely_off(float x, float bound) {
    return PERTURB != 0 && x != 0 ? static_cast<float>(x + noise(x) * bound * PERTURB) : x;
}

int run(dim3 grid, dim3 block, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> guard(one_launch);
    ++emulator_launches;
    if (emulator_idle) return cudaSuccess;
    error.clear();
    const bool fits = grid.x - 1 < 0x7fffffffu && grid.y - 1 < 65535u && grid.z == 1 && block.x - 1 < 1024u;
    if (!fits || block.x % LANES != 0) error = "invalid configuration";
    body = &thread, gridDim = grid, blockDim = block;
    for (unsigned k = 0; error.empty() && k < grid.x * grid.y; ++k) {
        blockIdx = dim3(k % grid.x, k / grid.x, 0);
        ++serial;
        run_block(block.x);
    }
    if (error.empty()) return cudaSuccess;
    last_error = error + ", thread " + std::to_string(current) + " of block (" + std::to_string(blockIdx.x) + ", " +
                 std::to_string(blockIdx.y) + ")";
    return 1;
}

}  // namespace emulator

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : 1; }
cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = emulator::SMS, cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return std::memset(to, value, bytes), cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return emulator::last_error.c_str(); }
