// CUDA's driver on a pretended GPU, as far as Triton's launcher calls it. Nothing is loaded or run: the owner of the
// process gets each launch, and a descriptor of a tensor is a list of what it was made from.
#include <cuda.h>
#include <string.h>

typedef void (*Listener)(CUfunction function, const unsigned* sizes, CUstream stream, void** parameters);
static Listener listener = NULL;
void listen(Listener l) { listener = l; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** parameters, void** extra) {
  const unsigned sizes[] = {c->gridDimX,  c->gridDimY,  c->gridDimZ,       c->blockDimX,
                            c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->numAttrs};
  if (listener) listener(function, sizes, c->hStream, parameters);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const unsigned others[] = {type, rank, interleave, swizzle, promotion, fill};
  unsigned char* at = memset(map, 0, sizeof *map);
  if (rank > 3) return CUDA_ERROR_INVALID_VALUE;
  memcpy(at, &address, 8);
  for (unsigned i = 0; i < 6; ++i) at[8 + i] = others[i];
  for (at += 14; rank-- > 0; at += 24) {
    memcpy(at, sizes++, 8);
    memcpy(at + 8, box++, 4);
    memcpy(at + 12, steps++, 4);
    if (rank > 0) memcpy(at + 16, strides++, 8);
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute a, CUdeviceptr pointer) {
  memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute a, CUdevice d) {
  *value = a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? 9
           : a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 0
           : a == CU_DEVICE_ATTRIBUTE_WARP_SIZE                ? 32
                                                               : 227 << 10;
  return CUDA_SUCCESS;
}

static size_t handles = 0;
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)(handles += 64), 0; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) { return *f = (CUfunction)m, 0; }
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute a, CUfunction f) {
  return *value = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* c) { return *n = 1, CUDA_SUCCESS; }

static const CUcontext context = (CUcontext)8;
CUresult cuCtxGetCurrent(CUcontext* c) { return *c = context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* d) { return *d = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit l) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit l, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* d, int number) { return *d = number, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) { return *c = context, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char** text) { return *text = "an error", CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
