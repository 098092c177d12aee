// What the fake driver keeps: memory, streams, events, graphs, and what is to go wrong.
//
// A stream is a queue: nothing in it happens before somebody waits for it or asks (a question does
// one step), so a wait that is missing shows in the data. One thread at a time, as in the seam.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

enum Code {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_PTX = 218,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURED_EVENT = 907,
};

using Op = std::function<int()>;  // what it answers, if not OK, breaks the context

struct Graph {
    std::vector<Op> ops;
};

struct Stream {
    std::deque<Op> queue;
    std::shared_ptr<Graph> capturing;
    bool spoilt = false;  // its capture
};

struct Event {
    std::weak_ptr<Stream> stream;
    unsigned long recorded = 0, done = 0;
    double ms = 0;
    bool captured = false;
};

struct Module {
    std::string ptx;
};

struct Memory {  // bytes of one kind, each allocation between two guards
    static constexpr size_t GUARD = 64;
    static constexpr unsigned char MARK = 0xA5, RUBBISH = 0xC3;
    std::map<uintptr_t, size_t> sizes;
    int damaged = 0;

    uintptr_t take(size_t size) {
        auto* base = new unsigned char[size + 2 * GUARD];
        memset(base, MARK, size + 2 * GUARD);
        memset(base + GUARD, RUBBISH, size);
        const auto address = reinterpret_cast<uintptr_t>(base + GUARD);
        sizes[address] = size;
        return address;
    }
    bool give_back(uintptr_t address) {
        const auto found = sizes.find(address);
        if (found == sizes.end()) return false;
        auto* base = reinterpret_cast<unsigned char*>(address) - GUARD;
        for (size_t i = 0; i < GUARD; i++)
            if (base[i] != MARK || base[GUARD + found->second + i] != MARK) {
                damaged++;
                break;
            }
        delete[] base;
        sizes.erase(found);
        return true;
    }
    size_t used() const {
        size_t sum = 0;
        for (const auto& one : sizes) sum += one.second;
        return sum;
    }
    bool holds(uintptr_t address, size_t size) const {
        auto after = sizes.upper_bound(address);
        if (after == sizes.begin()) return false;
        --after;
        return address + size <= after->first + after->second;
    }
};

struct Fault {
    std::string function;  // empty: any
    int countdown = 0;     // 0: none
    int code = OK;
    bool sticky = false;
};

template <typename T>
using Things = std::map<void*, std::shared_ptr<T>>;

struct Machine {
    bool plugged_in = false, initialized = false;
    size_t total = 0;
    Memory device, pinned;
    Things<Stream> streams;
    Things<Event> events;
    Things<Module> modules;
    Things<Graph> graphs, executables;
    int retained = 0, pushed = 0, broken = OK;
    double clock_ms = 0;
    Fault fault;
    std::vector<std::string> calls;
    std::thread::id capturer;
    int captures = 0;
};

inline Machine machine;
inline int epoch = 0;  // a context that was current before a reset is not any more

struct Stack {
    int epoch = -1, depth = 0;
};
inline thread_local Stack contexts;

inline Stack& current() {
    if (contexts.epoch != epoch) contexts = {epoch, 0};
    return contexts;
}

template <typename T>
void* add(Things<T>& things, std::shared_ptr<T> one) {
    void* const handle = one.get();
    things[handle] = std::move(one);
    return handle;
}

template <typename T>
std::shared_ptr<T> find(const Things<T>& things, void* handle) {
    const auto found = things.find(handle);
    return found == things.end() ? nullptr : found->second;
}

// One step of a stream; false where nothing is left to do.
inline bool step(Stream& stream) {
    if (stream.queue.empty() || machine.broken) return false;
    const Op op = std::move(stream.queue.front());
    stream.queue.pop_front();
    machine.clock_ms += 0.001;
    machine.broken = op();
    return true;
}

inline int put(Stream& stream, Op op) {
    if (stream.spoilt) return CAPTURE_INVALIDATED;
    if (stream.capturing)
        stream.capturing->ops.push_back(std::move(op));
    else
        stream.queue.push_back(std::move(op));
    return OK;
}

// Calls that CUDA forbids in a thread that captures; they spoil what is captured.
inline int forbidden_in_capture() {
    if (!machine.captures || machine.capturer != std::this_thread::get_id()) return OK;
    for (auto& one : machine.streams)
        if (one.second->capturing) one.second->spoilt = true;
    return CAPTURE_UNSUPPORTED;
}

// The beginning of every call: noted, made to fail where a test wants it, refused where it must be.
inline int enter(const char* name, bool needs_context = true) {
    machine.calls.emplace_back(name);
    Fault& fault = machine.fault;
    if (fault.countdown && (fault.function.empty() || fault.function == name) &&
        !--fault.countdown) {
        if (fault.sticky) machine.broken = fault.code;
        return fault.code;
    }
    if (!machine.initialized) return NOT_INITIALIZED;
    if (!needs_context) return OK;
    if (machine.broken) return machine.broken;
    return current().depth ? OK : INVALID_CONTEXT;
}

// How the calls are written.
using Handle = void*;
using Address = uintptr_t;
#define API extern "C" __attribute__((visibility("default"))) int
#define ENTER() \
    if (const int code = enter(__func__)) return code
#define ENTER_ANYWHERE() \
    if (const int code = enter(__func__, false)) return code
#define NOT_IN_CAPTURE() \
    if (const int code = forbidden_in_capture()) return code
#define FIND(type, name, things, handle) \
    const std::shared_ptr<type> name = find(machine.things, handle); \
    if (!name) return INVALID_HANDLE
