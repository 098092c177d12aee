// Modules, kernels, captured graphs, the way functions are looked up, and the door for tests.
#include <dlfcn.h>

#include "kernels.h"

// --- kernels

API cuModuleLoadDataEx(Handle* module, const char* ptx, unsigned, void*, void*) {
    ENTER();
    NOT_IN_CAPTURE();
    auto loaded = std::make_shared<Module>(Module{ptx});
    if (loaded->ptx.find(".version") == std::string::npos) return INVALID_PTX;
    return *module = add(machine.modules, loaded), OK;
}
API cuModuleLoadData(Handle* module, const char* ptx) {
    return cuModuleLoadDataEx(module, ptx, 0, nullptr, nullptr);
}
API cuModuleUnload(Handle handle) {
    const int code = enter(__func__);
    NOT_IN_CAPTURE();
    FIND(Module, module, modules, handle);
    machine.modules.erase(handle);
    return code;
}
API cuModuleGetFunction(Handle* function, Handle handle, const char* name) {
    ENTER();
    FIND(Module, module, modules, handle);
    const auto found = kernels.find(name);
    const bool shipped = module->ptx.find(std::string(".entry ") + name + "(") != std::string::npos;
    if (found == kernels.end() || !shipped) return NOT_FOUND;
    return *function = &found->second, OK;
}
API cuFuncSetBlockShape(Handle, int, int, int) {  // pycuda's habit; a launch gives its own shape
    ENTER();
    return OK;
}
API cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned, Handle where,
                   void** pointers, void** extra) {
    ENTER();
    FIND(Stream, stream, streams, where);
    Arguments given{pointers, nullptr, 0};
    if (!pointers) given.packed = (const char*)extra[1], given.packed_size = *(size_t*)extra[3];
    const auto& launch = *static_cast<Launch*>(function);
    const Index grid{int(grid_x), int(grid_y)}, block{int(block_x), 1};
    Op op = grid_z * block_y * block_z == 1 ? launch(grid, block, given) : Op();
    return op ? put(*stream, std::move(op)) : int(INVALID_VALUE);
}

// --- graphs

API cuStreamBeginCapture_v2(Handle where, int) {
    ENTER();
    FIND(Stream, stream, streams, where);
    if (stream->capturing) return ILLEGAL_STATE;
    stream->capturing = std::make_shared<Graph>();
    stream->spoilt = false;
    machine.captures++, machine.capturer = std::this_thread::get_id();
    return OK;
}
API cuStreamEndCapture(Handle where, Handle* graph) {
    const int code = enter(__func__);
    FIND(Stream, stream, streams, where);
    if (!stream->capturing) return ILLEGAL_STATE;
    machine.captures--;
    const auto captured = std::move(stream->capturing);
    const bool spoilt = std::exchange(stream->spoilt, false);
    stream->capturing = nullptr;
    *graph = nullptr;
    if (code || spoilt) return code ? code : int(CAPTURE_INVALIDATED);
    return *graph = add(machine.graphs, captured), OK;
}
API cuGraphInstantiateWithFlags(Handle* executable, Handle handle, unsigned long long) {
    ENTER();
    FIND(Graph, graph, graphs, handle);
    return *executable = add(machine.executables, std::make_shared<Graph>(*graph)), OK;
}
API cuGraphDestroy(Handle handle) {
    const int code = enter(__func__);
    return machine.graphs.erase(handle) ? code : INVALID_HANDLE;
}
API cuGraphExecDestroy(Handle handle) {
    const int code = enter(__func__);
    return machine.executables.erase(handle) ? code : INVALID_HANDLE;
}
API cuGraphLaunch(Handle handle, Handle where) {
    ENTER();
    FIND(Graph, graph, executables, handle);
    FIND(Stream, stream, streams, where);
    if (stream->capturing) return CAPTURE_UNSUPPORTED;
    stream->queue.insert(stream->queue.end(), graph->ops.begin(), graph->ops.end());
    return OK;
}

// --- functions by name: cuda-bindings asks for all of them so

API cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
    const std::string name(symbol);
    *function = nullptr;
    for (const auto& one : {name + "_v2", name + "WithFlags", name})
        if (!*function) *function = dlsym(RTLD_DEFAULT, one.c_str());
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}

// --- for tests (__init__.py)

API fake_reset(int plugged_in, size_t total) {
    machine = Machine();
    machine.plugged_in = plugged_in, machine.total = total;
    epoch++;
    return OK;
}
API fake_set_memory(size_t total) { return machine.total = total, OK; }
API fake_fail(const char* function, int number, int code, int sticky) {
    machine.fault = {function, number, code, sticky != 0};
    return OK;
}
API fake_alive(int* counts) {
    const int all[] = {
        int(machine.device.sizes.size()), int(machine.pinned.sizes.size()),
        int(machine.streams.size()),      int(machine.events.size()),
        int(machine.modules.size()),      int(machine.graphs.size()),
        int(machine.executables.size()),  machine.retained,
        machine.pushed,                   machine.captures,
        machine.device.damaged + machine.pinned.damaged,
    };
    return std::copy(std::begin(all), std::end(all), counts), OK;
}
API fake_calls(char* text, int size) {
    std::string all;
    for (const auto& one : machine.calls) all += one + "\n";
    return strncpy(text, all.c_str(), size), int(all.size());
}
