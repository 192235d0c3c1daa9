#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fastvae {
namespace {

constexpr int64_t MIN_ELEMENTS = 1 << 15;  // a thread's share below which waking it costs more than it saves
constexpr int PIECES = 8;                  // a thread: what is lost at the end is an eighth of a share

struct Job {
    Piece piece;
    const void* work;
    int64_t rows, step;
    std::atomic<int64_t> next{0};
    std::atomic<int> flags{0};
    int helpers = 0;  // inside `work_off`; guarded by the pool's mutex

    void work_off() {
        int seen = 0;
        for (int64_t first; (first = next.fetch_add(step, std::memory_order_relaxed)) < rows;) {
            seen |= piece(work, first, std::min(first + step, rows));
        }
        if (seen != 0) flags.fetch_or(seen, std::memory_order_relaxed);
    }
};

class Pool {
  public:
    void run(Job& job, int helpers) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            try {
                for (; threads_ < helpers; ++threads_) std::thread(&Pool::help, this).detach();
            } catch (const std::system_error&) {
                // no more threads are to be had: those there are, or the caller alone, do it
            }
            calls_.insert(calls_.end(), helpers, &job);
        }
        for (int k = 0; k < helpers; ++k) called_.notify_one();
        job.work_off();
        std::unique_lock<std::mutex> lock(mutex_);
        calls_.erase(std::remove(calls_.begin(), calls_.end(), &job), calls_.end());  // those nobody has heard yet
        done_.wait(lock, [&] { return job.helpers == 0; });
    }

  private:
    [[noreturn]] void help() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            called_.wait(lock, [this] { return !calls_.empty(); });
            Job& job = *calls_.front();
            calls_.pop_front();
            ++job.helpers;
            lock.unlock();
            job.work_off();
            lock.lock();
            if (--job.helpers == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable called_, done_;
    std::deque<Job*> calls_;
    int threads_ = 0;
};

// Never destroyed: helpers sleep in it until the process ends. A forked child has no helpers, so it makes a pool of its own.
std::atomic<Pool*> current{nullptr};
std::atomic<bool> forked{false};

#ifndef _WIN32
// From the moment the library is loaded: a fork before our first parallel run, but after one of torch's, leaves the child an
// OpenMP whose threads are gone.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
    current.store(nullptr);
    forked.store(true);
});
#endif

// How GNU's, LLVM's and Intel's OpenMP start a parallel region; null where the process has none of them.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

Parallel openmp() {
#ifdef _WIN32
    return nullptr;
#else
    static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#endif
}

Pool& pool() {
    Pool* made = current.load();
    if (made == nullptr) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(made, fresh)) return *fresh;
        delete fresh;
    }
    return *made;
}

}  // namespace

int run_rows(Piece piece, const void* work, int64_t rows, int64_t cost, int threads) {
    const int64_t worth = std::max<int64_t>(1, rows * cost / MIN_ELEMENTS);
    const int64_t share = std::min({static_cast<int64_t>(threads), rows, worth});
    if (share <= 1) return rows > 0 ? piece(work, 0, rows) : 0;
    Job job{piece, work, rows, std::max<int64_t>(1, rows / (share * PIECES))};
    const Parallel parallel = openmp();
    if (parallel != nullptr && !forked) {
        // all threads, as torch asks: GNU's runtime ends those that one region does without
        parallel([](void* data) { static_cast<Job*>(data)->work_off(); }, &job, static_cast<unsigned>(threads), 0);
    } else {
        pool().run(job, static_cast<int>(share) - 1);
    }
    return job.flags;
}

}  // namespace fastvae
