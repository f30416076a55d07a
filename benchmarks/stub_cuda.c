/* A libcuda that launches nothing. benchmarks/host.py builds it, so that Triton's real compiler and
 * launcher run on a machine without a GPU: host time can be measured, and launches be observed.
 * `stub_observe` sets a function that sees each launch; `params` are pointers to its arguments. */
#include <string.h>

typedef void (*Observer)(const char *kernel, unsigned programs, unsigned threads, void **params);
typedef struct { unsigned gridX, gridY, gridZ, blockX; } Config; /* the start of CUlaunchConfig */
static Observer observer = 0;
static long long launches = 0;
void stub_observe(Observer f) { observer = f; }
long long stub_launches(void) { return launches; }

static int launch(void *f, unsigned programs, unsigned threads, void **params) {
  launches++;
  if (observer) observer((const char *)f, programs, threads, params);
  return 0;
}
int cuLaunchKernelEx(const Config *c, void *f, void **params, void **extra) {
  return launch(f, c->gridX * c->gridY * c->gridZ, c->blockX, params);
}
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **params, void **extra) {
  return launch(f, gx * gy * gz, bx, params);
}

/* A function is its name. Contexts and modules are 1, the only device is 0. */
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = strdup(name); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) { /* an H100 */
    case 8: *value = 49152; break;   /* bytes of shared memory of a block */
    case 10: *value = 32; break;     /* threads of a warp */
    case 12: *value = 65536; break;  /* registers of a block */
    case 16: *value = 132; break;    /* multiprocessors */
    case 75: *value = 9; break;      /* compute capability */
    case 76: *value = 0; break;
    case 97: *value = 232448; break; /* bytes of shared memory of a block that asks for more */
    default: *value = 1000;
  }
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *f) {
  *value = attribute == 0 ? 1024 : 0; /* threads of a block */
  return 0;
}
int cuPointerGetAttribute(void **data, int attribute, void *pointer) {
  *data = pointer; /* the CPU's memory passes as the GPU's */
  return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuFuncSetAttribute(void *f, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *f, int config) { return 0; }

/* Some versions of Triton look these up; nothing here calls them. 801: not supported. */
#define UNUSED(name) int name(void) { return 801; }
UNUSED(cuCtxGetLimit)
UNUSED(cuCtxSetLimit)
UNUSED(cuModuleGetGlobal_v2)
UNUSED(cuModuleUnload)
UNUSED(cuOccupancyMaxActiveClusters)
UNUSED(cuPointerGetAttributes)
UNUSED(cuTensorMapEncodeTiled)
UNUSED(cuTensorMapEncodeIm2col)
UNUSED(cuStreamGetCaptureInfo_v2)
UNUSED(cuStreamIsCapturing)
UNUSED(cuMemAlloc_v2)
UNUSED(cuMemFree_v2)
UNUSED(cuMemcpyHtoDAsync_v2)
