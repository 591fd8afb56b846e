// How many threads to use now. On a machine whose cores are all busy (a gateway beside the engine, another container) a
// team waits at every barrier for whichever member the scheduler has put aside, milliseconds each time; one thread alone
// then is several times as fast. So the first thread measures how long it waits for the others: a wait longer than its own
// share of the work took makes the following calls run alone for a multiple of it, longer each time it happens again.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace sb {

class Team {
  public:
    explicit Team(int wanted)
        : began_(now()), size_(wanted > 1 && began_ < alone_until().load(std::memory_order_relaxed) ? 1 : wanted) {}

    int size() const { return size_; }

    // Inside the parallel region, by every member, instead of `omp barrier`, and once more as the region's last statement.
    void wait() {
        const bool first = omp_get_thread_num() == 0;
        const int64_t arrived = first ? now() : 0;
#pragma omp barrier
        if (first) waited_ += now() - arrived;
    }

    // After the region.
    ~Team() {
        if (size_ <= 1) return;
        const int64_t ended = now(), worked = ended - began_ - waited_;
        if (waited_ < std::max(STALL_NS, worked)) {
            if (waited_ < STALL_NS / 10) factor().store(FIRST_FACTOR, std::memory_order_relaxed);
            return;
        }
        const int64_t times = factor().load(std::memory_order_relaxed);
        alone_until().store(ended + std::min(waited_ * times, LONGEST_NS), std::memory_order_relaxed);
        factor().store(std::min<int64_t>(times * 2, 256), std::memory_order_relaxed);
    }

  private:
    static constexpr int64_t STALL_NS = 2'000'000;
    static constexpr int64_t FIRST_FACTOR = 8;      // stalls cost at most an eighth of the time
    static constexpr int64_t LONGEST_NS = 1'000'000'000;

    static int64_t now() {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count();
    }
    static std::atomic<int64_t>& alone_until() {
        static std::atomic<int64_t> value{0};
        return value;
    }
    static std::atomic<int64_t>& factor() {
        static std::atomic<int64_t> value{FIRST_FACTOR};
        return value;
    }

    const int64_t began_;
    const int size_;
    int64_t waited_ = 0;
};

// Hands out items 0..count-1. Each member has an even share of its own, taken in runs that get shorter towards its end; who
// is done helps the others (guided self-scheduling, Polychronopoulos & Kuck, 1987, over affinity scheduling, Markatos &
// LeBlanc, 1992): long runs stream, rows stay in the cache of the core that wrote them, nobody waits long for a last run.
class Shares {
  public:
    Shares(int64_t count, int members) : members_(std::min(members, MOST)) {
        for (int i = 0; i < members_; i++) {
            shares_[i].next.store(count * i / members_, std::memory_order_relaxed);
            shares_[i].end = count * (i + 1) / members_;
        }
    }

    // A run [begin, end) for `member`; false when nothing is left.
    bool claim(int member, int64_t& begin, int64_t& end) {
        for (int i = 0; i < members_; i++)
            if (claim_from(shares_[(member + i) % members_], begin, end)) return true;
        return false;
    }

  private:
    static constexpr int MOST = 64;
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };

    static bool claim_from(Share& share, int64_t& begin, int64_t& end) {
        begin = share.next.load(std::memory_order_relaxed);
        do {
            if (begin >= share.end) return false;
            end = begin + std::max<int64_t>(1, (share.end - begin) / 2);
        } while (!share.next.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return true;
    }

    const int members_;
    Share shares_[MOST];
};

}  // namespace sb
