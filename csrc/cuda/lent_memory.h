// Lent memory cut into arrays, each at a multiple of 256 bytes: the widest access, and whole cache lines. Host code.
#pragma once

#include <cstdint>

namespace attent::gpu {

class LentMemory {
  public:
    // `start`: a multiple of 256; 0 to count the bytes alone.
    explicit LentMemory(uintptr_t start) : start_(start) {}

    // The next `length` elements; nullptr for none.
    template <typename T>
    T* take(int64_t length) {
        if (length == 0) return nullptr;
        const uintptr_t array = start_ + static_cast<uintptr_t>(bytes_);
        bytes_ += (length * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
        return reinterpret_cast<T*>(array);
    }

    int64_t bytes() const { return bytes_; }

  private:
    uintptr_t start_;
    int64_t bytes_ = 0;
};

}  // namespace attent::gpu
