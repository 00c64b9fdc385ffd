// A CUDA driver that says yes and does nothing, as bench/host_time.py loads it: Triton's own launcher runs over it
// without a GPU, with all that it does on the host. It names a GPU like an H100.
#include <stddef.h>
#include <stdint.h>

static int context;

// What only has to succeed.
#define NOTHING(name) \
  int name(void) { return 0; }
NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLaunchKernelEx)
NOTHING(cuModuleUnload)
NOTHING(cuTensorMapEncodeTiled)

int cuCtxGetCurrent(void** found) { return *found = &context, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 1 << 20, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDevicePrimaryCtxRetain(void** found, int device) { return *found = &context, 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }
int cuGetErrorName(int error, const char** text) { return *text = "none", 0; }
int cuGetErrorString(int error, const char** text) { return *text = "none", 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = &context, 0; }
int cuModuleLoadData(void** module, const void* image) { return *module = &context, 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, void* config) { return *count = 1, 0; }
int cuStreamIsCapturing(void* stream, int* status) { return *status = 0, 0; }

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;       // threads of a warp
    case 16: *value = 132; break;      // multiprocessors
    case 75: *value = 9; break;        // compute capability 9.0
    case 76: *value = 0; break;
    case 81: *value = 233472; break;   // bytes of shared memory: of a multiprocessor,
    case 97: *value = 232448; break;   // and that a program may ask for
    default: *value = 65536;
  }
  return 0;
}

// A CPU tensor's address is as good as any.
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) { return *(uint64_t*)data = pointer, 0; }
