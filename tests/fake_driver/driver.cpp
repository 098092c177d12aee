// The part of NVIDIA's driver API that the seam and its two bindings use, on the host.
//
// Stricter than the driver: what is released while work waits is an error, and so is a copy from or
// to host memory that is not pinned. What is released in vain (a broken context) counts as released:
// the caller did its part.
#include "device.h"

static const int DEVICE_CONTEXT = 0;  // its address is the one context's handle

static bool work_waits() {
    for (const auto& one : machine.streams)
        if (!one.second->queue.empty()) return true;
    return false;
}

// --- the driver, its devices, its context

API cuInit(unsigned) {
    machine.initialized = machine.plugged_in;
    if (const int code = enter(__func__, false)) return code == NOT_INITIALIZED ? NO_DEVICE : code;
    return OK;
}
API cuDriverGetVersion(int* version) { return *version = 13000, OK; }
API cuGetErrorString(int code, const char** text) {
    static const std::map<int, const char*> TEXTS = {
        {INVALID_VALUE, "invalid argument"},
        {OUT_OF_MEMORY, "out of memory"},
        {NO_DEVICE, "no CUDA-capable device is detected"},
        {INVALID_CONTEXT, "invalid device context"},
        {ILLEGAL_ADDRESS, "an illegal memory access was encountered"},
        {CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"},
        {CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"},
    };
    const auto found = TEXTS.find(code);
    return *text = found == TEXTS.end() ? "another error" : found->second, OK;
}
API cuDeviceGetCount(int* count) {
    ENTER_ANYWHERE();
    return *count = 1, OK;
}
API cuDeviceGet(int* device, int index) {
    ENTER_ANYWHERE();
    return *device = index, index == 0 ? OK : INVALID_DEVICE;
}
API cuDeviceGetName(char* name, int size, int) {
    ENTER_ANYWHERE();
    return strncpy(name, "Fake GPU", size), OK;
}
API cuDeviceComputeCapability(int* major, int* minor, int) {
    ENTER_ANYWHERE();
    return *major = 8, *minor = 9, OK;
}
API cuDeviceGetAttribute(int* value, int attribute, int) {
    ENTER_ANYWHERE();
    if (attribute != 75 && attribute != 76) return NOT_SUPPORTED;
    return *value = attribute == 75 ? 8 : 9, OK;  // compute capability
}
API cuDeviceTotalMem_v2(size_t* size, int) {
    ENTER_ANYWHERE();
    return *size = machine.total, OK;
}
API cuDeviceGetUuid_v2(char* uuid, int) {
    ENTER_ANYWHERE();
    for (int i = 0; i < 16; i++) uuid[i] = char(i);
    return OK;
}
API cuDevicePrimaryCtxRetain(const void** context, int) {
    ENTER_ANYWHERE();
    machine.retained++;
    return *context = &DEVICE_CONTEXT, OK;
}
API cuDevicePrimaryCtxRelease_v2(int) {  // pops nothing
    const int code = enter(__func__, false);
    if (!machine.retained) return INVALID_CONTEXT;
    machine.retained--;
    return code;
}
API cuCtxPushCurrent_v2(const void* context) {
    ENTER_ANYWHERE();
    if (context != &DEVICE_CONTEXT || !machine.retained) return INVALID_CONTEXT;
    current().depth++, machine.pushed++;
    return OK;
}
API cuCtxPopCurrent_v2(const void** context) {
    const int code = enter(__func__, false);
    if (!current().depth) return INVALID_CONTEXT;
    current().depth--, machine.pushed--;
    return *context = &DEVICE_CONTEXT, code;
}

// --- memory

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER();
    return *total = machine.total, *free = machine.total - machine.device.used(), OK;
}
API cuMemAlloc_v2(Address* address, size_t size) {
    ENTER();
    NOT_IN_CAPTURE();
    if (!size) return INVALID_VALUE;
    if (machine.device.used() + size > machine.total) return OUT_OF_MEMORY;
    return *address = machine.device.take(size), OK;
}
API cuMemFree_v2(Address address) {
    const int code = enter(__func__);
    NOT_IN_CAPTURE();
    if (!code && work_waits()) return ILLEGAL_STATE;
    return machine.device.give_back(address) ? code : INVALID_VALUE;
}
API cuMemHostAlloc(Address* address, size_t size, unsigned) {
    ENTER();
    NOT_IN_CAPTURE();
    if (!size) return INVALID_VALUE;
    if (machine.pinned.used() + size > machine.total) return OUT_OF_MEMORY;
    return *address = machine.pinned.take(size), OK;
}
API cuMemFreeHost(Address address) {
    const int code = enter(__func__);
    NOT_IN_CAPTURE();
    if (!code && work_waits()) return ILLEGAL_STATE;
    return machine.pinned.give_back(address) ? code : INVALID_VALUE;
}
static int copy(Address to, Address from, Address host, Address device, size_t size, Handle where) {
    FIND(Stream, stream, streams, where);
    if (!machine.pinned.holds(host, size)) return INVALID_VALUE;
    return put(*stream, [=] {
        if (!machine.pinned.holds(host, size) || !machine.device.holds(device, size))
            return ILLEGAL_ADDRESS;
        memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
        return OK;
    });
}
API cuMemcpyHtoDAsync_v2(Address to, Address from, size_t size, Handle stream) {
    ENTER();
    return copy(to, from, from, to, size, stream);
}
API cuMemcpyDtoHAsync_v2(Address to, Address from, size_t size, Handle stream) {
    ENTER();
    return copy(to, from, to, from, size, stream);
}

// --- streams and events

API cuStreamCreate(Handle* stream, unsigned) {
    ENTER();
    NOT_IN_CAPTURE();
    return *stream = add(machine.streams, std::make_shared<Stream>()), OK;
}
API cuStreamDestroy_v2(Handle handle) {
    const int code = enter(__func__);
    FIND(Stream, stream, streams, handle);
    if (!code && !stream->queue.empty()) return ILLEGAL_STATE;
    if (stream->capturing) machine.captures--;
    machine.streams.erase(handle);
    return code;
}
API cuStreamSynchronize(Handle handle) {
    ENTER();
    NOT_IN_CAPTURE();
    FIND(Stream, stream, streams, handle);
    while (step(*stream)) {
    }
    return machine.broken;
}
API cuEventCreate(Handle* event, unsigned) {
    ENTER();
    return *event = add(machine.events, std::make_shared<Event>()), OK;
}
API cuEventDestroy_v2(Handle handle) {
    const int code = enter(__func__);
    FIND(Event, event, events, handle);
    machine.events.erase(handle);
    return code;
}
API cuEventRecord(Handle handle, Handle where) {
    ENTER();
    FIND(Event, event, events, handle);
    FIND(Stream, stream, streams, where);
    event->stream = stream;
    event->captured = stream->capturing != nullptr;
    const unsigned long mark = ++event->recorded;
    return put(*stream, [=] { return event->done = mark, event->ms = machine.clock_ms, OK; });
}
API cuEventQuery(Handle handle) {
    ENTER();
    FIND(Event, event, events, handle);
    if (event->captured) return CAPTURED_EVENT;
    if (event->done < event->recorded)
        if (const auto stream = event->stream.lock()) step(*stream);
    if (machine.broken) return machine.broken;
    return event->done < event->recorded ? NOT_READY : OK;
}
API cuEventSynchronize(Handle handle) {
    ENTER();
    FIND(Event, event, events, handle);
    if (event->captured) return CAPTURED_EVENT;
    const auto stream = event->stream.lock();
    while (event->done < event->recorded && stream && step(*stream)) {
    }
    return machine.broken;
}
API cuEventElapsedTime(float* ms, Handle first, Handle last) {
    ENTER();
    FIND(Event, start, events, first);
    FIND(Event, end, events, last);
    if (!start->recorded || !end->recorded) return INVALID_HANDLE;
    if (start->done < start->recorded || end->done < end->recorded) return NOT_READY;
    return *ms = float(end->ms - start->ms), OK;
}
API cuEventElapsedTime_v2(float* ms, Handle first, Handle last) {
    return cuEventElapsedTime(ms, first, last);
}
API cuLaunchHostFunc(Handle where, void (*function)(void*), void* data) {
    ENTER();
    FIND(Stream, stream, streams, where);
    return put(*stream, [=] { return function(data), OK; });
}
